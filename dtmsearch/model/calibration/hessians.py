"""Hessians of a text on the base model, layer by layer: as many at once as there is room for, kept while there is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from dtmsearch.core.calibration import too_few_to_solve
from dtmsearch.core.components import ModelManifest
from dtmsearch.model.calibration.calibration_texts import CalibrationTexts
from dtmsearch.model.calibration.input_statistics import Gatherer, SharedHessian
from dtmsearch.model.weights.standing import Standing

# Bytes of Hessians that are kept: all of a small model's, none of a large one's.
_HESSIAN_BYTES = 1 << 30
# Bytes of Hessians that are gathered at once, each of a component's inputs: those of 256 experts of 7,168 inputs would
# take 53 GB.
_MOST_HESSIAN_BYTES = 8 << 30


class Hessians:
    """X^T X of what a layer's components read; of experts that too few tokens reach, the identity."""

    def __init__(self, texts: CalibrationTexts, standing: Standing, manifest: ModelManifest) -> None:
        self._texts, self._standing, self._manifest = texts, standing, manifest
        self._walker: Gatherer | None = None
        self._kept: OrderedDict[int, list[SharedHessian]] = OrderedDict()

    def of_layer(self, layer: int) -> list[SharedHessian]:
        """The Hessians of a layer by the active calibration, kept as long as there is room."""
        if layer not in self._kept:
            with self._standing.on_base(), self._standing.eagerly():
                (every,) = self.parts_of(layer)
                self._kept[layer] = self.guarded(layer, self._walking().hessians(layer), every)
            self._kept.move_to_end(layer)
            while _bytes(self._kept) > _HESSIAN_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return self._kept[layer]

    def in_parts(self, layer: int, wanted: Collection[str]) -> Iterator[list[SharedHessian]]:
        """The Hessians of a layer's components, as many at once as there is room for; where that is not for all of
        them, of those `wanted` alone, for which the text goes through the layer several times."""
        parts = self.parts_of(layer)
        if len(parts) == 1:
            yield self.of_layer(layer)
            return
        parts = self.parts_of(layer, wanted)
        for number, part in enumerate(parts, start=1):
            with self._standing.on_base(), self._standing.eagerly():
                found = self.guarded(layer, self._walking().hessians(layer, stay=number < len(parts), only=part), part)
            yield found
            found.clear()  # before the next ones are gathered, whoever still holds the list

    def parts_of(self, layer: int, only: Collection[str] | None = None) -> list[list[str]]:
        """The components of a layer, or some of them, in parts whose Hessians are held at once."""
        parts: list[list[str]] = [[]]
        held = 0
        for component in self._manifest.components:
            if component.layer != layer or (only is not None and component.name not in only):
                continue
            size = 4 * component.shape[1] ** 2
            if parts[-1] and held + size > _MOST_HESSIAN_BYTES:
                parts.append([])
                held = 0
            parts[-1].append(component.name)
            held += size
        return parts

    def guarded(self, layer: int, found: Sequence[SharedHessian], part: Collection[str]) -> list[SharedHessian]:
        """The Hessians of a part of a layer, with the identity for experts that too few tokens reach, or none."""
        components = self._manifest.by_name
        reached = {name for shared in found for name in shared.components}
        experts = [c for c in self._manifest.components if c.stacked and c.mixture and c.layer == layer]
        missing = (c.name for c in experts if c.name in part and c.name not in reached)
        unreached = [SharedHessian((name,), torch.empty(0), 0) for name in missing]

        def guarded(shared: SharedHessian) -> SharedHessian:
            component = components[shared.components[0]]
            if not too_few_to_solve(component, shared.num_tokens):
                return shared
            device = self._standing.body.device_of(component.layer)
            return replace(shared, hessian=torch.eye(component.shape[1], device=device))

        return [guarded(shared) for shared in (*found, *unreached)]

    def _walking(self) -> Gatherer:
        """The active calibration's text on its way up the layers."""
        if self._walker is None:
            self._walker = self._texts.gatherer(self._texts.in_use)
        return self._walker

    def rest(self) -> None:
        """Let go of the text's states, for evaluations need the room."""
        self._walker = None

    def forget(self) -> None:
        """Let go of all that can be gathered again."""
        self.rest()
        self._kept.clear()


def _bytes(hessians: Mapping[int, Sequence[SharedHessian]]) -> int:
    return sum(
        shared.hessian.numel() * shared.hessian.element_size() for layer in hessians.values() for shared in layer
    )
