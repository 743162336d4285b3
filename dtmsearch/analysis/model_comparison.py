"""What is said of two models that were compared: values with their intervals, how far the base model is from itself,
and whether the two can be told apart.

Pure: arrays in, numbers and sentences out. Claims no more than the intervals bear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtmsearch.analysis.format import counted, interval_decimals, number
from dtmsearch.core.evaluation import Continuation, Reference
from dtmsearch.core.metric_registry import (
    METRICS,
    PromptOutputs,
    first_divergent_token,
    perplexity,
    share_of_divergent_tokens,
)
from dtmsearch.core.metrics import difference_limits, value_limits
from dtmsearch.core.positions import Positions
from dtmsearch.core.statistics import FEWEST, PairedDifference, paired_difference

_SEED = 0
# Shares of the positions; the last needs as many positions as show it.
_PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
# Unusable, as `analysis.verdict` has it: a bit a token worse at human text, or more than half of the choices others.
_RUINED_NATS, _RUINED_SHARE = math.log(2.0), 0.5
# A value that so many decimals do not show is written with a power of ten.
_MOST_DECIMALS = 8
Array = NDArray[Any]


@dataclass(frozen=True)
class ComparedModel:
    """One of the two: the name it was given by, what its files or its server are, and how it was run."""

    name: str
    holds: str
    way: str


@dataclass(frozen=True)
class Value:
    """A mean with its 95% interval over prompts; both ends None where there are too few prompts to say. `at_least`:
    only a lower bound is known of every position."""

    mean: float
    low: float | None = None
    high: float | None = None
    at_least: bool = False


@dataclass(frozen=True)
class ModelComparison:
    """Two models on the same prompts.

    `values`: fdt, sdt (tokens), flips (share of positions), dppl, kl (nats per token), ppl, ppl_base, ppl_ratio, as far
    as they could be measured. `floor`: fdt, sdt and flips of the base model against itself in its own engine; `same`:
    nothing differs at any position. `kl_percentiles`: percentile -> nats at so many of the positions; `covered`: the
    share of the base model's probability that the bound of KL rests on. `per_prompt`: column -> a value each prompt.
    """

    base: ComparedModel
    other: ComparedModel
    num_prompts: int
    prompt_tokens: int
    continuation_tokens: int
    seed: int
    values: Mapping[str, Value]
    floor: Mapping[str, Value]
    over_floor: PairedDifference
    same: bool
    kl_percentiles: Mapping[str, float]
    covered: float | None
    per_prompt: Mapping[str, Sequence[float]]
    survival: Sequence[float]
    base_survival: Sequence[float]
    texts: tuple[Continuation, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """Whether the two can be told apart, and by what; one or two sentences."""
        return _verdict(self)

    def to_pandas(self) -> Any:
        """A row a prompt; needs pandas."""
        import pyarrow as pa

        return pa.table({"prompt": range(self.num_prompts), **self.per_prompt}).to_pandas()

    def _repr_html_(self) -> str:
        import html

        rows = "".join(f"<tr><th>{name}</th><td>{value_text(name, v)}</td></tr>" for name, v in self.values.items())
        return f"<p>{html.escape(self.verdict)}</p><table>{rows}</table>"


def compared(
    base: ComparedModel,
    other: ComparedModel,
    reference: Reference,
    found: Positions,
    base_text_nll: Array | None,
    seed: int,
    notes: Sequence[str] = (),
) -> ModelComparison:
    """What positions come to. `reference` is BASE's, `agrees` where BASE keeps its own choices."""
    length = reference.continuation_tokens
    masked = found.diverged & reference.agrees
    per_prompt = _per_prompt(found, masked)
    values: dict[str, Value] = {
        name: _mean(per_prompt[name], name, length) for name in ("fdt", "sdt", "kl", "dppl") if name in per_prompt
    }
    if not found.first_only:
        values["flips"] = _mean(found.diverged.mean(axis=1), "flips", None)
    if found.covered is not None and "kl" in values:
        values["kl"] = replace(values["kl"], at_least=True)
    if found.text_nll is not None:
        values["ppl"] = _mean(per_prompt["ppl"], "ppl", None)
    if base_text_nll is not None:
        per_prompt["ppl_base"] = perplexity(base_text_nll)
        values["ppl_base"] = _mean(per_prompt["ppl_base"], "ppl", None)
        if found.text_nll is not None:
            own_logs, base_logs = (np.log(per_prompt[name].astype(np.float64)) for name in ("ppl", "ppl_base"))
            values["ppl_ratio"] = _exponential(paired_difference(own_logs, base_logs, _SEED))
    own = ~reference.agrees
    floor = {
        "fdt": _mean(first_divergent_token(own), "fdt", length),
        "sdt": _mean(share_of_divergent_tokens(own), "sdt", length),
        "flips": _mean(own.mean(axis=1), "flips", None),
    }
    # Of text alone, how much earlier it diverges than the base model's own noise.
    metric, of = ("fdt", first_divergent_token) if found.first_only else ("sdt", share_of_divergent_tokens)
    pair = (of(own), of(found.diverged)) if found.first_only else (of(found.diverged), of(own))
    over_floor = paired_difference(*pair, _SEED, limits=difference_limits(metric, length))
    return ModelComparison(
        *(base, other, reference.num_prompts, reference.prompt_tokens, length, seed, values, floor, over_floor),
        same=_same(found, own, base_text_nll),
        kl_percentiles=_percentiles(found.kl),
        covered=None if found.covered is None else float(found.covered.mean(dtype=np.float64)),
        per_prompt={name: column.tolist() for name, column in per_prompt.items()},
        survival=_survival(found.diverged),
        base_survival=_survival(own),
        notes=tuple(notes),
    )


def _per_prompt(found: Positions, masked: Array) -> dict[str, Array]:
    """Metric -> its value on each prompt, by the metrics' own definitions."""
    nothing = np.zeros(masked.shape, np.float32)
    outputs = PromptOutputs(masked, nothing if found.nll is None else found.nll, found.kl, found.text_nll)
    known = {"fdt": True, "sdt": not found.first_only, "dppl": found.nll is not None, "ppl": found.text_nll is not None}
    known["kl"] = found.kl is not None
    return {name: np.asarray(METRICS[name].of_prompts(outputs)) for name, is_known in known.items() if is_known}


def _mean(values: Array, name: str, length: int | None) -> Value:
    """The mean of a metric's values, geometric where it is one, with its interval."""
    if name == "flips":
        return _value(paired_difference(values, np.zeros(len(values)), _SEED, limits=(0.0, 1.0)))
    if METRICS[name].mean == "geometric":
        logs = np.log(values.astype(np.float64))
        return _exponential(paired_difference(logs, np.zeros(len(logs)), _SEED))
    return _value(paired_difference(values, np.zeros(len(values)), _SEED, limits=value_limits(name, length)))


def _value(found: PairedDifference) -> Value:
    return Value(found.mean, found.low, found.high) if found.is_known else Value(found.mean)


def _exponential(found: PairedDifference) -> Value:
    if not found.is_known:
        return Value(math.exp(found.mean))
    return Value(math.exp(found.mean), math.exp(found.low), math.exp(found.high))


def _percentiles(kl: Array | None) -> dict[str, float]:
    if kl is None:
        return {}
    shown = [p for p in _PERCENTILES if kl.size * (100.0 - p) / 100.0 >= 1.0]
    found = {f"{p:g}": float(np.percentile(kl.astype(np.float64), p)) for p in shown}
    return found | {"100": float(kl.max())}


def _survival(diverged: Array) -> list[float]:
    """After so many tokens, the share of prompts none of whose tokens has diverged: [positions + 1]."""
    kept = ~np.logical_or.accumulate(diverged, axis=1)
    return [1.0, *kept.mean(axis=0).tolist()]


def _same(found: Positions, own: Array, base_text_nll: Array | None) -> bool:
    """Whether nothing at all differs that was looked at."""
    if (found.diverged != own).any():
        return False
    if found.kl is not None and float(found.kl.max()) > 0.0:
        return False
    if found.text_nll is None or base_text_nll is None:
        return True
    return bool((found.text_nll == base_text_nll).all())


def _verdict(found: ModelComparison) -> str:
    base, other = "BASE", "OTHER"
    where = f"{counted(found.num_prompts, 'prompt')} of {found.continuation_tokens} tokens"
    positions = found.num_prompts * found.continuation_tokens
    flips, floor = found.values.get("flips"), found.floor["flips"]
    if found.same:
        looked = "token"
        if (kl := found.values.get("kl")) is not None:
            looked = "choice and every probability that was told" if kl.at_least else "choice and probability"
        return f"{base} and {other} are the same on {where}: every {looked} is, at {positions:,} positions."
    if flips is None:
        differ = (
            f"{other} first writes another token after {found.values['fdt'].mean:.1f} tokens on average "
            f"({base} itself: {found.floor['fdt'].mean:.1f})"
        )
    else:
        differ = (
            f"{other} chooses another token at {flips.mean:.2%} of {positions:,} positions ({base} itself: "
            f"{floor.mean:.2%})"
        )
    ruined = _ruined(found)
    if ruined and found.num_prompts >= FEWEST:
        return f"{other} is no stand-in for {base}: {ruined}. {differ}."
    over = found.over_floor
    if flips is not None and not flips.mean and found.num_prompts >= FEWEST:
        return f"No choice of {other} differs from {base}'s on {where}.{_shift(found)}"
    unit = "tokens earlier" if flips is None else "divergent tokens a prompt more"
    said = f"{over.mean:+.2f} {unit} than {base}'s own noise"
    if not over.is_known:
        return f"Too few prompts to say whether {other} is further from {base} than {base} is from itself: {differ}."
    span = f"{said}, {over.confidence:.0%} interval {over.low:+.2f} to {over.high:+.2f}"
    if over.low > 0.0:
        return f"{other} can be told apart from {base} by its text: {differ}; {span}."
    return f"{other}'s text cannot be told apart from {base}'s own noise on {where}: {differ}; {span}.{_shift(found)}"


def _shift(found: ModelComparison) -> str:
    kl = found.values.get("kl")
    return (
        "" if kl is None or not kl.mean else f" Its probabilities do differ: KL {value_text('kl', kl)} nats per token."
    )


def _ruined(found: ModelComparison) -> str:
    ratio = found.values.get("ppl_ratio")
    if ratio is not None and math.log(ratio.mean) >= _RUINED_NATS:
        return f"its PPL is {found.values['ppl'].mean:.4g} against {found.values['ppl_base'].mean:.4g}"
    flips = found.values.get("flips")
    if flips is not None and flips.mean > _RUINED_SHARE:
        return "it chooses otherwise at more than half of the positions"
    return ""


def value_text(name: str, value: Value) -> str:
    """`23.4 [19.8, 27.1]`, to the decimals that the interval bears; `>=` where it is a lower bound."""
    sign, scale, unit = (">= " if value.at_least else ""), *((100.0, "%") if name == "flips" else (1.0, ""))
    mean = value.mean * scale
    if value.low is None or value.high is None:
        return f"{sign}{number(mean)}{unit}"
    low, high = value.low * scale, value.high * scale
    borne = interval_decimals(low, high)
    if borne is None or (mean and abs(mean) < 10.0 ** (1 - _MOST_DECIMALS)):  # of which decimals would show nothing
        return f"{sign}{number(mean)}{unit} [{number(low)}, {number(high)}]"
    return f"{sign}{mean:.{borne}f}{unit} [{low:.{borne}f}, {high:.{borne}f}]"
