"""What metrics of divergence say of multiple-choice tasks, and which orders plans as the tasks do.

Accuracy hides what changes: answers that turn wrong are made up for by others that turn right. So flips are counted as
well, the share of questions whose answer is another than the base model's (Dutta et al., "Accuracy is Not All You
Need", arXiv 2407.09141). Questions that have to be known stand apart from easy ones, as in LLM-KICK (arXiv 2310.01382).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtmsearch.analysis.findings import Axis, Findings, FoundTable, Picture, spanned
from dtmsearch.core.cloze import CHOICES, KINDS, QuestionKind
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.plan import Plan
from dtmsearch.core.statistics import kendall_tau, wilson_interval
from dtmsearch.errors import UserError
from dtmsearch.store.store import ResultStore
from dtmsearch.studies.evidence import Floats, Measured, measured
from dtmsearch.studies.study import PartRun, Study

ORDERED_BY = ("fdt", "sdt", "kl", "dppl", "ppl")
_RESAMPLES = 200
Answers = Mapping[QuestionKind, NDArray[np.int64]]
_SAYS = {"passage": "what follows (easy)", "near": "what follows, nearby", "word": "rare word (knowledge)"}


@dataclass(frozen=True)
class Asked:
    """A plan's values and answers: metric -> losses [prompts]; kind -> whether it was right, and whether its answer is
    another than the base model's, each [questions]."""

    row: Measured
    losses: Mapping[str, Floats]
    right: Mapping[QuestionKind, Floats]
    flipped: Mapping[QuestionKind, Floats]


def asked(rows: Sequence[Measured], answers: Sequence[Answers], base: Answers) -> list[Asked]:
    """Plans with their answers, those of small KL first."""
    found = [
        Asked(
            row,
            {name: METRICS[name].losses(np.asarray(row.row[METRICS[name].list_column])) for name in ORDERED_BY},
            {kind: (own[kind] == 0).astype(np.float64) for kind in own},
            {kind: (own[kind] != base[kind]).astype(np.float64) for kind in own},
        )
        for row, own in zip(rows, answers, strict=True)
    ]
    return sorted(found, key=lambda each: float(each.losses["kl"].mean()))


def agreement(
    plans: Sequence[Asked], metric: str, of_answers: Sequence[Floats], seed: int = 0
) -> tuple[float, float, float]:
    """Kendall's tau between the orders of plans by a metric and by what came of their answers [questions] each, the
    more the worse, with its 95% interval: percentiles over prompts and questions resampled alike for all plans."""
    losses, counts = np.array([plan.losses[metric] for plan in plans]), np.array(of_answers)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(_RESAMPLES):
        prompts = random.integers(losses.shape[1], size=losses.shape[1])
        questions = random.integers(counts.shape[1], size=counts.shape[1])
        drawn.append(kendall_tau(losses[:, prompts].mean(axis=1), counts[:, questions].mean(axis=1)))
    low, high = np.nanpercentile(drawn, (2.5, 97.5)) if np.isfinite(drawn).any() else (math.nan, math.nan)
    return kendall_tau(losses.mean(axis=1), counts.mean(axis=1)), float(low), float(high)


def conclude(store: ResultStore, parts: Sequence[PartRun]) -> Findings:
    """Ask the plans of the ladder, and say which metric orders them as their answers do."""
    from dtmsearch.workflows.asking import asked_of

    (part,) = parts
    rows = measured(store, part.run, ORDERED_BY)
    plans = [store.plan(row.plan_id, part.run) for row in rows]
    known = [(row, plan) for row, plan in zip(rows, plans, strict=True) if plan is not None and plan != Plan()]
    if len(known) < 3:
        raise UserError("fewer than 3 plans were measured: add search.schemes or options.mixed")
    base, *answers = asked_of(part.file, [Plan(), *(plan for _, plan in known)])
    return concluded(asked([row for row, _ in known], answers, base), base)


def concluded(found: Sequence[Asked], base: Answers) -> Findings:
    """What follows from plans and their answers."""
    taus = {
        (metric, kind, what): agreement(found, metric, counts)
        for kind in KINDS
        for what, counts in (
            ("accuracy", [1.0 - plan.right[kind] for plan in found]),
            ("flips", [plan.flipped[kind] for plan in found]),
        )
        for metric in ORDERED_BY
    }
    said = [_on_the_base(base), *(_best(taus, what) for what in ("accuracy", "flips"))]
    asked_for = [(what, kind) for what in ("accuracy", "flips") for kind in KINDS]
    rows = tuple(
        (METRICS[metric].title, *(spanned(*taus[metric, kind, what], 2) for what, kind in asked_for))
        for metric in ORDERED_BY
    )
    columns = ("metric", *(f"{what}: {_SAYS[kind]}" for what, kind in asked_for))
    note = (
        "Kendall's tau between plans by the metric and by wrong answers or flips; 95% intervals over prompts and "
        "questions."
    )
    points = [
        {
            "kl": float(plan.losses["kl"].mean()),
            "flips": float(plan.flipped[kind].mean()),
            "accuracy": float(plan.right[kind].mean()),
            "kind": _SAYS[kind],
        }
        for plan in found
        for kind in KINDS
        if plan.losses["kl"].mean() > 0.0
    ]
    kl = Axis("kl", "KL (nats per token)", logarithmic=True)
    pictures = (
        Picture("flips", "dots", points, kl, Axis("flips", "share of other answers", from_zero=True),
                "Share of questions that are answered otherwise than by the base model, against KL",
                series="kind", choice="flips"),
        Picture("accuracy", "dots", points, kl, Axis("accuracy", "share of right answers"),
                f"Share of right answers against KL; chance is {1 / CHOICES:.2f}", series="kind", choice="accuracy"),
    )  # fmt: skip
    tables = (FoundTable("Which metric orders plans as their answers do", columns, rows, note), _plans(found))
    return Findings(tuple(said), tables, pictures)


def _plans(found: Sequence[Asked]) -> FoundTable:
    columns = ("bits per weight", "KL", "FDT", "SDT", "PPL", *(f"right / flips: {_SAYS[kind]}" for kind in KINDS))
    rows = []
    for plan in found:
        fdt, sdt, ppl = -plan.losses["fdt"].mean(), plan.losses["sdt"].mean(), math.exp(plan.losses["ppl"].mean())
        kinds = (f"{plan.right[kind].mean():.3f} / {plan.flipped[kind].mean():.3f}" for kind in KINDS)
        size = f"{plan.row.row['bits_per_weight']:.2f}"
        rows.append((size, f"{plan.losses['kl'].mean():.3g}", f"{fdt:.1f}", f"{sdt:.1f}", f"{ppl:.4g}", *kinds))
    return FoundTable("Plans", columns, tuple(rows), f"Of {CHOICES} choices each; chance is {1 / CHOICES:.2f}.")


def _on_the_base(base: Answers) -> str:
    shares = []
    for kind in KINDS:
        right = int((base[kind] == 0).sum())
        low, high = wilson_interval(right, len(base[kind]))
        shares.append(f"{_SAYS[kind]} {spanned(right / len(base[kind]), low, high, 2)}")
    return f"The base model's share of right answers ({1 / CHOICES:.2f} is chance): {'; '.join(shares)}."


def _best(taus: Mapping[tuple[str, QuestionKind, str], tuple[float, float, float]], what: str) -> str:
    parts = []
    for kind in KINDS:
        first = max(ORDERED_BY, key=lambda metric: np.nan_to_num(taus[metric, kind, what][0], nan=-2.0))
        parts.append(f"{_SAYS[kind]}: {METRICS[first].title} {spanned(*taus[first, kind, what], 2)}")
    return f"Nearest to the order by {what} (Kendall's tau): {'; '.join(parts)}."


STUDY = Study(
    "tasks",
    "Divergence and tasks",
    "What do FDT, SDT, KL and perplexities say of accuracy and of changed answers on multiple-choice questions, and "
    "which orders plans best?",
    conclude,
)
