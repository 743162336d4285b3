"""A plan as a small picture of characters: a row for each kind of component, a column for each layer."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence

from dtmsearch.analysis.scheme_characters import UNQUANTIZED, scheme_characters
from dtmsearch.core.components import Component
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import DENSE

# A mixture's experts would be rows by the hundred.
_MOST_KINDS = 16


def plan_picture(plan: Plan, components: Sequence[Component], width: int | None = None) -> str:
    """Which scheme each component has, by one character, and what the characters mean.

    A scheme's character is the digit of its bits where no other scheme of the plan has these, else a letter;
    components that the plan leaves out stand as `.`. A model with more layers than the window (`width` characters,
    default: that of the terminal) is cut into parts below each other. Empty where there are too many kinds to see
    anything, or no layers.
    """
    kinds = list(dict.fromkeys(component.kind for component in components))
    if len({component.layer for component in components}) < 2 or len(kinds) > _MOST_KINDS:
        return ""
    window = width or shutil.get_terminal_size().columns
    symbols = scheme_characters(plan.schemes.values())
    at = {(c.kind, c.layer): symbols.get(plan.shown_scheme_of(c), UNQUANTIZED) for c in components}
    layers = sorted({layer for _, layer in at})
    margin = max(map(len, [*kinds, "layer"])) + 2
    per_part = max(10, window - margin)
    lines = []
    for start in range(0, len(layers), per_part):
        part = layers[start : start + per_part]
        lines.append(f"{'layer':<{margin}}{_ruler(part)}")
        lines += [f"{kind:<{margin}}{''.join(at.get((kind, n), ' ') for n in part)}".rstrip() for kind in kinds]
    counts = Counter(scheme for c in components if (scheme := plan.shown_scheme_of(c)) != DENSE)
    meaning = [f"{symbol} = {counts[scheme]} x {scheme}" for scheme, symbol in symbols.items()]
    left = len(components) - counts.total()
    meaning += [f"{UNQUANTIZED} = {left} x unquantized"] if left else []
    legend = textwrap.wrap("; ".join(meaning), max(20, window - margin), break_on_hyphens=False)
    return "\n".join([*lines, *(f"{'':<{margin}}{line}" for line in legend)])


def _ruler(layers: Sequence[int]) -> str:
    """The number of the first and of every tenth layer, above its column."""
    line = ""
    for at, layer in enumerate(layers):
        if at == 0 or (layer % 10 == 0 and len(line) < at):
            line = f"{line:<{at}}{layer}"
    return line
