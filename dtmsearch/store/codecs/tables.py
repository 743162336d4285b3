"""From records to rows and back: runs, steps, continuations, trainings, components, references.

Knows values and columns, nothing of files. Whatever was not measured is null, never 0 and never infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.decoding import GREEDY, Decoding
from dtmsearch.core.evaluation import Reference, Writing
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.records import ContinuationRecord, RunRecord, StepRecord, TrainingRecord
from dtmsearch.store.codecs.columns import coded_constant, from_columns, from_time, lists, matrix, to_time
from dtmsearch.store.schemas import COMPONENTS, CONTINUATIONS, PROMPTS, RUNS, STEPS, TRAININGS


def runs_table(records: Sequence[RunRecord]) -> pa.Table:
    """A row of `runs` for each record."""
    columns = {name: [getattr(r, name) for r in records] for name in RUNS.names}
    for name in ("created_at", "finished_at"):
        columns[name] = [to_time(seconds) for seconds in columns[name]]
    return from_columns(RUNS, columns)


def run_records(table: pa.Table) -> list[RunRecord]:
    """The last record of each run, in order of creation."""
    columns = {name: table[name].to_pylist() for name in RUNS.names if not name.endswith("_at")}
    columns |= {name: from_time(table[name]) for name in ("created_at", "finished_at")}
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    latest = {row["run"]: RunRecord(**row) for row in rows}
    return sorted(latest.values(), key=lambda record: (record.created_at, record.run))


def steps_table(run: str, steps: Sequence[StepRecord]) -> pa.Table:
    """A row of `steps` for each decision."""
    columns: dict[str, Any] = {name: [getattr(s, name) for s in steps] for name in STEPS.names if name != "run"}
    return from_columns(STEPS, columns | {"run": coded_constant(run, len(steps))})


def step_records(table: pa.Table) -> list[StepRecord]:
    """The decisions in order; where a step stands twice, the first."""
    rows = table.drop_columns(["run"]).to_pylist()
    first = {row["step"]: row for row in reversed(rows)}
    return [StepRecord(**first[step]) for step in sorted(first)]


def continuations_table(run: str, records: Sequence[ContinuationRecord]) -> pa.Table:
    """A row of `continuations` for each text."""
    continuations = [record.continuation for record in records]
    columns: dict[str, Any] = {
        "run": coded_constant(run, len(records)),
        "reference_id": [record.reference_id for record in records],
        "plan_id": [record.plan_id for record in records],
        "prompt": [c.prompt for c in continuations],
        "prompt_text": [c.prompt_text for c in continuations],
    }
    for source in ("base", "own"):
        writings: list[Writing] = [getattr(c, source) for c in continuations]
        for part in ("tokens", "pieces", "margins"):
            columns[f"{source}_{part}"] = [list(getattr(writing, part)) for writing in writings]
    return from_columns(CONTINUATIONS, columns)


def trainings_table(run: str, records: Sequence[TrainingRecord]) -> pa.Table:
    """A row of `trainings` for each training."""
    names = [name for name in TRAININGS.names if name not in ("run", "losses")]
    columns: dict[str, Any] = {name: [getattr(r, name) for r in records] for name in names}
    columns["losses"] = lists([np.array(r.losses, np.float32) for r in records], pa.float32())
    return from_columns(TRAININGS, columns | {"run": coded_constant(run, len(records))})


def components_table(manifest: ModelManifest, components: Sequence[Component]) -> pa.Table:
    """A row of `components` for each component."""
    columns = {
        "manifest_id": coded_constant(manifest.id, len(components)),
        "model": coded_constant(manifest.model, len(components)),
        "component": [c.name for c in components],
        "layer": [c.layer for c in components],
        "kind": [c.kind for c in components],
        "rows": [c.shape[0] for c in components],
        "cols": [c.shape[1] for c in components],
        "num_weights": [c.num_weights for c in components],
        "dense_bits": [manifest.dense_bits] * len(components),
        "transposed": [c.transposed for c in components],
        "stacked": [c.stacked for c in components],
        "mixture": [c.mixture or None for c in components],
        "num_experts": [c.num_experts or None for c in components],
        "experts_per_token": [c.experts_per_token or None for c in components],
        "source_bits": [c.source_bits for c in components],
        "apart": [c.apart for c in components],
        "source": coded_constant(manifest.source, len(components)),
    }
    return from_columns(COMPONENTS, columns)


COMPONENT_COLUMNS = (
    *("component", "layer", "kind", "rows", "cols", "transposed", "stacked"),
    *("mixture", "num_experts", "experts_per_token", "source_bits", "apart"),
)


def components_of(table: pa.Table) -> tuple[Component, ...]:
    """How the model keeps them is not known of rows from before there were columns for it: as linear layers."""
    return tuple(
        Component(
            *(r["component"], r["layer"], r["kind"], (r["rows"], r["cols"]), bool(r["transposed"]), bool(r["stacked"])),
            *(r["mixture"] or "", r["num_experts"] or 0, r["experts_per_token"] or 0, r["source_bits"] or 0),
            bool(r["apart"]),
        )
        for r in table.select(COMPONENT_COLUMNS).to_pylist()
    )


def prompts_table(reference: Reference) -> pa.Table:
    """A row of `prompts` for each prompt of a reference."""
    num_prompts, prompt_tokens = reference.num_prompts, reference.prompt_tokens
    columns = {
        "reference_id": coded_constant(reference.id, num_prompts),
        "manifest_id": coded_constant(reference.manifest_id, num_prompts),
        "mode": coded_constant(str(reference.mode), num_prompts),
        "prompt": np.arange(num_prompts, dtype=np.int32),
        "tokens": lists(list(reference.text[:, :prompt_tokens]), pa.int32()),
        "continuation": lists(list(reference.continuation), pa.int32()),
        "human_continuation": lists(list(reference.text[:, prompt_tokens:]), pa.int32()),
        "base_agreement": reference.base_agreement,
        "disagreements": lists([np.flatnonzero(~row) for row in reference.agrees], pa.int32()),
        "suppressed": lists([np.array(reference.suppressed, np.int32)] * num_prompts, pa.int32()),
        "opening": lists([np.array(reference.opening, np.int32)] * num_prompts, pa.int32()),
        "tokenizer": coded_constant(reference.tokenizer, num_prompts),
        "decoding": coded_constant(str(reference.decoding), num_prompts),
    }
    return from_columns(PROMPTS, columns)


def reference_of(table: pa.Table) -> Reference:
    """The reference whose rows, at least one, these are."""
    table = table.combine_chunks().sort_by("prompt")
    first = table.slice(0, 1).to_pylist()[0]
    lists = {name: matrix(table[name]) for name in ("tokens", "continuation", "human_continuation")}
    agrees = np.ones(lists["continuation"].shape, np.bool_)
    for row, positions in enumerate(table["disagreements"].to_pylist()):
        agrees[row, positions] = False
    return Reference(
        id=first["reference_id"],
        manifest_id=first["manifest_id"],
        mode=NumericMode.parse(first["mode"]),
        text=np.concatenate([lists["tokens"], lists["human_continuation"]], axis=1),
        continuation=lists["continuation"],
        agrees=agrees,
        suppressed=tuple(first["suppressed"]),
        opening=tuple(first["opening"] or ()),
        tokenizer=first["tokenizer"] or "",
        decoding=Decoding.parse(first["decoding"] or str(GREEDY)),
    )
