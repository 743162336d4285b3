"""Tokens that a model has no embedding for. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from dtmsearch.errors import UserError

# So many tokens are named; the others are counted.
_MOST_NAMED = 5


def check_known(ids: ArrayLike, vocabulary_size: int, names_of: Callable[[Sequence[int]], Sequence[str]]) -> None:
    """Raise `UserError`, with the ids and what `names_of` them says, where some are not below `vocabulary_size`."""
    found = np.asarray(ids, np.int64)
    unknown = np.unique(found[found >= vocabulary_size]).tolist()
    if not unknown:
        return
    shown = unknown[:_MOST_NAMED]
    named = ", ".join(f"{i} ({name!r})" for i, name in zip(shown, names_of(shown), strict=True))
    more = f" and {len(unknown) - len(shown)} more" if len(unknown) > len(shown) else ""
    raise UserError(
        f"the tokenizer gives the text ids that the model has no embedding for: {named}{more}, where the model has "
        f"{vocabulary_size} rows (ids 0 to {vocabulary_size - 1}). Resize its embeddings to the tokenizer "
        "(resize_token_embeddings), or take the tokenizer that belongs to it"
    )
