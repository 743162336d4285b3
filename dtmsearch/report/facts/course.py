"""The course of a search: its candidates, its decisions, and the tree of the plans that it kept and dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.records import RunRecord
from dtmsearch.report.facts.rows import DENSE_PLAN, Row, column_of, metrics_of
from dtmsearch.store.store import ResultStore

_CANDIDATE_COLUMNS = [
    *("step", "plan_id", "parent_plan_id", "perturbation", "component", "scheme", "reference_id", "status"),
    *("num_compressed", "share", "bits_per_weight", "num_prompts"),
    *("tokens", "wall_seconds", "replica", "attempts", "reused_from", "weights_id"),
]
# Dropped plans drawn in the tree, at most.
_MOST_LEAVES = 2_000


def candidates_of(store: ResultStore, record: RunRecord) -> pa.Table:
    """The search's evaluations on its own prompts, failures included, without their lists over prompts."""
    where = pc.field("purpose") == "search"
    if record.reference_id is not None:
        where &= pc.field("reference_id") == record.reference_id
    columns = [*_CANDIDATE_COLUMNS, *(column_of(metric) for metric in metrics_of(record))]
    table = store.table("evaluations", columns, record.run, where)
    coded = [f.name for f in table.schema if pa.types.is_dictionary(f.type)]
    for name in coded:
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.string()))
    return table.combine_chunks()


def complete_of(candidates: pa.Table) -> pa.Table:
    """Those that were measured, on as many prompts as any was: others do not compare with them."""
    ok = candidates.filter(pc.equal(candidates["status"], "ok"))
    return ok.filter(pc.equal(ok["num_prompts"], pc.max(ok["num_prompts"]))) if ok.num_rows else ok


def measured_metrics(complete: pa.Table, metrics: Sequence[str], rank_by: str) -> tuple[str, ...]:
    """Those of `metrics` of which a candidate has a value, the one that ranks first."""
    measured = [m for m in metrics if complete[column_of(m)].null_count < complete.num_rows]
    return tuple(sorted(measured, key=lambda m: m != rank_by))


def path_of(complete: pa.Table, steps: Sequence[Any], metrics: Sequence[str]) -> list[Row]:
    """The decisions, with what was measured of the plan that each chose."""
    wanted = pa.array([step.plan_id for step in steps], pa.string())
    measured = complete.filter(pc.is_in(complete["plan_id"], wanted)).to_pylist()
    by_plan = {row["plan_id"]: row for row in measured}
    rows = []
    for step in steps:
        row = by_plan.get(step.plan_id, {})
        values = {metric: row.get(column_of(metric)) for metric in metrics}
        rows.append(
            {
                "step": step.step,
                "plan_id": step.plan_id,
                "edge": step.perturbation or "chosen as a whole",
                "score": step.score,
                "num_compressed": step.num_compressed,
                "share": step.share,
                "bits": step.bits_per_weight,
                "sparsity": step.sparsity,
                "evaluations": step.evaluations,
                "wall_seconds": step.wall_seconds,
                **{metric: value for metric, value in values.items() if value is not None},
            }
        )
    return rows


def ranking_of(path: Sequence[Row], components: Sequence[Row]) -> list[Row]:
    """The options that a probe ranks, from the one that costs least: `place` from 1, the components that share it,
    layer and kind of the first, scheme, and metrics as far as they were measured."""
    by_name = {row["component"]: row for row in components}
    rows = []
    for row in path:
        names, _, scheme = row["edge"].partition("=")
        first = by_name.get(names.split("+")[0], {"layer": None, "kind": None})
        option = {"components": names.replace("+", ", "), "scheme": scheme, "place": row["step"] + 1}
        rows.append({**row, **option, "layer": first["layer"], "kind": first["kind"]})
    return rows


def tree_of(complete: pa.Table, rank_by: str, chosen: Sequence[str]) -> tuple[list[Row], list[Row], int]:
    """Nodes by round and rank within it, edges between kept plans, and how many dropped plans there are."""
    # Plans that are chosen as a whole extend no other.
    rows = complete.filter(pc.and_(pc.is_valid(complete["step"]), pc.is_valid(complete["perturbation"])))
    columns = ["step", "plan_id", "parent_plan_id", "perturbation", "num_compressed", column_of(rank_by)]
    parents = set(rows["parent_plan_id"].to_pylist())
    on_path = set(chosen)
    if not parents - {DENSE_PLAN} - on_path:  # one plan at a time: a line, not a tree
        return [], [], 0
    sign = "descending" if rank_by in METRICS and METRICS[rank_by].higher_is_better else "ascending"
    ordered = rows.select(columns).sort_by([("step", "ascending"), (column_of(rank_by), sign)])
    step = ordered["step"].to_numpy()
    first = np.concatenate(([0], np.flatnonzero(np.diff(step)) + 1)) if len(step) else np.array([], np.int64)
    rank = np.arange(len(step)) - np.repeat(first, np.diff(np.append(first, len(step)))) + 1
    ordered = ordered.append_column("rank", pa.array(rank))
    kept_ids = pa.array(sorted((parents | on_path) - {DENSE_PLAN}), pa.string())
    is_kept = pc.is_in(ordered["plan_id"], kept_ids)
    leaves = ordered.filter(pc.invert(is_kept))
    if leaves.num_rows > _MOST_LEAVES:  # the best of each round, as many as can be drawn
        leaves = leaves.filter(pc.less_equal(leaves["rank"], max(1, _MOST_LEAVES // max(1, len(first)))))
    kept = [_node(row, rank_by, on_path) for row in ordered.filter(is_kept).to_pylist()]
    place = {row["plan_id"]: row for row in kept}
    root = {"step": -1, "rank": 1}
    edges = [
        {
            "step": (parent := place.get(row["parent_plan_id"], root))["step"],
            "rank": parent["rank"],
            "step2": row["step"],
            "rank2": row["rank"],
            "fate": row["fate"],
        }
        for row in kept
        if row["parent_plan_id"] in place or row["parent_plan_id"] == DENSE_PLAN
    ]
    dropped = [_node(row, rank_by, on_path) | {"fate": "dropped"} for row in leaves.to_pylist()]
    return dropped + kept, edges, ordered.num_rows - len(kept)


def _node(row: Row, rank_by: str, on_path: set[str]) -> Row:
    fate = "chosen" if row["plan_id"] in on_path else "kept"
    names = ("step", "rank", "plan_id", "parent_plan_id", "num_compressed")
    return {**{n: row[n] for n in names}, "edge": row["perturbation"], "value": row[column_of(rank_by)], "fate": fate}
