"""Prices of a model in stages: states go up and gradients come down through all of them, each of which has the products
of its own components."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.prices import FloatArray, PriceRequest
from dtmsearch.model.calibration.calibrator import AnyCalibrator
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.pipeline_parallel.pipeline_body import outgoing
from dtmsearch.model.pipeline_parallel.remote import Remote
from dtmsearch.model.pipeline_parallel.stage import received, to_send
from dtmsearch.model.replica.pricing import Pricer
from dtmsearch.model.weights.applied import Weights


class PipelinePricer(Pricer):
    """A `Pricer` of a model whose first layers are here, and the others in the stages `remotes`."""

    def __init__(
        self,
        body: Body,
        weights: Weights,
        calibrator: AnyCalibrator,
        manifest: ModelManifest,
        eager: Callable[[], AbstractContextManager[None]],
        rows_in_batch: Callable[[int], int],
        remotes: Sequence[Remote],
    ) -> None:
        super().__init__(body, weights, calibrator, manifest, eager, rows_in_batch)
        self._remotes = remotes

    def unpriceable(self, components: Sequence[str]) -> str:
        """See `Replica.unpriceable`."""
        if outside := self._layers.outside(components):
            return f"{outside} lies outside the layers"
        problems = [self._layers.unpriceable(self._layers.here(components))]
        problems += [remote.get("unpriceable", tuple(components)) for remote in self._remotes]
        return next(filter(None, problems), "")

    def _up(self, batches: Sequence[Tensor]) -> list[list[Tensor]]:
        """Of each batch the states of the layers here, and the last layer's output; each stage keeps its own."""
        for remote in self._remotes:
            remote.tell("begin_prices")
        states = [self._body.own_boundaries(batch, None) for batch in batches]
        tops = []
        for batch, own in zip(batches, states, strict=True):
            rows, promise = to_send(batch), outgoing(own[-1])
            for remote in self._remotes:
                promise = remote.peer.ask("rise", rows, promise)
            tops.append(promise)
        last = self._remotes[-1].peer
        for own, top in zip(states, tops, strict=True):
            own.append(received(last.answer(top), self._body.input_device))
        return states

    def _down(
        self,
        request: PriceRequest,
        batches: Sequence[Tensor],
        states: list[list[Tensor]],
        gradients: list[Tensor],
    ) -> Mapping[str, FloatArray]:
        found: dict[str, FloatArray] = {}
        lowest = self._layers.lowest(request.components)
        for own in states:
            own.pop()  # the last layer's output, which stands above those of the layers here
        reached = to_send(gradients)
        for remote in reversed(self._remotes):
            if lowest < remote.layers.stop:
                products, reached = remote.get("fall", request, reached)
                found |= products
            else:
                remote.tell("end_prices")
        if lowest < self._body.own.stop:
            found |= self._layers.down(request, batches, states, received(reached, self._body.input_device))[0]
        return found
