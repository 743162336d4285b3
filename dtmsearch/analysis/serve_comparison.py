"""Whether an engine serves a folder as it was measured: its divergences beside the recorded ones, and beside how far
the same engine moves the base model.

Pure: arrays in, numbers and sentences out. Claims no more than the intervals bear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dtmsearch.analysis.format import counted
from dtmsearch.core.metric_registry import first_divergent_token, share_of_divergent_tokens
from dtmsearch.core.metrics import difference_limits, value_limits
from dtmsearch.core.statistics import FEWEST, PairedDifference, mean_interval, paired_difference

_SEED = 0
Bools = NDArray[np.bool_]
Verdict = Literal["served as measured", "not served as measured", "cannot be told", "too few prompts"]
# What is compared, in the order in which it is said: of an engine's own greedy text, and of its choice at each token
# of the base model's.
TITLES = {"fdt_text": "FDT of its text", "fdt": "FDT", "sdt": "SDT"}
_METRIC = {"fdt_text": "fdt", "fdt": "fdt", "sdt": "sdt"}


@dataclass(frozen=True)
class ServedPositions:
    """What an engine makes of the base model's continuations [num_prompts, continuation_tokens]. `text`: True from
    where its own greedy text leaves them on. `forced`: its choice is another after the base model's own tokens; None of
    an engine that does not tell."""

    text: Bools
    forced: Bools | None = None

    def values(self, agrees: Bools) -> dict[str, NDArray[Any]]:
        """Metric -> its value on each prompt, in tokens. Positions at which the base model leaves its own continuation
        count in none but the text's, which goes on from there otherwise."""
        found: dict[str, NDArray[Any]] = {"fdt_text": first_divergent_token(self.text)}
        if self.forced is not None:
            masked = self.forced & agrees
            found |= {"fdt": first_divergent_token(masked), "sdt": share_of_divergent_tokens(masked)}
        return found


@dataclass(frozen=True)
class ServedValue:
    """A metric, in tokens: as recorded, as served, the paired difference of the two; `floor`, how far the base model
    itself is from its own continuations in the same engine; and `room`, how far from the recorded value a folder is
    that is served as badly as can be."""

    recorded: float
    served: PairedDifference
    difference: PairedDifference
    floor: float
    room: float

    @property
    def tells(self) -> bool:
        """Whether a folder that is served wrongly could be seen: not where the engine moves the base model as far."""
        return self.room > self.floor

    @property
    def leaves(self) -> bool:
        """Whether the difference is larger than the engine's own, with certainty."""
        return self.difference.is_known and (self.difference.low > self.floor or self.difference.high < -self.floor)


@dataclass(frozen=True)
class LeavingPrompt:
    """A prompt on which the served text does not leave the base model's where it is recorded to: numbers of tokens, and
    what either goes on with from where the served text leaves."""

    prompt: int
    recorded: int
    served: int
    base_text: str = ""
    served_text: str = ""


@dataclass(frozen=True)
class ServeComparison:
    """A folder in an engine. `expected` says where the recorded values are from; `equal_prompts` leave the base model's
    text at the very token that is recorded. `num_leaving`, of these the `examples` differ most."""

    folder: str
    base: str
    engine: str
    dtype: str
    expected: str
    num_prompts: int
    continuation_tokens: int
    values: Mapping[str, ServedValue]
    equal_prompts: int
    base_equal_prompts: int
    examples: Sequence[LeavingPrompt] = ()
    notes: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def outcome(self) -> Verdict:
        if self.num_prompts < FEWEST:
            return "too few prompts"
        if any(value.leaves for value in self.values.values()):
            return "not served as measured"
        return "served as measured" if any(value.tells for value in self.values.values()) else "cannot be told"

    @property
    def verdict(self) -> str:
        """The outcome and the numbers that it rests on; one or two sentences."""
        return _verdict(self)


def served_values(
    expected: Mapping[str, NDArray[Any]],
    served: ServedPositions,
    base: ServedPositions,
    agrees: Bools,
) -> dict[str, ServedValue]:
    """Metric -> what it comes to. `expected`: fdt_text, fdt and sdt of each prompt as recorded, of the first also where
    the base model leaves its own text; `served` the folder in an engine, `base` the base model in the same."""
    length = agrees.shape[1]
    own, floor = served.values(agrees), base.values(agrees)
    found = {}
    for name, values in own.items():
        metric = _METRIC[name]
        if name not in floor:
            continue
        at_rest, recorded = float(floor[name].mean()), float(expected[name].mean())
        found[name] = ServedValue(
            recorded,
            mean_interval(values, _SEED, value_limits(metric, length)),
            paired_difference(values, expected[name], _SEED, limits=difference_limits(metric, length)),
            at_rest if metric == "sdt" else length - at_rest,
            length - recorded if metric == "sdt" else recorded,
        )
    return found


def leaving(expected_fdt: NDArray[Any], served_fdt: NDArray[Any], most: int) -> list[LeavingPrompt]:
    """Prompts whose served text leaves elsewhere than recorded, the farthest first."""
    apart = np.abs(served_fdt.astype(np.int64) - expected_fdt.astype(np.int64))
    order = [int(at) for at in np.lexsort((np.arange(len(apart)), -apart)) if apart[at]]
    return [LeavingPrompt(at, int(expected_fdt[at]), int(served_fdt[at])) for at in order[:most]]


def _verdict(found: ServeComparison) -> str:
    where = f"{counted(found.num_prompts, 'prompt')} of {found.continuation_tokens} tokens"
    said = "; ".join(_said(name, value) for name, value in found.values.items())
    if found.outcome == "too few prompts":
        return f"Too few prompts to say whether {found.engine} serves it as measured ({where}): {said}."
    if found.outcome == "cannot be told":
        return (
            f"Cannot be told whether {found.engine} serves it as measured ({where}): it moves the base model itself as "
            f"far as a folder that is served wrongly could be from what is recorded: {said}."
        )
    outcome = found.outcome[0].upper() + found.outcome[1:]
    return (
        f"{outcome} by {found.engine} on {where}: {said}. {found.equal_prompts} of {found.num_prompts} prompts leave "
        f"the base model's text at the token that is recorded; of the base model itself "
        f"{found.base_equal_prompts} keep it whole there."
    )


def _said(name: str, value: ServedValue) -> str:
    apart = value.difference
    span = f" [{apart.low:+.1f}, {apart.high:+.1f}]" if apart.is_known else ""
    return (
        f"{TITLES[name]} {value.served.mean:.1f}, recorded {value.recorded:.1f} ({apart.mean:+.1f}{span}; the base "
        f"model moves by {value.floor:.1f})"
    )
