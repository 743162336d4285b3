"""The calibrator of a model in stages: each stage's `Calibrator` has its own layers, text goes from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dtmsearch.core.calibration import Calibration, InputStatistics, PackedMatrix, WeightError
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import Scheme, solved_pairs
from dtmsearch.model.calibration.calibrator import Calibrator
from dtmsearch.model.compress.compressor import Fetch
from dtmsearch.model.forward.boundary_states import State
from dtmsearch.model.pipeline_parallel.pipeline_body import PipelineBody, outgoing
from dtmsearch.model.pipeline_parallel.remote import Remote
from dtmsearch.model.weights.standing import Standing


class PipelineCalibrator:
    """Answers as a `Calibrator` does, for all stages: each calibrates its own components, the first by `own`, and gets
    the text's states from the pass `whole`."""

    def __init__(
        self,
        own: Calibrator,
        whole: PipelineBody,
        standing: Standing,
        remotes: Sequence[Remote],
        manifest: ModelManifest,
        rows_in_batch: Callable[[int], int],
    ) -> None:
        self._own, self._whole, self._standing, self._remotes = own, whole, standing, remotes
        self._rows_in_batch = rows_in_batch
        self._layer_of = {component.name: component.layer for component in manifest.components}
        self._statistics: dict[str, InputStatistics] = {}
        self._entered: set[str] = set()

    def use(self, calibration: Calibration, statistics: InputStatistics | None) -> None:
        """See `Calibrator.use`."""
        self._own.use(calibration, statistics)
        if statistics is not None:
            self._statistics[calibration.id] = statistics
        for remote in self._remotes:
            remote.peer.ask("use_calibration", calibration, statistics)

    def fetch_from(self, calibration_id: str, fetch: Fetch) -> None:
        """See `Calibrator.fetch_from`; the stages have fetches of their own."""
        self._own.fetch_from(calibration_id, fetch)

    def statistics(self, calibration_id: str) -> InputStatistics:
        """See `Calibrator.statistics`."""
        if calibration_id not in self._statistics:
            calibration = self._own.texts.known(calibration_id)
            with self._standing.on_base():
                self._enter(calibration_id)
                own = self._own.statistics(calibration_id)
                squares, tokens, largest = dict(own.mean_squares), dict(own.num_tokens), dict(own.largest)
                gathering = [remote.peer.ask("gather", calibration_id) for remote in self._remotes]
                for remote, promise in zip(self._remotes, gathering, strict=True):
                    theirs, of_theirs, largest_there = remote.peer.answer(promise)
                    squares, tokens, largest = squares | theirs, tokens | of_theirs, largest | largest_there
            self.use(calibration, InputStatistics(calibration_id, squares, tokens, largest))
        return self._statistics[calibration_id]

    def _enter(self, calibration_id: str) -> None:
        """Let every stage have the text's states at its first layer. The base model must stand, unquantized."""
        if calibration_id in self._entered:
            return
        batches = self._text(calibration_id)
        states: list[State | None] = [None] * len(batches)
        start = 0
        for remote in self._remotes:
            stop = remote.layers.start
            states = [self._whole.advance(b, s, start, stop) for b, s in zip(batches, states, strict=True)]
            remote.tell("enter", calibration_id, "", *map(outgoing, states))
            start = stop
        self._entered.add(calibration_id)

    def _text(self, calibration_id: str) -> Sequence[Tensor]:
        tokens = torch.from_numpy(self._own.texts.known(calibration_id).tokens).long().to(self._whole.input_device)
        batches: Sequence[Tensor] = tokens.split(self._rows_in_batch(tokens.shape[1]))
        return batches

    @property
    def _active(self) -> str:
        assert self._own.texts.active is not None
        return self._own.texts.active

    def activate(self, calibration_id: str) -> None:
        """See `Calibrator.activate`."""
        if self._own.texts.active == calibration_id:
            return
        self._own.texts.known(calibration_id)
        self.statistics(calibration_id)
        self._own.activate(calibration_id)
        for remote in self._remotes:
            remote.tell("activate", calibration_id)

    def prepare(self, plans: Iterable[Plan], calibration_id: str | None = None) -> None:
        """See `Calibrator.prepare`."""
        plans = [plan for plan in plans if plan.needs_calibration]
        if not plans:
            return
        pairs = [pair for plan in plans for pair in plan.parsed.items()]
        self.activate(self._own.texts.usual if calibration_id is None else calibration_id)
        self._own.solve(self._here(pairs))
        if self._own.texts.through_compressed:
            self._solve_from_below(pairs)
        for remote, wanted in self._elsewhere(pairs):
            if remote.get("lacks", wanted):
                self._have_enter()
                remote.tell("solve_for_itself", wanted)

    def _here(self, pairs: Iterable[tuple[str, Scheme]]) -> list[tuple[str, Scheme]]:
        return [(c, scheme) for c, scheme in pairs if self._layer_of[c] in self._whole.own]

    def _elsewhere(self, pairs: Iterable[tuple[str, Scheme]]) -> list[tuple[Remote, list[tuple[str, Scheme]]]]:
        """What is to be solved in other stages: (component, solved scheme) pairs of each that has some."""
        wanted = solved_pairs(pairs)
        found = [
            (remote, [(c, scheme) for c, scheme in wanted if self._layer_of[c] in remote.layers])
            for remote in self._remotes
        ]
        return [(remote, pairs) for remote, pairs in found if pairs]

    def _have_enter(self) -> None:
        """Stand on the base model, unquantized, as solving does, and have the stages entered."""
        with self._standing.on_base():
            self._enter(self._active)
        self._standing.rest_on(self._standing.weights_id)

    def _solve_from_below(self, pairs: Iterable[tuple[str, Scheme]]) -> None:
        """By a calibration through compressed layers: have what these pairs lack solved stage by stage, each over the
        text's states behind those below as the same scheme has made them."""
        for scheme in dict.fromkeys(scheme for _, wanted in self._elsewhere(pairs) for _, scheme in wanted):
            needed = [(r, [pair for pair in wanted if pair[1] == scheme]) for r, wanted in self._elsewhere(pairs)]
            lacking = [remote for remote, wanted in needed if wanted and remote.get("lacks", wanted)]
            if not lacking:
                continue
            self._standing.rest_on(self._standing.weights_id)
            reached = self.statistics(self._active).mean_squares
            layer_of = {name: layer for name, layer in self._layer_of.items() if layer >= 0 and name in reached}
            self._own.solve([(name, scheme) for name, layer in layer_of.items() if layer in self._whole.own])
            for remote in self._remotes[: self._remotes.index(lacking[-1]) + 1]:
                start = remote.layers.start
                below = Plan.of({name: scheme.name for name, layer in layer_of.items() if layer < start})
                with self._standing.weights.perturbed(below):
                    states = [self._whole.advance(batch, None, 0, start) for batch in self._text(self._active)]
                    remote.tell("enter", self._active, scheme.name, *map(outgoing, states))
                own = [(name, scheme) for name, layer in layer_of.items() if layer in remote.layers]
                remote.tell("solve_for_itself", own)

    def solve(self, pairs: Iterable[tuple[str, Scheme]]) -> list[PackedMatrix]:
        """See `Calibrator.solve`."""
        pairs = list(pairs)
        if self._own.texts.through_compressed:
            self._solve_from_below(pairs)
        found = self._own.solve(self._here(pairs))
        elsewhere = self._elsewhere(pairs)
        if elsewhere and not self._own.texts.through_compressed:
            self._have_enter()
        solving = [(remote, remote.peer.ask("solve", wanted)) for remote, wanted in elsewhere]
        for remote, promise in solving:
            found += remote.peer.answer(promise)
        by_pair = {(packed.component, packed.scheme): packed for packed in found}
        return [by_pair[component, scheme.name] for component, scheme in solved_pairs(pairs)]

    def weight_errors(
        self, components: Sequence[str], schemes: Sequence[Scheme], calibration_id: str, by_hessian: bool
    ) -> list[WeightError]:
        """See `Calibrator.weight_errors`; every stage has its own components measured at the same time."""
        self._standing.rest_on_base()
        if calibration_id:
            self.activate(calibration_id)
            if by_hessian or any(scheme.solved is not None for scheme in schemes):
                self._have_enter()
            if self._own.texts.through_compressed:
                self._solve_from_below([(component, scheme) for component in components for scheme in schemes])
        layers = [(remote, [c for c in components if self._layer_of[c] in remote.layers]) for remote in self._remotes]
        asked = [
            (remote, remote.peer.ask("weight_errors", names, schemes, calibration_id, by_hessian))
            for remote, names in layers
        ]
        here = [c for c in components if self._layer_of[c] in self._whole.own]
        answers = [self._own.weight_errors(here, schemes, calibration_id, by_hessian)]
        answers += [remote.peer.answer(promise) for remote, promise in asked]
        found = {(error.component, error.scheme): error for errors in answers for error in errors}
        return [found[c, s.name] for c in components for s in schemes]

    def applied(self, component: str, weight: Tensor, scheme: Scheme) -> Tensor:
        """See `Calibrator.applied`."""
        return self._own.applied(component, weight, scheme)

    def rest(self) -> None:
        """See `Calibrator.rest`."""
        self._own.rest()

    def forget(self) -> None:
        """See `Calibrator.forget`."""
        self._own.forget()
