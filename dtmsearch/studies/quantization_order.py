"""In which order metrics have components quantized ("Divergent Token Metrics", arXiv 2311.01544, section 4.2), and what
the plans of these orders come to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtmsearch.analysis.findings import Axis, Findings, FoundTable, Picture
from dtmsearch.core.evaluation import IntArray, ModelSpec
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.statistics import FEWEST, kendall_tau, paired_difference
from dtmsearch.search.strategies.measuring import settings_of
from dtmsearch.search.strategies.orders import ORDERED_BY, OrderSettings, order_by, ordered_plans
from dtmsearch.store.store import ResultStore
from dtmsearch.studies.evidence import Floats, Measured, components_of, measured, told
from dtmsearch.studies.study import Part, PartRun, Study

if TYPE_CHECKING:
    from dtmsearch.workflows.weight_shapes import WeightShape

_ALL = ("fdt", "sdt", "dppl", "ppl", "kl")
_ORDER = "order"
# Rows of text over which inputs are looked at for outliers.
_TEXT_ROWS = 16
_LAST = 12


def conclude(store: ResultStore, parts: Sequence[PartRun]) -> Findings:
    """What orders by each metric on more and more prompts come to, which components come last, and what tree searches
    ranked by each metric found."""
    said: list[str] = []
    tables: list[FoundTable] = []
    pictures: list[Picture] = []
    for part in parts:
        if part.label == _ORDER:
            found = _orders(store, part)
            said, tables, pictures = list(found.said), list(found.tables), list(found.pictures)
    searched = [part for part in parts if part.label != _ORDER]
    if searched:
        sentence, table, course = _searched(store, searched)
        said.append(sentence)
        tables.append(table)
        pictures.append(course)
    return Findings(tuple(said), tuple(tables), tuple(pictures))


def _orders(store: ResultStore, part: PartRun) -> Findings:
    rows = measured(store, part.run, _ALL)
    count = part.file.prompts.count
    alone = [row for row in rows if row.component is not None]
    steps = sorted(store.table("steps", ["step", "plan_id", "share"], part.run).to_pylist(), key=lambda r: r["step"])
    by_id = {row.plan_id: row for row in rows}
    percent = settings_of(OrderSettings, part.file.search.options, "orders").percent
    wanted = ordered_plans(count, percent)
    plans = [(each, by_id[step["plan_id"]], step["share"]) for each, step in zip(wanted, steps, strict=True)]
    judged = np.arange(count // 2, count)
    share = percent / 100
    fewer = {(each.metric, each.prompts): row for each, row, _ in plans if each.share == share}
    sizes = sorted({size for _, size in fewer})
    length = part.file.prompts.continuation_tokens
    tables = [_by_prompts(fewer, sizes, judged, metric, length) for metric in ("kl", "fdt")]
    depth = [
        {
            "ranked": f"by {METRICS[each.metric].title}",
            "share": reached,
            "kl": float(row.values("kl")[judged].mean()),
            "fdt": float(row.values("fdt")[judged].mean()),
            "ppl": float(np.exp(row.values("ppl")[judged].mean())),
        }
        for each, row, reached in plans[len(fewer) :]
    ]
    places = _places(alone, count // 2)
    spec = part.file.model_spec
    shapes = _shapes(spec, _text(store, part, _TEXT_ROWS))
    tables += [_last(store, part, alone, places)] + ([_outliers(alone, places, shapes)] if len(shapes) > 2 else [])
    titles = {"fdt": "FDT (tokens)", "kl": "KL (nats per token)", "ppl": "PPL on human text"}
    pictures = [
        Picture(
            f"depth-{metric}",
            "lines",
            depth,
            Axis("share", "share of the weights that is quantized"),
            Axis(metric, titles[metric], logarithmic=metric == "kl"),
            f"{titles[metric]} against the share that is quantized, in the order of each metric, on other prompts",
            series="ranked",
            choice=metric.upper(),
            place="depth",
        )
        for metric in titles
    ]
    return Findings(_sentences(fewer, sizes, judged, share), tuple(tables), tuple(pictures))


def _shapes(spec: ModelSpec, rows: IntArray) -> Mapping[str, WeightShape]:
    """Component -> its outliers; nothing where the model or what loads it is elsewhere, as on the head of a cluster."""
    if not Path(spec.path).is_dir() or find_spec("torch") is None:
        return {}
    from dtmsearch.workflows.weight_shapes import weight_shapes

    return weight_shapes(spec, rows)


def _sentences(
    fewer: Mapping[tuple[str, int], Measured], sizes: Sequence[int], judged: Any, share: float
) -> tuple[str, ...]:
    most = sizes[-1]
    kl = {metric: fewer[metric, most].values("kl")[judged] for metric in ORDERED_BY}
    fdt = {metric: fewer[metric, most].values("fdt")[judged] for metric in ORDERED_BY}
    listed = ", ".join(
        f"{METRICS[m].title} {fdt[m].mean():.1f} (KL {kl[m].mean():.4f})"
        for m in sorted(ORDERED_BY, key=lambda m: -float(fdt[m].mean()))
    )
    said = [f"Orders by {most} prompts, {share:.0%} of the weights quantized, FDT on other prompts: {listed}."]
    enough: list[int] = []
    for size in reversed(sizes):  # and on every larger number of prompts
        if _is_worse(fewer["fdt", size].values("kl")[judged], kl["kl"]):
            break
        enough.insert(0, size)
    if enough:
        said.append(f"The order by FDT is not surely worse than KL's (in KL) from {enough[0]} prompts on.")
    else:
        said.append(f"The order by FDT is surely worse than KL's (in KL) even on {most} prompts.")
    lost = {(metric, size): -fewer[metric, size].values("fdt")[judged] for metric in ("kl", "fdt") for size in sizes}
    overtakes = [size for size in sizes if _is_worse(lost["kl", size], lost["fdt", size])]
    said.append(
        f"In FDT itself it surely overtakes KL's order of as many prompts at {', '.join(map(str, overtakes))} prompts."
        if overtakes
        else "In FDT itself it nowhere surely overtakes KL's order of as many prompts."
    )
    return tuple(said)


def _is_worse(losses: Floats, others: Floats) -> bool:
    return len(losses) >= FEWEST and paired_difference(losses, others, 0).low > 0.0


def _by_prompts(
    fewer: Mapping[tuple[str, int], Measured], sizes: Sequence[int], judged: Any, metric: str, length: int
) -> FoundTable:
    rows = [
        (METRICS[ranked].title, *(told(fewer[ranked, size].values(metric)[judged], metric, length) for size in sizes))
        for ranked in ORDERED_BY
    ]
    return FoundTable(
        f"{METRICS[metric].title} of the plan, by what components were ranked by and on how many prompts",
        ("ranked by", *(f"{size} prompts" for size in sizes)),
        tuple(rows),
        f"On {len(judged)} other prompts, with 95% intervals. Plans quantize the least harmful components first.",
    )


def _places(alone: Sequence[Measured], prompts: int) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """metric -> the place of each component in its order, from 0."""
    values = [{name: np.asarray(row.row[METRICS[name].list_column]) for name in _ALL} for row in alone]
    found = {}
    for metric in ORDERED_BY:
        found[metric] = np.empty(len(alone), np.int64)
        found[metric][order_by(values, metric, prompts)] = np.arange(len(alone))
    return found


def _last(
    store: ResultStore,
    part: PartRun,
    alone: Sequence[Measured],
    places: Mapping[str, np.ndarray[Any, np.dtype[np.int64]]],
) -> FoundTable:
    known = components_of(store, part.record.manifest_id)
    rows = []
    for at in np.argsort(-places["kl"])[:_LAST]:
        name = str(alone[at].component)
        by = [f"{int(places[metric][at]) + 1}" for metric in ORDERED_BY]
        rows.append((f"layer {known[name].layer} {known[name].kind}", f"{alone[at].values('kl').mean():.4f}", *by))
    columns = ("component", "KL alone", *(f"place by {METRICS[m].title}" for m in ORDERED_BY))
    return FoundTable(f"The last {len(rows)} of {len(alone)} components by KL", columns, tuple(rows))


def _outliers(
    alone: Sequence[Measured],
    places: Mapping[str, np.ndarray[Any, np.dtype[np.int64]]],
    shapes: Mapping[str, WeightShape],
) -> FoundTable:
    titles = {
        "kurtosis": "kurtosis of weights",
        "weights_over_median": "largest over median weight",
        "inputs_over_median": "largest over median input",
        "outlier_features": "share of outlier features (6.0)",
    }
    known = [at for at, row in enumerate(alone) if row.component in shapes]
    values = [asdict(shapes[str(alone[at].component)]) for at in known]
    rows = [
        (title, *(f"{kendall_tau(np.array([v[name] for v in values]), places[m][known]):+.2f}" for m in ORDERED_BY))
        for name, title in titles.items()
    ]
    return FoundTable(
        "Do components with outliers come last? Kendall's tau of the order with each",
        ("outliers", *(f"order by {METRICS[m].title}" for m in ORDERED_BY)),
        tuple(rows),
        f"{len(known)} components; inputs over {_TEXT_ROWS} prompts of the study. Of unrelated ones tau is within "
        f"{_chance(len(known)):.2f} of 0 in 19 of 20 cases.",
    )


def _chance(number: int) -> float:
    """Two standard deviations of Kendall's tau of so many unrelated values."""
    return 2.0 * math.sqrt(2.0 * (2 * number + 5) / (9.0 * number * max(number - 1, 1)))


def _text(store: ResultStore, part: PartRun, rows: int) -> Any:
    reference = store.reference(str(part.record.reference_id))
    assert reference is not None, "a run that is finished has its reference"
    return reference.text[:rows]


def _searched(store: ResultStore, parts: Sequence[PartRun]) -> tuple[str, FoundTable, Picture]:
    """Tree searches, each ranked by a metric: their plans on held-out prompts, and FDT along the way."""
    rows, points, held = [], [], {}
    for part in parts:
        ranked = METRICS[part.file.search.rank_by].title
        plan = next((r for r in measured(store, part.run, _ALL, "validation") if r.row["label"] == "plan"), None)
        steps = store.table("steps", ["step", "plan_id", "share"], part.run).to_pylist()
        by_id = {row.plan_id: row for row in measured(store, part.run, _ALL)}
        for step in steps:
            row = by_id.get(step["plan_id"])
            if row is not None:
                values = {m: float(row.values(m).mean()) for m in ("fdt", "kl")}
                points.append({"ranked": f"by {ranked}", "share": step["share"], **values})
        if plan is None:
            continue
        held[ranked] = plan
        length = part.file.prompts.continuation_tokens
        cells = [told(plan.values(metric), metric, length) for metric in ("fdt", "sdt", "kl", "ppl")]
        rows.append((ranked, f"{plan.row['num_compressed']}", f"{plan.row['share']:.1%}", *cells))
    columns = ("ranked by", "components", "share", "FDT", "SDT", "KL", "PPL")
    prompts = {row.row["num_prompts"] for row in held.values()}
    table = FoundTable(
        "Tree searches ranked by each metric, their plans on held-out prompts",
        columns,
        tuple(rows),
        f"{', '.join(map(str, sorted(prompts)))} held-out prompts, means with 95% intervals.",
    )
    listed = ", ".join(f"{r} {p.values('fdt').mean():.1f}" for r, p in sorted(held.items(), key=_fdt, reverse=True))
    course = Picture(
        "searches",
        "lines",
        points,
        Axis("share", "share of the weights that is quantized"),
        Axis("fdt", "FDT (tokens) on the search's own prompts"),
        "FDT along tree searches ranked by each metric, on the prompts that they choose by",
        series="ranked",
        place="searches",
    )
    return f"Tree searches, FDT of their plans on held-out prompts, by what ranked them: {listed}.", table, course


def _fdt(item: tuple[str, Measured]) -> float:
    return float(item[1].values("fdt").mean())


def _search(metric: str) -> Part:
    return Part(metric, ("search.strategy=lazy_greedy", f"search.rank_by={metric}", "search.options={}"))


STUDY = Study(
    "quantization-order",
    "The order in which components are quantized",
    "Ranked by PPL, DPPL, FDT, SDT or KL: which components come last, what do the plans come to, and how many prompts "
    "make FDT's ranking as good as KL's?",
    conclude,
    (Part(_ORDER), *(_search(metric) for metric in ORDERED_BY)),
)
