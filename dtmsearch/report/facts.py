"""What a report shows of a run, read from the store's tables: plain rows, ready to be drawn.

Everything is derived, nothing is measured. Knows tables and numbers, nothing of charts or pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtmsearch.config import section_of
from dtmsearch.plans.metrics import METRICS, PairedDifference, paired_difference
from dtmsearch.plans.plan import Plan
from dtmsearch.plans.records import RunRecord
from dtmsearch.plans.schemes import DENSE, parse_scheme
from dtmsearch.results import schemas, tables
from dtmsearch.results.pareto import candidates
from dtmsearch.results.store import ResultStore
from dtmsearch.results.summary import RunSummary, summarize_run

Row = dict[str, Any]

# The column of `evaluations` that holds a metric's value over all prompts.
COLUMN = {"fdt": "fdt_mean", "sdt": "sdt_mean", "dppl": "dppl", "ppl": "ppl", "kl": "kl"}
assert COLUMN.keys() == set(METRICS)
# Candidates drawn at most: as many spots as a figure of a page's width has apart.
MOST_POINTS = 2_500
# Plans whose damage is compared with that of their parts, at most.
_MOST_SUMS = 800
# Dropped plans drawn in the tree, at most.
_MOST_LEAVES = 2_000
_BOOTSTRAP_SEED = 0
_RESAMPLES = 2_000
_ROOT = Plan().id
_CANDIDATE_COLUMNS = [
    *("step", "plan_id", "parent_plan_id", "perturbation", "component", "scheme", "reference_id", "status"),
    *("num_compressed", "share", "bits_per_weight", "num_prompts", *COLUMN.values()),
    *("tokens", "wall_seconds", "replica", "attempts", "reused_from", "weights_id"),
]
# Attention first, then the feed-forward part, as they come in a layer; other kinds follow in order of name.
_KIND_ORDER = ("qkv", "q", "k", "v", "o", "router", "gate_up", "gate", "up", "down")


@dataclass(frozen=True)
class Cost:
    """What a run has taken. `busy_seconds` are those in which replicas measured; `utilisation` their part of the time
    that the search had on as many replicas as it knew at once, None while there is no decision."""

    evaluations: int
    reused: int
    failures: Mapping[str, int]
    retried: int
    tokens: int
    busy_seconds: float
    wall_seconds: float | None
    replicas: int
    utilisation: float | None


@dataclass(frozen=True)
class RunFacts:
    """A run, ready to be shown.

    `ceiling`: the length of continuations, which FDT and SDT end at (None before there is a reference). `metrics`:
    those measured in the search, the one that ranks first. Rows are mappings from names to plain values: `components`
    (component, layer, kind, num_weights), `sensitivity` (component and scheme with each metric's value when compressed
    alone), `plan_rows` (the final plan, or the leader so far, dense components included), `points` (candidates that
    are drawn, of `num_points`), `path` (decisions), `uniform` (plans on held-out prompts), `survival` (share of
    prompts that have not diverged by a token), `sums` (a plan's damage beside that of its parts), `nodes` and `edges`
    (the tree of kept and dropped plans), `texts` (how both models go on from prompts), `losses` (of trainings under
    masks, step by step), `sweep` (plans of all runs on the same held-out prompts; empty with one run).
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

    @property
    def title(self) -> str:
        return self.summary.run


def gather(store: ResultStore, run: str) -> RunFacts:
    """Everything that a report shows of a run. Raises `ValueError` when the store has none of that name."""
    summary = summarize_run(store, run)
    record = store.run(run)
    assert record is not None
    search = _search_section(record)
    rank_by = str(search.get("rank_by", "fdt"))
    candidates = _candidates(store, record)
    complete = _complete(candidates)
    metrics = _measured_metrics(complete, rank_by)
    components = _components(store, record)
    steps = tables.step_records(store.table("steps", run=run))
    path = _path(complete, steps)
    plan_id = summary.final_plan_id or (steps[-1].plan_id if steps else None)
    plan_rows, size_mb, dense_size_mb = _plan_rows(store, record, plan_id, components, summary.share, path)
    sensitivity = _sensitivity(candidates, components)
    ceiling = _ceiling(store, record)
    points = spread(complete, "bits_per_weight", COLUMN[rank_by], MOST_POINTS)
    nodes, edges, num_leaves = _tree(complete, rank_by, [row["plan_id"] for row in path])
    return RunFacts(
        summary=summary,
        record=record,
        rank_by=rank_by,
        strategy=str(search.get("strategy", "")),
        ceiling=ceiling,
        noise_floor=_noise_floor(store, record),
        metrics=metrics,
        size_mb=size_mb,
        dense_size_mb=dense_size_mb,
        components=components,
        sensitivity=sensitivity,
        plan_id=plan_id,
        plan_rows=plan_rows,
        points=_plain(points, metrics),
        num_points=complete.num_rows,
        path=path,
        uniform=_validated(summary),
        survival=_survival(store, record, summary),
        sums=_sums(store, record, complete, sensitivity, metrics, ceiling),
        nodes=nodes,
        edges=edges,
        num_leaves=num_leaves,
        texts=_texts(store, record, plan_id),
        losses=_losses(store, record),
        sweep=_sweep(store, record),
        cost=_cost(candidates, summary),
    )


def _search_section(record: RunRecord) -> Mapping[str, Any]:
    """What the search file says of its strategy; nothing where another version wrote a file that cannot be read."""
    return section_of(record.config, "search")


# Candidates


def _candidates(store: ResultStore, record: RunRecord) -> pa.Table:
    """The search's evaluations on its own prompts, failures included, without their lists over prompts."""
    where = pc.field("purpose") == "search"
    if record.reference_id is not None:
        where &= pc.field("reference_id") == record.reference_id
    table = store.table("evaluations", _CANDIDATE_COLUMNS, record.run, where)
    coded = [f.name for f in table.schema if pa.types.is_dictionary(f.type)]
    for name in coded:
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.string()))
    return table.combine_chunks()


def _complete(candidates: pa.Table) -> pa.Table:
    """Those that were measured, on as many prompts as any was: others do not compare with them."""
    ok = candidates.filter(pc.equal(candidates["status"], "ok"))
    return ok.filter(pc.equal(ok["num_prompts"], pc.max(ok["num_prompts"]))) if ok.num_rows else ok


def _measured_metrics(complete: pa.Table, rank_by: str) -> tuple[str, ...]:
    measured = [m for m in METRICS if complete[COLUMN[m]].null_count < complete.num_rows]
    return tuple(sorted(measured, key=lambda m: m != rank_by))


def _plain(table: pa.Table, metrics: Sequence[str]) -> list[Row]:
    """Rows with metrics under their own names."""
    names = {"plan_id": "plan_id", "perturbation": "edge", "num_compressed": "num_compressed", "share": "share"}
    names |= {"bits_per_weight": "bits", "step": "step"} | {COLUMN[m]: m for m in metrics}
    rows: list[Row] = table.select(list(names)).rename_columns(list(names.values())).to_pylist()
    return rows


def spread(table: pa.Table, x: str, y: str, most: int) -> pa.Table:
    """At most about `most` rows, one for each spot of an even grid over two columns that has any: what is left out
    would be drawn on top of what stays. Rows where either is null or infinite are left out."""
    xs, ys = (table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in (x, y))
    known = np.flatnonzero(np.isfinite(xs) & np.isfinite(ys))
    if len(known) <= most:
        return table.take(known)
    ranks = [_cells(values[known]) for values in (xs, ys)]
    for cells in (256, 192, 128, 96, 64, 48, 32):
        spots = (ranks[0] * cells).astype(np.int64) * (cells + 1) + (ranks[1] * cells).astype(np.int64)
        _, first = np.unique(spots, return_index=True)
        if len(first) <= most:
            break
    return table.take(known[np.sort(first)])


def _cells(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values from 0 to 1 between their extremes."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


# Components and plans


def _components(store: ResultStore, record: RunRecord) -> list[Row]:
    if record.manifest_id is None:
        return []
    columns = ["component", "layer", "kind", "rows", "cols", "num_weights", "dense_bits"]
    rows = store.table("components", columns, record.run, pc.field("manifest_id") == record.manifest_id).to_pylist()
    return list({row["component"]: row for row in rows}.values())


def kinds_of(components: Iterable[Row]) -> list[str]:
    """The kinds of components, as they come in a layer."""
    kinds = {row["kind"] for row in components}
    known = [kind for kind in _KIND_ORDER if kind in kinds]
    return known + sorted(kinds - set(known))


def _plan_rows(
    store: ResultStore,
    record: RunRecord,
    plan_id: str | None,
    components: list[Row],
    share: float | None,
    path: list[Row],
) -> tuple[list[Row], float | None, float | None]:
    """Each component with its scheme and bits in a plan; the size in MB of those searched, and of their dense form."""
    if plan_id is None:
        return [], None, None
    where = pc.field("plan_id") == plan_id
    stored = store.table("plans", ["component", "scheme", "stored_bits", "num_weights"], record.run, where).to_pylist()
    by_name = {row["component"]: row for row in stored}
    rows = []
    for component in components:
        own = by_name.get(component["component"])
        bits = component["dense_bits"] if own is None else own["stored_bits"] / own["num_weights"]
        scheme = DENSE if own is None else own["scheme"]
        pruned = parse_scheme(scheme).pruned_weights((component["rows"], component["cols"]))
        rows.append({**component, "scheme": scheme, "bits": bits, "pruned": pruned / component["num_weights"]})
    share = share if share is not None else (path[-1]["share"] if path else None)
    if not stored or not share:
        return rows, None, None
    compressed = sum(row["num_weights"] for row in stored)
    dense_bits = components[0]["dense_bits"] if components else 16
    total = compressed / share
    size = sum(row["stored_bits"] for row in stored) + (total - compressed) * dense_bits
    return rows, size / 8e6, total * dense_bits / 8e6


def _sensitivity(candidates: pa.Table, components: list[Row]) -> list[Row]:
    """Every component under every scheme that was measured with nothing else compressed and nothing trained, tied ones
    together; where one was measured more than once, on the most prompts."""
    alone = candidates.filter(
        pc.or_(
            pc.is_valid(candidates["component"]),
            pc.and_(pc.equal(candidates["parent_plan_id"], _ROOT), pc.is_valid(candidates["perturbation"])),
        )
    )
    alone = alone.filter(pc.and_(pc.equal(alone["status"], "ok"), pc.is_null(alone["weights_id"])))
    by_name = {row["component"]: row for row in components}
    found: dict[tuple[str, str], Row] = {}
    for row in alone.to_pylist():
        names, scheme = _edge(row)
        for name in names:
            before = found.get((name, scheme))
            if name in by_name and (before is None or before["num_prompts"] < row["num_prompts"]):
                values = {metric: row[column] for metric, column in COLUMN.items() if row[column] is not None}
                place = {key: by_name[name][key] for key in ("component", "layer", "kind", "num_weights")}
                size = {"bits": row["bits_per_weight"], "num_prompts": row["num_prompts"]}
                found[name, scheme] = {**place, "scheme": scheme, **size, **values}
    return list(found.values())


def _edge(row: Row) -> tuple[list[str], str]:
    """The components and the scheme of a plan that is one step from dense."""
    if row["component"] is not None:
        return [row["component"]], row["scheme"]
    names, _, scheme = row["perturbation"].partition("=")
    return names.split("+"), scheme


def damage(metric: str, value: float, ceiling: int | None) -> float:
    """How far a value is from that of a model that never diverges; perplexities stand for themselves."""
    return (ceiling or 0) - value if metric == "fdt" else value


# The course


def _path(complete: pa.Table, steps: Sequence[Any]) -> list[Row]:
    """The decisions, with what was measured of the plan that each chose."""
    wanted = pa.array([step.plan_id for step in steps], pa.string())
    measured = complete.filter(pc.is_in(complete["plan_id"], wanted)).to_pylist()
    by_plan = {row["plan_id"]: row for row in measured}
    rows = []
    for step in steps:
        row = by_plan.get(step.plan_id, {})
        values = {metric: row.get(column) for metric, column in COLUMN.items()}
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


def _validated(summary: RunSummary) -> list[Row]:
    rows = []
    for row in summary.validation:
        if row.summary is None:
            continue
        values = {metric: getattr(row.summary, column) for metric, column in COLUMN.items()}
        size = {"label": row.label, "share": row.share, "bits": row.bits_per_weight}
        rows.append({**size, **{metric: value for metric, value in values.items() if value is not None}})
    return rows


def _survival(store: ResultStore, record: RunRecord, summary: RunSummary) -> list[Row]:
    """For each validated plan and position: the share of held-out prompts whose text is still the base model's."""
    length = _ceiling(store, record, held_out=True)
    if length is None:
        return []
    rows = []
    for label, lists in per_prompt(store, record, summary).items():
        fdt = np.asarray(lists["fdt"])
        if label != "base":
            same = [float((fdt >= position).mean()) for position in range(length + 1)]
            rows += [{"label": label, "token": position, "same": value} for position, value in enumerate(same)]
    return rows


def per_prompt(store: ResultStore, record: RunRecord, summary: RunSummary) -> dict[str, Row]:
    """label of a validated plan -> its values per held-out prompt: fdt, sdt, kl_list."""
    labels = {row.plan_id: row.label for row in summary.validation if row.summary is not None}
    if not labels or record.validation_reference_id is None:
        return {}
    where = (pc.field("reference_id") == record.validation_reference_id) & (pc.field("status") == "ok")
    where &= pc.field("plan_id").isin(list(labels))
    rows = store.table("evaluations", ["plan_id", "fdt", "sdt", "kl_list"], record.run, where).to_pylist()
    by_label = {labels[row["plan_id"]]: row for row in rows}
    return {label: by_label[label] for label in labels.values() if label in by_label}


def interval(values: Sequence[float]) -> PairedDifference:
    """A mean over prompts with its 95% bootstrap interval."""
    array = np.asarray(values, np.float64)
    return paired_difference(array, np.zeros_like(array), _BOOTSTRAP_SEED, resamples=_RESAMPLES)


# Interaction


def _sums(
    store: ResultStore,
    record: RunRecord,
    complete: pa.Table,
    sensitivity: list[Row],
    metrics: Sequence[str],
    ceiling: int | None,
) -> list[Row]:
    """Plans of several components: the damage measured, and the sum of what their components do alone."""
    metric = next((m for m in ("kl", "sdt") if m in metrics), None)
    several = complete.filter(pc.greater(complete["num_compressed"], 1)) if metric else complete.slice(0, 0)
    if metric is None or several.num_rows == 0 or not sensitivity:
        return []
    several = spread(several, "num_compressed", COLUMN[metric], _MOST_SUMS)
    alone = {(r["component"], r["scheme"]): damage(metric, r[metric], ceiling) for r in sensitivity if metric in r}
    where = pc.field("plan_id").isin(several["plan_id"].to_pylist())
    parts = store.table("plans", ["plan_id", "component", "scheme"], record.run, where)
    sums: dict[str, float] = {}
    columns = (parts[name].to_pylist() for name in ("plan_id", "component", "scheme"))
    for plan_id, component, scheme in zip(*columns, strict=True):
        sums[plan_id] = sums.get(plan_id, 0.0) + alone.get((component, scheme), np.nan)
    rows = []
    for row in several.to_pylist():
        expected = sums.get(row["plan_id"], np.nan)
        if np.isfinite(expected):
            found = damage(metric, row[COLUMN[metric]], ceiling)
            rows.append({"metric": metric, "sum": expected, "measured": found, "num_compressed": row["num_compressed"]})
    return rows


# The tree


def _tree(complete: pa.Table, rank_by: str, chosen: Sequence[str]) -> tuple[list[Row], list[Row], int]:
    """Nodes by round and rank within it, edges between kept plans, and how many dropped plans there are."""
    rows = complete.filter(pc.is_valid(complete["step"]))
    columns = ["step", "plan_id", "parent_plan_id", "perturbation", "num_compressed", COLUMN[rank_by]]
    parents = set(rows["parent_plan_id"].to_pylist())
    on_path = set(chosen)
    if not parents - {_ROOT} - on_path:  # one plan at a time: a line, not a tree
        return [], [], 0
    sign = "descending" if rank_by == "fdt" else "ascending"
    ordered = rows.select(columns).sort_by([("step", "ascending"), (COLUMN[rank_by], sign)])
    step = ordered["step"].to_numpy()
    first = np.concatenate(([0], np.flatnonzero(np.diff(step)) + 1)) if len(step) else np.array([], np.int64)
    rank = np.arange(len(step)) - np.repeat(first, np.diff(np.append(first, len(step)))) + 1
    ordered = ordered.append_column("rank", pa.array(rank))
    kept_ids = pa.array(sorted((parents | on_path) - {_ROOT}), pa.string())
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
        if row["parent_plan_id"] in place or row["parent_plan_id"] == _ROOT
    ]
    dropped = [_node(row, rank_by, on_path) | {"fate": "dropped"} for row in leaves.to_pylist()]
    return dropped + kept, edges, ordered.num_rows - len(kept)


def _node(row: Row, rank_by: str, on_path: set[str]) -> Row:
    fate = "chosen" if row["plan_id"] in on_path else "kept"
    names = ("step", "rank", "plan_id", "parent_plan_id", "num_compressed")
    return {**{n: row[n] for n in names}, "edge": row["perturbation"], "value": row[COLUMN[rank_by]], "fate": fate}


# Texts, references and cost


def _texts(store: ResultStore, record: RunRecord, plan_id: str | None) -> list[Row]:
    """How the base model and the plan go on from prompts, least robust first, with the position of the divergence."""
    if plan_id is None or record.validation_reference_id is None:
        return []
    where = (pc.field("plan_id") == plan_id) & (pc.field("reference_id") == record.validation_reference_id)
    rows = list(
        {row["prompt"]: row for row in store.table("continuations", None, record.run, where).to_pylist()}.values()
    )
    for row in rows:
        pairs = zip(row["base_tokens"], row["own_tokens"], strict=True)
        row["diverges_at"] = next((at for at, (a, b) in enumerate(pairs) if a != b), len(row["base_tokens"]))
    return sorted(rows, key=lambda row: (row["diverges_at"], row["prompt"]))


def _losses(store: ResultStore, record: RunRecord) -> list[Row]:
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


def _sweep(store: ResultStore, record: RunRecord) -> list[Row]:
    """Every validated plan of the store on this run's held-out prompts, if more than one run has any."""
    if record.validation_reference_id is None:
        return []
    found = [c for c in candidates(store) if c.reference_id == record.validation_reference_id]
    if len({c.run for c in found if c.label == "plan"}) < 2:
        return []
    return [
        {
            **{name: getattr(c, name) for name in ("run", "label", "plan_id", "share", "kl", "num_compressed")},
            "bits": c.bits_per_weight,
            "fdt": c.fdt_mean,
            "sdt": c.sdt_mean,
            "fronts": list(c.fronts),
            "name": c.run if c.label == "plan" else c.label.replace("uniform-nearest:", "uniform:"),
            "whose": "this run" if c.run == record.run and c.label == "plan" else _others(c.label),
        }
        for c in found
    ]


def _others(label: str) -> str:
    return "another run" if label == "plan" else "uniform plan"


def _ceiling(store: ResultStore, record: RunRecord, held_out: bool = False) -> int | None:
    reference_id = record.validation_reference_id if held_out else record.reference_id
    if reference_id is None:
        return None
    rows = store.segments.read("prompts", [reference_id], ["continuation"]).slice(0, 1).to_pylist()
    return len(rows[0]["continuation"]) if rows else None


def _noise_floor(store: ResultStore, record: RunRecord) -> float | None:
    """Tokens a prompt at which the base model's single pass leaves its own cached generation, on held-out prompts."""
    reference_id = record.validation_reference_id or record.reference_id
    if reference_id is None:
        return None
    rows = store.segments.read("prompts", [reference_id], ["disagreements"])
    if rows.num_rows == 0:
        return None
    return float(pc.mean(pc.list_value_length(rows["disagreements"])).as_py())


def _cost(candidates: pa.Table, summary: RunSummary) -> Cost:
    own = candidates.filter(pc.is_null(candidates["reused_from"]))
    busy = float(pc.sum(own["wall_seconds"]).as_py() or 0.0)
    wall = summary.wall_seconds
    replicas = len(pc.unique(own["replica"]))
    statuses = Counter(candidates["status"].to_pylist())
    return Cost(
        evaluations=candidates.num_rows,
        reused=candidates.num_rows - own.num_rows,
        failures={kind: number for kind, number in sorted(statuses.items()) if kind != "ok"},
        retried=int(pc.sum(pc.greater(own["attempts"], 1)).as_py() or 0),
        tokens=int(pc.sum(own["tokens"]).as_py() or 0),
        busy_seconds=busy,
        wall_seconds=wall,
        replicas=replicas,
        utilisation=min(1.0, busy / (wall * replicas)) if wall and replicas else None,
    )
