"""What is left of greedy divergence where continuations are sampled by noise that both models share.

At a position where the two distributions p and q have the total variation v, the same Gumbel noise makes them choose
different tokens with a probability of at least v, as any pair of samples does, and of at most 2 v / (1 + v): both
choose the token t with the probability 1 / sum(max(p / p_t, q / q_t)) >= min(p_t, q_t) / sum(max(p, q)), which adds up
to at least (1 - v) / (1 + v) (Daliri, Musco and Suresh, arXiv 2408.07978).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from dtmsearch.analysis.findings import Axis, Findings, FoundTable, Picture, spanned
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.statistics import kendall_tau, paired_difference
from dtmsearch.errors import UserError
from dtmsearch.store.store import ResultStore
from dtmsearch.studies.evidence import Floats, interval_of, measured
from dtmsearch.studies.study import Part, PartRun, Study

METRICS_USED = ("fdt", "sdt", "kl", "overlap")


@dataclass(frozen=True)
class Sampled:
    """What plans measured under one decoding: plan -> metric -> its value on each prompt; the unquantized plan
    apart."""

    label: str
    length: int
    plans: Mapping[str, Mapping[str, Floats]]
    base: Mapping[str, Floats]
    disagreement: float


def most_divergence(total_variation: float) -> float:
    """What shared noise makes of a total variation at most (see the module)."""
    return 2.0 * total_variation / (1.0 + total_variation)


def _sampled(store: ResultStore, part: PartRun) -> Sampled:
    rows = measured(store, part.run, METRICS_USED)
    values = {row.plan_id: {name: row.values(name) for name in METRICS_USED if row.has(name)} for row in rows}
    base = next((row.plan_id for row in rows if row.row["num_compressed"] == 0), None)
    if base is None:
        raise UserError(f"run {part.run!r} has not measured the unquantized model")
    reference = store.reference(str(part.record.reference_id))
    assert reference is not None
    own = values.pop(base)
    return Sampled(part.label, reference.continuation_tokens, values, own, reference.disagreement)


def conclude(store: ResultStore, parts: Sequence[PartRun]) -> Findings:
    """How plans rank under each decoding, how surely they are told apart, and how often shared noise parts samples."""
    found = [_sampled(store, part) for part in parts]
    shared = [plan for plan in found[0].plans if all(plan in each.plans for each in found)]
    if len(shared) < 3:
        raise UserError("fewer than 3 plans were measured under every decoding: add search.schemes or options.mixed")
    first = next((each for each in found if each.label == "greedy"), found[0])
    overview = tuple(_overview(each, first, shared) for each in found)
    points: list[dict[str, Any]] = [
        {
            "decoding": each.label,
            "kl": float(plan["kl"].mean()),
            "share": float(plan["sdt"].mean()) / each.length,
            "variation": 1.0 - float(plan["overlap"].mean()),
        }
        for each in found
        for plan in each.plans.values()
        if plan["sdt"].any() and plan["kl"].mean() > 0.0
    ]
    sampled = [point for point in points if point["decoding"] != "greedy"]
    said = [_on_the_base(found), *_on_noise(sampled)]
    tables = (
        FoundTable(
            "Decodings",
            ("decoding", "base leaves its own", "FDT of base", "tau FDT, KL", f"tau with {first.label} FDT", *_TOLD,
             "share / sqrt(KL)"),
            overview,
            "Base leaves its own: share of tokens that the base model's single pass chooses otherwise than its cached "
            "generation; no divergence is counted there. Kendall's tau between the plans' orders with 95% intervals "
            f"over prompts; tau with {first.label} FDT is between mean FDT there and here. Told: share of pairs of "
            "plans whose paired 95% interval leaves zero out. Last: median over plans.",
        ),
        _per_plan(found, first, shared),
    )  # fmt: skip
    line = np.linspace(0.0, max([point["variation"] for point in sampled], default=1.0), 20)
    pictures = (
        Picture(
            "share-and-variation", "dots", sampled, Axis("variation", "total variation of what is sampled from"),
            Axis("share", "share of divergent tokens"),
            "Share of divergent tokens against total variation; the dashed line is the most that shared noise can make",
            series="decoding", marks=[{"x": float(x), "y": most_divergence(float(x))} for x in line],
            choice="by total variation",
        ),
        Picture(
            "share-and-kl", "dots", points, Axis("kl", "KL (nats per token)", logarithmic=True),
            Axis("share", "share of divergent tokens", logarithmic=True),
            "Share of divergent tokens against KL, greedy and sampled", series="decoding", choice="by KL",
        ),
    )  # fmt: skip
    return Findings(tuple(said), tables, pictures)


_TOLD = tuple(f"told by {METRICS[name].title}" for name in ("fdt", "sdt", "kl"))


def _overview(own: Sampled, first: Sampled, plans: Sequence[str]) -> tuple[str, ...]:
    fdt, kl = ([own.plans[plan][name] for plan in plans] for name in ("fdt", "kl"))
    count = len(plans)
    by_kl = interval_of([*fdt, *kl], lambda means: kendall_tau(-means[:count], means[count:]))
    theirs = [first.plans[plan]["fdt"] for plan in plans]
    same = interval_of([*fdt, *theirs], lambda means: kendall_tau(means[:count], means[count:]))
    ratios = [
        float(own.plans[plan]["sdt"].mean()) / own.length / math.sqrt(own.plans[plan]["kl"].mean())
        for plan in plans
        if own.plans[plan]["kl"].mean() > 0.0
    ]
    told = [f"{_told_apart([own.plans[plan][name] for plan in plans]):.2f}" for name in ("fdt", "sdt", "kl")]
    base = f"{own.base['fdt'].mean():.1f} of {own.length}"
    constant = f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})" if ratios else "-"
    return (own.label, f"{own.disagreement:.4%}", base, spanned(*by_kl, 2), spanned(*same, 2), *told, constant)


def _told_apart(values: Sequence[Floats]) -> float:
    """The share of pairs of plans whose paired difference is not zero for certain."""
    pairs = list(combinations(values, 2))
    return sum(paired_difference(a, b, 0).excludes_zero for a, b in pairs) / len(pairs)


def _per_plan(found: Sequence[Sampled], first: Sampled, plans: Sequence[str]) -> FoundTable:
    ordered = sorted(plans, key=lambda plan: float(first.plans[plan]["kl"].mean()))
    rows = tuple(
        (
            f"{first.plans[plan]['kl'].mean():.3g}",
            *(
                f"{each.plans[plan]['fdt'].mean():.1f} / {each.plans[plan]['sdt'].mean():.1f} / "
                f"{each.plans[plan]['kl'].mean():.3g}"
                for each in found
            ),
        )
        for plan in ordered
    )
    return FoundTable("FDT / SDT / KL of each plan", (f"{first.label} KL", *(each.label for each in found)), rows)


def _on_the_base(found: Sequence[Sampled]) -> str:
    leaving = [each.label for each in found if each.base["sdt"].any()]
    if leaving:
        return f"The plan that changes nothing diverges under {', '.join(leaving)}: noise is not shared there."
    return "The plan that changes nothing diverges nowhere, under any decoding: the noise is shared."


def _on_noise(points: Sequence[Mapping[str, Any]]) -> list[str]:
    if not points:
        return []
    ratios = [point["share"] / point["variation"] for point in points if point["variation"] > 0.0]
    kept = sum(point["share"] <= most_divergence(point["variation"]) for point in points)
    return [
        f"Of {len(points)} plans under samples, the share of divergent tokens is {min(ratios):.2f} to "
        f"{max(ratios):.2f} times the total variation of what they are sampled from (median {np.median(ratios):.2f}; "
        f"1 is the least that any pair of samples can have); below the most that shared noise makes of it in {kept}."
    ]


STUDY = Study(
    "sampling",
    "Divergence of sampled continuations",
    "With noise that both models share, what do FDT and SDT of sampled continuations say beside those of greedy ones?",
    conclude,
    (
        Part("greedy"),
        Part("t0.5", ("search.decoding.temperature=0.5",)),
        Part("t0.8-k50-p0.95", ("search.decoding={temperature: 0.8, top_k: 50, top_p: 0.95}",)),
        Part("t1", ("search.decoding.temperature=1",)),
    ),
)
