"""The other stages of a pipeline as the first one reaches them. How a call gets there is `Peer`'s business."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class Peer(Protocol):
    """Another stage's process, which does what it is asked in the order in which it is asked."""

    def ask(self, method: str, *arguments: Any) -> Any:
        """Have a method of its `Stage` called. A promise of the answer, which may be an argument to any peer."""

    def answer(self, promise: Any) -> Any:
        """What was promised. Raises what the method has raised."""


@dataclass(frozen=True)
class Remote:
    """A stage in another process, and its layers."""

    layers: range
    peer: Peer

    def tell(self, method: str, *arguments: Any) -> None:
        """Have a method called, and wait until it is done."""
        self.get(method, *arguments)

    def get(self, method: str, *arguments: Any) -> Any:
        return self.peer.answer(self.peer.ask(method, *arguments))
