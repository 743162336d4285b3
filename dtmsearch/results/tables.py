"""The store's tables: Arrow schemas of a format version, and the way from records to rows and back.

Knows values and columns, nothing of files. Whatever was not measured is null, never 0 and never infinite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dtmsearch.plans.calibration import Calibration, InputStatistics, PackedMatrix, WeightError
from dtmsearch.plans.components import Component, ModelManifest
from dtmsearch.plans.evaluation import Continuation, EvalFailure, EvalResult, Outcome, Provenance, Reference, Writing
from dtmsearch.plans.metrics import Summary, summarize
from dtmsearch.plans.plan import Plan
from dtmsearch.plans.records import EvaluationRecord, RunRecord, StepRecord, TrainingRecord
from dtmsearch.plans.schemes import DENSE, parse_scheme

# Raise it when a column changes; a store of a newer version than this is refused.
FORMAT_VERSION = 1

_MICROSECONDS = 1_000_000
_CODED = pa.dictionary(pa.int32(), pa.string())  # for names that repeat: stored once, compared as numbers
_TIME = pa.timestamp("us")  # UTC
_INTS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())


def _schema(name: str, columns: list[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema(columns, metadata={"dtmsearch.table": name, "dtmsearch.format": str(FORMAT_VERSION)})


# A run has a row for each time that its status was written; the last one holds.
RUNS = _schema(
    "runs",
    [
        ("run", pa.string()),
        ("status", pa.string()),
        ("config", pa.string()),
        ("config_folder", pa.string()),
        ("manifest_id", pa.string()),
        ("reference_id", pa.string()),
        ("validation_reference_id", pa.string()),
        ("final_plan_id", pa.string()),
        ("created_at", _TIME),
        ("finished_at", _TIME),
        ("version", pa.string()),
        ("message", pa.string()),
    ],
)
COMPONENTS = _schema(
    "components",
    [
        ("manifest_id", _CODED),
        ("model", _CODED),
        ("component", pa.string()),
        ("layer", pa.int32()),
        ("kind", _CODED),
        ("rows", pa.int64()),
        ("cols", pa.int64()),
        ("num_weights", pa.int64()),
        ("dense_bits", pa.int32()),
    ],
)
# `disagreements` are all the positions at which the base model leaves its continuation, `base_agreement` the first.
PROMPTS = _schema(
    "prompts",
    [
        ("reference_id", _CODED),
        ("manifest_id", _CODED),
        ("mode", _CODED),
        ("prompt", pa.int32()),
        ("tokens", _INTS),
        ("continuation", _INTS),
        ("human_continuation", _INTS),
        ("base_agreement", pa.int32()),
        ("disagreements", _INTS),
        ("suppressed", _INTS),
    ],
)
# `tokens` counts the tokens that the evaluation computed; the lists run over its prompts.
EVALUATIONS = _schema(
    "evaluations",
    [
        ("run", _CODED),
        ("step", pa.int32()),
        ("evaluation_id", pa.string()),
        ("plan_id", pa.string()),
        ("parent_plan_id", _CODED),
        ("weights_id", _CODED),
        ("perturbation", _CODED),
        ("component", _CODED),
        ("scheme", _CODED),
        ("purpose", _CODED),
        ("label", _CODED),
        ("reused_from", _CODED),
        ("reference_id", _CODED),
        ("status", _CODED),
        ("message", pa.string()),
        ("num_compressed", pa.int32()),
        ("share", pa.float64()),
        ("bits_per_weight", pa.float64()),
        ("num_prompts", pa.int32()),
        ("fdt_mean", pa.float64()),
        ("fdt_p25", pa.float64()),
        ("fdt_p50", pa.float64()),
        ("fdt_p75", pa.float64()),
        ("sdt_mean", pa.float64()),
        ("dppl", pa.float64()),
        ("ppl", pa.float64()),
        ("kl", pa.float64()),
        ("fdt", _INTS),
        ("sdt", _INTS),
        ("dppl_list", _FLOATS),
        ("ppl_list", _FLOATS),
        ("kl_list", _FLOATS),
        ("tokens", pa.int64()),
        ("wall_seconds", pa.float64()),
        ("replica", _CODED),
        ("node", _CODED),
        ("attempts", pa.int32()),
        ("finished_at", _TIME),
        ("version", _CODED),
    ],
)
PLANS = _schema(
    "plans",
    [
        ("plan_id", _CODED),
        ("component", _CODED),
        ("scheme", _CODED),
        ("stored_bits", pa.int64()),
        ("num_weights", pa.int64()),
    ],
)
# How the base model and a run's final plan go on from some held-out prompts; `own` is the compressed model's.
CONTINUATIONS = _schema(
    "continuations",
    [
        ("run", _CODED),
        ("reference_id", _CODED),
        ("plan_id", _CODED),
        ("prompt", pa.int32()),
        ("prompt_text", pa.string()),
        ("base_tokens", _INTS),
        ("base_pieces", pa.list_(pa.string())),
        ("base_margins", _FLOATS),
        ("own_tokens", _INTS),
        ("own_pieces", pa.list_(pa.string())),
        ("own_margins", _FLOATS),
    ],
)
STEPS = _schema(
    "steps",
    [
        ("run", _CODED),
        ("step", pa.int32()),
        ("plan_id", pa.string()),
        ("perturbation", pa.string()),
        ("score", pa.float64()),
        ("num_compressed", pa.int32()),
        ("share", pa.float64()),
        ("bits_per_weight", pa.float64()),
        ("sparsity", pa.float64()),
        ("evaluations", pa.int64()),
        ("wall_seconds", pa.float64()),
    ],
)

# Mean squares of the inputs of a model's components over calibration text.
STATISTICS = _schema(
    "statistics",
    [
        ("calibration_id", _CODED),
        ("manifest_id", _CODED),
        ("component", pa.string()),
        ("mean_squares", _FLOATS),
    ],
)
# Components under schemes that took solving for, as `plans.calibration.PackedMatrix` says.
MATRICES = _schema(
    "matrices",
    [
        ("calibration_id", _CODED),
        ("component", pa.string()),
        ("scheme", pa.string()),
        ("rows", pa.int64()),
        ("cols", pa.int64()),
        ("bits", pa.int32()),
        ("block", pa.int64()),
        ("scale_dtype", _CODED),
        ("codes", pa.large_binary()),
        ("scales", pa.large_binary()),
        ("zeros", pa.large_binary()),
        ("mask", pa.large_binary()),
    ],
)

# Trainings under masks: `weights_id` names the weights that `plan_id` over `from_weights_id` came to.
TRAININGS = _schema(
    "trainings",
    [
        ("run", _CODED),
        ("round", pa.int32()),
        ("training_id", pa.string()),
        ("plan_id", pa.string()),
        ("from_weights_id", pa.string()),
        ("weights_id", pa.string()),
        ("steps", pa.int64()),
        ("tokens", pa.int64()),
        ("wall_seconds", pa.float64()),
        ("losses", _FLOATS),
    ],
)

# What a run knew of schemes without measuring them, as `plans.calibration.WeightError` says.
WEIGHT_ERRORS = _schema(
    "weight_errors",
    [
        ("run", _CODED),
        ("component", _CODED),
        ("scheme", _CODED),
        ("plain", pa.float64()),
        ("weighted_by_inputs", pa.float64()),
        ("weighted_by_hessian", pa.float64()),
    ],
)

SCHEMAS: dict[str, pa.Schema] = {
    "runs": RUNS,
    "components": COMPONENTS,
    "prompts": PROMPTS,
    "evaluations": EVALUATIONS,
    "plans": PLANS,
    "steps": STEPS,
    "statistics": STATISTICS,
    "matrices": MATRICES,
    "weight_errors": WEIGHT_ERRORS,
    "continuations": CONTINUATIONS,
    "trainings": TRAININGS,
}
# Columns that came to a table after its first segments were written, which lack them: there they are null.
ADDED: dict[str, frozenset[str]] = {"evaluations": frozenset({"weights_id"})}
SUMMARY_COLUMNS = ("num_prompts", "fdt_mean", "fdt_p25", "fdt_p50", "fdt_p75", "sdt_mean", "dppl", "ppl", "kl")


def fits(table: str, schema: pa.Schema) -> bool:
    """Whether a segment's columns are those of a table, or were before columns were added to it."""
    missing = set(SCHEMAS[table].names) - set(schema.names)
    if not missing <= ADDED.get(table, frozenset()):
        return False
    return bool(schema.equals(pa.schema([field for field in SCHEMAS[table] if field.name not in missing])))


def empty(table: str) -> pa.Table:
    return SCHEMAS[table].empty_table()


def _to_time(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * _MICROSECONDS)


def _from_time(column: pa.ChunkedArray) -> list[float | None]:
    """Seconds since the epoch."""
    return [None if us is None else us / _MICROSECONDS for us in column.cast(pa.int64()).to_pylist()]


def _from_columns(schema: pa.Schema, columns: dict[str, Any]) -> pa.Table:
    assert columns.keys() == set(schema.names), columns.keys() ^ set(schema.names)
    arrays = []
    for field in schema:
        values = columns[field.name]
        arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _coded_constant(value: str | None, length: int) -> pa.Array:
    """A column that repeats one value."""
    if value is None:
        return pa.nulls(length, _CODED)
    return pa.DictionaryArray.from_arrays(np.zeros(length, np.int32), pa.array([value]))


def _lists(rows: Sequence[NDArray[np.generic] | None], values: pa.DataType) -> pa.Array:
    """A list column from an array per row, null where there is none."""
    present = [row for row in rows if row is not None]
    lengths = np.array([0 if row is None else len(row) for row in rows], np.int32)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int32)), dtype=np.int32)
    dtype = values.to_pandas_dtype()
    flat = np.concatenate(present).astype(dtype, copy=False) if present else np.empty(0, dtype)
    missing = pa.array([row is None for row in rows], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, values), mask=missing)


def _arrays(column: pa.ListArray) -> list[NDArray[Any] | None]:
    """A view into the column's memory for each row of a list column, None where it is null."""
    values = column.values.to_numpy(zero_copy_only=True)
    offsets = column.offsets.to_numpy(zero_copy_only=True).tolist()
    rows: list[NDArray[Any] | None] = [values[start:stop] for start, stop in pairwise(offsets)]
    if column.null_count:
        for at in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist():
            rows[at] = None
    return rows


# Runs and steps


def runs_table(records: Sequence[RunRecord]) -> pa.Table:
    columns = {name: [getattr(r, name) for r in records] for name in RUNS.names}
    for name in ("created_at", "finished_at"):
        columns[name] = [_to_time(seconds) for seconds in columns[name]]
    return _from_columns(RUNS, columns)


def run_records(table: pa.Table) -> list[RunRecord]:
    """The last record of each run, in order of creation."""
    columns = {name: table[name].to_pylist() for name in RUNS.names if not name.endswith("_at")}
    columns |= {name: _from_time(table[name]) for name in ("created_at", "finished_at")}
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    latest = {row["run"]: RunRecord(**row) for row in rows}
    return sorted(latest.values(), key=lambda record: (record.created_at, record.run))


def steps_table(run: str, steps: Sequence[StepRecord]) -> pa.Table:
    columns: dict[str, Any] = {name: [getattr(s, name) for s in steps] for name in STEPS.names if name != "run"}
    return _from_columns(STEPS, columns | {"run": _coded_constant(run, len(steps))})


def step_records(table: pa.Table) -> list[StepRecord]:
    """The decisions in order; where a step stands twice, the first."""
    rows = table.drop_columns(["run"]).to_pylist()
    first = {row["step"]: row for row in reversed(rows)}
    return [StepRecord(**first[step]) for step in sorted(first)]


# Continuations


def continuations_table(run: str, reference_id: str, plan_id: str, continuations: Sequence[Continuation]) -> pa.Table:
    number = len(continuations)
    columns: dict[str, Any] = {
        "run": _coded_constant(run, number),
        "reference_id": _coded_constant(reference_id, number),
        "plan_id": _coded_constant(plan_id, number),
        "prompt": [c.prompt for c in continuations],
        "prompt_text": [c.prompt_text for c in continuations],
    }
    for source in ("base", "own"):
        writings: list[Writing] = [getattr(c, source) for c in continuations]
        for part in ("tokens", "pieces", "margins"):
            columns[f"{source}_{part}"] = [list(getattr(writing, part)) for writing in writings]
    return _from_columns(CONTINUATIONS, columns)


def trainings_table(run: str, records: Sequence[TrainingRecord]) -> pa.Table:
    names = [name for name in TRAININGS.names if name not in ("run", "losses")]
    columns: dict[str, Any] = {name: [getattr(r, name) for r in records] for name in names}
    columns["losses"] = _lists([np.array(r.losses, np.float32) for r in records], pa.float32())
    return _from_columns(TRAININGS, columns | {"run": _coded_constant(run, len(records))})


# Components


def components_table(manifest: ModelManifest, components: Sequence[Component]) -> pa.Table:
    columns = {
        "manifest_id": _coded_constant(manifest.id, len(components)),
        "model": _coded_constant(manifest.model, len(components)),
        "component": [c.name for c in components],
        "layer": [c.layer for c in components],
        "kind": [c.kind for c in components],
        "rows": [c.shape[0] for c in components],
        "cols": [c.shape[1] for c in components],
        "num_weights": [c.num_weights for c in components],
        "dense_bits": [manifest.dense_bits] * len(components),
    }
    return _from_columns(COMPONENTS, columns)


def components_of(table: pa.Table) -> tuple[Component, ...]:
    rows = table.select(["component", "layer", "kind", "rows", "cols"]).to_pylist()
    return tuple(Component(r["component"], r["layer"], r["kind"], (r["rows"], r["cols"])) for r in rows)


# References


def prompts_table(reference: Reference) -> pa.Table:
    num_prompts, prompt_tokens = reference.num_prompts, reference.prompt_tokens
    columns = {
        "reference_id": _coded_constant(reference.id, num_prompts),
        "manifest_id": _coded_constant(reference.manifest_id, num_prompts),
        "mode": _coded_constant(reference.mode, num_prompts),
        "prompt": np.arange(num_prompts, dtype=np.int32),
        "tokens": _lists(list(reference.text[:, :prompt_tokens]), pa.int32()),
        "continuation": _lists(list(reference.continuation), pa.int32()),
        "human_continuation": _lists(list(reference.text[:, prompt_tokens:]), pa.int32()),
        "base_agreement": reference.base_agreement,
        "disagreements": _lists([np.flatnonzero(~row) for row in reference.agrees], pa.int32()),
        "suppressed": _lists([np.array(reference.suppressed, np.int32)] * num_prompts, pa.int32()),
    }
    return _from_columns(PROMPTS, columns)


def reference_of(table: pa.Table) -> Reference:
    """The reference whose rows, at least one, these are."""
    table = table.combine_chunks().sort_by("prompt")
    first = table.slice(0, 1).to_pylist()[0]
    lists = {name: _matrix(table[name]) for name in ("tokens", "continuation", "human_continuation")}
    agrees = np.ones(lists["continuation"].shape, np.bool_)
    for row, positions in enumerate(table["disagreements"].to_pylist()):
        agrees[row, positions] = False
    return Reference(
        id=first["reference_id"],
        manifest_id=first["manifest_id"],
        mode=first["mode"],
        text=np.concatenate([lists["tokens"], lists["human_continuation"]], axis=1),
        continuation=lists["continuation"],
        agrees=agrees,
        suppressed=tuple(first["suppressed"]),
    )


def _matrix(column: pa.ChunkedArray) -> NDArray[np.int32]:
    """[rows, length of each list] of a list column whose lists are of one length."""
    values: NDArray[np.int32] = column.combine_chunks().flatten().to_numpy().reshape(len(column), -1).copy()
    return values


# Calibration


def weight_errors_table(run: str, errors: Sequence[WeightError]) -> pa.Table:
    columns: dict[str, Any] = {n: [getattr(e, n) for e in errors] for n in WEIGHT_ERRORS.names if n != "run"}
    return _from_columns(WEIGHT_ERRORS, columns | {"run": _coded_constant(run, len(errors))})


def weight_errors_of(table: pa.Table) -> list[WeightError]:
    return [WeightError(**row) for row in table.drop_columns(["run"]).to_pylist()]


def statistics_table(calibration: Calibration, statistics: InputStatistics) -> pa.Table:
    names = sorted(statistics.mean_squares)
    columns = {
        "calibration_id": _coded_constant(calibration.id, len(names)),
        "manifest_id": _coded_constant(calibration.manifest_id, len(names)),
        "component": names,
        "mean_squares": _lists([statistics.mean_squares[name] for name in names], pa.float32()),
    }
    return _from_columns(STATISTICS, columns)


def statistics_of(table: pa.Table) -> InputStatistics:
    """The statistics whose rows, at least one, these are."""
    table = table.combine_chunks()
    squares = table["mean_squares"].combine_chunks()
    arrays = {n: v for n, v in zip(table["component"].to_pylist(), _arrays(squares), strict=True) if v is not None}
    return InputStatistics(table["calibration_id"][0].as_py(), arrays)


_BYTES_COLUMNS = ("codes", "scales", "zeros", "mask")


def matrices_table(calibration_id: str, matrices: Sequence[PackedMatrix]) -> pa.Table:
    columns: dict[str, Any] = {
        "calibration_id": _coded_constant(calibration_id, len(matrices)),
        "rows": [m.shape[0] for m in matrices],
        "cols": [m.shape[1] for m in matrices],
    }
    columns |= {n: [getattr(m, n) for m in matrices] for n in ("component", "scheme", "bits", "block", "scale_dtype")}
    columns |= {n: [getattr(m, n).tobytes() for m in matrices] for n in _BYTES_COLUMNS}
    return _from_columns(MATRICES, columns)


def matrices_of(table: pa.Table) -> list[PackedMatrix]:
    """The matrices in rows of `matrices`; their arrays are read-only views into the rows' memory."""
    return [
        PackedMatrix(
            component=row["component"].as_py(),
            scheme=row["scheme"].as_py(),
            shape=(row["rows"].as_py(), row["cols"].as_py()),
            bits=row["bits"].as_py(),
            block=row["block"].as_py(),
            scale_dtype=row["scale_dtype"].as_py(),
            **{name: np.frombuffer(row[name].as_buffer(), np.uint8) for name in _BYTES_COLUMNS},
        )
        for batch in table.to_batches()
        for row in ({name: batch[name][at] for name in batch.schema.names} for at in range(batch.num_rows))
    ]


# Plans


@dataclass(frozen=True)
class PlanFigures:
    """What a plan amounts to over the search's components, as `plans.plan.PlanSize` counts it."""

    num_compressed: int
    share: float
    bits_per_weight: float


class PlanRows:
    """Turns plans into rows and figures, with a lookup for each (component, scheme) pair and the rest in numpy:
    a search records a hundred thousand plans of hundreds of components."""

    def __init__(self, manifest: ModelManifest, searched: Sequence[Component]) -> None:
        self._manifest = manifest
        self._searched = frozenset(c.name for c in searched)
        self._total_weights = sum(c.num_weights for c in searched)
        self._number_of_pair: dict[tuple[str, str], int] = {}
        self._component_codes: dict[str, int] = {}
        self._scheme_codes: dict[str, int] = {}
        self._pair_rows: list[tuple[int, int, int, int, int]] = []
        self._pairs = np.empty((0, 5), np.int64)

    def table(self, plans: Sequence[Plan]) -> pa.Table:
        numbers, lengths = self._numbers(plans)
        component, scheme, stored_bits, num_weights, _ = self._pairs[numbers].T
        plan_codes = np.repeat(np.arange(len(plans), dtype=np.int32), lengths)
        columns = {
            "plan_id": _coded(plan_codes, [p.id for p in plans]),
            "component": _coded(component, list(self._component_codes)),
            "scheme": _coded(scheme, list(self._scheme_codes)),
            "stored_bits": pa.array(stored_bits),
            "num_weights": pa.array(num_weights),
        }
        return _from_columns(PLANS, columns)

    def figures(self, plans: Sequence[Plan]) -> list[PlanFigures]:
        numbers, lengths = self._numbers(plans)
        _, _, stored_bits, num_weights, searched = self._pairs[numbers].T
        owner = np.repeat(np.arange(len(plans)), lengths)
        dense_bits = self._manifest.dense_bits
        counts, weights, saved = np.zeros((3, len(plans)), np.int64)
        np.add.at(counts, owner, searched)
        np.add.at(weights, owner, searched * num_weights)
        np.add.at(saved, owner, searched * (num_weights * dense_bits - stored_bits))
        return [
            PlanFigures(c, w / self._total_weights, (self._total_weights * dense_bits - s) / self._total_weights)
            for c, w, s in zip(counts.tolist(), weights.tolist(), saved.tolist(), strict=True)
        ]

    def _numbers(self, plans: Sequence[Plan]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The pair numbers of all entries of all plans, one plan after the other, and each plan's length."""
        known = self._number_of_pair
        for plan in plans:
            for entry in plan.entries:
                if entry not in known:
                    self._learn(entry)
        self._pairs = np.array(self._pair_rows, np.int64).reshape(-1, 5)
        numbers = np.array([known[entry] for plan in plans for entry in plan.entries], np.int64)
        return numbers, np.array([len(plan) for plan in plans], np.int64)

    def _learn(self, entry: tuple[str, str]) -> None:
        name, scheme = entry
        component = self._manifest.by_name.get(name)
        if component is None:
            raise ValueError(f"the plan names {name!r}, which {self._manifest.model} does not have")
        assert scheme != DENSE, "plans leave dense components out"
        stored_bits = parse_scheme(scheme).stored_bits(component.shape, self._manifest.dense_bits)
        self._number_of_pair[entry] = len(self._pair_rows)
        self._pair_rows.append(
            (
                self._component_codes.setdefault(name, len(self._component_codes)),
                self._scheme_codes.setdefault(scheme, len(self._scheme_codes)),
                stored_bits,
                component.num_weights,
                int(name in self._searched),
            )
        )


def _coded(codes: NDArray[np.integer[Any]], names: list[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(names, pa.string()))


def plan_of(table: pa.Table) -> Plan:
    """The plan whose rows these are."""
    return Plan.of(dict(zip(table["component"].to_pylist(), table["scheme"].to_pylist(), strict=True)))


# Evaluations


def evaluations_table(
    run: str, records: Sequence[EvaluationRecord], figures: Sequence[PlanFigures], version: str
) -> pa.Table:
    """Rows of evaluations. `figures` are those of each record's plan; `version` is the package's."""
    number = len(records)
    requests = [r.request for r in records]
    outcomes = [r.outcome for r in records]
    results = [o if isinstance(o, EvalResult) else None for o in outcomes]
    failures = [o if isinstance(o, EvalFailure) else None for o in outcomes]
    single = [r.plan.entries[0] if len(r.plan) == 1 else (None, None) for r in requests]
    columns: dict[str, Any] = {
        "run": _coded_constant(run, number),
        "step": [r.step for r in records],
        "evaluation_id": [r.id for r in requests],
        "plan_id": [r.plan.id for r in requests],
        "parent_plan_id": [r.parent.id for r in requests],
        "weights_id": [r.weights_id or None for r in requests],
        "perturbation": [r.perturbation for r in records],
        "component": [component for component, _ in single],
        "scheme": [scheme for _, scheme in single],
        "purpose": [r.purpose for r in records],
        "label": [r.label for r in records],
        "reused_from": [r.reused_from for r in records],
        "reference_id": [r.reference_id for r in requests],
        "status": ["ok" if f is None else f.kind for f in failures],
        "message": [None if f is None else f.message for f in failures],
        "num_compressed": [f.num_compressed for f in figures],
        "share": [f.share for f in figures],
        "bits_per_weight": [f.bits_per_weight for f in figures],
        "fdt": _lists([None if r is None else r.fdt for r in results], pa.int32()),
        "sdt": _lists([None if r is None else r.sdt for r in results], pa.int32()),
        "dppl_list": _lists([None if r is None else r.dppl for r in results], pa.float32()),
        "ppl_list": _lists([None if r is None else r.ppl for r in results], pa.float32()),
        "kl_list": _lists([None if r is None else r.kl for r in results], pa.float32()),
        "version": _coded_constant(version, number),
    }
    summaries = [None if r is None else summarize(r) for r in results]
    columns |= {name: [None if s is None else getattr(s, name) for s in summaries] for name in SUMMARY_COLUMNS}
    columns["num_prompts"] = [r.prompts[1] - r.prompts[0] for r in requests]
    return _from_columns(EVALUATIONS, columns | _provenance_columns([o.provenance for o in outcomes]))


def _provenance_columns(provenances: Sequence[Provenance]) -> dict[str, Any]:
    return {
        "tokens": [p.tokens for p in provenances],
        "wall_seconds": [p.wall_seconds for p in provenances],
        "replica": [p.replica for p in provenances],
        "node": [p.node for p in provenances],
        "attempts": [p.attempts for p in provenances],
        "finished_at": [_to_time(p.finished_at) for p in provenances],
    }


_PROVENANCE_COLUMNS = ("replica", "node", "attempts", "wall_seconds", "tokens")
OUTCOME_COLUMNS = [
    *("evaluation_id", "status", "message", "fdt", "sdt", "dppl_list", "kl_list", "ppl_list"),
    *(*_PROVENANCE_COLUMNS, "finished_at"),
]


def outcomes(batch: pa.RecordBatch) -> Iterator[Outcome]:
    """The outcomes in rows of `evaluations`. Their arrays are read-only views into the rows' memory."""
    ids, status, message = (batch[name].to_pylist() for name in ("evaluation_id", "status", "message"))
    lists = [_arrays(batch[name]) for name in ("fdt", "sdt", "dppl_list", "kl_list", "ppl_list")]
    seconds = _from_time(batch["finished_at"])
    where = map(Provenance, *(batch[name].to_pylist() for name in _PROVENANCE_COLUMNS), seconds)
    if set(status) == {"ok"}:
        yield from map(EvalResult, ids, *lists, where)
        return
    rows = zip(ids, status, message, *lists, where, strict=True)
    for request_id, kind, text, fdt, sdt, dppl, kl, ppl, provenance in rows:
        if kind == "ok":
            yield EvalResult(request_id, fdt, sdt, dppl, kl, ppl, provenance)
        else:
            yield EvalFailure(request_id, kind, text, provenance)


def summary_of(row: dict[str, Any]) -> Summary:
    """The aggregates of a row of `evaluations` whose status is `ok`."""
    return Summary(**{name: row[name] for name in SUMMARY_COLUMNS})
