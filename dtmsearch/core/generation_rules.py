"""The rules by which a reference's continuations are generated: a part of its identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dtmsearch.core.decoding import GREEDY


@dataclass(frozen=True)
class GenerationRules:
    """What decides a continuation beside model, numeric mode and the prompt's tokens.

    `suppressed` are the end-of-text tokens, which are never chosen; `opening` the tokens that the tokenizer puts before
    a text; `tokenizer` the identity of the tokenizer's files; `decoding` how every next token is chosen, as `Decoding`
    writes it. Nothing of the checkpoint's own generation settings applies.
    """

    suppressed: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()
    tokenizer: str = ""
    decoding: str = str(GREEDY)

    def differences(self, other: GenerationRules) -> list[str]:
        """What other rules say otherwise, a line a rule."""
        changed = []
        if other.suppressed != self.suppressed:
            changed.append(f"end-of-text tokens {_listed(other.suppressed)}, not {_listed(self.suppressed)}")
        if other.opening != self.opening:
            changed.append(f"begin tokens {_listed(other.opening)}, not {_listed(self.opening)}")
        if other.tokenizer != self.tokenizer:
            changed.append("other tokenizer files")
        if other.decoding != self.decoding:
            changed.append(f"decoding {other.decoding}, not {self.decoding}")
        return changed


def _listed(tokens: Sequence[int]) -> str:
    return ", ".join(map(str, tokens)) or "none"
