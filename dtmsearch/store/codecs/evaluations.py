"""From evaluations to rows and back, the arrays of outcomes as views into the rows' memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dtmsearch.core.evaluation import EvalFailure, EvalResult, Outcome, Provenance
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.metrics import Summary, summarize
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.records import EvaluationRecord
from dtmsearch.store.codecs.columns import arrays, coded_constant, from_columns, from_time, lists, to_time, values_of
from dtmsearch.store.codecs.plans import PlanFigures
from dtmsearch.store.schemas import EVALUATIONS, MODE_COLUMNS, SUMMARY_COLUMNS


def evaluations_table(
    run: str,
    records: Sequence[EvaluationRecord],
    figures: Sequence[PlanFigures],
    version: str,
    modes: Mapping[str, NumericMode] | None = None,
) -> pa.Table:
    """Rows of evaluations. `figures` are those of each record's plan, `modes` the numeric modes of references by their
    ids, as far as they are known; `version` is the package's."""
    number = len(records)
    requests = [r.request for r in records]
    outcomes = [r.outcome for r in records]
    results = [o if isinstance(o, EvalResult) else None for o in outcomes]
    failures = [o if isinstance(o, EvalFailure) else None for o in outcomes]
    single = [r.plan.entries[0] if len(r.plan) == 1 else (None, None) for r in requests]
    columns: dict[str, Any] = {
        "run": coded_constant(run, number),
        "step": [r.step for r in records],
        "evaluation_id": [r.id for r in requests],
        "plan_id": [r.plan.id for r in requests],
        "parent_plan_id": [r.parent.id for r in requests],
        "weights_id": [r.weights_id or None for r in requests],
        "calibration_id": [r.calibrated_by or None for r in requests],
        "extra_metrics": [sorted(r.extra_metrics) for r in requests],
        **_mode_columns([(modes or {}).get(r.reference_id) for r in requests]),
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
        "active_bits_per_weight": [f.active_bits_per_weight for f in figures],
        "fdt": lists([None if r is None else r.fdt for r in results], pa.int32()),
        "sdt": lists([None if r is None else r.sdt for r in results], pa.int32()),
        "dppl_list": lists([None if r is None else r.dppl for r in results], pa.float32()),
        "ppl_list": lists([None if r is None else r.ppl for r in results], pa.float32()),
        "kl_list": lists([None if r is None else r.kl for r in results], pa.float32()),
        "fdt_unmasked": lists([None if r is None else r.fdt_unmasked for r in results], pa.int32()),
        "sdt_unmasked": lists([None if r is None else r.sdt_unmasked for r in results], pa.int32()),
        "version": coded_constant(version, number),
    }
    summaries = [None if r is None else summarize(r) for r in results]
    columns |= _other_columns(results, summaries)
    columns |= {name: [None if s is None else getattr(s, name) for s in summaries] for name in SUMMARY_COLUMNS}
    columns["num_prompts"] = [r.prompts[1] - r.prompts[0] for r in requests]
    return from_columns(EVALUATIONS, columns | _provenance_columns([o.provenance for o in outcomes]))


def _other_columns(results: Sequence[EvalResult | None], summaries: Sequence[Summary | None]) -> dict[str, Any]:
    """Columns of metrics of other packages, null where there are none."""
    found = [dict(sorted(r.others.items())) if r is not None and r.others else None for r in results]
    return {
        "other_metrics": [None if others is None else list(others) for others in found],
        "other_means": [
            None if others is None or s is None else [s.others[name] for name in others]
            for others, s in zip(found, summaries, strict=True)
        ],
        "other_values": lists([None if o is None else np.concatenate(list(o.values())) for o in found], pa.float32()),
    }


def with_metric(rows: pa.Table, name: str) -> pa.Table:
    """Rows with `OTHER_COLUMNS`, and two columns more for a metric of another package: its value over all prompts, and
    on each (`name`, `name_list`); null where it was not measured."""
    means: list[float | None] = [None] * rows.num_rows
    values: list[list[float] | None] = [None] * rows.num_rows
    for at in np.flatnonzero(rows["other_metrics"].is_valid().to_numpy()).tolist():
        names, own = rows["other_metrics"][at].as_py(), rows["other_values"][at].as_py()
        if name in names:
            place, length = names.index(name), len(own) // len(names)
            means[at] = rows["other_means"][at].as_py()[place]
            values[at] = own[place * length : (place + 1) * length]
    rows = rows.append_column(name, pa.array(means, pa.float64()))
    return rows.append_column(f"{name}_list", pa.array(values, pa.list_(pa.float32())))


def _mode_columns(modes: Sequence[NumericMode | None]) -> dict[str, Any]:
    return {name: [None if mode is None else getattr(mode, name) for mode in modes] for name in MODE_COLUMNS}


def _provenance_columns(provenances: Sequence[Provenance]) -> dict[str, Any]:
    return {
        "tokens": [p.tokens for p in provenances],
        "wall_seconds": [p.wall_seconds for p in provenances],
        "replica": [p.replica for p in provenances],
        "node": [p.node for p in provenances],
        "attempts": [p.attempts for p in provenances],
        "finished_at": [to_time(p.finished_at) for p in provenances],
        "versions": [p.versions or None for p in provenances],
    }


_PROVENANCE_COLUMNS = ("replica", "node", "attempts", "wall_seconds", "tokens")
OUTCOME_COLUMNS = [
    *("evaluation_id", "status", "message", "fdt", "sdt", "dppl_list", "kl_list", "ppl_list"),
    *("fdt_unmasked", "sdt_unmasked", "other_metrics", "other_values"),
    *(*_PROVENANCE_COLUMNS, "finished_at", "versions"),
]


def outcomes(batch: pa.RecordBatch) -> Iterator[Outcome]:
    """The outcomes in rows of `evaluations`. Their arrays are read-only views into the rows' memory."""
    ids, status, message = (values_of(batch[name]) for name in ("evaluation_id", "status", "message"))
    lists = [arrays(batch[name]) for name in ("fdt", "sdt", "dppl_list", "kl_list", "ppl_list")]
    more = [*(arrays(batch[name]) for name in ("fdt_unmasked", "sdt_unmasked")), _others(batch)]
    seconds = from_time(batch["finished_at"])
    said = (versions or "" for versions in values_of(batch["versions"]))
    where = map(Provenance, *(values_of(batch[name]) for name in _PROVENANCE_COLUMNS), seconds, said)
    if set(status) == {"ok"}:
        yield from map(EvalResult, ids, *lists, where, *more)
        return
    rows = zip(ids, status, message, *lists, where, *more, strict=True)
    for request_id, kind, text, *measured in rows:
        if kind == "ok":
            yield EvalResult(request_id, *measured)
        else:
            yield EvalFailure(request_id, kind, text, measured[len(lists)])


def _others(batch: pa.RecordBatch) -> Sequence[Mapping[str, NDArray[np.float32]]]:
    """Metric of another package -> values, for each row."""
    names = batch["other_metrics"]
    nothing: Mapping[str, NDArray[np.float32]] = {}
    if names.null_count == len(names):
        return [nothing] * len(names)
    rows = zip(names.to_pylist(), arrays(batch["other_values"]), strict=True)
    return [
        nothing if own is None or values is None else dict(zip(own, np.split(values, len(own)), strict=True))
        for own, values in rows
    ]


def others_of(row: Mapping[str, Any]) -> dict[str, NDArray[np.generic]]:
    """Metric of another package -> values on each prompt, of a row of `evaluations` as Python values; of metrics whose
    plans compare by logarithms, those. What is not installed here is left out."""
    names = row["other_metrics"] or []
    values = np.split(np.array(row["other_values"] or [], np.float32), len(names)) if names else []
    return {name: METRICS[name].comparable(own) for name, own in zip(names, values, strict=True) if name in METRICS}


def summary_of(row: dict[str, Any]) -> Summary:
    """The aggregates of a row of `evaluations` whose status is `ok`."""
    others = dict(zip(row["other_metrics"] or (), row["other_means"] or (), strict=True))
    return Summary(**{name: row[name] for name in SUMMARY_COLUMNS}, others=others)
