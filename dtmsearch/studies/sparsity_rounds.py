"""Pruning in rounds: uniform, by FDT as published, and by sensitivity ("Divergent Token Metrics", arXiv 2311.01544,
section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dtmsearch.analysis.findings import Axis, Findings, FoundTable, Picture
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import UserError
from dtmsearch.store.store import ResultStore
from dtmsearch.studies.evidence import Measured, components_of, measured, told
from dtmsearch.studies.study import Part, PartRun, Study

_METRICS = ("fdt", "sdt", "kl", "ppl")
_NEARLY_GONE = 0.9


@dataclass(frozen=True)
class RoundModel:
    """A model that a round came to, on held-out prompts: its share of zeros, and whether it was trained."""

    number: int
    sparsity: float
    trained: bool
    found: Measured


def round_models(rows: Sequence[Measured], last: RoundModel | None = None) -> list[RoundModel]:
    """The models of rounds among held-out measurements, labelled `round-2:35.0%` and `round-2:35.0%:trained`; and the
    final plan, which is what the last round came to."""
    found = [] if last is None else [last]
    for row in rows:
        label = str(row.row["label"] or "")
        if label.startswith("round-"):
            number, sparsity, *rest = label.removeprefix("round-").split(":")
            found.append(RoundModel(int(number), float(sparsity.rstrip("%")) / 100, bool(rest), row))
    return sorted(found, key=lambda model: (model.number, model.trained))


def _of_part(store: ResultStore, part: PartRun) -> list[RoundModel]:
    rows = measured(store, part.run, _METRICS, "validation")
    steps = store.table("steps", ["step", "sparsity"], part.run).to_pylist()
    plan = next((row for row in rows if row.row["label"] == "plan"), None)
    if plan is None or not steps:
        return round_models(rows)
    search = part.file.search
    share = max(steps, key=lambda step: int(step["step"]))["sparsity"]
    return round_models(rows, RoundModel(len(search.pruning_rounds), share, search.recovery is not None, plan))


def conclude(store: ResultStore, parts: Sequence[PartRun]) -> Findings:
    """What each allocation's rounds came to, and which components vanish."""
    rows, points, pictures, gone = [], [], [], []
    last: dict[str, RoundModel] = {}
    for part in parts:
        length = part.file.prompts.continuation_tokens
        for model in _of_part(store, part):
            cells = [told(model.found.values(metric), metric, length) for metric in ("fdt", "kl", "ppl")]
            trained = "yes" if model.trained else "no"
            rows.append((f"{model.sparsity:.0%}", part.label, trained, *cells))
            fdt = float(model.found.values("fdt").mean())
            series = f"{part.label}{', trained' if model.trained else ''}"
            points.append({"allocation": series, "sparsity": model.sparsity, "fdt": fdt})
            last[part.label] = model
        pictures.append(_pruned_picture(store, part))
        gone.append(_gone(part, pictures[-1]))
    if not last:
        raise UserError("no round was measured on held-out prompts: give a validation section (--held-out FILE)")
    rows.sort(key=lambda row: (float(row[0].rstrip("%")), row[2], row[1]))
    listed = ", ".join(f"{label} {model.found.values('fdt').mean():.1f}" for label, model in last.items())
    deepest = max(model.sparsity for model in last.values())
    said = (f"At {deepest:.0%} of the weights pruned, FDT on held-out prompts: {listed}.",)
    table = FoundTable(
        "Rounds, on held-out prompts",
        ("pruned", "allocation", "trained", "FDT", "KL", "PPL"),
        tuple(rows),
        f"{next(iter(last.values())).found.row['num_prompts']} prompts, means with 95% intervals.",
    )
    vanished = FoundTable(
        "Components at the end", ("allocation", f"pruned beyond {_NEARLY_GONE:.0%}", "most", "least"), tuple(gone)
    )
    lines = Picture(
        "rounds",
        "lines",
        points,
        Axis("sparsity", "share of weights that is pruned"),
        Axis("fdt", "FDT on held-out prompts (tokens)"),
        "FDT after each round by what allocates it",
        series="allocation",
    )
    return Findings(said, (table, vanished), (lines, *pictures))


def _pruned_picture(store: ResultStore, part: PartRun) -> Picture:
    known = components_of(store, part.record.manifest_id)
    plan = store.table("plans", ["plan_id", "component", "scheme"], part.run).to_pylist()
    shares = {
        row["component"]: parse_scheme(row["scheme"]).pruned_share
        for row in plan
        if row["plan_id"] == part.record.final_plan_id
    }
    cells = [{"layer": each.layer, "kind": each.kind, "pruned": shares.get(name, 0.0)} for name, each in known.items()]
    return Picture(
        f"pruned-{part.label}",
        "heat",
        cells,
        Axis("layer", "layer"),
        Axis("pruned", "share that is pruned"),
        f"What the last round's plan prunes of each component, allocated by {part.label}",
        place="pruned",
        choice=part.label,
    )


def _gone(part: PartRun, picture: Picture) -> tuple[str, ...]:
    cells = sorted(picture.rows, key=lambda cell: -float(cell["pruned"]))
    beyond = sum(cell["pruned"] >= _NEARLY_GONE for cell in cells)
    ends = [
        ", ".join(f"{cell['layer']} {cell['kind']} {cell['pruned']:.0%}" for cell in some)
        for some in (cells[:3], cells[-3:])
    ]
    return (part.label, f"{beyond} of {len(cells)}", *ends)


STUDY = Study(
    "sparsity-rounds",
    "Pruning in rounds",
    "Pruned in rounds, the same share everywhere, by FDT as published, or by sensitivity: what does each round come "
    "to, and which components vanish?",
    conclude,
    tuple(Part(name, (f"search.allocate={name}",)) for name in ("uniform", "fdt75", "sensitivity")),
)
