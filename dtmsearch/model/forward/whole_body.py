"""The forward pass of a model that is only measured as it is."""

from __future__ import annotations

import torch

from dtmsearch.model.forward.partial import Body


class WholeBody(Body):
    """A body whose passes all start at the tokens and which generates nothing, so that neither where they may be cut
    nor which cache gives its own tokens is proved."""

    warns = False

    def _prove(self) -> None:
        with torch.inference_mode():
            tokens = self.random_prompts()[0]
            self.head_apart = self._proves_head_apart(tokens, self._whole_logits(tokens))
        self.cuts = frozenset({0})
