"""A run's plans on its held-out prompts, as rows of the store become rows of a verdict: what was measured there, each
beside the final plan, and the uniform plan that it is held against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from dtmsearch.analysis.verdict import FOUND, PLAN, NoiseFloor, SizedBy, ValidationRow, rival_of
from dtmsearch.config import times_of
from dtmsearch.config.recorded_text import section_of
from dtmsearch.core.components import Component
from dtmsearch.core.metric_registry import BUILT_IN, METRICS
from dtmsearch.core.metrics import difference_limits
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import RunRecord
from dtmsearch.core.statistics import PairedDifference, paired_difference
from dtmsearch.core.times import PICOSECONDS
from dtmsearch.store.codecs.evaluations import others_of, summary_of
from dtmsearch.store.schemas import OTHER_COLUMNS, SUMMARY_COLUMNS
from dtmsearch.store.store import ResultStore

_INTERVAL_SEED = 0
_VALIDATION_COLUMNS = [
    *("label", "plan_id", "weights_id", "purpose", "reference_id", "status", "message"),
    *(
        "num_compressed",
        "bits_per_weight",
        "active_bits_per_weight",
        "share",
        "fdt",
        "sdt",
        "kl_list",
        "dppl_list",
        "ppl_list",
    ),
    *("fdt_unmasked", "sdt_unmasked"),
    *OTHER_COLUMNS,
    *SUMMARY_COLUMNS,
]


@dataclass(frozen=True)
class Measured:
    """A row of `evaluations` on the held-out prompts, its label, and its values per prompt."""

    row: Mapping[str, Any]
    label: str
    per_prompt: Mapping[str, NDArray[np.generic]]


def sized_by(record: RunRecord) -> SizedBy:
    """What a run's budget counts: stored bits where it limits these, or nothing."""
    stop = section_of(record.config, "search").get("stop")
    stop = stop if isinstance(stop, dict) else {}
    if stop.get("bits_per_weight") or stop.get("size_mb"):
        return "bits_per_weight"
    counted: tuple[SizedBy, ...] = ("active_bits_per_weight", "decode_ms", "prefill_ms")
    return next((rule for rule in counted if stop.get(rule)), "bits_per_weight")


def _with_times(
    store: ResultStore, record: RunRecord, rows: tuple[ValidationRow, ...], components: Sequence[Component]
) -> tuple[ValidationRow, ...]:
    """The rows with what their plans take by the search's table of times, if it has one."""
    times = times_of(record.config)
    if times is None:
        return rows
    plans = {row.plan_id: store.plan(row.plan_id, record.run) or Plan() for row in rows}
    names = {name for plan in plans.values() for name in plan.schemes}  # a uniform plan names all that is searched
    searched = [component for component in components if component.name in names]
    found = []
    for row in rows:
        plan = plans[row.plan_id]
        taken = times.total(searched, {component.name: plan.scheme_of(component.name) for component in searched})
        if taken is not None:
            prefill = None if taken[1] is None else taken[1] / PICOSECONDS
            row = replace(row, decode_ms=taken[0] / PICOSECONDS, prefill_ms=prefill)
        found.append(row)
    return tuple(found)


def best_uniform(
    store: ResultStore,
    record: RunRecord,
    rows: Sequence[ValidationRow],
    rank_by: str,
    components: Sequence[Component],
) -> ValidationRow | None:
    """The best uniform plan of at most the plan's size, by the prompts to choose by where the run had any: the best by
    the prompts that are reported would look better than it is."""
    plan = next((row for row in rows if row.label == PLAN), None)
    if plan is None or record.choice_reference_id is None:
        return rival_of(rows, rank_by, sized_by(record))
    where = (pc.field("reference_id") == record.choice_reference_id) & (pc.field("purpose") == "choice")
    found = store.table("evaluations", _VALIDATION_COLUMNS, record.run, where).to_pylist()
    measured = tuple(_row(Measured(row, row["label"], {}), None, None) for row in found)
    chosen_by = _with_times(store, record, measured, components)
    others = [row for row in chosen_by if row.plan_id != plan.plan_id]
    best = rival_of([plan, *(row for row in others if row.label != PLAN)], rank_by, sized_by(record))
    reported = None if best is None else next((row for row in rows if row.plan_id == best.plan_id), None)
    return reported or rival_of(rows, rank_by, sized_by(record))


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts: how long their continuations are, and the base model's FDT and SDT against itself on each."""

    continuation_tokens: int
    fdt: NDArray[np.generic]
    sdt: NDArray[np.generic]

    @staticmethod
    def of(store: ResultStore, reference_id: str | None) -> HeldOut | None:
        reference = None if reference_id is None else store.reference(reference_id)
        if reference is None:
            return None
        return HeldOut(reference.continuation_tokens, reference.base_agreement, (~reference.agrees).sum(axis=1))


def validation_rows(
    store: ResultStore,
    record: RunRecord,
    measured: Sequence[Measured],
    reference: HeldOut | None,
    components: Sequence[Component],
) -> tuple[ValidationRow, ...]:
    """The final plan first, then what it is held against, from large to small."""
    plan = next((m for m in measured if m.label == PLAN), None)
    others = sorted((m for m in measured if m is not plan), key=lambda m: (-m.row["bits_per_weight"], m.label))
    rows = tuple(_row(m, plan, reference) for m in ([] if plan is None else [plan]) + others)
    return _with_times(store, record, rows, components)


def noise_floor(measured: Sequence[Measured], reference: HeldOut | None) -> NoiseFloor | None:
    """How far the base model is from itself beside how far the plan is; None where the plan was not measured."""
    plan = next((m for m in measured if m.label == PLAN and m.row["status"] == "ok"), None)
    if plan is None or reference is None:
        return None
    floor = NoiseFloor(float(reference.fdt.mean()), float(reference.sdt.mean()))
    if plan.row["fdt_unmasked"] is None or plan.row["sdt_unmasked"] is None:
        return floor
    own = {metric: np.array(plan.row[f"{metric}_unmasked"]) for metric in ("fdt", "sdt")}
    limits = difference_limits("fdt", reference.continuation_tokens)
    return replace(
        floor,
        plan_fdt=float(own["fdt"].mean()),
        plan_sdt=float(own["sdt"].mean()),
        fdt_vs_base=paired_difference(own["fdt"], reference.fdt, _INTERVAL_SEED, limits=limits),
        sdt_vs_base=paired_difference(own["sdt"], reference.sdt, _INTERVAL_SEED, limits=limits),
    )


def measured_held_out(store: ResultStore, record: RunRecord) -> list[Measured]:
    """What a run measured on the held-out prompts that are reported, the final plan under the label `plan`."""
    if record.validation_reference_id is None or record.final_plan_id is None:
        return []
    final = pc.field("plan_id") == record.final_plan_id
    # The held-out prompts may be those of the search, whose evaluations bear no labels.
    where = (
        (pc.field("reference_id") == record.validation_reference_id)
        & (pc.field("purpose") != "race")
        & ((pc.field("purpose") == "validation") | final)
    )
    rows = store.table("evaluations", _VALIDATION_COLUMNS, record.run, where)
    ended_with = (record.final_plan_id, store.weights_id(record.run) or None)
    found: dict[str, Measured] = {}
    for row in rows.to_pylist():
        label = row["label"] if row["purpose"] == "validation" else None
        if (row["plan_id"], row["weights_id"]) == ended_with:
            label = PLAN
        elif label == PLAN:
            label = FOUND
        if label is not None:
            found.setdefault(label, Measured(row, label, _per_prompt(row)))
    return list(found.values())


def _per_prompt(row: Mapping[str, Any]) -> dict[str, NDArray[np.generic]]:
    """metric -> values; of perplexities their logarithms, whose mean is that of all tokens."""
    columns = {metric: METRICS[metric].list_column for metric in BUILT_IN}
    values = {metric: np.array(row[column]) for metric, column in columns.items() if row[column] is not None}
    found = {m: np.log(own) if METRICS[m].mean == "geometric" else own for m, own in values.items()}
    return found | others_of(row)


def _row(measured: Measured, plan: Measured | None, reference: HeldOut | None) -> ValidationRow:
    row, length = measured.row, None if reference is None else reference.continuation_tokens
    ok = row["status"] == "ok"
    return ValidationRow(
        label=measured.label,
        plan_id=row["plan_id"],
        weights_id=row["weights_id"] or None,
        num_compressed=row["num_compressed"],
        bits_per_weight=row["bits_per_weight"],
        active_bits_per_weight=row["active_bits_per_weight"],
        share=row["share"],
        summary=summary_of(dict(row)) if ok else None,
        failure=None if ok else f"{row['status']}: {row['message']}",
        decode_ms=None,
        prefill_ms=None,
        measured_as=row["label"] or "",
        **{f"{metric}_vs_plan": _difference(plan, measured, metric, length) for metric in BUILT_IN},
        others_vs_plan={m: _difference(plan, measured, m, length) for m in measured.per_prompt if m not in BUILT_IN},
    )


def _difference(
    plan: Measured | None, other: Measured, metric: str, continuation_tokens: int | None
) -> PairedDifference | None:
    if plan is None or plan is other:
        return None
    a, b = plan.per_prompt.get(metric), other.per_prompt.get(metric)
    if a is None or b is None:
        return None
    return paired_difference(a, b, _INTERVAL_SEED, limits=difference_limits(metric, continuation_tokens))
