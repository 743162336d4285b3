"""What the store says of its runs: how far a run is, what it found, and how its plan does on held-out prompts.

Everything is derived from the tables; nothing is measured here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import pyarrow.compute as pc

from dtmsearch.analysis.failure import headline
from dtmsearch.analysis.format import counted, number
from dtmsearch.analysis.held_out_rows import (
    HeldOut,
    best_uniform,
    measured_held_out,
    noise_floor,
    sized_by,
    validation_rows,
)
from dtmsearch.analysis.kept_fdt import KeptFdt, kept_fdt
from dtmsearch.analysis.verdict import (
    PLAN,
    NoiseFloor,
    ValidationRow,
    noise_sentence,
    verdict,
)
from dtmsearch.config.recorded_text import section_of
from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.holders import is_larger_than_source, size_sentence, source_sentence
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import RunRecord, RunStatus, StepRecord
from dtmsearch.core.schemes import SCALE_BITS
from dtmsearch.core.strategy_settings import RANK_BY
from dtmsearch.core.windows import num_touching
from dtmsearch.errors import UserError
from dtmsearch.store.codecs.evaluations import summary_of
from dtmsearch.store.codecs.tables import COMPONENT_COLUMNS, components_of, step_records
from dtmsearch.store.schemas import OTHER_COLUMNS, SUMMARY_COLUMNS
from dtmsearch.store.store import ResultStore

# Intervals are made with the same weights every time that they are asked for.


@dataclass(frozen=True)
class RunSummary:
    """A run as its records show it.

    `status` is `incomplete` where rows of a finished run are lost, in the tables `missing`.
    `interrupted`: the run counts as running, but no driver works on it. `continue_command` continues a run that was
    submitted to a cluster, where it was submitted. `num_evaluations` are those of the search, its
    failures included; `failures` counts them by kind. `wall_seconds` is the search's own time over all its sessions
    up to its last decision, None before the first. `verdict` says how the plan does on held-out prompts, in the metric
    that the search ranks by (`rank_by`), against `rival`: the label of the best uniform plan of at most its size;
    `verdict_in_brief` is the one sentence of it that says most.
    `active_bits_per_weight` is what a token reads of a mixture of experts, None of other models; `experts` says how
    many of the search's tokens reach its experts.
    `noise` is how far the base model is from itself there. `search_text` and `held_out_text` say where prompts come
    from and how many repeat a text, None where the run's version did not record it; `min_fdt` what was asked and found
    of an FDT to be kept. `written` says by which export the final plan can be written at its counted size; `source`,
    where the base model comes quantized, says how large it is beside the plan, `source_format` in which format it
    comes. `components` are all that the model has, in the model's order.
    `kv_cache` says of how many tokens KV caches are counted and what they take, where they are.
    """

    run: str
    status: RunStatus | Literal["incomplete"]
    interrupted: bool
    message: str | None
    continue_command: str | None
    model: str | None
    manifest_id: str | None
    reference_id: str | None
    validation_reference_id: str | None
    num_evaluations: int
    failures: Mapping[str, int]
    num_steps: int
    last_step: StepRecord | None
    final_plan_id: str | None
    final_plan: Plan | None
    num_compressed: int | None
    share: float | None
    bits_per_weight: float | None
    wall_seconds: float | None
    created_at: float
    finished_at: float | None
    validation: tuple[ValidationRow, ...]
    verdict: str
    search_text: str | None = None
    held_out_text: str | None = None
    min_fdt: KeptFdt | None = None
    already_complete: bool = False
    kv_cache: str | None = None
    missing: tuple[str, ...] = ()
    rank_by: str = RANK_BY
    rival: str | None = None
    noise: NoiseFloor | None = None
    written: str | None = None
    active_bits_per_weight: float | None = None
    experts: str | None = None
    source: str | None = None
    source_format: str = ""
    components: tuple[Component, ...] = ()
    verdict_in_brief: str = ""


@dataclass(frozen=True)
class RunOverview:
    """A line about a run. `score` is its last decision's value of the metric that it ranks by, `rank_by`, on the
    search's prompts; `fdt` that decision's mean FDT there; `held_out` the final plan's value of `rank_by` on held-out
    prompts; `failed` what ended a failed run, in a line."""

    run: str
    status: RunStatus | Literal["incomplete"]
    interrupted: bool
    model: str | None
    num_evaluations: int
    last_step: int | None
    share: float | None
    bits_per_weight: float | None
    score: float | None
    fdt: float | None
    created_at: float
    failed: str | None = None
    rank_by: str = "fdt"
    held_out: float | None = None


def record_of(store: ResultStore, run: str) -> RunRecord:
    """What the store records of a run. Raises `UserError` when it has none of that name."""
    record = store.run(run)
    if record is None:
        names = ", ".join(r.run for r in store.runs()) or "none"
        raise UserError(f"no run {run!r} in the store {store.url}; it holds: {names}")
    return record


def summarize_run(store: ResultStore, run: str) -> RunSummary:
    """What the store knows of a run. Raises `UserError` when it has none of that name."""
    record = record_of(store, run)
    missing = store.missing(record, thorough=True)
    statuses = _search_statuses(store, run)
    steps = step_records(store.table("steps", run=run))
    reference = HeldOut.of(store, record.validation_reference_id)
    measured = measured_held_out(store, record)
    components = _components(store, record)
    parts_of_model = [component for component, _ in components]
    rows = validation_rows(store, record, measured, reference, parts_of_model)
    rank_by = _rank_by(record)
    rival = best_uniform(store, record, rows, rank_by, parts_of_model)
    noise = noise_floor(measured, reference)
    plan_row = next((row for row in rows if row.label == PLAN), None)
    chosen_at = next((step for step in reversed(steps) if step.plan_id == record.final_plan_id), None)
    size = plan_row or chosen_at
    plan = None if record.final_plan_id is None else store.plan(record.final_plan_id, run)
    source = _source(store, record, plan, components)
    return RunSummary(
        run=run,
        status="incomplete" if missing else record.status,
        interrupted=_is_interrupted(store, record),
        message=record.message,
        continue_command=record.continue_command,
        model=_models(store).get(record.manifest_id),
        manifest_id=record.manifest_id,
        reference_id=record.reference_id,
        validation_reference_id=record.validation_reference_id,
        kv_cache=_kv_cache(record, plan, components),
        num_evaluations=sum(statuses.values()),
        failures={kind: number for kind, number in sorted(statuses.items()) if kind != "ok"},
        num_steps=len(steps),
        last_step=steps[-1] if steps else None,
        final_plan_id=record.final_plan_id,
        final_plan=plan,
        num_compressed=None if size is None else size.num_compressed,
        share=None if size is None else size.share,
        bits_per_weight=None if size is None else size.bits_per_weight,
        active_bits_per_weight=None if size is None else size.active_bits_per_weight,
        wall_seconds=steps[-1].wall_seconds if steps else None,
        created_at=record.created_at,
        finished_at=record.finished_at,
        validation=rows,
        verdict=_verdict(record, rows, rank_by, rival, reference, noise, source=source),
        verdict_in_brief=_verdict(record, rows, rank_by, rival, reference, None, brief=True),
        missing=missing,
        search_text=record.search_text,
        held_out_text=_held_out_text(store, record),
        rank_by=rank_by,
        rival=None if rival is None else rival.label,
        noise=noise,
        written=_written(store, record, plan, components),
        source=source,
        source_format=source_of(store, record),
        components=tuple(parts_of_model),
        experts=_experts(store, record),
        min_fdt=kept_fdt(store, record, plan_row.summary.fdt_mean if plan_row and plan_row.summary else None),
    )


def _rank_by(record: RunRecord) -> str:
    """The metric that a run's search ranks by; FDT for one that is not known here."""
    rank_by = str(section_of(record.config, "search").get("rank_by", "fdt"))
    return rank_by if rank_by in METRICS else "fdt"


def _kv_cache(record: RunRecord, plan: Plan | None, components: Sequence[tuple[Component, int]]) -> str | None:
    """Of how many tokens KV caches are counted, and their megabytes; None where none are."""
    caches = [(component, bits) for component, bits in components if component.is_cache]
    told = section_of(record.config, "model").get("kv_cache")
    if not caches or not isinstance(told, dict):
        return None
    own = sum(component.num_weights * bits for component, bits in caches) / 8e6
    said = f"{counted(told.get('batch', 1), 'text')} of {told.get('context'):,} tokens: {number(own)} MB unquantized"
    if plan is None:
        return said
    under = sum(plan.scheme(component.name).bits_of(component, bits) for component, bits in caches) / 8e6
    return f"{said}, {number(under)} MB under the plan"


def _components(store: ResultStore, record: RunRecord) -> list[tuple[Component, int]]:
    """The components of a run's model, each with the bits of a weight of the base model."""
    columns = [*COMPONENT_COLUMNS, "dense_bits"]
    found = store.table("components", columns, where=pc.field("manifest_id") == record.manifest_id)
    # Every run of the model has written them.
    return list(dict.fromkeys(zip(components_of(found), found["dense_bits"].to_pylist(), strict=True)))


def _experts(store: ResultStore, record: RunRecord) -> str | None:
    """How many of the search's tokens reach the experts of a mixture, in words."""
    columns = ["mixture", "expert", "tokens"]
    of_search = pc.field("reference_id") == (record.reference_id or "")
    rows = sorted(store.table("expert_tokens", columns, record.run, of_search).to_pylist(), key=lambda r: r["tokens"])
    if not rows:
        return None
    least, middle, most = rows[0], rows[len(rows) // 2], rows[-1]
    return (
        f"{len(rows):,}, reached by {least['tokens']:,} to {most['tokens']:,} tokens of the search, "
        f"{middle['tokens']:,} in the middle; by the fewest: expert {least['expert']} of {least['mixture']}"
    )


def _written(
    store: ResultStore, record: RunRecord, plan: Plan | None, components: Sequence[tuple[Component, int]]
) -> str | None:
    """By which export the final plan can be written at its counted size, in words."""
    if plan is None or not plan.entries or not components:
        return None
    try:
        parts = [component for component, _ in components]
        return size_sentence(plan, parts, components[0][1], scale_bits_of(record), source_of(store, record))
    except ValueError:  # a scheme that is not known here
        return None


def source_of(store: ResultStore, record: RunRecord) -> str:
    """The format that a run's base model comes in, where that is quantized; else empty."""
    found = store.table("components", ["source"], where=pc.field("manifest_id") == record.manifest_id)
    return next((source for source in found["source"].to_pylist() if source), "")


def _source(
    store: ResultStore, record: RunRecord, plan: Plan | None, components: Sequence[tuple[Component, int]]
) -> str | None:
    """The format and size of a base model that comes quantized, over the components of the search, in words."""
    says = source_of(store, record)
    if not says:
        return None
    try:
        return source_sentence(
            plan, _searched(record, [component for component, _ in components]), components[0][1], says
        )
    except ValueError:  # a scheme that is not known here
        return None


def _searched(record: RunRecord, components: Sequence[Component]) -> Sequence[Component]:
    """Those that a run searches."""
    section = section_of(record.config, "search").get("components") or {}
    manifest = ModelManifest("", None, "bfloat16", 0, "", tuple(components))
    try:
        return manifest.select(tuple(section.get("include") or ("*",)), tuple(section.get("exclude") or ()))
    except (ValueError, AttributeError, TypeError):  # of a file of other times
        return components


def scale_bits_of(record: RunRecord) -> int:
    """Bits of a scale where a run's plans are stored."""
    # A file of other times may lack the key, or have a value that is no scale's dtype now.
    scale_dtype = str(section_of(record.config, "model").get("scale_dtype", "float32"))
    return 32 if scale_dtype == "float32" else SCALE_BITS


def _verdict(
    record: RunRecord,
    rows: Sequence[ValidationRow],
    rank_by: str,
    rival: ValidationRow | None,
    reference: HeldOut | None,
    noise: NoiseFloor | None,
    brief: bool = False,
    source: str | None = None,
) -> str:
    if record.final_plan_id is None:
        return _without_plan(record)
    if record.status == "running" and not any(row.label == PLAN for row in rows):
        return "The plan is found, and not yet measured on held-out prompts."
    length = None if reference is None else reference.continuation_tokens
    said = verdict(rows, rank_by, length, rival, sized_by(record), brief)
    if source is not None and is_larger_than_source(source):
        said = f"{said} {source}."
    return said if noise is None else f"{said} {noise_sentence(noise)}"


def _held_out_text(store: ResultStore, record: RunRecord) -> str | None:
    """Where the held-out prompts come from, as they were cut. An earlier version may have validated a plan on what it
    had searched by, which is said."""
    if record.held_out_text is not None or record.validation_reference_id is None or record.reference_id is None:
        return record.held_out_text
    held_out, search = store.reference(record.validation_reference_id), store.reference(record.reference_id)
    shared = 0 if held_out is None or search is None else num_touching(held_out.text, search.text)
    if held_out is None or not shared:
        return None
    return f"{shared} of {held_out.num_prompts} prompts hold text that the search saw: these are not held out"


def _chose_none(record: RunRecord) -> bool:
    """Whether a run has ended as one whose strategy chooses no plan."""
    return record.status == "finished" and record.final_plan_id is None


def _without_plan(record: RunRecord) -> str:
    if _chose_none(record):
        return "This strategy chooses no plan; its ranking is the run's rows of the table steps."
    if record.status == "failed":
        return "The search failed before it came to a plan."
    return "The search has not come to a plan yet."


def runs_overview(store: ResultStore) -> list[RunOverview]:
    """A line about every run, in order of creation."""
    models = _models(store)
    return [_overview(store, record, models) for record in store.runs()]


def _overview(store: ResultStore, record: RunRecord, models: Mapping[str | None, str]) -> RunOverview:
    steps = step_records(store.table("steps", run=record.run))
    last = steps[-1] if steps else None
    # A probe's decisions are its ranking: the last one is no plan that it came to.
    leading = None if _chose_none(record) else last
    return RunOverview(
        run=record.run,
        status="incomplete" if store.missing(record) else record.status,
        interrupted=_is_interrupted(store, record),
        model=models.get(record.manifest_id),
        num_evaluations=sum(_search_statuses(store, record.run).values()),
        last_step=None if last is None else last.step,
        share=None if leading is None else leading.share,
        bits_per_weight=None if leading is None else leading.bits_per_weight,
        score=None if leading is None else leading.score,
        fdt=None if leading is None else _fdt_of(store, record, leading.plan_id),
        created_at=record.created_at,
        failed=headline(record.message) if record.status == "failed" and record.message else None,
        rank_by=_rank_by(record),
        held_out=_held_out_value(store, record),
    )


def _held_out_value(store: ResultStore, record: RunRecord) -> float | None:
    """The final plan's value on the held-out prompts that are reported, in the metric that the search ranks by."""
    if record.final_plan_id is None or record.validation_reference_id is None:
        return None
    where = (pc.field("reference_id") == record.validation_reference_id) & (pc.field("plan_id") == record.final_plan_id)
    columns = ["weights_id", "status", *OTHER_COLUMNS, *SUMMARY_COLUMNS]
    over = store.weights_id(record.run) or None
    for row in store.table("evaluations", columns, record.run, where).to_pylist():
        if row["weights_id"] == over and row["status"] == "ok":
            with suppress(ValueError):  # not measured of this plan
                return summary_of(row).value(_rank_by(record))
    return None


def _is_interrupted(store: ResultStore, record: RunRecord) -> bool:
    return record.status == "running" and not store.is_running(record.run)


def _models(store: ResultStore) -> dict[str | None, str]:
    """manifest id -> the model's path or hub id."""
    rows = store.table("components", ["manifest_id", "model"])
    return dict(zip(rows["manifest_id"].to_pylist(), rows["model"].to_pylist(), strict=True))


def _search_statuses(store: ResultStore, run: str) -> Counter[str]:
    rows = store.table("evaluations", ["status"], run, pc.field("purpose").isin(["search", "race"]))
    return Counter(rows["status"].to_pylist())


def _fdt_of(store: ResultStore, record: RunRecord, plan_id: str) -> float | None:
    """A plan's mean FDT on the search's prompts, over the weights that the search has come to."""
    if record.reference_id is None:
        return None
    where = (pc.field("plan_id") == plan_id) & (pc.field("reference_id") == record.reference_id)
    on_all = where & (pc.field("purpose") != "race")
    rows = store.table("evaluations", ["fdt_mean", "weights_id"], record.run, on_all).to_pylist()
    over = store.weights_id(record.run) or None
    return next((row["fdt_mean"] for row in rows if row["weights_id"] == over and row["fdt_mean"] is not None), None)
