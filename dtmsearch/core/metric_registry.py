"""Metrics by their names: what each makes of a prompt, and how its values are ranked, compared and written.

Definitions of FDT, SDT and DPPL: "Divergent Token Metrics" (arXiv 2311.01544), section 3. Knows arrays, nothing of
models or results.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core import plugins
from dtmsearch.core.drafting import DRAFT_TOKENS, DRAFTS, WIDTHS, accepted_tokens, clear_runs
from dtmsearch.errors import UserError

Numbers = NDArray[np.generic]
_NAME = re.compile("[a-z][a-z0-9_]{0,30}")


@dataclass(frozen=True)
class PromptOutputs:
    """What a model makes of prompts where something is predicted, each [num_prompts, positions].

    `diverged`: its choice (greedy, or sampled by the same noise) is another token than the base model's, positions left
    out at which the base model leaves its own continuation. `nll`: nats of the base model's token. `kl`, `text_nll` and
    `text_missed`, where a metric needs them: KL(base || model), nats of human text, and where its greedy choice is
    another token than human text has. `own`: what the metric's own `at_positions` found. `overlap`, where a metric
    needs it: the probability that the distributions which the two models' tokens are chosen from have in common; of
    greedy choices 1 where they are the same, else 0.
    """

    diverged: NDArray[np.bool_]
    nll: NDArray[np.float32]
    kl: NDArray[np.float32] | None = None
    text_nll: NDArray[np.float32] | None = None
    own: NDArray[np.float32] | None = None
    text_missed: NDArray[np.bool_] | None = None
    overlap: NDArray[np.float32] | None = None


Limits = tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """A number for each prompt that says how far a compressed model is from the base model.

    `of_prompts` gives it, [num_prompts]. A metric of its own kind says with `at_positions` what it makes of the logits:
    (compressed model's, base model's, each [positions, vocabulary], the base model's tokens [positions]), tensors that
    it must not write to -> [positions]. `needs` names what it takes beside the compressed model's outputs: `base` (the
    base model's distribution), `text` (a pass over human text) or `overlap`.

    `mean` says how a plan's value follows from its prompts': `arithmetic`, or `geometric`, for what is compared by its
    logarithm. `can_be_summed`: what components do alone adds up to what they do together, so that strategies may choose
    by sums of it. `ranks`: less of it is better, or more, so that searches may rank by it. `limits` (length of the
    continuations, None where unknown) are what no value can leave. `title`, `digits` and `unit` are how it is written.
    Raise `version` when the same outputs give other numbers: it is part of an evaluation's identity.
    """

    name: str
    of_prompts: Callable[[PromptOutputs], Numbers]
    at_positions: Callable[[Any, Any, Any], Any] | None = None
    needs: frozenset[Literal["base", "text", "overlap"]] = frozenset()
    higher_is_better: bool = False
    mean: Literal["arithmetic", "geometric"] = "arithmetic"
    can_be_summed: bool = False
    ranks: bool = True
    limits: Callable[[int | None], Limits] = lambda continuation_tokens: (-math.inf, math.inf)
    title: str = ""
    digits: str = ".4f"
    unit: str = ""
    version: int | str = 1

    def __post_init__(self) -> None:
        if not is_metric_name(self.name):
            raise UserError(f"a metric's name is small letters, digits and _, such as top5, got {self.name!r}")

    @property
    def needs_base(self) -> bool:
        """Whether the base model's distribution must be at hand."""
        return self.at_positions is not None or "base" in self.needs

    @property
    def column(self) -> str:
        """The column of `evaluations` that holds its value over all prompts."""
        return f"{self.name}_mean" if self.name in ("fdt", "sdt") else self.name

    @property
    def list_column(self) -> str:
        """The column of `evaluations` that holds its value on each prompt."""
        return self.name if self.name in ("fdt", "sdt") else f"{self.name}_list"

    def comparable(self, values: Numbers) -> NDArray[np.float64]:
        """Values of prompts as numbers whose mean ranks plans: of a geometric one their logarithms."""
        numbers = values.astype(np.float64)
        return np.log(numbers) if self.mean == "geometric" else numbers

    def losses(self, values: Numbers) -> NDArray[np.float64]:
        """Values of prompts turned so that less is better."""
        return -values.astype(np.float64) if self.higher_is_better else self.comparable(values)

    def over_prompts(self, values: Numbers) -> float:
        """The value of a plan from those of its prompts."""
        if self.mean == "geometric":
            return math.exp(float(np.log(values, dtype=np.float64).sum()) / len(values))
        if np.issubdtype(values.dtype, np.integer):
            return int(values.sum()) / len(values)
        return float(values.mean(dtype=np.float64))

    def loss_from_zero(self, continuation_tokens: int) -> Callable[[Numbers], NDArray[np.float64]] | None:
        """What turns values of prompts into losses that are 0 at best and whose mean ranks as the metric does; None
        where no bound is known that they could start from, or it would be that of logarithms."""
        low, high = self.limits(continuation_tokens)
        if self.mean == "geometric" or not math.isfinite(high if self.higher_is_better else low):
            return None
        if self.higher_is_better:
            return lambda values: high - values.astype(np.float64)
        return lambda values: values.astype(np.float64) - low


def is_metric_name(name: str) -> bool:
    """Whether a metric could be called so; it need not be installed."""
    return _NAME.fullmatch(name) is not None


def _check_metric(name: str, added: Any) -> None:
    if not isinstance(added, Metric):
        raise UserError(f"the entry point {name} of dtmsearch.metrics is {type(added).__name__}, wanted a Metric")
    if added.name != name:
        raise UserError(f"the entry point {name} of dtmsearch.metrics names a metric {added.name}: give both one name")


METRICS: plugins.Registry[Metric] = plugins.Registry(plugins.METRICS, "metric", _check_metric)


def metric_versions(names: Iterable[str]) -> dict[str, str]:
    """Name -> version of those that are not this package's own, or have had another, for an identity. Raises
    `UserError` for a metric that nobody has."""
    found = {}
    for name in sorted(set(names)):
        metric, whose = METRICS[name], METRICS.version(name)
        if name not in BUILT_IN or metric.version != 1:
            found[name] = ", ".join(part for part in (whose, str(metric.version)) if part)
    return found


def first_divergent_token(diverged: NDArray[np.bool_]) -> NDArray[np.int32]:
    """FDT [num_prompts]: position of the first divergent token; the continuation's length where there is none."""
    length = diverged.shape[1]
    first: NDArray[np.int32] = np.where(diverged.any(axis=1), diverged.argmax(axis=1), length).astype(np.int32)
    return first


def share_of_divergent_tokens(diverged: NDArray[np.bool_]) -> NDArray[np.int32]:
    """SDT [num_prompts]: how many tokens diverge, as the paper counts it (divide by the length for a share)."""
    count: NDArray[np.int32] = diverged.sum(axis=1).astype(np.int32)
    return count


def perplexity(negative_log_likelihood: NDArray[np.float32]) -> NDArray[np.float32]:
    """exp of the mean over positions of nats [num_prompts, positions]: [num_prompts], infinite where it overflows."""
    with np.errstate(over="ignore"):
        value: NDArray[np.float32] = np.exp(negative_log_likelihood.mean(axis=1, dtype=np.float64)).astype(np.float32)
    return value


def mean_of_positions(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean over positions [num_prompts, positions]: [num_prompts]."""
    mean: NDArray[np.float32] = values.mean(axis=1, dtype=np.float64).astype(np.float32)
    return mean


def _tokens(continuation_tokens: int | None) -> Limits:
    return 0.0, math.inf if continuation_tokens is None else float(continuation_tokens)


def _from_zero(continuation_tokens: int | None) -> Limits:
    return 0.0, math.inf


def _kl(outputs: PromptOutputs) -> Numbers:
    assert outputs.kl is not None
    return mean_of_positions(outputs.kl)


def _ppl(outputs: PromptOutputs) -> Numbers:
    assert outputs.text_nll is not None
    return perplexity(outputs.text_nll)


for _metric in (
    Metric(
        "fdt",
        lambda outputs: first_divergent_token(outputs.diverged),
        higher_is_better=True,
        limits=_tokens,
        title="FDT",
        digits=".1f",
        unit="tokens",
    ),
    Metric(
        "sdt",
        lambda outputs: share_of_divergent_tokens(outputs.diverged),
        limits=_tokens,
        title="SDT",
        digits=".2f",
        unit="tokens",
    ),
    Metric(
        "dppl",
        lambda outputs: perplexity(outputs.nll),
        mean="geometric",
        limits=_from_zero,
        title="DPPL",
    ),
    Metric(
        "ppl",
        _ppl,
        needs=frozenset({"text"}),
        mean="geometric",
        limits=_from_zero,
        title="PPL",
        digits=".4g",
    ),
    Metric(
        "kl",
        _kl,
        needs=frozenset({"base"}),
        can_be_summed=True,
        limits=_from_zero,
        title="KL",
        unit="nats per token",
    ),
):
    METRICS.add(_metric.name, _metric)


def _top1(outputs: PromptOutputs) -> Numbers:
    assert outputs.text_missed is not None
    return mean_of_positions((~outputs.text_missed).astype(np.float32))


# How near the two likeliest tokens are to each other, in nats, where a density of near ties is counted.
TIE_WIDTH = 0.25


def _own_mean(outputs: PromptOutputs) -> Numbers:
    assert outputs.own is not None
    return mean_of_positions(outputs.own)


def _overlap(outputs: PromptOutputs) -> NDArray[np.float32]:
    assert outputs.overlap is not None
    return outputs.overlap


def accepted_metric(name: str, draft_tokens: int) -> Metric:
    """The metric of a name that says how many of so many proposed tokens are accepted a step, the compressed model as a
    draft for its base (see `accepted_tokens`)."""

    def of_prompts(outputs: PromptOutputs) -> Numbers:
        return accepted_tokens(_overlap(outputs), draft_tokens)

    return Metric(
        name,
        of_prompts,
        needs=frozenset({"overlap"}),
        higher_is_better=True,
        limits=lambda continuation_tokens: (0.0, float(draft_tokens)),
        title=f"accepted of {draft_tokens}",
        digits=".3f",
        unit="tokens a step",
    )


def _runs_metric(name: str, width: int, which: int) -> Metric:
    return Metric(
        name,
        lambda outputs: clear_runs(outputs.diverged, width)[which],
        ranks=False,  # a plan that diverges oftener starts oftener
        limits=_tokens,
        digits=".2f",
    )


def _near_ties(logits: Any, base_logits: Any, tokens: Any) -> Any:
    best = logits.float().topk(2, dim=1).values
    return ((best[:, 0] - best[:, 1]) < TIE_WIDTH).float() / TIE_WIDTH


def _uncertainty(logits: Any, base_logits: Any, tokens: Any) -> Any:
    return 1.0 - logits.float().softmax(dim=1).square().sum(dim=1)


# Had by their names (`search.metrics`), in no list: measured only where they are asked for. `top1`: the share of human
# text that is the greedy choice. Of a model's own distribution: `tie_density`, the density per nat of the two likeliest
# tokens' distance at zero, and `uncertainty`, the chance that two draws from it differ. `accepted`, of drafts of
# `DRAFT_TOKENS` tokens, and those of other lengths. `overlap`: what the distributions that tokens are chosen from
# have in common, over positions. `starts8`: how often 8 tokens follow a continuation's start or a divergence; `clear8`:
# how often none of them diverges.
for _metric in (
    Metric(
        "top1",
        _top1,
        needs=frozenset({"text"}),
        higher_is_better=True,
        limits=lambda continuation_tokens: (0.0, 1.0),
        title="top-1 on text",
    ),
    Metric("tie_density", _own_mean, at_positions=_near_ties, ranks=False, limits=_from_zero, unit="per nat"),
    Metric(
        "uncertainty",
        _own_mean,
        at_positions=_uncertainty,
        ranks=False,
        limits=lambda continuation_tokens: (0.0, 1.0),
    ),
    Metric(
        "overlap",
        lambda outputs: mean_of_positions(_overlap(outputs)),
        needs=frozenset({"overlap"}),
        higher_is_better=True,
        limits=lambda continuation_tokens: (0.0, 1.0),
        title="overlap",
    ),
    accepted_metric("accepted", DRAFT_TOKENS),
    *(accepted_metric(f"accepted{tokens}", tokens) for tokens in DRAFTS),
    *(_runs_metric(f"starts{width}", width, 0) for width in WIDTHS),
    *(_runs_metric(f"clear{width}", width, 1) for width in WIDTHS),
):
    METRICS.add(_metric.name, _metric, listed=False)

BUILT_IN = ("fdt", "sdt", "dppl", "ppl", "kl")
# What is measured of every plan, for next to nothing.
ALWAYS = ("fdt", "sdt", "dppl")
