"""Text as rows of tokens, and which of them each step takes. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.identity import identity
from dtmsearch.errors import UserError
from dtmsearch.model.training.recipe import Recipe
from dtmsearch.model.weights.trained import write_whole

# Texts are tokenized in pieces of about this many characters, side by side.
_PIECE_CHARACTERS = 50_000


def read_rows(texts: Sequence[str], tokenizer: Any, sequence_tokens: int, folder: Path) -> NDArray[np.int32]:
    """Rows [rows, sequence_tokens] of the texts, mapped from a file of `folder` that is written the first time."""
    kept = folder / f"{_digest(texts, tokenizer, sequence_tokens)}.npy"
    if not kept.exists():
        found = tokenized(texts, tokenizer, sequence_tokens)
        write_whole(kept, lambda path: _save(path, found))
    rows: NDArray[np.int32] = np.load(kept, mmap_mode="r")
    return rows


def check_batch(recipe: Recipe, num_rows: int) -> None:
    """Raise `UserError` for rows that do not fill one batch; where no step is taken, for fewer than a fit needs."""
    if recipe.num_steps == 0:
        if num_rows < 2:
            raise UserError(
                f"the training text holds {num_rows} rows of {recipe.sequence_tokens} tokens, but a fit needs two: "
                "give more text, or a smaller recovery.sequence_tokens"
            )
        return
    if num_rows < recipe.rows:
        raise UserError(
            f"the training text holds {num_rows} rows of {recipe.sequence_tokens} tokens, but one batch takes "
            f"{recipe.rows}: give more text, or a smaller recovery.batch_tokens"
        )


def tokenized(texts: Sequence[str], tokenizer: Any, sequence_tokens: int) -> NDArray[np.int32]:
    """Rows [rows, sequence_tokens] of the texts, one after the other; the rest at the end is left out."""
    pieces = [piece for text in texts for piece in _pieces(text)]
    ids = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else []
    flat = np.concatenate([np.array(part, np.int32) for part in ids]) if ids else np.empty(0, np.int32)
    whole = len(flat) // sequence_tokens * sequence_tokens
    return flat[:whole].reshape(-1, sequence_tokens)


def batch_rows(step: int, rows: int, num_rows: int, seed: int) -> NDArray[np.int64]:
    """Which of `num_rows` rows step `step` takes: every epoch is a permutation of its own, one after the other."""
    epochs, places = np.divmod(np.arange(step * rows, (step + 1) * rows), num_rows)
    orders = {epoch: _order(epoch, num_rows, seed) for epoch in np.unique(epochs).tolist()}
    return np.concatenate([order[places[epochs == epoch]] for epoch, order in orders.items()])


@lru_cache(maxsize=2)
def _order(epoch: int, num_rows: int, seed: int) -> NDArray[np.int64]:
    """The rows of an epoch, one after the other; a batch reaches into two."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def _digest(texts: Sequence[str], tokenizer: Any, sequence_tokens: int) -> str:
    whole = identity([sha256(text.encode(errors="surrogatepass")).hexdigest() for text in texts])
    return identity([whole, tokenizer.backend_tokenizer.to_str(), sequence_tokens])


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end at line ends."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE_CHARACTERS)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def _save(path: Path, rows: NDArray[np.int32]) -> None:
    with path.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
