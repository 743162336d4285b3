"""What each engine that serves models wants of a search: the schemes that its export holds, what must share one, and
the budget that leaves a choice. Knows numbers and names, no model's code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dtmsearch.core.schemes import SCALE_BITS

# Of all that vLLM takes (core.engine_rules), what its fastest kernels for weight-only integers do.
_VLLM_BITS = (4, 8)
_VLLM_GROUPS = (32, 64, 128)
EngineName = Literal["transformers", "vllm", "llama.cpp"]
# Between the smallest scheme and a budget at least so much, or there is next to nothing to choose.
_LEAST_ROOM = 0.25
# Where the budget that was asked for leaves no room: so much above the smallest scheme.
_ROOM = 0.375
# Blocks that llama.cpp's types of few bits have, and those that all its others have.
_K_BLOCK, _BLOCK = 256, 32


@dataclass(frozen=True)
class Engine:
    """`export` are the options of `dtmsearch export`; `usual_bits` a budget that suits it, in bits per weight with
    scales; `fused`: it runs q, k, v and gate, up as one matrix each, of one scheme."""

    export: str
    usual_bits: float
    fused: bool = False


WANTED: Mapping[EngineName, Engine] = {
    "transformers": Engine("--to compressed-tensors", 4.5),
    "vllm": Engine("--to compressed-tensors --runtime vllm", 5.0, fused=True),
    "llama.cpp": Engine("--to gguf-recipe", 4.5),
}


@dataclass(frozen=True)
class Menu:
    """Schemes to choose among, the most bits first; the budget in bits per weight; and what a person should know of
    either, empty where there is nothing."""

    schemes: tuple[str, ...]
    bits_per_weight: float
    note: str = ""


def menu(name: EngineName, bits: float | None, largest_group: int) -> Menu:
    """What to search for an engine within so many `bits` per weight (None: what suits it). `largest_group`: the largest
    group of inputs that divides those of every matrix, 0 where not even 32 does."""
    group = _group(name, largest_group)
    widths = _widths(name, largest_group)
    scales = SCALE_BITS / group if group else 0.0  # of rows next to nothing
    least = widths[0] + scales
    budget, notes = bits or WANTED[name].usual_bits, []
    if budget < least + _LEAST_ROOM:
        asked, budget = budget, least + _ROOM
        if bits is not None:
            smallest = _name(name, widths[0], group)
            notes.append(
                f"{asked:g} bits per weight leave {name} no choice, whose smallest scheme here, {smallest}, takes "
                f"{least:.4g} with its scales: the budget is {budget:.4g}"
            )
    if group == 0:
        what = "llama.cpp keeps such matrices in 16 bits" if name == "llama.cpp" else "scales are those of rows"
        notes.append(f"{_BLOCK} does not divide all inputs: {what}")
    return Menu(_near(name, budget, widths, group, scales), budget, "; ".join(notes))


def _group(name: EngineName, largest_group: int) -> int:
    """The inputs that share a scale; 0 for whole rows."""
    if name == "vllm":
        return max((group for group in _VLLM_GROUPS if group <= largest_group), default=0)
    return _BLOCK if largest_group >= _BLOCK else 0


def _widths(name: EngineName, largest_group: int) -> tuple[int, ...]:
    """Bits of codes, the fewest first."""
    if name == "vllm":
        return _VLLM_BITS
    if name == "llama.cpp":
        return (2, 3, 4, 5, 6, 8) if largest_group >= _K_BLOCK else (4, 5, 8)
    return 2, 3, 4, 6, 8


def _near(name: EngineName, budget: float, widths: tuple[int, ...], group: int, scales: float) -> tuple[str, ...]:
    """The schemes around a budget: the widest that a uniform plan could have, one below, one above, and 8 bits."""
    within = [at for at, width in enumerate(widths) if width + scales <= budget]
    at = within[-1] if within else 0
    chosen = {*widths[max(at - 1, 0) : at + 2], widths[-1]}
    return tuple(_name(name, width, group) for width in sorted(chosen, reverse=True))


def _name(name: EngineName, width: int, group: int) -> str:
    # Rows are enough for 8 bits; llama.cpp knows blocks alone.
    in_rows = group == 0 or (width == 8 and name == "transformers")
    return f"int{width}-channel" if in_rows else f"int{width}-g{group}"
