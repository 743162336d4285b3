"""How large batches are: what a device likes, and less of it once memory has not sufficed. Knows no model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

# Tokens of a forward batch unless the settings say otherwise: on a CPU what its cache likes, on a GPU what
# keeps its matrix products busy.
_TOKENS = {"cpu": 1_600, "cuda": 25_600}
# Times as many are continued together: a step multiplies one token of each row, of which more cost a CPU little more.
_CONTINUED = {"cpu": 4, "cuda": 1}
# What is kept of them then takes no more bytes.
_MOST_KEPT = 1 << 30
_T = TypeVar("_T")


class Batches:
    """Batches of `tokens` tokens, by default as many as the device likes. When memory does not suffice, `release` lets
    go of what can be made again; batches are not made smaller than `longest_row()`, the most tokens of a row in use.

    `roomy` is false once memory has not sufficed for a work twice, the second time without what others had kept:
    nothing is kept then that is not needed.
    """

    def __init__(
        self, tokens: int, device: torch.device, release: Callable[[], None], longest_row: Callable[[], int]
    ) -> None:
        self._continued = 1 if tokens else _CONTINUED[device.type]
        self.tokens = tokens or _TOKENS[device.type]
        self.roomy = True
        self._release, self._longest_row = release, longest_row

    def rows(self, row_tokens: int) -> int:
        return max(1, self.tokens // row_tokens)

    def rows_continued(self, row_tokens: int, token_bytes: int) -> int:
        """The rows of a batch that is continued token by token up to `row_tokens`, where caches keep `token_bytes` of a
        token."""
        return max(1, min(self._continued * self.tokens, max(self.tokens, _MOST_KEPT // token_bytes)) // row_tokens)

    def halving(self, work: Callable[[], _T]) -> _T:
        """`work`, with smaller batches for as long as memory does not suffice. Raises `torch.OutOfMemoryError`."""
        tries = 0
        while True:
            tries += 1
            try:
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error)
            self._release()
            if tries == 1:
                continue
            if self.roomy:
                log.warning("out of memory: states and outputs of layers are not kept from now on")
                self.roomy = False
            elif not self._halve():
                raise torch.OutOfMemoryError(message)

    def _halve(self) -> bool:
        if self.tokens <= self._longest_row():
            return False
        self.tokens //= 2
        log.warning("out of memory: batches of %d tokens from now on", self.tokens)
        return True


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that memory was not enough, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
