"""What a report shows of a run, read from the store's tables: plain rows, ready to be drawn.

Everything is derived, nothing is measured. Knows tables and numbers, nothing of charts or pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtmsearch.analysis.shape import shape_sentence
from dtmsearch.analysis.summary import RunSummary, record_of, summarize_run
from dtmsearch.config.recorded_text import section_of
from dtmsearch.core.records import RunRecord
from dtmsearch.report.facts.cost import Cost, cost_of, losses_of
from dtmsearch.report.facts.course import (
    candidates_of,
    complete_of,
    measured_metrics,
    path_of,
    ranking_of,
    tree_of,
)
from dtmsearch.report.facts.held_out import (
    ceiling_of,
    noise_floor_of,
    per_prompt,
    plans_of,
    survival_of,
    sweep_of,
    texts_of,
    validated,
)
from dtmsearch.report.facts.plan_facts import components_of, plan_rows_of, sensitivity_of, sums_of
from dtmsearch.report.facts.rows import (
    MOST_POINTS,
    Row,
    bits_of,
    column_of,
    damage,
    interval,
    kinds_of,
    metrics_of,
    plain,
    spread,
)
from dtmsearch.report.facts.spending import difference_of, recipe_command, spending_of, suffering_of, uses_of
from dtmsearch.report.facts.story import Story, story_of
from dtmsearch.store.codecs import tables
from dtmsearch.store.store import ResultStore

__all__ = [
    "Row",
    "RunFacts",
    "bits_of",
    "ceiling_of",
    "column_of",
    "damage",
    "gather",
    "interval",
    "kinds_of",
    "per_prompt",
    "plans_of",
    "recipe_command",
    "spending_of",
    "spread",
    "suffering_of",
]

# The strategy that chooses no plan.
_RANKS_ONLY = "probe"


@dataclass(frozen=True)
class RunFacts:
    """A run, ready to be shown.

    `ceiling`: the length of continuations, which FDT and SDT end at (None before there is a reference). `metrics`:
    those measured in the search, the one that ranks first. Rows are mappings from names to plain values: `components`
    (component, layer, kind, num_weights), `sensitivity` (component and scheme with each metric's value when compressed
    alone), `plan_rows` (the final plan, or the leader so far, dense components included), `points` (candidates that
    are drawn, of `num_points`), `path` (decisions), `ranking` (of a probe: options from the one that
    costs least, each with its metrics), `uniform` (plans on held-out prompts), `survival` (share of
    prompts that have not diverged by a token), `story` (of a search by prices or probes), `uses` (exports that the plan
    allows), `difference` (from uniform, in a sentence), `sums` (a plan's damage beside that of its parts), `nodes` and
    `edges` (the tree of kept and dropped plans), `texts` (how both models go on from prompts), `losses` (of
    trainings under masks, step by step), `sweep` (plans of all runs on the same held-out prompts; empty with one run).
    """

    summary: RunSummary
    record: RunRecord
    rank_by: str
    strategy: str
    ceiling: int | None
    noise_floor: float | None
    metrics: tuple[str, ...]
    size_mb: float | None
    dense_size_mb: float | None
    components: list[Row]
    sensitivity: list[Row]
    plan_id: str | None
    plan_rows: list[Row]
    points: list[Row]
    num_points: int
    path: list[Row]
    ranking: list[Row]
    uniform: list[Row]
    survival: list[Row]
    sums: list[Row]
    nodes: list[Row]
    edges: list[Row]
    num_leaves: int
    texts: list[Row]
    losses: list[Row]
    sweep: list[Row]
    cost: Cost
    story: Story
    uses: list[Row]
    difference: str | None
    shape: str | None

    @property
    def title(self) -> str:
        return self.summary.run

    @property
    def alone(self) -> list[Row]:
        """What every component costs alone: as measured, else as priced."""
        return self.sensitivity or self.story.prices

    @property
    def is_by_prices(self) -> bool:
        return bool(self.story.prices)


def gather(store: ResultStore, run: str) -> RunFacts:
    """Everything that a report shows of a run. Raises `UserError` when the store has none of that name."""
    summary = summarize_run(store, run)
    record = record_of(store, run)
    search = section_of(record.config, "search")
    rank_by = str(search.get("rank_by", "fdt"))
    candidates = candidates_of(store, record)
    complete = complete_of(candidates)
    metrics = measured_metrics(complete, metrics_of(record), rank_by)
    components = components_of(store, record)
    steps = tables.step_records(store.table("steps", run=run))
    path = path_of(complete, steps, metrics)
    strategy = str(search.get("strategy", ""))
    # A probe's decisions are places in a ranking, none of which is a plan to be had.
    leader = steps[-1].plan_id if steps and strategy != _RANKS_ONLY else None
    plan_id = summary.final_plan_id or leader
    plan_rows, size_mb, dense_size_mb = plan_rows_of(store, record, plan_id, components, summary.share, path)
    sensitivity = sensitivity_of(candidates, components, metrics_of(record))
    ceiling = ceiling_of(store, record)
    points = spread(complete, "bits_per_weight", column_of(rank_by), MOST_POINTS)
    nodes, edges, num_leaves = tree_of(complete, rank_by, [row["plan_id"] for row in path])
    story = story_of(store, record, candidates, components, ceiling)
    return RunFacts(
        summary=summary,
        record=record,
        rank_by=rank_by,
        strategy=strategy,
        ceiling=ceiling,
        noise_floor=noise_floor_of(store, record),
        metrics=metrics,
        size_mb=size_mb,
        dense_size_mb=dense_size_mb,
        components=components,
        sensitivity=sensitivity,
        plan_id=plan_id,
        plan_rows=plan_rows,
        points=plain(points, metrics),
        num_points=complete.num_rows,
        path=path,
        ranking=ranking_of(path, components) if strategy == _RANKS_ONLY else [],
        uniform=validated(summary),
        survival=survival_of(store, record, summary),
        sums=sums_of(store, record, complete, sensitivity, metrics, ceiling),
        nodes=nodes,
        edges=edges,
        num_leaves=num_leaves,
        texts=texts_of(store, record, plan_id),
        losses=losses_of(store, record),
        sweep=sweep_of(store, record),
        cost=cost_of(candidates, summary, story.price_stages),
        story=story,
        uses=uses_of(record, summary, plan_rows, store.url),
        difference=difference_of(plan_rows, summary) if summary.final_plan_id else None,
        shape=None if summary.final_plan is None else shape_sentence(summary.final_plan, summary.components),
    )
