"""States at the boundaries between layers: here, in another process, or to be had from one below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


class Elsewhere:
    """A state that lies in another process, and may not be there yet; `promise` as who passes it on knows it."""

    def __init__(self, promise: Any) -> None:
        self.promise = promise

    def to(self, *_: Any, **__: Any) -> Elsewhere:
        """It stays where it is, whatever device a state is wanted on."""
        return self


@dataclass(frozen=True)
class Below:
    """The state at a boundary that is no cut: that at `start`, the next one below that is, from where the layers run
    again (None at boundary 0)."""

    state: Tensor | None
    start: int

    def to(self, *arguments: Any, **options: Any) -> Below:
        return self if self.state is None else Below(self.state.to(*arguments, **options), self.start)


State = Tensor | Elsewhere | Below
