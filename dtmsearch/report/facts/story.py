"""How a search by prices went: what every option was priced at, what the prices foresaw of plans that were measured
later, and what was measured around which plan.

To second order a plan's KL is the mean over samples of the square of its options' products, summed, over twice the
predicted tokens (`core.prices`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dtmsearch.core.prices import TAKEN, PriceKind
from dtmsearch.core.records import RunRecord
from dtmsearch.errors import UserError
from dtmsearch.report.facts.rows import DENSE_PLAN, Row
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.solve_budgets import ForeseenPlan, predicted_front

Floats = NDArray[np.float64]
# Plans that are shown as foreseen and measured, at most.
_MOST_FORESEEN = 400
_Z95 = 1.96


@dataclass(frozen=True)
class Story:
    """`prices`: a row an option (component, scheme, `kl`, its standard error `error`), of `samples`. `foreseen`: a row
    a measured plan (`predicted` and `measured` KL in nats per token, each with `_low` and `_high`, a 95% interval).
    `stages`: what was asked of the model, in order. `front`: what is foreseen of the best plan of every size, put right
    by the plans that were measured (`bits`, `kl`, `kl_low`, `kl_high`), `uniform` the same of uniform plans (and
    `scheme`)."""

    prices: list[Row]
    samples: int
    foreseen: list[Row]
    stages: list[Row]
    front: list[Row]
    uniform: list[Row]

    @property
    def median_error(self) -> float | None:
        """Of the options' prices, the standard error as a part of the price, in the middle."""
        parts = [row["error"] / row["kl"] for row in self.prices if row["kl"] > 0.0]
        return float(np.median(parts)) if parts else None

    @property
    def price_stages(self) -> list[Row]:
        """Those in which prices were taken."""
        return [stage for stage in self.stages if stage["unit"] == "samples"]

    @property
    def ratio(self) -> float | None:
        """Measured over predicted, in the middle of the plans."""
        parts = [row["measured"] / row["predicted"] for row in self.foreseen if row["predicted"] > 0.0]
        return float(np.median(parts)) if parts else None


def story_of(
    store: ResultStore, record: RunRecord, candidates: pa.Table, components: Sequence[Row], positions: int | None
) -> Story:
    """`positions` are the predicted tokens of a sample."""
    columns = ["kind", "around_plan_id", "component", "scheme", "first_sample", "products", "block_tokens"]
    columns += ["wall_seconds", "reference_id"]
    table = store.table("prices", columns, record.run)
    blocks = table.filter(pc.equal(pc.cast(table["reference_id"], pa.string()), record.reference_id or ""))
    products = _products(blocks)
    samples = len(next(iter(products.values()), ()))
    prices = _prices(products, components, positions) if positions and samples > 1 else []
    foreseen = _foreseen(store, record, candidates, products, positions) if prices and positions else []
    stages = _price_stages(blocks) + _measured_stages(store, record, candidates)
    front, uniform = _front(store, record, foreseen) if prices else ([], [])
    return Story(prices, samples, foreseen, stages, front, uniform)


def _front(store: ResultStore, record: RunRecord, foreseen: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The predicted front and the uniform plans beside it; nothing where the search file can no longer be read."""
    try:
        found = predicted_front(store, record.run, max((row["bits"] for row in foreseen), default=0.0))
    except UserError:
        return [], []
    uniform = [{"scheme": scheme, **_foreseen_row(plan)} for scheme, plan in found.uniform.items()]
    return [_foreseen_row(plan) for plan in found.front], uniform


def _foreseen_row(plan: ForeseenPlan) -> Row:
    return {"bits": plan.bits_per_weight, "kl": plan.kl, "kl_low": plan.kl_low, "kl_high": plan.kl_high}


def _products(blocks: pa.Table) -> dict[tuple[str, str], Floats]:
    """Option -> its products [samples] around the base model."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in blocks.to_pylist():
        if row["kind"] == "fisher" and row["around_plan_id"] == DENSE_PLAN:
            found.setdefault((row["component"], row["scheme"]), {})[row["first_sample"]] = row["products"]
    return {
        option: np.concatenate([np.asarray(parts[first], np.float64) for first in sorted(parts)])
        for option, parts in found.items()
    }


def _prices(products: dict[tuple[str, str], Floats], components: Sequence[Row], positions: int) -> list[Row]:
    by_name = {row["component"]: row for row in components}
    rows = []
    for (name, scheme), own in products.items():
        if name not in by_name:
            continue
        price, error = _mean_square(own, positions)
        place = {key: by_name[name][key] for key in ("component", "layer", "kind", "num_weights")}
        rows.append({**place, "scheme": scheme, "kl": price, "error": error})
    return rows


def _mean_square(own: Floats, positions: int) -> tuple[float, float]:
    """Half the mean square over samples, a predicted token, and its standard error."""
    squares = np.square(own) / (2 * positions)
    return float(squares.mean()), float(squares.std(ddof=1) / np.sqrt(len(squares)))


def _foreseen(
    store: ResultStore,
    record: RunRecord,
    candidates: pa.Table,
    products: dict[tuple[str, str], Floats],
    positions: int,
) -> list[Row]:
    """Measured plans of which all options are priced; of several measurements of one, that on the most prompts."""
    ok = candidates.filter(pc.and_(pc.equal(candidates["status"], "ok"), pc.greater(candidates["num_compressed"], 0)))
    ids = list(dict.fromkeys(ok["plan_id"].to_pylist()))[-_MOST_FORESEEN:]
    where = pc.field("plan_id").isin(ids)
    entries: dict[str, dict[str, str]] = {}
    for row in store.table("plans", ["plan_id", "component", "scheme"], record.run, where).to_pylist():
        entries.setdefault(row["plan_id"], {})[row["component"]] = row["scheme"]
    of_search = where & (pc.field("purpose") == "search") & (pc.field("reference_id") == record.reference_id)
    measured: dict[str, Row] = {}
    for row in store.table("evaluations", ["plan_id", "kl_list", "bits_per_weight"], record.run, of_search).to_pylist():
        before = measured.get(row["plan_id"], {"kl_list": ()})
        if row["kl_list"] is not None and len(row["kl_list"]) > len(before["kl_list"]):
            measured[row["plan_id"]] = row
    rows = []
    for plan_id, plan in entries.items():
        if plan_id not in measured or any(option not in products for option in plan.items()):
            continue
        predicted, error = _mean_square(np.sum([products[option] for option in plan.items()], axis=0), positions)
        values = np.asarray(measured[plan_id]["kl_list"], np.float64)
        own = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
        rows.append(
            {
                "plan_id": plan_id,
                "num_compressed": len(plan),
                "bits": measured[plan_id]["bits_per_weight"],
                "num_prompts": len(values),
                **_spanned("predicted", predicted, error),
                **_spanned("measured", float(values.mean()), own),
            }
        )
    return rows


def _spanned(name: str, mean: float, error: float) -> Row:
    # No KL is below nothing, nor has a place on a logarithmic axis.
    low = max(mean - _Z95 * error, mean / 100)
    return {name: mean, f"{name}_low": low, f"{name}_high": mean + _Z95 * error}


def _price_stages(blocks: pa.Table) -> list[Row]:
    """What was taken by backward passes, around which plan."""
    taken: dict[tuple[PriceKind, str], dict[int, Row]] = {}
    for row in blocks.to_pylist():
        taken.setdefault((row["kind"], row["around_plan_id"]), {})[row["first_sample"]] = row
    return [
        {
            "what": TAKEN[kind],
            "around": "the base model" if around == DENSE_PLAN else f"plan {around[:8]}",
            "number": sum(len(row["products"]) for row in parts.values()),
            "unit": "samples",
            "tokens": sum(row["block_tokens"] for row in parts.values()),
            "seconds": sum(row["wall_seconds"] for row in parts.values()),
            "best": None,
            "leader": None,
        }
        for (kind, around), parts in taken.items()
    ]


def _measured_stages(store: ResultStore, record: RunRecord, candidates: pa.Table) -> list[Row]:
    """Plans that were measured together: around one plan, on as many prompts, one after another. `best` and `leader`
    are KLs on the same prompts, of the best of them and of the plan around which they are."""
    ok = candidates.filter(pc.and_(pc.equal(candidates["status"], "ok"), pc.is_valid(candidates["kl"])))
    groups: list[list[Row]] = []
    for row in ok.to_pylist():
        key = row["parent_plan_id"], row["num_prompts"]
        # The plan around which others are measured comes first, with the base model as its parent.
        leads = groups and groups[-1][0]["plan_id"] == row["parent_plan_id"] and len(groups[-1]) == 1
        same = groups and (groups[-1][-1]["parent_plan_id"], groups[-1][-1]["num_prompts"]) == key
        if same or (leads and groups[-1][0]["num_prompts"] == row["num_prompts"]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [_measured_stage(group) for group in groups]


def _measured_stage(group: Sequence[Row]) -> Row:
    parent = group[-1]["parent_plan_id"]
    around = "the base model" if parent == DENSE_PLAN else f"plan {parent[:8]}"
    leader = next((row["kl"] for row in group if row["plan_id"] == parent), None)
    others = [row["kl"] for row in group if row["plan_id"] != parent]
    alone = all(row["num_compressed"] == 1 for row in group)
    return {
        "what": "components alone" if alone else "plans compared" if parent == DENSE_PLAN else "steps and swaps",
        "around": around if parent != DENSE_PLAN or alone else "",
        "number": len(others) or len(group),
        "unit": f"plans on {group[-1]['num_prompts']} prompts",
        "tokens": sum(row["tokens"] or 0 for row in group),
        "seconds": sum(row["wall_seconds"] or 0.0 for row in group),
        "best": min(others, default=None),
        "leader": leader,
    }
