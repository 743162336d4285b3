"""The model that a process holds, and the weights on which it stands: the base model's own, or trained ones.

Everything that works on the unquantized model brings it there by this, and finds it where it was left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from dtmsearch.core.plan import Plan
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.modules.compiled import Slot, as_loaded
from dtmsearch.model.modules.discovery import find_layers
from dtmsearch.model.weights.applied import Weights
from dtmsearch.model.weights.trained import trained_file


class Standing:
    """A model, its `weights` under a plan, and `weights_id`: the trained weights below the plan, empty for the base
    model's own. Trained weights are found in `weights_folder`; `slots` are those of compiled layers."""

    def __init__(
        self, body: Body, weights: Weights, weights_folder: str = "", slots: Mapping[str, Slot] | None = None
    ) -> None:
        self.body, self.weights, self.weights_id = body, weights, ""
        self._weights_folder, self._slots = weights_folder, slots or {}

    def rest_on(self, weights_id: str) -> None:
        """Stand unquantized, on trained weights or (the empty id) on the base model's own. Raises `UserError` for
        trained weights that this machine does not see."""
        path = trained_file(self._weights_folder, weights_id) if weights_id else None
        self.weights.become(Plan())
        if weights_id != self.weights_id:
            self.weights.rest_on(path)
            self.weights_id = weights_id

    def rest_on_base(self) -> None:
        """Stand on the base model's own weights; where that is so already, the plan over them stays."""
        if self.weights_id:
            self.rest_on("")

    @contextmanager
    def on_base(self) -> Iterator[None]:
        """The base model within, unquantized; afterwards the weights that were stood on, unquantized, too."""
        before = self.weights_id
        self.rest_on("")
        try:
            yield
        finally:
            if before:
                self.rest_on(before)

    def eagerly(self) -> AbstractContextManager[None]:
        """Layers as they were loaded: where shapes change with every token, compiled ones would compile for ever."""
        return as_loaded(*find_layers(self.body.model), self._slots)
