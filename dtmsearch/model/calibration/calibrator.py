"""A replica's calibrations: it gathers their statistics, solves what schemes need solved, and says how far schemes move
weights.

Works on the unquantized model, to which it brings the replica back where that is needed. Knows nothing of evaluations.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dtmsearch.core.calibration import (
    Calibration,
    ExpertUse,
    FloatArray,
    InputStatistics,
    PackedMatrix,
    WeightError,
    too_few_to_solve,
    too_few_to_weigh,
)
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import Scheme, parse_scheme, solved_pairs
from dtmsearch.errors import UserError
from dtmsearch.model.calibration.expert_use import expert_uses
from dtmsearch.model.calibration.input_statistics import Gatherer, SharedHessian
from dtmsearch.model.compress.bitsandbytes_layers import compressed_module, restored_weight
from dtmsearch.model.compress.compressor import Fetch
from dtmsearch.model.compress.gptq import inverse_factor, solve
from dtmsearch.model.compress.packing import pack
from dtmsearch.model.compress.rounding import round_weight
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.weights.standing import Standing

# Bytes of Hessians that are kept: all of a small model's, none of a large one's.
_HESSIAN_BYTES = 1 << 30
# Bytes of Hessians that are gathered at once, each of a component's inputs: those of 256 experts of 7,168 inputs would
# take 53 GB.
_MOST_HESSIAN_BYTES = 8 << 30
# As LLM.int8() rounds weights.
_BY_ROW = parse_scheme("int8-channel")
# Weights that are solved for side by side: about 16 bytes of working memory for each.
_MOST_TOGETHER = 1 << 28


class AnyCalibrator(Protocol):
    """What a replica asks of its calibrator, whether its layers lie in one process or in several."""

    def use(self, calibration: Calibration, statistics: InputStatistics | None) -> None: ...

    def fetch_from(self, calibration_id: str, fetch: Fetch) -> None: ...

    def statistics(self, calibration_id: str) -> InputStatistics: ...

    def activate(self, calibration_id: str) -> None: ...

    def prepare(self, plans: Iterable[Plan], calibration_id: str | None = None) -> None: ...

    def solve(self, pairs: Iterable[tuple[str, Scheme]]) -> list[PackedMatrix]: ...

    def weight_errors(
        self, components: Sequence[str], schemes: Sequence[Scheme], calibration_id: str, by_hessian: bool
    ) -> list[WeightError]: ...

    def applied(self, component: str, weight: Tensor, scheme: Scheme) -> Tensor: ...

    def rest(self) -> None: ...

    def forget(self) -> None: ...


class Calibrator:
    """The calibrations that a replica was given, one of them active.

    Statistics and Hessians are those of the base model; matrices are solved for the weights that the model stands on
    (by a calibration through compressed layers, over these weights' own Hessians). `body` is the pass as far as it goes
    here, `rows_in_batch` gives the rows of a batch for rows of so many tokens where the text begins here.
    """

    def __init__(
        self,
        body: Body,
        standing: Standing,
        manifest: ModelManifest,
        rows_in_batch: Callable[[int], int] = lambda tokens: 1,
    ) -> None:
        self._body, self._standing, self._manifest = body, standing, manifest
        self._weights, self._rows_in_batch = standing.weights, rows_in_batch
        self._calibrations: dict[str, Calibration] = {}
        self._statistics: dict[str, InputStatistics] = {}
        self._fetch: dict[str, Fetch] = {}
        self._entries: dict[tuple[str, str], tuple[Tensor, int]] = {}
        self.active: str | None = None
        self._walker: Gatherer | None = None
        self._hessians: OrderedDict[int, list[SharedHessian]] = OrderedDict()
        self._errors: dict[tuple[str, str, str, bool], WeightError] = {}

    def use(self, calibration: Calibration, statistics: InputStatistics | None) -> None:
        """Take a calibration; where there are no statistics of it yet, they are gathered when first needed."""
        if calibration.manifest_id != self._manifest.id:
            raise ValueError(
                f"calibration {calibration.id} is of another model: its manifest is {calibration.manifest_id}, that of "
                f"{self._manifest.model} is {self._manifest.id}"
            )
        self._calibrations.setdefault(calibration.id, calibration)
        if statistics is not None:
            self._statistics[calibration.id] = statistics

    def enter(self, calibration_id: str, batches: Sequence[Tensor], scheme: str = "") -> None:
        """Take the states of a calibration's text at the first layer that is here, a batch each: the base model's, or
        behind layers that are compressed by a scheme."""
        self._entries[calibration_id, scheme] = torch.cat(list(batches)), len(batches[0])

    def fetch_from(self, calibration_id: str, fetch: Fetch) -> None:
        """Where matrices solved by a calibration may be had."""
        self._fetch[calibration_id] = fetch

    def statistics(self, calibration_id: str) -> InputStatistics:
        """Gather, if they are not known, mean squares and largest values of all components' inputs."""
        if calibration_id not in self._statistics:
            with self._standing.on_base(), self._standing.eagerly():
                squares, tokens, largest = self._gatherer(self.known(calibration_id)).mean_squares()
            squares |= self._unweighed(tokens)
            self._statistics[calibration_id] = InputStatistics(calibration_id, squares, tokens, largest)
        return self._statistics[calibration_id]

    def _unweighed(self, tokens: Mapping[str, int]) -> dict[str, FloatArray]:
        """Mean squares of 1 for experts that too few tokens reach, by how many reach which component."""
        experts = [c for c in self._manifest.components if c.stacked and c.layer in self._body.own]
        few = [c for c in experts if too_few_to_weigh(c, tokens.get(c.name, 0))]
        return {c.name: np.ones(c.shape[1], np.float32) for c in few}

    def activate(self, calibration_id: str) -> None:
        """Calibrate by this one from now on. Raises `ValueError` for one that was not given."""
        if self.active == calibration_id:
            return
        self.known(calibration_id)
        statistics = self.statistics(calibration_id)
        self._standing.rest_on(self._standing.weights_id)  # dense: what stands there may be calibrated by another
        self.active = calibration_id
        self.forget()
        compressor = self._weights.compressor
        compressor.calibrate(calibration_id, statistics, self._body.input_device)

    def known(self, calibration_id: str) -> Calibration:
        """A calibration by its id. Raises `ValueError` for one that was not given."""
        if calibration_id not in self._calibrations:
            named = f"calibration {calibration_id}, which this replica was not given" if calibration_id else "none"
            raise ValueError(f"a calibrated scheme needs calibration text; the request names {named}")
        return self._calibrations[calibration_id]

    @property
    def usual(self) -> str:
        """The calibration to take where none is named: the active one, else the first."""
        return self.active or next(iter(self._calibrations), "")

    def prepare(self, plans: Iterable[Plan], calibration_id: str | None = None) -> None:
        """Make sure that these plans can be applied: by the calibration given, else the active or the first one."""
        plans = [plan for plan in plans if plan.needs_calibration]
        if plans:
            self.activate(self.usual if calibration_id is None else calibration_id)
            self.solve([pair for plan in plans for pair in plan.parsed.items()])

    def solve(self, pairs: Iterable[tuple[str, Scheme]]) -> list[PackedMatrix]:
        """Solve for (component, scheme) pairs by the active calibration; those at hand already are not solved again.

        The matrices of schemes that need solving, in order of the pairs. Raises `ValueError` for a component that the
        text does not reach.
        """
        wanted = {(component, scheme.name): scheme for component, scheme in solved_pairs(pairs)}
        compressor = self._weights.compressor
        self._choose_fetch()
        held = ((pair, compressor.solved(pair[0], scheme)) for pair, scheme in wanted.items())
        found = {pair: packed for pair, packed in held if packed is not None}
        missing = sorted(wanted.keys() - found.keys())
        for packed in self._solve_missing([(pair[0], wanted[pair]) for pair in missing]):
            compressor.keep(packed)
            found[packed.component, packed.scheme] = packed
        compressor.trim(wanted.keys())
        return [found[pair] for pair in wanted]

    def _solve_missing(self, missing: Sequence[tuple[str, Scheme]]) -> Iterator[PackedMatrix]:
        """What is not at hand, in order of components and schemes' names, and in a calibration through compressed
        layers what lies below it."""
        if missing and self.through_compressed:
            for scheme in dict.fromkeys(wanted for _, wanted in missing):
                yield from self._solve_upwards(scheme, [component for component, own in missing if own == scheme])
            return
        by_layer: dict[int, dict[str, list[Scheme]]] = {}
        for component, scheme in missing:
            by_layer.setdefault(self._layer_of(component), {}).setdefault(component, []).append(scheme)
        for layer in sorted(by_layer):
            yield from self._solve_layer(layer, by_layer[layer])

    @property
    def through_compressed(self) -> bool:
        """Whether the active calibration goes through compressed layers."""
        return self.active is not None and self._calibrations[self.active].through == "compressed"

    def _solve_upwards(self, scheme: Scheme, wanted: Sequence[str]) -> Iterator[PackedMatrix]:
        """Solve all components from the first layer up to those wanted, each layer over the text's states behind the
        layers below as this scheme has made them (arXiv 2210.17323, section 4). All of them are compressed, whatever a
        plan has there: so a component's matrix follows from its scheme alone."""
        if said := self._body.how_it_runs():
            raise UserError(f"calibration.through: compressed goes up layer by layer, and {said}. Use through: base")
        compressor, top = self._weights.compressor, max(self._layer_of(component) for component in wanted)
        reached: set[str] = set()
        self._standing.rest_on(self._standing.weights_id)
        with self._standing.eagerly():
            walker = self._gatherer(self._calibrations[self.active or ""], scheme.name)
            for layer in range(self._body.own.start, top + 1):
                here: list[str] = []
                for part in self._parts_of(layer):
                    for shared in self._guarded(layer, walker.hessians(layer, stay=True, only=part), part):
                        here += shared.components
                        pairs = [(c, scheme) for c in shared.components if compressor.solved(c, scheme) is None]
                        yield from self._solve_shared(pairs, shared.hessian) if pairs else ()
                reached.update(here)
                if layer < top:
                    plan = dict.fromkeys(here, scheme.name)
                    with self._weights.perturbed(Plan.of(plan)):
                        walker.advance(layer + 1)
        self._require_reached(wanted, reached)

    def lacks(self, pairs: Iterable[tuple[str, Scheme]]) -> bool:
        """Whether some of these (component, solved scheme) pairs are neither at hand nor to be fetched."""
        self._choose_fetch()
        return any(self._weights.compressor.solved(*pair) is None for pair in pairs)

    def _choose_fetch(self) -> None:
        """What may be fetched was solved for the base model's weights."""
        self._weights.compressor.fetch_from(None if self._standing.weights_id else self._fetch.get(self.active or ""))

    def _layer_of(self, component: str) -> int:
        layer = self._manifest.by_name[component].layer
        if not 0 <= layer < self._body.num_layers:
            raise UserError(f"{component} lies outside the layers, where no Hessians are gathered")
        return layer

    def _solve_layer(self, layer: int, wanted: Mapping[str, Sequence[Scheme]]) -> Iterable[PackedMatrix]:
        reached: set[str] = set()
        for hessians in self._in_parts(layer, wanted):
            for shared in hessians:
                reached.update(shared.components)
                pairs = [(c, scheme) for c in shared.components for scheme in wanted.get(c, ())]
                if pairs:
                    yield from self._solve_shared(pairs, shared.hessian)
        self._require_reached(wanted, reached)

    def _in_parts(self, layer: int, wanted: Collection[str]) -> Iterator[list[SharedHessian]]:
        """The Hessians of a layer's components, as many at once as there is room for; where that is not for all of
        them, of those `wanted` alone, for which the text goes through the layer several times."""
        parts = self._parts_of(layer)
        if len(parts) == 1:
            yield self.hessians(layer)
            return
        parts = self._parts_of(layer, wanted)
        for number, part in enumerate(parts, start=1):
            with self._standing.on_base(), self._standing.eagerly():
                found = self._guarded(layer, self._walking().hessians(layer, stay=number < len(parts), only=part), part)
            yield found
            found.clear()  # before the next ones are gathered, whoever still holds the list

    def _parts_of(self, layer: int, only: Collection[str] | None = None) -> list[list[str]]:
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

    def _require_reached(self, wanted: Iterable[str], reached: set[str]) -> None:
        for component in sorted(set(wanted) - reached):
            raise UserError(
                f"{component} cannot be calibrated: no token of the calibration text reached it as a module of its own"
            )

    def _solve_shared(self, pairs: Sequence[tuple[str, Scheme]], hessian: Tensor) -> Iterable[PackedMatrix]:
        factor = inverse_factor(hessian)
        for together in _chunks(pairs, lambda pair: self._manifest.by_name[pair[0]].num_weights):
            originals = {component: self._weights.original(component) for component, _ in together}
            jobs = [self._weights.compressor.job(c, originals[c], scheme) for c, scheme in together]
            for (component, scheme), solved in zip(together, solve(jobs, factor), strict=True):
                yield pack(component, scheme.name, solved, originals[component].dtype)

    def hessians(self, layer: int) -> list[SharedHessian]:
        """The Hessians of a layer by the active calibration, kept as long as there is room."""
        if layer not in self._hessians:
            assert self.active is not None
            with self._standing.on_base(), self._standing.eagerly():
                (every,) = self._parts_of(layer)
                self._hessians[layer] = self._guarded(layer, self._walking().hessians(layer), every)
            self._hessians.move_to_end(layer)
            while _bytes(self._hessians) > _HESSIAN_BYTES and len(self._hessians) > 1:
                self._hessians.popitem(last=False)
        return self._hessians[layer]

    def _guarded(self, layer: int, found: Sequence[SharedHessian], part: Collection[str]) -> list[SharedHessian]:
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
            return replace(shared, hessian=torch.eye(component.shape[1], device=self._body.input_device))

        return [guarded(shared) for shared in (*found, *unreached)]

    def _walking(self) -> Gatherer:
        """The active calibration's text on its way up the layers."""
        if self._walker is None:
            assert self.active is not None
            self._walker = self._gatherer(self._calibrations[self.active])
        return self._walker

    def _gatherer(self, calibration: Calibration, scheme: str = "") -> Gatherer:
        tokens = torch.from_numpy(calibration.tokens).long().to(self._body.input_device)
        entry, rows = self._entries.get((calibration.id, scheme), (None, self._rows_in_batch(tokens.shape[1])))
        assert entry is not None or self._body.own.start == 0, "the text's states come from the stage below"
        everywhere = calibration.experts == "all"
        return Gatherer(self._body, tokens, self._manifest.components, rows, entry, everywhere)

    def rest(self) -> None:
        """Let go of the text's states, for evaluations need the room."""
        self._walker = None

    def forget(self) -> None:
        """Let go of all that can be gathered again."""
        self.rest()
        self._hessians.clear()

    def weight_errors(
        self, components: Sequence[str], schemes: Sequence[Scheme], calibration_id: str, by_hessian: bool
    ) -> list[WeightError]:
        """Errors of every scheme on every component, in this order of nesting; see `Replica.weight_errors`."""
        self._standing.rest_on_base()
        if calibration_id:
            self.activate(calibration_id)
        if any(scheme.needs_calibration for scheme in schemes) and not calibration_id:
            names = ", ".join(scheme.name for scheme in schemes)
            raise ValueError(f"errors of {names} need calibration text; no calibration is named")
        if caches := [name for name in components if self._manifest.by_name[name].is_cache]:
            raise ValueError(f"{caches[0]} is a KV cache: it has no weights that could have errors")
        by_layer: dict[int, list[str]] = {}
        for component in components:
            if any((calibration_id, component, s.name, by_hessian) not in self._errors for s in schemes):
                by_layer.setdefault(self._manifest.by_name[component].layer, []).append(component)
        for layer in sorted(by_layer):
            self._measure_errors(by_layer[layer], schemes, calibration_id, by_hessian)
        self.rest()
        return [self._errors[calibration_id, c, s.name, by_hessian] for c in components for s in schemes]

    def _measure_errors(
        self, components: Sequence[str], schemes: Sequence[Scheme], calibration_id: str, by_hessian: bool
    ) -> None:
        """Errors of all schemes on components of one layer; the device is asked for them once, at the end."""
        self.solve([(component, scheme) for component in components for scheme in schemes])
        found: dict[tuple[str, str], Tensor] = {}
        weighed: set[str] = set()
        parts = self._in_parts(self._layer_of(components[0]), components) if by_hessian else ()
        for shared in (shared for part in parts for shared in part):
            for component in shared.components:
                if component in components:
                    weighed.add(component)
                    found |= self._norms_of(component, schemes, calibration_id, shared.hessian)
        for component in components:
            if component not in weighed:
                found |= self._norms_of(component, schemes, calibration_id, None)
        rows = torch.stack(list(found.values())).tolist()
        for (component, name), (plain, by_inputs, hessian) in zip(found, rows, strict=True):
            error = WeightError(
                component,
                name,
                plain,
                by_inputs if self._squares(component, calibration_id) is not None else None,
                hessian if component in weighed else None,
            )
            self._errors[calibration_id, component, name, by_hessian] = error

    def _norms_of(
        self, component: str, schemes: Sequence[Scheme], calibration_id: str, hessian: Tensor | None
    ) -> dict[tuple[str, str], Tensor]:
        """(component, scheme) -> norms of what the scheme changes, over those of the weights."""
        weight = self._weights.original(component)
        matrix = weight if weight.ndim == 2 else weight.unsqueeze(0)
        squares = self._squares(component, calibration_id)
        norms = _norms(matrix.float(), squares, hessian)
        return {
            (component, scheme.name): _norms(
                self.applied(component, matrix, scheme).float().sub_(matrix), squares, hessian
            ) / norms
            for scheme in schemes
        }  # fmt: skip

    def expert_uses(self, components: Sequence[str], schemes: Sequence[Scheme], calibration_id: str) -> list[ExpertUse]:
        """See `dtmsearch.model.calibration.expert_use.expert_uses`, of a calibration's text on the base model."""
        held = [self._manifest.by_name[name] for name in components]
        with self._standing.on_base(), self._standing.eagerly():
            return expert_uses(self._gatherer(self.known(calibration_id)), self._weights, held, schemes)

    def _squares(self, component: str, calibration_id: str) -> Tensor | None:
        known = calibration_id and component in self._statistics[calibration_id].mean_squares
        return self._weights.compressor.mean_squares(component) if known else None

    def applied(self, component: str, weight: Tensor, scheme: Scheme) -> Tensor:
        """The dense matrix [rows, cols] of a component under a scheme."""
        if scheme.is_unquantized:
            return weight.clone()
        if not scheme.kind.as_module:
            return self._weights.compressor.compress(component, weight, scheme)
        if scheme.rounds_activations:  # vector-wise: a scale for each row, as in rounding
            return round_weight(weight, _BY_ROW)
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        return restored_weight(compressed_module(linear, weight, scheme))


def _norms(matrix: Tensor, squares: Tensor | None, hessian: Tensor | None) -> Tensor:
    """Squared norms of `matrix`: plain, weighted by mean squared inputs, weighted by the Hessian; 1 where not known."""
    one = matrix.new_ones(())
    squared = matrix.square()
    plain = squared.sum(dtype=torch.float64)
    by_inputs = one if squares is None else (squared.sum(dim=0) * squares.to(matrix.device)).sum(dtype=torch.float64)
    by_hessian = one if hessian is None else ((matrix @ hessian) * matrix).sum(dtype=torch.float64)
    return torch.stack([plain, by_inputs.double(), by_hessian.double()])


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


def _bytes(hessians: Mapping[int, Sequence[SharedHessian]]) -> int:
    return sum(
        shared.hessian.numel() * shared.hessian.element_size() for layer in hessians.values() for shared in layer
    )
