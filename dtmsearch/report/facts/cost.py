"""What a run has taken, and the losses of its trainings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from dtmsearch.analysis.summary import RunSummary
from dtmsearch.core.records import RunRecord
from dtmsearch.report.facts.rows import MOST_POINTS, Row
from dtmsearch.store import schemas
from dtmsearch.store.store import ResultStore


@dataclass(frozen=True)
class Cost:
    """What a run has taken. Of `tokens`, `price_tokens` went through backward passes too. `busy_seconds` are those in
    which replicas measured; `utilisation` their part of the time that the search had on as many replicas as it knew at
    once, None while there is no decision."""

    evaluations: int
    reused: int
    failures: Mapping[str, int]
    retried: int
    tokens: int
    price_tokens: int
    busy_seconds: float
    wall_seconds: float | None
    replicas: int
    utilisation: float | None


def cost_of(candidates: pa.Table, summary: RunSummary, priced: Sequence[Row]) -> Cost:
    """`priced` are the stages in which prices were taken."""
    own = candidates.filter(pc.is_null(candidates["reused_from"]))
    busy = float(pc.sum(own["wall_seconds"]).as_py() or 0.0) + sum(stage["seconds"] for stage in priced)
    price_tokens = sum(stage["tokens"] for stage in priced)
    wall = summary.wall_seconds
    replicas = len(pc.unique(own["replica"]))
    statuses = Counter(candidates["status"].to_pylist())
    return Cost(
        evaluations=candidates.num_rows,
        reused=candidates.num_rows - own.num_rows,
        failures={kind: number for kind, number in sorted(statuses.items()) if kind != "ok"},
        retried=int(pc.sum(pc.greater(own["attempts"], 1)).as_py() or 0),
        tokens=int(pc.sum(own["tokens"]).as_py() or 0) + price_tokens,
        price_tokens=price_tokens,
        busy_seconds=busy,
        wall_seconds=wall,
        replicas=replicas,
        utilisation=min(1.0, busy / (wall * replicas)) if wall and replicas else None,
    )


def losses_of(store: ResultStore, record: RunRecord) -> list[Row]:
    """The loss of every step of the run's trainings under masks, at most as many as a picture tells apart."""
    if "trainings" not in schemas.SCHEMAS:
        return []
    trainings = {row["training_id"]: row for row in store.table("trainings", run=record.run).to_pylist()}
    rows: list[Row] = []
    for training in sorted(trainings.values(), key=lambda row: row["round"]):
        losses = training["losses"] or []
        stride = max(1, len(losses) * len(trainings) // MOST_POINTS)
        place = {"round": f"round {training['round'] + 1}"}
        rows += [{**place, "step": step, "loss": losses[step]} for step in range(0, len(losses), stride)]
    return rows
