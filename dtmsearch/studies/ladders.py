"""What the ladder of plans has measured, a row a plan from mild to strong: shared by the studies `bound` and
`square-root`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dtmsearch.core.schemes import DENSE
from dtmsearch.store.store import ResultStore
from dtmsearch.studies.evidence import Measured, measured
from dtmsearch.studies.study import PartRun

LADDER_METRICS = ("fdt", "sdt", "dppl", "kl", "tie_density", "uncertainty")


@dataclass(frozen=True)
class Rung:
    """A measured plan: `name` says which; `kind` is `rounded`, `pruned` or `mixed`."""

    name: str
    kind: str
    found: Measured


def rungs(store: ResultStore, part: PartRun) -> tuple[Measured | None, list[Rung]]:
    """The unquantized model, where it was measured, and the plans, those of small KL first."""
    rows = measured(store, part.run, LADDER_METRICS)
    schemes = _schemes(store, part.run)
    base = next((row for row in rows if row.row["num_compressed"] == 0), None)
    found = [_rung(row, schemes.get(row.plan_id, [])) for row in rows if row is not base]
    return base, sorted(found, key=lambda rung: float(rung.found.values("kl").mean()))


def _schemes(store: ResultStore, run: str) -> dict[str, list[str]]:
    """Plan -> the schemes of its components."""
    found: dict[str, list[str]] = {}
    for row in store.table("plans", ["plan_id", "scheme"], run).to_pylist():
        if row["scheme"] != DENSE:
            found.setdefault(row["plan_id"], []).append(row["scheme"])
    return found


def _rung(row: Measured, schemes: Sequence[str]) -> Rung:
    kinds = Counter(schemes)
    if len(kinds) == 1:
        (name,) = kinds
        pruned = name.split("-")[0] in ("magnitude", "random", "wanda")
        return Rung(name, "pruned" if pruned else "rounded", row)
    return Rung(f"{len(schemes)} components, {len(kinds)} schemes", "mixed", row)
