"""Whether a plan that was found on one kind of text holds on another, and what a plan for all of them costs each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dtmsearch.analysis.findings import Axis, Findings, FoundTable, Picture, spanned
from dtmsearch.core.statistics import kendall_tau
from dtmsearch.search.strategies.measuring import half_of
from dtmsearch.store.store import ResultStore
from dtmsearch.studies.evidence import Floats, Measured, interval_of, measured
from dtmsearch.studies.study import PartRun, Study

MIXTURE, UNIFORM = "all together", "uniform"


def conclude(store: ResultStore, parts: Sequence[PartRun]) -> Findings:
    """The regret of every plan on every text, on prompts that no plan was chosen by; how far rankings agree."""
    (part,) = parts
    names = _names([source.files[0] for source in part.file.prompts.mix])
    rows = measured(store, part.run, ("fdt", "sdt", "kl"))
    plans = _plans(store, part, names, rows)
    by_plan = {row.plan_id: row for row in rows if row.component is None or row.plan_id in plans.values()}
    count = part.file.prompts.count
    judged = {name: half_of(count, len(names), at, first=False) for at, name in enumerate(names)}
    kl = {plan: {text: by_plan[i].values("kl")[at] for text, at in judged.items()} for plan, i in plans.items()}
    fdt = {plan: {text: by_plan[i].values("fdt")[at] for text, at in judged.items()} for plan, i in plans.items()}
    said, worst = [], ("", "", 0.0)
    for plan in names:
        for text in names:
            ratio = _ratio(kl, plan, text)
            if ratio[0] > worst[2]:
                worst = plan, text, ratio[0]
    said.append(
        f"The plan chosen on {worst[0]} has {worst[2]:.2f} times the KL of {worst[1]}'s own plan on {worst[1]}, the "
        "most of all pairs."
    )
    costs = {text: _ratio(kl, MIXTURE, text) for text in names}
    listed = ", ".join(f"{text} {spanned(*ratio, 2)}" for text, ratio in costs.items())
    said.append(f"One plan for all of them has, in each text's own plan's KL: {listed}.")
    regret = FoundTable(
        "KL of each plan over that of the text's own plan",
        ("plan chosen on", *(f"on {name}" for name in names)),
        tuple((plan, *(spanned(*_ratio(kl, plan, text), 2) for text in names)) for plan in kl),
        f"On the second half of each text's prompts ({len(judged[names[0]])}); 95% intervals over prompts. Below 1: by "
        "chance, or because the text's own half of the prompts was too small to choose by.",
    )
    values = FoundTable(
        "KL and FDT themselves",
        ("plan chosen on", *(f"on {name}" for name in names)),
        tuple((p, *(f"{kl[p][t].mean():.4f}, FDT {fdt[p][t].mean():.1f}" for t in names)) for p in kl),
    )
    ranking = _rankings(rows, names, count)
    points = [
        {"plan": plan, "text": text, "ratio": value, "low": low, "high": high}
        for plan in kl
        for text in names
        for value, low, high in [_ratio(kl, plan, text)]
    ]
    picture = Picture(
        "regret",
        "dots",
        points,
        Axis("text", "measured on"),
        Axis("ratio", "KL over that of the text's own plan", logarithmic=True),
        "What a plan that was chosen on one text costs on another",
        series="plan",
        low="low",
        high="high",
    )
    return Findings(tuple(said), (regret, values, ranking), (picture,))


def _names(paths: Sequence[str]) -> list[str]:
    """What the texts are called: their files' names, told apart by numbers where two are the same."""
    names = [Path(path).name.partition(".")[0] for path in paths]
    return [name if names.count(name) == 1 else f"{name} {at + 1}" for at, name in enumerate(names)]


def _plans(store: ResultStore, part: PartRun, names: Sequence[str], rows: Sequence[Measured]) -> dict[str, str]:
    """What a plan was chosen on -> the plan: each text, all together, and the largest
    uniform plan within the budget."""
    steps = sorted(store.table("steps", ["step", "plan_id"], part.run).to_pylist(), key=lambda row: row["step"])
    found = dict(zip((*names, MIXTURE), (row["plan_id"] for row in steps), strict=True))
    whole = [row for row in rows if row.component is None and row.plan_id not in found.values()]
    largest = max(whole, key=lambda row: float(row.row["bits_per_weight"]), default=None)
    return found | ({} if largest is None else {UNIFORM: largest.plan_id})


def _ratio(kl: Mapping[str, Mapping[str, Floats]], plan: str, text: str) -> tuple[float, float, float]:
    return interval_of([kl[plan][text], kl[text][text]], lambda means: float(means[0] / max(means[1], 1e-300)))


def _rankings(rows: Sequence[Measured], names: Sequence[str], count: int) -> FoundTable:
    """How far texts rank single components alike, beside how far a text's two halves do."""
    alone = np.array([row.values("kl") for row in rows if row.component is not None])
    halves = {
        (name, first): alone[:, half_of(count, len(names), at, first)].mean(axis=1)
        for at, name in enumerate(names)
        for first in (True, False)
    }
    lines = [
        (one, *(f"{kendall_tau(halves[one, True], halves[other, False]):.2f}" for other in names)) for one in names
    ]
    return FoundTable(
        "How far the rankings of components under each scheme agree (Kendall's tau)",
        ("first half of", *(f"second half of {name}" for name in names)),
        tuple(lines),
        "The diagonal is a text against itself on other prompts.",
    )


STUDY = Study(
    "domains",
    "Plans across kinds of text",
    "Does a plan that was found on one kind of text hold on another, and what does a plan for all of them cost?",
    conclude,
    mixes=True,
)
