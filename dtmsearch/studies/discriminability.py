"""Which metric tells the removal of the smallest weights from that of as many at random ("Divergent Token Metrics",
arXiv 2311.01544, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtmsearch.analysis.findings import Axis, Findings, FoundTable, Picture, Row, spanned
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.statistics import mean_interval, wilson_interval
from dtmsearch.errors import UserError
from dtmsearch.search.strategies.measuring import BlockSettings, settings_of
from dtmsearch.store.store import ResultStore
from dtmsearch.studies.evidence import Measured, components_of, measured
from dtmsearch.studies.study import PartRun, Study

TOLD_BY = ("fdt", "sdt", "dppl", "kl", "ppl", "top1")
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Comparisons:
    """Of each component, block of prompts and random mask, by a metric: 1 where the first scheme was found the less
    harmful one, 0 where the random mask was, 0.5 where both came to the same: [components, blocks, masks a block].
    `num_left_out` blocks lack a mask of some component, whose evaluation failed."""

    components: tuple[str, ...]
    scores: Mapping[str, Scores]
    num_left_out: int = 0


def comparisons(rows: Sequence[Measured], masks_a_block: int = 1) -> Comparisons:
    """Every random mask beside the other scheme of its component, on the block of prompts that the mask was drawn
    for. Blocks that lack a mask of some component are left out."""
    masks: dict[str, dict[int, Measured]] = {}
    whole: dict[str, Measured] = {}
    for row in rows:
        name, _, seed = row.scheme.rpartition("-s")
        if row.component is None:
            continue
        if name.startswith("random-") and seed.isdigit():
            masks.setdefault(row.component, {})[int(seed)] = row
        else:
            whole[row.component] = row
    names = tuple(name for name in whole if name in masks)
    seeds = set.intersection(*(set(masks[name]) for name in names)) if names else set()
    num_drawn = 1 + max((seed for own in masks.values() for seed in own), default=-1)
    drawn = [range(first, first + masks_a_block) for first in range(0, num_drawn, masks_a_block)]
    complete = [(block, own) for block, own in enumerate(drawn) if seeds.issuperset(own)]
    scores = {
        metric: np.array(
            [
                [_scores(metric, whole[name], [masks[name][seed] for seed in own], block) for block, own in complete]
                for name in names
            ]
        )
        for metric in TOLD_BY
        if complete and whole[names[0]].has(metric)
    }
    return Comparisons(names, scores, len(drawn) - len(complete))


def _scores(metric: str, whole: Measured, masks: Sequence[Measured], block: int) -> list[float]:
    own = METRICS[metric].losses(np.asarray(whole.row[METRICS[metric].list_column]))
    scores = []
    for mask in masks:
        theirs = METRICS[metric].losses(np.asarray(mask.row[METRICS[metric].list_column]))
        ours = own[block * len(theirs) : (block + 1) * len(theirs)]
        scores.append(0.5 + 0.5 * float(np.sign(theirs.mean() - ours.mean())))
    return scores


def conclude(store: ResultStore, parts: Sequence[PartRun]) -> Findings:
    """How often each metric tells the two apart, by layer and by kind."""
    (part,) = parts
    settings = settings_of(BlockSettings, part.file.search.options, "discriminability")
    block, masks = settings.block, settings.masks
    found = comparisons(measured(store, part.run, TOLD_BY), masks)
    if not found.scores:
        raise UserError(
            f"run {part.run!r} has no block of prompts on which every component was measured under all of its masks "
            f"(why: dtmsearch query failures {part.run}): give more prompts (prompts.count)"
        )
    known = components_of(store, part.record.manifest_id)
    rows, said = [], []
    for metric, scores in found.scores.items():
        over = mean_interval(scores.mean(axis=(0, 2)), 0, (0.0, 1.0))
        right, wrong = int((scores == 1.0).sum()), int((scores == 0.0).sum())
        low, high = wilson_interval(right, right + wrong)
        share = right / max(right + wrong, 1)
        tied = 1.0 - (right + wrong) / scores.size
        title = METRICS[metric].title
        rows.append((title, spanned(over.mean, over.low, over.high), f"{tied:.3f}", spanned(share, low, high)))
        said.append((over.mean, title))
    said.sort(reverse=True)
    first, second = part.file.search.schemes
    best = ", ".join(f"{title} {share:.0%}" for share, title in said)
    sentence = (
        f"On {block} prompts, {first} is found less harmful than {second} in this share of "
        f"{next(iter(found.scores.values())).size:,} comparisons (50% is guessing): {best}."
    )
    left_out = f" but {found.num_left_out}, where a mask's evaluation failed" if found.num_left_out else ""
    often = "once" if masks == 1 else f"with {masks} masks"
    note = (
        f"{len(found.components)} components, each compared {often} on every block of {block} prompts{left_out}. "
        "First interval: 95% over blocks, which all components share; last: Wilson's, as if every comparison were "
        "independent."
    )
    columns = ("metric", "right, ties as half", "tied", "right where not tied")
    table = FoundTable("How often each metric tells the two apart", columns, tuple(rows), note)
    by_layer = _by(found, {name: str(known[name].layer) for name in found.components})
    by_kind = _by(found, {name: known[name].kind for name in found.components})
    titles = list(found.scores)
    tables = _table("By layer", "layer", by_layer, titles), _table("By kind", "kind", by_kind, titles)
    numbered = [{**row, "group": int(str(row["group"]))} for row in by_layer]
    pictures = _picture("layer", numbered), _picture("kind", by_kind)
    return Findings((sentence,), (table, *tables), pictures)


def _picture(what: str, rows: Sequence[Row]) -> Picture:
    return Picture(
        f"told-by-{what}",
        "lines" if what == "layer" else "dots",
        rows,
        Axis("group", what),
        Axis("share", "share told right (ties as half)"),
        f"How often each metric finds the removal of small weights less harmful than that of random ones, by {what}",
        series="metric",
        low="low",
        high="high",
        choice=f"by {what}",
    )


def _by(found: Comparisons, groups: Mapping[str, str]) -> list[Row]:
    """A row for each group of components and metric: the share told right, with Wilson's interval."""
    rows: list[Row] = []
    for group in dict.fromkeys(groups.values()):
        own = [at for at, name in enumerate(found.components) if groups[name] == group]
        for metric, scores in found.scores.items():
            told = scores[own]
            low, high = wilson_interval(float(told.sum()), told.size)
            title = METRICS[metric].title
            rows.append({"group": group, "metric": title, "share": float(told.mean()), "low": low, "high": high})
    return rows


def _table(title: str, what: str, rows: Iterable[Row], metrics: Sequence[str]) -> FoundTable:
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(str(row["group"]), []).append(spanned(row["share"], row["low"], row["high"], 2))
    columns = (what, *(METRICS[metric].title for metric in metrics))
    return FoundTable(title, columns, tuple((group, *values) for group, values in groups.items()))


STUDY = Study(
    "discriminability",
    "Which metric tells small weights from random ones",
    "Per component 0.1% of the weights are removed, the smallest or as many at random: which metric says that the "
    "first does less harm?",
    conclude,
)
