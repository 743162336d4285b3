"""Why the share of divergent tokens is a constant times the square root of KL, and which constant.

Let a plan move the logits of a position by independent Gaussians of standard deviation s, small beside 1. To second
order KL is half the variance of that move under the base model's own distribution p: on average s^2 / 2 times
1 - sum(p^2), the chance that two draws from p differ (`uncertainty`, G its mean over positions). The distance of the
two likeliest logits moves by a Gaussian of standard deviation sqrt(2) s, and the greedy token changes where that is
below minus the distance m. With f the density of m over positions, taken as f(0) as far as the move reaches, that
happens at the share

    integral of f(0) P(d < -m) dm = f(0) E[max(-d, 0)] = f(0) s / sqrt(pi),

and with s^2 = 2 KL / G the share is f(0) sqrt(2 / (pi G)) sqrt(KL). Assumed: moves are small, Gaussian, of one size at
all positions and independent between tokens, and a third token decides nowhere. f(0) and G are the base model's alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dtmsearch.analysis.findings import Axis, Findings, FoundTable, Picture, Row, spanned
from dtmsearch.errors import UserError
from dtmsearch.store.store import ResultStore
from dtmsearch.studies.evidence import Floats, interval_of
from dtmsearch.studies.ladders import rungs
from dtmsearch.studies.study import PartRun, Study

# Plans whose KL is in between are mild enough for second order, and strong enough to be told from rounding.
_MILD = (1e-4, 0.1)


def constant_of(tie_density: float, uncertainty: float) -> float:
    """The share of divergent tokens over sqrt(KL), from a model's density of near ties (per nat) and its mean
    uncertainty (see the module)."""
    return tie_density * math.sqrt(2.0 / (math.pi * uncertainty))


def conclude(store: ResultStore, parts: Sequence[PartRun]) -> Findings:
    """The constant that the base model predicts, and that of every plan."""
    (part,) = parts
    length = part.file.prompts.continuation_tokens
    base, ladder = rungs(store, part)
    if base is None:
        raise UserError(f"run {part.run!r} has not measured the unquantized model")
    ties, uncertainty = base.values("tie_density"), base.values("uncertainty")
    predicted = interval_of([ties, uncertainty], lambda means: constant_of(*means))
    rows, mild = [], []
    points: list[Row] = []
    for rung in ladder:
        kl, sdt = rung.found.values("kl"), rung.found.values("sdt") / length
        mean = float(kl.mean())
        if mean <= 0.0 or not sdt.any():
            continue
        found = interval_of([sdt, kl], _ratio)
        rows.append((rung.name, f"{mean:.3g}", f"{sdt.mean():.4f}", spanned(*found)))
        points.append({"plan": rung.name, "kind": rung.kind, "kl": mean, "share": float(sdt.mean())})
        if _MILD[0] <= mean <= _MILD[1]:
            mild.append(found[0])
    if not points:
        raise UserError("no plan of the ladder made any token diverge: add stronger schemes (search.schemes)")
    said = [
        f"Predicted from the base model alone: {spanned(*predicted)} (density of near ties {ties.mean():.3f} per nat, "
        f"uncertainty {uncertainty.mean():.3f})."
    ]
    if mild:
        middle = float(np.median(mild))
        said.append(
            f"Measured: the share of divergent tokens is {middle:.3f} of sqrt(KL) (median of {len(mild)} plans of KL "
            f"{_MILD[0]:g} to {_MILD[1]:g}, from {min(mild):.3f} to {max(mild):.3f}), {middle / predicted[0]:.2f} "
            "times the prediction."
        )
    table = FoundTable(
        "The share of divergent tokens over sqrt(KL)",
        ("plan", "KL", "share of tokens", "share / sqrt(KL)"),
        tuple(rows),
        "KL in nats per token; 95% intervals over prompts, by resampling them.",
    )
    ends = [min(point["kl"] for point in points), max(point["kl"] for point in points)]
    picture = Picture(
        "share-and-kl",
        "dots",
        points,
        Axis("kl", "KL (nats per token)", logarithmic=True),
        Axis("share", "share of divergent tokens", logarithmic=True),
        "Share of divergent tokens against KL; the dashed line is predicted from the base model alone",
        series="kind",
        marks=[{"x": end, "y": predicted[0] * math.sqrt(end)} for end in ends],
    )
    return Findings(tuple(said), (table,), (picture,))


def _ratio(means: Floats) -> float:
    share, kl = means
    return float(share / math.sqrt(kl)) if kl > 0.0 else math.nan


STUDY = Study(
    "square-root",
    "Divergent tokens and the square root of KL",
    "Which constant ties the share of divergent tokens to the square root of KL, and can it be told from the base "
    "model alone?",
    conclude,
)
