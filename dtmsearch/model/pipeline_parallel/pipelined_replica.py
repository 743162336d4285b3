"""A replica whose layers lie in several processes: the first stage, which asks the others.

A pass goes from stage to stage without coming back in between; what a stage leaves is kept where it is until it is
needed. How the others are reached is `Peer`'s business: nothing here knows Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dtmsearch.core.calibration import Calibration, InputStatistics, PackedMatrix, WeightError
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import ModelSpec, ReplicaSettings, Speed
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import Scheme, solved_pairs
from dtmsearch.errors import UserError
from dtmsearch.model.calibration.calibrator import AnyCalibrator, Calibrator
from dtmsearch.model.calibration.outliers import outlier_shares
from dtmsearch.model.compress.compressor import Fetch
from dtmsearch.model.forward.partial import Body, Elsewhere, StandIn, State
from dtmsearch.model.modules.compiled import Slot
from dtmsearch.model.modules.fingerprints import tokenizer_fingerprint
from dtmsearch.model.modules.loading import load_tokenizer
from dtmsearch.model.modules.slots import Places
from dtmsearch.model.modules.swapping import swapped
from dtmsearch.model.pipeline_parallel.stage import Stage, StageBody, cut, load_part, received, to_send
from dtmsearch.model.replica.replica import LoadedModel, Replica
from dtmsearch.model.weights.applied import Checkpoint, Weights
from dtmsearch.model.weights.standing import Standing


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


def make_stage(
    spec: ModelSpec, settings: ReplicaSettings, name: str = "local", node: str = "", peers: Sequence[Peer] = ()
) -> Stage | PipelineReplica:
    """The stage that the settings say; the first one is the replica, and gets the others."""
    if settings.stage:
        return Stage(spec, settings)
    return PipelineReplica(spec, settings, name, node, peers)


class _Bridge(StandIn):
    """In place of the first layer that is elsewhere, in a generation: hands on what comes out of the last of them."""

    cross: Callable[[Tensor], Tensor]

    def handed_on(self, hidden_states: Tensor) -> Tensor:
        return self.cross(hidden_states)


class PipelineBody(Body):
    """The whole forward pass. Boundaries of other stages are `Elsewhere`."""

    def __init__(self, model: Any, own: range, remotes: Sequence[Remote]) -> None:
        super().__init__(model, own)
        self._remotes = remotes
        # While one batch is in the last stage, others are in those before.
        self.passes_ahead = len(remotes)

    def check_cuts(self) -> None:
        """Raises `UserError` for a model that cannot be cut into stages, as far as this stage's layers tell: they run
        once in a pass, and each gives from the state below it alone, bit by bit, what it gives in the pass."""
        with torch.inference_mode():
            tokens, others = self.random_prompts()
            with self._only(self.own.start, self.own.stop):
                states = self.boundaries(tokens)
                self.run(others)  # lest layers find what they left of the same tokens
            # Of the stand-ins for the other layers nothing is noted.
            if len(states) != self.own.stop + 1:
                raise self._uncuttable("its layers run several times")
            for start in range(1, self.own.stop):
                found = self.through(states[start], start, start + 1, lambda: self.run(tokens))
                if not torch.equal(found, states[start + 1]):
                    raise self._uncuttable(f"a pass that starts at layer {start} is not the same")

    def check_cache(self) -> None:
        """Raises `UserError` for a model that does not generate its own tokens with the stages' caches."""
        try:
            with torch.inference_mode():
                right, why = self.generates_own(self.random_prompts()[0]), "other tokens than those of single passes"
        except UserError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # what the model's code makes of a cache
            right, why = False, f"{type(error).__name__}: {error}"
        if not right:
            raise self._uncuttable(f"with a cache in each stage it does not generate its own tokens ({why})")

    def _whole_logits(self, tokens: Tensor) -> Tensor:
        hidden = self.finish(tokens, None, 0)
        with self.head_only():
            return self.logits(hidden.reshape(-1, hidden.shape[-1])).reshape(*tokens.shape, -1)

    def _uncuttable(self, why: str) -> UserError:
        return UserError(
            f"{type(self.model).__name__} cannot be cut into stages: {why}. Give each replica one process (without "
            "--nodes-per-replica), whose GPUs --gpus-per-replica says"
        )

    def advance(self, tokens: Tensor, state: State | None, start: int, stop: int) -> State:
        here = self.own.stop
        if start < here:
            state = super().advance(tokens, state, start, min(stop, here))
        return state if stop <= here and state is not None else self._onward(tokens, state, max(start, here), stop)

    def _onward(self, tokens: Tensor, state: State | None, start: int, stop: int) -> Elsewhere:
        promise = outgoing(state)
        rows = to_send(tokens)
        for remote in self._remotes:
            first, last = max(start, remote.layers.start), min(stop, remote.layers.stop)
            if first < last:
                promise = remote.peer.ask("run", rows, promise, first, last)
        return Elsewhere(promise)

    def begin(self, tokens: Tensor, state: State | None, start: int) -> Callable[[], Tensor]:
        here = self.own.stop
        if start < here:
            state = super().advance(tokens, state, start, here)
        reached = self._onward(tokens, state, max(start, here), self.num_layers)

        def end() -> Tensor:
            sent = self._remotes[-1].peer.answer(reached.promise)
            return super(PipelineBody, self).finish(tokens, received(sent, self.input_device), self.num_layers)

        return end

    def finish(self, tokens: Tensor, state: State | None, start: int) -> Tensor:
        return self.begin(tokens, state, start)()

    def generate(self, prompts: Tensor, num_tokens: int, suppressed: tuple[int, ...]) -> Tensor:
        for remote in self._remotes:
            remote.peer.ask("begin_generation", prompts.shape[1] + num_tokens)
        with self._bridged():
            return super().generate(prompts, num_tokens, suppressed)

    @contextmanager
    def _bridged(self) -> Iterator[None]:
        """Within, the model's own code runs through all stages, as it calls its layers."""
        arguments: Any = None

        def note(module: nn.Module, ordered: Any, named: Mapping[str, Any]) -> None:
            nonlocal arguments
            arguments = to_send((ordered, {key: value for key, value in named.items() if key != "past_key_values"}))

        def cross(hidden: Tensor) -> Tensor:
            promise = to_send(hidden)
            for remote in self._remotes:
                promise = remote.peer.ask("decode", arguments, promise)
            crossed: Tensor = received(self._remotes[-1].peer.answer(promise), hidden.device)
            return crossed

        hook = self.around_layers.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with self._only(self.own.start, self.own.stop):
                first = self.own.stop
                bridge = _Bridge(self._real[first], first)
                bridge.cross, bridge.returns = cross, self._stand_ins[first].returns
                with swapped(self._layers, {str(first): bridge}):
                    yield
        finally:
            hook.remove()


def outgoing(state: State | None) -> Any:
    """A state as an argument to a peer."""
    assert state is not None
    return state.promise if isinstance(state, Elsewhere) else to_send(state)


class PipelineWeights(Weights):
    """A whole model's components under a plan, each where its layer is."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        places: Places,
        scale_dtype: torch.dtype,
        remotes: Sequence[Remote],
        manifest: ModelManifest,
        device: torch.device,
    ) -> None:
        super().__init__(model, checkpoint, places, scale_dtype)
        self._device = device
        self._remote_of = {c.name: r for r in remotes for c in manifest.components if c.layer in r.layers}

    def become(self, plan: Plan) -> None:
        for remote, changed in self._changes_elsewhere(plan).items():
            remote.tell("become", self._part(remote, self.plan, changed))
            self.plan = Plan.of(self.plan.schemes | changed)
        super().become(plan)

    @contextmanager
    def perturbed(self, plan: Plan) -> Iterator[None]:
        with ExitStack() as stack:
            for remote, changed in self._changes_elsewhere(plan).items():
                remote.tell("perturb", self._part(remote, self.plan, changed))
                stack.callback(remote.peer.ask, "restore")
            here = {c: s for c, s in plan.diff(self.plan).items() if c not in self._remote_of}
            stack.enter_context(super().perturbed(Plan.of(self.plan.schemes | here)))
            yield

    def _changes_elsewhere(self, plan: Plan) -> dict[Remote, dict[str, str]]:
        changes: dict[Remote, dict[str, str]] = {}
        for component, scheme in plan.diff(self.plan).items():
            if component in self._remote_of:
                changes.setdefault(self._remote_of[component], {})[component] = scheme
        return changes

    def _part(self, remote: Remote, plan: Plan, changed: Mapping[str, str]) -> Plan:
        """What a stage has of a plan with some changes."""
        return Plan.of({c: s for c, s in plan.entries if self._remote_of.get(c) is remote} | dict(changed))

    def standing(self, component: str) -> Tensor:
        return self._fetched("standing", component) if component in self._remote_of else super().standing(component)

    def original(self, component: str) -> Tensor:
        return self._fetched("original", component) if component in self._remote_of else super().original(component)

    def _fetched(self, method: str, component: str) -> Tensor:
        weight: Tensor = received(self._remote_of[component].get(method, component), self._device)
        return weight


class PipelineStanding(Standing):
    """The same of all stages."""

    def __init__(self, body: Body, weights: Weights, weights_folder: str, remotes: Sequence[Remote]) -> None:
        super().__init__(body, weights, weights_folder)
        self._remotes = remotes

    def rest_on(self, weights_id: str) -> None:
        changes = weights_id != self.weights_id
        super().rest_on(weights_id)
        if changes:
            for remote in self._remotes:
                remote.tell("stand_on", weights_id)


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
            calibration = self._own.known(calibration_id)
            with self._standing.on_base():
                self._enter(calibration_id)
                squares = dict(self._own.statistics(calibration_id).mean_squares)
                gathering = [remote.peer.ask("gather", calibration_id) for remote in self._remotes]
                for remote, promise in zip(self._remotes, gathering, strict=True):
                    squares |= remote.peer.answer(promise)
            self.use(calibration, InputStatistics(calibration_id, squares))
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
        tokens = torch.from_numpy(self._own.known(calibration_id).tokens).long().to(self._whole.input_device)
        batches: Sequence[Tensor] = tokens.split(self._rows_in_batch(tokens.shape[1]))
        return batches

    @property
    def _active(self) -> str:
        assert self._own.active is not None
        return self._own.active

    def activate(self, calibration_id: str) -> None:
        """See `Calibrator.activate`."""
        if self._own.active == calibration_id:
            return
        self._own.known(calibration_id)
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
        self.activate(self._own.usual if calibration_id is None else calibration_id)
        self._own.solve(self._here(pairs))
        if self._own.through_compressed:
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
        if self._own.through_compressed:
            self._solve_from_below(pairs)
        found = self._own.solve(self._here(pairs))
        elsewhere = self._elsewhere(pairs)
        if elsewhere and not self._own.through_compressed:
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
            if self._own.through_compressed:
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


class PipelineReplica(Replica):
    """A replica that has the model's first layers itself, and asks the stages that have the others."""

    def __init__(self, spec: ModelSpec, settings: ReplicaSettings, name: str, node: str, peers: Sequence[Peer]) -> None:
        self._peers = peers
        super().__init__(spec, settings, name, node)

    def _load(self, spec: ModelSpec, settings: ReplicaSettings) -> LoadedModel:
        part = load_part(spec, settings, self._device)
        self._own = part.layers
        stages = cut(part.manifest.num_layers, settings.num_stages)[1:]
        self._remotes = [Remote(*pair) for pair in zip(stages, self._peers, strict=True)]
        tokenizer = load_tokenizer(part.folder, spec)
        fingerprint = tokenizer_fingerprint(part.folder, tokenizer)
        return LoadedModel(part.model, tokenizer, part.manifest, part.checkpoint, fingerprint)

    def _make_body(self, model: Any) -> Body:
        body = PipelineBody(model, self._own, self._remotes)
        body.check_cuts()
        body.check_cache()
        return body

    def _make_weights(self, loaded: LoadedModel, places: Places, scale_dtype: torch.dtype) -> Weights:
        device = self._body.input_device
        return PipelineWeights(
            loaded.model, loaded.checkpoint, places, scale_dtype, self._remotes, loaded.manifest, device
        )

    def _make_standing(self, weights_folder: str, slots: dict[str, Slot]) -> Standing:
        return PipelineStanding(self._body, self._weights, weights_folder, self._remotes)

    def _make_calibrator(self) -> AnyCalibrator:
        assert isinstance(self._body, PipelineBody)
        own = Calibrator(StageBody(self._body.model, self._own), self._standing, self._manifest, self._batches.rows)
        return PipelineCalibrator(*(own, self._body, self._standing, self._remotes, self._manifest, self._batches.rows))

    def measure_speed(self, count: int, prompt_tokens: int, continuation_tokens: int) -> Speed:
        """See `Replica.measure_speed`; the memory is that of all stages together."""
        speed = super().measure_speed(count, prompt_tokens, continuation_tokens)
        others = sum(remote.get("memory_bytes") for remote in self._remotes)
        return replace(speed, memory_bytes=speed.memory_bytes + others)

    def routed_tokens(self, reference_id: str) -> dict[str, int]:
        """See `Replica.routed_tokens`."""
        for remote in self._remotes:
            remote.tell("begin_counting")
        routed = super().routed_tokens(reference_id)
        for remote in self._remotes:
            routed |= remote.get("end_counting")
        return routed

    def _outlier_shares(self, multiple: float) -> dict[int, float]:
        here = [c for c in self._manifest.components if c.layer in self._own]
        shares = outlier_shares(self._weights, here, multiple)
        for remote in self._remotes:
            shares |= remote.get("outlier_shares", multiple)
        return shares

    def release_memory(self) -> None:
        super().release_memory()
        for remote in self._remotes:
            remote.tell("rest")
