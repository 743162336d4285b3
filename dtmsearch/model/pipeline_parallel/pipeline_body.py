"""The pass of a model in stages: it goes from stage to stage, and what a stage leaves is kept where it is until it is
needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dtmsearch.core.decoding import GREEDY, Decoding
from dtmsearch.errors import UserError
from dtmsearch.model.forward.boundary_states import Elsewhere, State
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.forward.stand_ins import StandIn
from dtmsearch.model.modules.swapping import swapped
from dtmsearch.model.pipeline_parallel.remote import Remote
from dtmsearch.model.pipeline_parallel.stage import received, to_send


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
                raise self.uncuttable("its layers run several times")
            for start in range(1, self.own.stop):
                found = self.through(states[start], start, start + 1, lambda: self.run(tokens))
                if not torch.equal(found, states[start + 1]):
                    raise self.uncuttable(f"a pass that starts at layer {start} is not the same")

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
            raise self.uncuttable(f"with a cache in each stage it does not generate its own tokens ({why})")

    def _whole_logits(self, tokens: Tensor) -> Tensor:
        hidden = self.finish(tokens, None, 0)
        with self.head_only():
            return self.logits(hidden.reshape(-1, hidden.shape[-1])).reshape(*tokens.shape, -1)

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
            return self.head_input(tokens, received(sent, self.input_device))

        return end

    def head_input(self, tokens: Tensor, state: Tensor) -> Tensor:
        return super().finish(tokens, state, self.num_layers)

    def finish(self, tokens: Tensor, state: State | None, start: int) -> Tensor:
        return self.begin(tokens, state, start)()

    def generate(
        self, prompts: Tensor, num_tokens: int, suppressed: tuple[int, ...], decoding: Decoding = GREEDY
    ) -> Tensor:
        for remote in self._remotes:
            remote.peer.ask("begin_generation", prompts.shape[1] + num_tokens)
        with self._bridged():
            return super().generate(prompts, num_tokens, suppressed, decoding)

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
