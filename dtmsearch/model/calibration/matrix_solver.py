"""Solves what GPTQ and SparseGPT have solved for, matrices by the Hessians of the active calibration; and has AutoRound
tune what is its.

What is at hand already, or may be fetched, is not solved again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dtmsearch.core.calibration import PackedMatrix
from dtmsearch.core.components import IN_MEMORY, Component, ModelManifest
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import Scheme, solved_pairs
from dtmsearch.errors import UserError
from dtmsearch.model.calibration.calibration_texts import CalibrationTexts
from dtmsearch.model.calibration.hessians import Hessians
from dtmsearch.model.compress.autoround import tuned
from dtmsearch.model.compress.compressor import Fetch
from dtmsearch.model.compress.gptq import Solved, inverse_factor, solve
from dtmsearch.model.compress.packing import pack
from dtmsearch.model.modules.compat import path_of
from dtmsearch.model.weights.standing import Standing

# Weights that are solved for side by side: about 16 bytes of working memory for each.
_MOST_TOGETHER = 1 << 28


class MatrixSolver:
    """Matrices are solved for the weights that the model stands on; by a calibration through compressed layers, over
    these weights' own Hessians."""

    def __init__(
        self, texts: CalibrationTexts, hessians: Hessians, standing: Standing, manifest: ModelManifest
    ) -> None:
        self._texts, self._hessians, self._standing, self._manifest = texts, hessians, standing, manifest
        self._fetch: dict[str, Fetch] = {}

    def fetch_from(self, calibration_id: str, fetch: Fetch) -> None:
        """Where matrices solved by a calibration may be had."""
        self._fetch[calibration_id] = fetch

    def solve(self, pairs: Iterable[tuple[str, Scheme]]) -> list[PackedMatrix]:
        """Solve for (component, scheme) pairs by the active calibration; those at hand already are not solved again.

        The matrices of schemes that need solving, in order of the pairs. Raises `ValueError` for a component that the
        text does not reach.
        """
        wanted = {(component, scheme.name): scheme for component, scheme in solved_pairs(pairs)}
        compressor = self._standing.weights.compressor
        self.choose_fetch()
        held = ((pair, compressor.solved(pair[0], scheme)) for pair, scheme in wanted.items())
        found = {pair: packed for pair, packed in held if packed is not None}
        missing = sorted(wanted.keys() - found.keys())
        for packed in self._solve_missing([(pair[0], wanted[pair]) for pair in missing]):
            compressor.keep(packed)
            found[packed.component, packed.scheme] = packed
        compressor.trim(wanted.keys())
        return [found[pair] for pair in wanted]

    def lacks(self, pairs: Iterable[tuple[str, Scheme]]) -> bool:
        """Whether some of these (component, solved scheme) pairs are neither at hand nor to be fetched."""
        self.choose_fetch()
        return any(self._standing.weights.compressor.solved(*pair) is None for pair in pairs)

    def choose_fetch(self) -> None:
        """What may be fetched was solved for the base model's weights."""
        fetch = None if self._standing.weights_id else self._fetch.get(self._texts.active or "")
        self._standing.weights.compressor.fetch_from(fetch)

    def _solve_missing(self, missing: Sequence[tuple[str, Scheme]]) -> Iterator[PackedMatrix]:
        """What is not at hand, in order of components and schemes' names, and in a calibration through compressed
        layers what lies below it."""
        yield from self._tune([pair for pair in missing if pair[1].is_tuned])
        missing = [pair for pair in missing if not pair[1].is_tuned]
        if missing and self._texts.through_compressed:
            for scheme in dict.fromkeys(wanted for _, wanted in missing):
                yield from self._solve_upwards(scheme, [component for component, own in missing if own == scheme])
            return
        by_layer: dict[int, dict[str, list[Scheme]]] = {}
        for component, scheme in missing:
            by_layer.setdefault(self.layer_of(component), {}).setdefault(component, []).append(scheme)
        for layer in sorted(by_layer):
            yield from self._solve_layer(layer, by_layer[layer])

    def _tune(self, missing: Sequence[tuple[str, Scheme]]) -> Iterator[PackedMatrix]:
        """Have AutoRound tune the whole model under each scheme, whatever of it is wanted: so a component's matrix
        follows from its scheme alone."""
        for scheme in dict.fromkeys(wanted for _, wanted in missing):
            model, weights = self._standing.body.model, self._standing.weights
            wanted = [component for component, own in missing if own == scheme]
            layers = [c.name for c in self._manifest.components if self._is_tunable(c, scheme)]
            if other := sorted(set(wanted) - set(layers)):
                raise UserError(f"{other[0]} cannot be {scheme.name}: AutoRound tunes linear layers of whole models")
            elsewhere = self._standing.weights_id or self._manifest.content_hash == IN_MEMORY
            if elsewhere or len(self._standing.body.own) < self._manifest.num_layers:
                raise UserError(
                    f"{scheme.name} is of a model's own weights, in a folder and in one process: AutoRound loads it by "
                    "itself (no trained weights, no model object in memory, no --nodes-per-replica)"
                )
            text = torch.from_numpy(self._texts.in_use.tokens)
            device, trusts = self._standing.body.input_device, bool(getattr(model.config, "auto_map", None))
            found = tuned(path_of(model), layers, scheme, text, model.dtype, device, trusts)
            for component in wanted:
                codes = Solved(found[component], None, None)
                yield pack(component, scheme.name, codes, weights.original(component).dtype)

    def _is_tunable(self, component: Component, scheme: Scheme) -> bool:
        plain = not (component.stacked or component.transposed or component.is_cache or component.is_block)
        return plain and component.layer >= 0 and scheme.misfit(component.shape) is None

    def _solve_upwards(self, scheme: Scheme, wanted: Sequence[str]) -> Iterator[PackedMatrix]:
        """Solve all components from the first layer up to those wanted, each layer over the text's states behind the
        layers below as this scheme has made them (arXiv 2210.17323, section 4). All of them are compressed, whatever a
        plan has there: so a component's matrix follows from its scheme alone."""
        if said := self._standing.body.how_it_runs():
            raise UserError(f"calibration.through: compressed goes up layer by layer, and {said}. Use through: base")
        compressor, top = self._standing.weights.compressor, max(self.layer_of(component) for component in wanted)
        reached: set[str] = set()
        self._standing.rest_on(self._standing.weights_id)
        with self._standing.eagerly():
            walker = self._texts.gatherer(self._texts.in_use, scheme.name)
            for layer in range(self._standing.body.own.start, top + 1):
                here: list[str] = []
                for part in self._hessians.parts_of(layer):
                    for shared in self._hessians.guarded(layer, walker.hessians(layer, stay=True, only=part), part):
                        here += shared.components
                        pairs = [(c, scheme) for c in shared.components if compressor.solved(c, scheme) is None]
                        yield from self._solve_shared(pairs, shared.hessian) if pairs else ()
                reached.update(here)
                if layer < top:
                    plan = dict.fromkeys(here, scheme.name)
                    with self._standing.weights.perturbed(Plan.of(plan)):
                        walker.advance(layer + 1)
        self._require_reached(wanted, reached)

    def _solve_layer(self, layer: int, wanted: Mapping[str, Sequence[Scheme]]) -> Iterable[PackedMatrix]:
        reached: set[str] = set()
        for hessians in self._hessians.in_parts(layer, wanted):
            for shared in hessians:
                reached.update(shared.components)
                pairs = [(c, scheme) for c in shared.components for scheme in wanted.get(c, ())]
                if pairs:
                    yield from self._solve_shared(pairs, shared.hessian)
        self._require_reached(wanted, reached)

    def _require_reached(self, wanted: Iterable[str], reached: set[str]) -> None:
        for component in sorted(set(wanted) - reached):
            raise UserError(
                f"{component} cannot be calibrated: no token of the calibration text reached it as a module of its own"
            )

    def _solve_shared(self, pairs: Sequence[tuple[str, Scheme]], hessian: Tensor) -> Iterable[PackedMatrix]:
        factor = inverse_factor(hessian)
        for together in _chunks(pairs, lambda pair: self._manifest.by_name[pair[0]].num_weights):
            originals = {component: self._standing.weights.original(component) for component, _ in together}
            jobs = [self._standing.weights.compressor.job(c, originals[c], scheme) for c, scheme in together]
            for (component, scheme), solved in zip(together, solve(jobs, factor), strict=True):
                yield pack(component, scheme.name, solved, originals[component].dtype)

    def layer_of(self, component: str) -> int:
        """The layer of a component. Raises `UserError` for one outside the layers."""
        layer = self._manifest.by_name[component].layer
        if not 0 <= layer < self._standing.body.num_layers:
            raise UserError(f"{component} lies outside the layers, where no Hessians are gathered")
        return layer


def _chunks(
    pairs: Sequence[tuple[str, Scheme]], weights_of: Callable[[tuple[str, Scheme]], int]
) -> Iterable[Sequence[tuple[str, Scheme]]]:
    """Pairs in runs of as many weights as are solved for side by side."""
    chunk: list[tuple[str, Scheme]] = []
    held = 0
    for pair in pairs:
        if chunk and held + weights_of(pair) > _MOST_TOGETHER:
            yield chunk
            chunk, held = [], 0
        chunk.append(pair)
        held += weights_of(pair)
    if chunk:
        yield chunk
