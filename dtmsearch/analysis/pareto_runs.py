"""The plans of a store that no other makes needless: size against quality on held-out prompts, in SQL.

Knows the columns of the tables, nothing of how plans were found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dtmsearch.analysis.sql import query
from dtmsearch.core.pareto import Point, front
from dtmsearch.store.store import ResultStore

# metric -> the column of a candidate's mean, and whether more of it is better
METRICS = {"fdt": ("fdt_mean", True), "sdt": ("sdt_mean", False), "kl": ("kl", False)}
# The final plans of the runs, over whatever weights, and the uniform plans beside them.
_CANDIDATES = """
SELECT
  e.weights_id, e.plan_id = r.final_plan_id AS is_final,
  e.reference_id, coalesce(c.model, '') AS model, r.run, e.label, e.plan_id, e.num_compressed, e.share,
  e.bits_per_weight, e.num_prompts, e.fdt_mean, e.sdt_mean, e.dppl, e.ppl, e.kl
FROM evaluations e
JOIN runs r ON r.run = e.run AND r.validation_reference_id = e.reference_id
LEFT JOIN (SELECT manifest_id, any_value(model) AS model FROM components GROUP BY ALL) c
  ON c.manifest_id = r.manifest_id
WHERE r.run GLOB '{pattern}' AND e.status = 'ok' AND (e.purpose = 'validation' OR e.plan_id = r.final_plan_id)
  AND e.purpose != 'race'
  AND (e.plan_id = r.final_plan_id OR e.label LIKE 'uniform%' OR e.label LIKE 'preset:%')
ORDER BY e.reference_id, e.plan_id, e.plan_id != r.final_plan_id, r.created_at
"""


@dataclass(frozen=True)
class Candidate:
    """A plan on the held-out prompts of a reference; `fronts` are the metrics in which no plan as small is better."""

    reference_id: str
    model: str
    run: str
    label: str
    plan_id: str
    num_compressed: int
    share: float
    bits_per_weight: float
    num_prompts: int
    fdt_mean: float
    sdt_mean: float
    dppl: float
    ppl: float | None
    kl: float | None
    fronts: tuple[str, ...]


def candidates(store: ResultStore, pattern: str = "*") -> list[Candidate]:
    """Every validated plan of the runs whose names match a pattern, and the uniform plans beside them, by reference
    and from small to large. Plans are held against each other only on the same prompts and model."""
    rows = _each_once(store, query(store, _CANDIDATES.format(pattern=pattern.replace("'", "''"))).to_pylist())
    fronts: dict[int, list[str]] = {id(row): [] for row in rows}
    for reference in {row["reference_id"] for row in rows}:
        group = [row for row in rows if row["reference_id"] == reference]
        for metric in METRICS:
            _mark(group, metric, fronts)
    found = [Candidate(**_plan_row(row), fronts=tuple(fronts[id(row)])) for row in rows]
    return sorted(found, key=lambda c: (c.model, c.reference_id, c.bits_per_weight, c.run))


def _each_once(store: ResultStore, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each model once for a set of held-out prompts: a run's plan over the weights that it ended with, other plans over
    the base model's."""
    ended_with = {run: store.weights_id(run) or None for run in {row["run"] for row in rows}}
    found: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    for row in rows:
        is_final, weights_id = row.pop("is_final"), row.pop("weights_id")
        if weights_id == (ended_with[row["run"]] if is_final else None):
            found.setdefault((row["reference_id"], row["plan_id"], weights_id), row)
    return list(found.values())


def _mark(rows: list[dict[str, Any]], metric: str, fronts: dict[int, list[str]]) -> None:
    column, more_is_better = METRICS[metric]
    measured = [row for row in rows if row[column] is not None]
    points = [Point(row["bits_per_weight"], row[column] if more_is_better else -row[column]) for row in measured]
    for row, is_on in zip(measured, front(points), strict=True):
        if is_on:
            fronts[id(row)].append(metric)


def _plan_row(row: dict[str, Any]) -> dict[str, Any]:
    is_rival = (row["label"] or "").startswith(("uniform", "preset:"))
    return row | {"label": row["label"] if is_rival else "plan"}
