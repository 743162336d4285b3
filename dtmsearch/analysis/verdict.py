"""What is said of a plan on held-out prompts: whether it can be used, how it does against the best uniform plan of at
most its size, and whether it can be told from the base model's own noise.

Pure: rows in, sentences out. Claims no more than the intervals bear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Literal

from dtmsearch.analysis.format import counted, interval_decimals, size_in_words
from dtmsearch.core.gguf_presets import PRESET
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.metrics import Summary, rank_key
from dtmsearch.core.plan import LARGER
from dtmsearch.core.plan_widths import LAST_LAYERS, ONE_WIDTH
from dtmsearch.core.statistics import PairedDifference
from dtmsearch.core.strategy_settings import RANK_BY

PLAN, BASE = "plan", "base"
# What the search came to, where a uniform plan did as well and is the plan instead.
FOUND = "found"
# Of earlier versions the second, which was the one nearest in size.
_UNIFORM = ("uniform:", "uniform-nearest:")
# Unusable: a bit a token worse at human text, or another choice at more than half of the positions.
_RUINED_NATS, _RUINED_SHARE = log(2.0), 0.5


# What a budget counts, by which plans of one size are found.
SizedBy = Literal["bits_per_weight", "active_bits_per_weight", "decode_ms", "prefill_ms"]
_OF_ITS_SIZE: Mapping[SizedBy, str] = {
    "bits_per_weight": "of at most its size",
    "active_bits_per_weight": "that has a token read at most as many bits",
    "decode_ms": "that takes no longer for a token",
    "prefill_ms": "that takes no longer for a prompt",
}


@dataclass(frozen=True)
class ValidationRow:
    """A plan on the held-out prompts. The differences are the final plan minus this one, paired over prompts: in
    tokens for fdt and sdt, in nats per token for kl and for perplexities (of their logarithms); None for the final plan
    itself and where either was not measured. `active_bits_per_weight` is what a token reads of a mixture of experts,
    None of other models; `decode_ms` and `prefill_ms` are those of the components by the search's table of times, None
    where it has none. `weights_id` names the weights that a training came to, None of the base model's. `measured_as`
    is the label under which it was measured, which the final plan's may be of another."""

    label: str
    plan_id: str
    num_compressed: int
    bits_per_weight: float
    share: float
    summary: Summary | None
    failure: str | None
    fdt_vs_plan: PairedDifference | None = None
    sdt_vs_plan: PairedDifference | None = None
    kl_vs_plan: PairedDifference | None = None
    dppl_vs_plan: PairedDifference | None = None
    ppl_vs_plan: PairedDifference | None = None
    others_vs_plan: Mapping[str, PairedDifference | None] = field(default_factory=dict, hash=False)
    active_bits_per_weight: float | None = None
    weights_id: str | None = None
    decode_ms: float | None = None
    prefill_ms: float | None = None
    measured_as: str = ""

    def counted(self, by: SizedBy) -> float:
        """What plans are held against each other by: bits per weight where something else is not known."""
        found: float | None = getattr(self, by)
        return self.bits_per_weight if found is None else found

    def vs_plan(self, metric: str) -> PairedDifference | None:
        found: PairedDifference | None = getattr(self, f"{metric}_vs_plan", None)
        return found or self.others_vs_plan.get(metric)

    @property
    def uniform_scheme(self) -> str | None:
        """The scheme of a uniform plan; None of any other."""
        return next((self.label.removeprefix(p) for p in _UNIFORM if self.label.startswith(p)), None)

    @property
    def rival_name(self) -> str | None:
        """What a plan that others are held against is called: a uniform one's scheme, or a mixture of llama.cpp's own;
        None of any other."""
        return self.uniform_scheme or _mixture_in(self.label)


def _mixture_in(label: str) -> str | None:
    if label == LAST_LAYERS:
        return "the last blocks dropped"
    if label == ONE_WIDTH:
        return "one width for all"
    return f"llama.cpp's mixture {label.removeprefix(PRESET)}" if label.startswith(PRESET) else None


@dataclass(frozen=True)
class NoiseFloor:
    """How far the base model is from itself on the held-out prompts: its single pass against its own cached generation,
    with no position left out. A plan's values compare with it only where they leave none out either; `fdt_vs_base` and
    `sdt_vs_base` are the plan minus the base model, paired over prompts (None where only masked values were kept)."""

    fdt: float
    sdt: float
    plan_fdt: float | None = None
    plan_sdt: float | None = None
    fdt_vs_base: PairedDifference | None = None
    sdt_vs_base: PairedDifference | None = None


@dataclass(frozen=True)
class _Shown:
    """How a metric is written: its value in a sentence, the unit of a difference, and the decimals of either where no
    interval says how many they bear."""

    name: str
    value: str
    unit: str
    value_spec: str
    difference_spec: str

    def said(self, value: float, spec: str | None = None) -> str:
        return self.value.format(format(value, spec or self.value_spec))

    def difference(self, value: float, spec: str | None = None) -> str:
        return f"{value:+{spec or self.difference_spec}} {self.unit}".rstrip()


_SHOWN = {
    "fdt": _Shown("FDT", "first diverges after {} tokens on average", "tokens", ".1f", ".1f"),
    "sdt": _Shown("SDT", "has an SDT of {} tokens a prompt", "tokens", ".2f", ".2f"),
    "kl": _Shown("KL", "has a KL of {} nats per token", "nats per token", ".4f", ".4f"),
    "dppl": _Shown("DPPL", "has a DPPL of {}", "nats per token", ".4f", ".4f"),
    "ppl": _Shown("PPL", "has a PPL of {}", "nats per token", ".4g", ".4f"),
}


def _shown(metric: str) -> _Shown:
    if metric in _SHOWN:
        return _SHOWN[metric]
    found = METRICS[metric]
    unit = f" {found.unit}" if found.unit else ""
    title = found.title or metric
    return _Shown(title, f"has a {title} of {{}}{unit}", found.unit or "", found.digits, found.digits)


def _borne(difference: PairedDifference | None) -> str | None:
    """The decimals that a difference bears, by its interval; None where there is none."""
    if difference is None or not difference.is_known:
        return None
    digits = interval_decimals(difference.low, difference.high)
    return None if digits is None else f".{digits}f"


def _value_spec(difference: PairedDifference | None, metric: str) -> str | None:
    """Those of the values that it is the difference of: of perplexities it is one of logarithms."""
    return None if METRICS[metric].mean == "geometric" else _borne(difference)


def _number(value: float | None, metric: str, spec: str | None = None) -> str:
    return "-" if value is None else format(value, spec or METRICS[metric].digits)


def rival_of(
    rows: Sequence[ValidationRow], rank_by: str, sized_by: SizedBy = "bits_per_weight"
) -> ValidationRow | None:
    """The best uniform plan, or mixture of llama.cpp, in `rank_by` that comes to at most the plan's `sized_by` and 1%;
    one that could not be measured only where none could; None where there is none of that size."""
    plan = next((row for row in rows if row.label == PLAN), None)
    if plan is None:
        return None
    most = LARGER * plan.counted(sized_by)
    small = [row for row in rows if row.rival_name is not None and row.counted(sized_by) <= most]
    measured = [row for row in small if _value(row, rank_by) is not None]
    if measured:
        return min(measured, key=lambda row: _rank(row, rank_by))
    return max(small, key=lambda row: row.counted(sized_by), default=None)


def _value(row: ValidationRow, metric: str) -> float | None:
    if row.summary is None:
        return None
    try:
        return row.summary.value(metric)
    except ValueError:
        return None


def _rank(row: ValidationRow, rank_by: str) -> tuple[float, ...]:
    assert row.summary is not None
    return rank_key(row.summary, rank_by)


def unusable(row: ValidationRow, base: ValidationRow | None, continuation_tokens: int | None) -> str | None:
    """Why a plan cannot be used at all, None where it may: it predicts human text worse than the base model by a bit a
    token or more (its perplexity is at least twice as large), or it would choose another token at more than half of
    the positions of the base model's own text."""
    if row.summary is None:
        return None
    own, other = row.summary.ppl, None if base is None or base.summary is None else base.summary.ppl
    if own is not None and other is not None and log(own) - log(other) >= _RUINED_NATS:
        return f"PPL {own:.4g} against {other:.4g} of the base model"
    if continuation_tokens and row.summary.sdt_mean > _RUINED_SHARE * continuation_tokens:
        return f"it would choose otherwise at {row.summary.sdt_mean:.1f} of {continuation_tokens} positions"
    return None


def verdict(
    rows: Sequence[ValidationRow],
    rank_by: str = RANK_BY,
    continuation_tokens: int | None = None,
    rival: ValidationRow | None = None,
    sized_by: SizedBy = "bits_per_weight",
    brief: bool = False,
) -> str:
    """How the final plan does on held-out prompts, in the metric that the search ranked by, against the best uniform
    plan of at most its size (`rival`, by default the best on these prompts); FDT beside it. `sized_by` says what
    sizes are. `brief`: the one sentence of it that says most."""
    plan = next((row for row in rows if row.label == PLAN), None)
    if plan is None:
        return "The plan was not measured on held-out prompts, so nothing is said of how good it is."
    if plan.summary is None:
        return f"The plan could not be measured on held-out prompts ({plan.failure})."
    base = next((row for row in rows if row.label == BASE), None)
    ruined = unusable(plan, base, continuation_tokens)
    metric = rank_by if _value(plan, rank_by) is not None else "fdt"
    said = [] if ruined is None else [f"The plan is unusable ({ruined}, FDT {plan.summary.fdt_mean:.1f})."]
    if brief and said:
        return said[0]
    found = rival or rival_of(rows, metric, sized_by)
    said.append(_against(plan, found, metric, base, continuation_tokens, sized_by, brief))
    if brief:
        return said[0]
    said += _time_sentence(plan, found)
    instead = next((row for row in rows if row.label == FOUND), None)
    if instead is not None:
        kind = _mixture_in(plan.measured_as) or "a uniform plan"
        said.append(f"It is {kind}: what the search found did no better ({_figures(instead, metric)}).")
    return " ".join(said)


def _against(
    plan: ValidationRow,
    rival: ValidationRow | None,
    metric: str,
    base: ValidationRow | None,
    continuation_tokens: int | None,
    sized_by: SizedBy,
    brief: bool,
) -> str:
    assert plan.summary is not None
    of_its_size = _OF_ITS_SIZE[sized_by]
    difference = None if rival is None else rival.vs_plan(metric)
    spec, own = _value_spec(difference, metric), _value(plan, metric)
    found = (
        f"On {counted(plan.summary.num_prompts, 'held-out prompt')} the plan "
        f"({size_in_words(plan.bits_per_weight, plan.active_bits_per_weight)}) "
        f"{'-' if own is None else _shown(metric).said(own, spec)}"
    )
    fdt = "" if metric == "fdt" else f" (FDT {plan.summary.fdt_mean:.1f})"
    if rival is None:
        return f"{found}{fdt}; no known plan {of_its_size} was measured, so it is called neither better nor worse."
    best = "best uniform plan" if rival.uniform_scheme else "best known plan"
    remarks = [_size_of_rival(rival)]
    remarks += ["not trained, as the plan's weights were"] if plan.weights_id and not rival.weights_id else []
    remarks += ["unusable"] if unusable(rival, base, continuation_tokens) else []
    other = f"the {best} {of_its_size}, {rival.rival_name} ({', '.join(remarks)})"
    if rival.summary is None or difference is None:
        reason = f" ({rival.failure})" if rival.failure else ""
        return f"{found}{fdt}; {other}, could not be measured{reason}, so it is called neither better nor worse."
    value = _number(_value(rival, metric), metric, spec)
    return (
        f"{found}: {_comparison(difference, metric)} {other}, with {value} ({_interval(difference, metric)})"
        f"{'' if brief else _beside(plan, rival, metric)}{_dissent(rival, metric)}."
    )


def _time_sentence(plan: ValidationRow, rival: ValidationRow | None) -> list[str]:
    """What the plan takes by the search's table of times beside the uniform plan that it is held against; nothing
    without a table."""
    if plan.decode_ms is None:
        return []
    own = f"By its table of times the plan takes {_times_of(plan)}"
    if rival is None or rival.decode_ms is None:
        return [f"{own}."]
    pairs = (("decoding", plan.decode_ms, rival.decode_ms), ("prefill", plan.prefill_ms, rival.prefill_ms))
    slower = [name for name, mine, other in pairs if mine is not None and other is not None and mine > other]
    words = f": slower in {' and '.join(slower)}" if slower else ""
    return [f"{own}, {rival.rival_name} {_times_of(rival)}{words}."]


def _times_of(row: ValidationRow) -> str:
    prefill = "" if row.prefill_ms is None else f" and {row.prefill_ms:.3g} for a prompt"
    return f"{row.decode_ms:.3g} ms for a token{prefill}"


def _size_of_rival(rival: ValidationRow) -> str:
    active = rival.active_bits_per_weight
    return f"{rival.bits_per_weight:.2f} bits{'' if active is None else f', {active:.2f} read by a token'}"


def _comparison(difference: PairedDifference, metric: str) -> str:
    if not difference.is_known:
        return "too few prompts to say whether it is better or worse than"
    if not difference.excludes_zero:
        return "not distinguishable from"
    return "better than" if _is_better(difference, metric) else "worse than"


def _is_better(difference: PairedDifference, metric: str) -> bool:
    return (difference.mean > 0) == METRICS[metric].higher_is_better


def _interval(d: PairedDifference, metric: str) -> str:
    spec = _borne(d)
    text = f"difference {_shown(metric).difference(d.mean, spec)}"
    if not d.is_known:
        return text
    low, high = (_shown(metric).difference(end, spec).partition(" ")[0] for end in (d.low, d.high))
    return f"{text}, {d.confidence:.0%} interval {low} to {high}"


def _beside(plan: ValidationRow, rival: ValidationRow, metric: str) -> str:
    """FDT, where another metric speaks first."""
    difference = rival.vs_plan("fdt")
    if metric == "fdt" or difference is None or plan.summary is None or rival.summary is None:
        return ""
    if not difference.is_known:
        return (
            f"; its FDT is {plan.summary.fdt_mean:.1f} beside {rival.summary.fdt_mean:.1f}, on too few prompts to "
            f"compare ({_interval(difference, 'fdt')})"
        )
    return (
        f"; its FDT of {plan.summary.fdt_mean:.1f} is {_comparison(difference, 'fdt')} {rival.summary.fdt_mean:.1f} "
        f"({_interval(difference, 'fdt')})"
    )


def _dissent(rival: ValidationRow, metric: str) -> str:
    """What else has to be said: metrics that are beside neither, and say the opposite of the first."""
    first = rival.vs_plan(metric)
    assert first is not None
    opposite = []
    for name in ("sdt", "kl"):
        d = rival.vs_plan(name)
        if name != metric and d is not None and d.excludes_zero and _is_better(d, name) != _is_better(first, metric):
            number = _shown(name).difference(d.mean, _borne(d)).partition(" ")[0]
            opposite.append(f"{_shown(name).name} {'better' if _is_better(d, name) else 'worse'} ({number})")
    return f", but its {' and '.join(opposite)}" if opposite else ""


def _figures(row: ValidationRow, metric: str) -> str:
    if row.summary is None:
        return f"it could not be measured: {row.failure}"
    value = _value(row, metric)
    shown = "" if value is None or metric == "fdt" else f"{_shown(metric).name} {_number(value, metric)}, "
    return f"{row.bits_per_weight:.2f} bits per weight, {shown}first divergence after {row.summary.fdt_mean:.1f} tokens"


def noise_sentence(noise: NoiseFloor) -> str:
    """Whether the plan can be told from the base model's own noise, like for like."""
    floor = (
        f"the base model's single pass against its own cached generation has an SDT of {noise.sdt:.2f} and an FDT of "
        f"{noise.fdt:.1f}"
    )
    difference = noise.sdt_vs_base
    if noise.plan_sdt is None or noise.plan_fdt is None or difference is None:
        return f"Noise: {floor}. The plan's values leave those positions out, so they do not compare with it."
    if not difference.is_known:
        words = "too few prompts to say whether it diverges more than that"
    elif difference.low > 0.0:
        words = "it diverges more than that"
    elif difference.high < 0.0:
        words = "it diverges less than that"
    else:
        words = "not distinguishable from that"
    return (
        f"Noise, with no position left out: {floor}; the plan {noise.plan_sdt:.2f} and {noise.plan_fdt:.1f}: {words} "
        f"(SDT {_interval(difference, 'sdt').removeprefix('difference ')})."
    )
