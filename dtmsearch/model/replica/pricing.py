"""Products of gradients with what options change, a prompt at a time, taken at the outputs of components.

One pass up keeps the states between layers; then gradients go down from the head, a layer at a time (`PricedLayers`).
Memory: the weights, states of one request between layers, one layer's changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import Reference
from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import FloatArray, PriceRequest
from dtmsearch.errors import UserError
from dtmsearch.model.calibration.calibrator import AnyCalibrator
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.replica.loaded_reference import greedy
from dtmsearch.model.replica.price_layers import PricedLayers
from dtmsearch.model.weights.applied import Weights

# Logits that are held at once.
_MOST_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 28}


class Pricer:
    """Takes products on a replica's model, all of whose layers are here. `eager` is a context in which layers run as
    they were loaded, `rows_in_batch` gives the rows of a batch for rows of so many tokens."""

    def __init__(
        self,
        body: Body,
        weights: Weights,
        calibrator: AnyCalibrator,
        manifest: ModelManifest,
        eager: Callable[[], AbstractContextManager[None]],
        rows_in_batch: Callable[[int], int],
    ) -> None:
        self._body, self._weights, self._calibrator = body, weights, calibrator
        self._layers = PricedLayers(body, weights, calibrator, manifest)
        self._eager, self._rows_in_batch = eager, rows_in_batch

    def unpriceable(self, components: Sequence[str]) -> str:
        """See `Replica.unpriceable`."""
        if self._body.how_it_runs() or not self._body.head_apart:
            return f"no backward pass goes layer by layer: {self._body.how_it_runs() or 'its head runs within it'}"
        if outside := self._layers.outside(components):
            return f"{outside} lies outside the layers"
        return self._layers.unpriceable(components)

    def products(self, request: PriceRequest, reference: Reference, stand_on: Callable[[Plan], None]) -> FloatArray:
        """Products [samples, components, schemes]. `stand_on` has the model under a plan, on the base model's weights.

        Raises `UserError`.
        """
        if problem := self.unpriceable(request.components):
            raise UserError(f"prices cannot be had: {problem}. Choose a strategy that measures, such as sensitivity")
        prompts = (np.arange(*request.samples) % reference.num_prompts).astype(np.int32)
        tokens = torch.from_numpy(greedy(reference, prompts)).long().to(self._body.input_device)
        batches = tokens.split(self._rows_in_batch(tokens.shape[1]))
        base_hidden: list[Tensor] | None = None
        with torch.no_grad():
            if request.kind == "slope":
                stand_on(Plan())
                with self._eager():
                    states = [self._body.finish(batch, None, 0) for batch in batches]
                base_hidden = [state[:, reference.prompt_tokens - 1 : -1].clone() for state in states]
            plans = [request.around, *(Plan.of(dict.fromkeys(request.components, s)) for s in request.schemes)]
            self._calibrator.prepare(plans, request.calibration_id or None)
            stand_on(request.around)
            self._calibrator.rest()
            self._weights.let_gradients_through()
        with self._eager():
            found = self._by_component(request, batches, reference.prompt_tokens, base_hidden)
        return np.stack([found[component] for component in request.components], axis=1)

    def _by_component(
        self, request: PriceRequest, batches: Sequence[Tensor], targets_from: int, base_hidden: list[Tensor] | None
    ) -> Mapping[str, FloatArray]:
        """Products [samples, schemes] of each component. `batches` are of tokens that are predicted from position
        `targets_from`, `base_hidden` the base model's inputs of the head, for the slope."""
        with torch.no_grad():
            states = self._up(batches)
        gradients, first = [], request.samples[0]
        for at, batch in enumerate(batches):
            base = None if base_hidden is None else base_hidden[at]
            gradients.append(_of_head(self._body, request, batch, states[at][-1], targets_from, first, base))
            first += len(batch)
        return self._down(request, batches, states, gradients)

    def _up(self, batches: Sequence[Tensor]) -> list[list[Tensor]]:
        """The states of each batch at boundaries that are kept here, the last layer's output the last."""
        return self._body.boundaries_of(batches)

    def _down(
        self,
        request: PriceRequest,
        batches: Sequence[Tensor],
        states: list[list[Tensor]],
        gradients: list[Tensor],
    ) -> Mapping[str, FloatArray]:
        """Products of each component, from the gradients at the last layer's output."""
        return self._layers.down(request, batches, states, gradients)[0]


def _of_head(
    body: Body,
    request: PriceRequest,
    tokens: Tensor,
    state: Tensor,
    targets_from: int,
    first_sample: int,
    base_hidden: Tensor | None,
) -> Tensor:
    """The gradient at the last layer's output."""
    leaf = state.detach().requires_grad_()
    with torch.enable_grad():
        hidden = body.head_input(tokens, leaf)[:, targets_from - 1 : -1]
        rows = hidden.reshape(-1, hidden.shape[-1])
        base_rows = None if base_hidden is None else base_hidden.reshape(rows.shape)
        targets = tokens[:, targets_from:].to(rows.device).reshape(-1)
        drawn = _drawn(request, first_sample, len(tokens), hidden.shape[1])
        wanted = torch.from_numpy(drawn).to(rows.device).reshape(-1)
        total = torch.zeros_like(rows)
        chunk = max(1, _MOST_LOGITS[rows.device.type] // body.vocabulary_size)
        with body.head_only():
            for at in range(0, len(rows), chunk):
                part = rows[at : at + chunk].detach().requires_grad_()
                logits = body.logits(part)
                with torch.no_grad():
                    own = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
                    if base_rows is not None:
                        own -= body.logits(base_rows[at : at + chunk]).to(own.dtype).softmax(dim=1)
                    else:
                        draws = request.kind == "fisher"
                        labels = _labels(own, wanted[at : at + chunk]) if draws else targets[at : at + chunk]
                        own[torch.arange(len(own), device=own.device), labels] -= 1.0
                (total[at : at + chunk],) = torch.autograd.grad(logits, part, own.to(logits.dtype))
        (gradient,) = torch.autograd.grad(rows, leaf, total)
    return gradient


def _drawn(request: PriceRequest, first_sample: int, samples: int, positions: int) -> NDArray[np.float64]:
    """Numbers between 0 and 1, [samples, positions], that follow from the seed and the sample alone."""
    return np.stack([np.random.default_rng((request.seed, first_sample + i)).random(positions) for i in range(samples)])


def _labels(probabilities: Tensor, drawn: Tensor) -> Tensor:
    """Tokens [rows] drawn from `probabilities` [rows, vocabulary] by numbers between 0 and 1: where these lie in their
    cumulative sums."""
    sums = probabilities.double().cumsum(dim=1)
    found = torch.searchsorted(sums, (drawn.to(sums) * sums[:, -1]).unsqueeze(1), right=True).squeeze(1)
    return found.clamp_(max=probabilities.shape[1] - 1)
