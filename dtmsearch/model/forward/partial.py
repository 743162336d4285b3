"""The forward pass of a causal language model, cut at the boundaries between its layers.

Boundary l is the input of layer l. The model's own code runs at every cut: layers that are not wanted are replaced by
stand-ins that hand their input on, or a stored state in its place, so that masks, positions, norms and the head's
extras stay those of the model's family. Knows nothing of plans or metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dtmsearch.model.modules.compat import BodyOutput, Cache, fixed_cache, no_packed_sequences
from dtmsearch.model.modules.discovery import find_layers
from dtmsearch.model.modules.loading import vocabulary_size
from dtmsearch.model.modules.swapping import swapped


class Elsewhere:
    """A state that lies in another process, and may not be there yet; `promise` as who passes it on knows it."""

    def __init__(self, promise: Any) -> None:
        self.promise = promise

    def to(self, *_: Any, **__: Any) -> Elsewhere:
        """It stays where it is, whatever device a state is wanted on."""
        return self


State = Tensor | Elsewhere


class StandIn(nn.Module):
    """In place of a layer: hands on its input, or `state` if there is one, and remembers what came in."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # no submodule: its weights are the model's
        self.index = index
        self.state: Tensor | None = None
        self.seen: Tensor | None = None
        self.returns_tuple = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen = hidden_states
        _grow_cache(self.index, hidden_states, [*args, *kwargs.values()])
        handed = self.handed_on(hidden_states)
        return (handed, None) if self.returns_tuple else handed

    def handed_on(self, hidden_states: Tensor) -> Tensor:
        return hidden_states if self.state is None else self.state

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)  # what the model's loop asks its layers about themselves


def _grow_cache(index: int, hidden_states: Tensor, arguments: Iterable[Any]) -> None:
    """What the model's code asks a cache's layer about lengths is answered as if the layer had run, for next to no
    memory."""
    for cache in arguments:
        if isinstance(cache, Cache) and index < len(cache.layers):
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(nothing, nothing, index)


class _HiddenStates(nn.Module):
    """In place of everything below the head: gives `hidden_states`."""

    hidden_states: Tensor

    @property
    def decoder(self) -> nn.Module:
        """What OPT's head runs: the part of the body that does the work."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> BodyOutput:
        return BodyOutput(last_hidden_state=self.hidden_states)


class Body:
    """A model whose forward pass can start and end at any boundary.

    All tensors of states are [prompts, tokens, hidden]. Every method must run under `torch.inference_mode`. Of a model
    whose other layers have no weights here, `own` are those that have.
    """

    # Passes that are begun before the first is waited for.
    passes_ahead = 0

    def __init__(self, model: Any, own: range | None = None) -> None:
        self.model = model
        self.layers_name, self._layers = find_layers(model)
        self._real = list(self._layers)
        self.own = range(len(self._real)) if own is None else own
        self._stand_ins = [StandIn(layer, index) for index, layer in enumerate(self._real)]
        self._below_head = _HiddenStates()
        self._prefix: str = model.base_model_prefix
        self.vocabulary_size = vocabulary_size(model)
        self._note_what_layers_return()

    @property
    def num_layers(self) -> int:
        return len(self._real)

    @property
    def itemsize(self) -> int:
        """Bytes of one value of a state."""
        return int(self.model.dtype.itemsize)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a token's state at one boundary."""
        return int(self.model.config.get_text_config().hidden_size) * self.itemsize

    def _note_what_layers_return(self) -> None:
        """Tensors or tuples; a layer that is not here returns what those that are do, so one of the two guesses is
        right."""
        returned: dict[int, bool] = {}

        def note(layer: nn.Module, args: Any, output: Any) -> None:
            returned[self._real.index(layer)] = isinstance(output, tuple)

        hooks = [self._real[index].register_forward_hook(note) for index in self.own]
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self.input_device)
        try:
            self._guess_returned(tokens, returned)
        finally:
            for hook in hooks:
                hook.remove()

    def _guess_returned(self, tokens: Tensor, returned: dict[int, bool]) -> None:
        whole = len(self.own) == self.num_layers
        for guess in (False, True):
            for index, stand_in in enumerate(self._stand_ins):
                stand_in.returns_tuple = returned.get(index, guess)
            with torch.inference_mode(), self._only(self.own.start, self.own.stop):
                try:
                    self.run(tokens)
                except Exception:  # whatever the model's code makes of what it did not expect
                    if whole or guess:
                        raise
            for index, is_tuple in returned.items():
                self._stand_ins[index].returns_tuple = is_tuple
            if whole or returned.get(self.own.start) == guess:
                return

    @property
    def input_device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def run(self, tokens: Tensor) -> Tensor:
        """The head's input, at every token, through whatever stands in the layers' places."""
        with no_packed_sequences():
            hidden: Tensor = getattr(self.model, self._prefix)(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden

    @contextmanager
    def _only(self, start: int, stop: int) -> Iterator[None]:
        """Layers from `start` up to `stop` are real, the others stand-ins."""
        others = (*range(start), *range(stop, self.num_layers))
        try:
            with swapped(self._layers, {str(index): self._stand_ins[index] for index in others}):
                yield
        finally:
            for stand_in in self._stand_ins:
                stand_in.state = stand_in.seen = None

    def advance(self, tokens: Tensor, state: State | None, start: int, stop: int) -> State:
        """The state at boundary `stop` (below the number of layers) from that at `start` (None at boundary 0)."""
        with self._only(start, stop):
            self._enter(state, start)
            self.run(tokens)
            seen = self._stand_ins[stop].seen
        assert seen is not None
        return seen

    def finish(self, tokens: Tensor, state: State | None, start: int) -> Tensor:
        """The head's input, at every token, from the state at boundary `start` (None at boundary 0)."""
        with self._only(start, self.num_layers):
            self._enter(state, start)
            return self.run(tokens)

    def begin(self, tokens: Tensor, state: State | None, start: int) -> Callable[[], Tensor]:
        """`finish`, of which what can go on by itself does so until its result is asked for."""
        hidden = self.finish(tokens, state, start)
        return lambda: hidden

    @property
    def around_layers(self) -> nn.Module:
        """The module whose code runs the layers one after the other."""
        module: nn.Module = self.model.get_submodule(self.layers_name.rpartition(".")[0])
        return module

    def through(self, state: Tensor | None, start: int, stop: int, run: Callable[[], object]) -> Tensor:
        """The state at boundary `stop`, which may lie above the last layer, in the pass that `run` makes."""
        found: list[Any] = []
        hook = self._real[stop - 1].register_forward_hook(lambda layer, args, output: found.append(output))
        try:
            with self._only(start, stop):
                self._enter(state, start)
                run()
        finally:
            hook.remove()
        reached: Tensor = found[0][0] if isinstance(found[0], tuple) else found[0]
        return reached

    def boundaries(self, tokens: Tensor) -> list[Tensor]:
        """The states at all boundaries from the first layer's input to the last one's output, [layers + 1]."""
        found: list[Tensor] = []

        def note(layer: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any], output: Any) -> None:
            if not found:
                found.append(args[0] if args else named["hidden_states"])
            found.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in self._real]
        try:
            self.run(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _enter(self, state: State | None, start: int) -> None:
        assert (state is None) == (start == 0) and not isinstance(state, Elsewhere)
        if state is not None:
            self._stand_ins[start - 1].state = state

    @contextmanager
    def head_only(self) -> Iterator[None]:
        """Within, `logits` may be called; the body cannot run."""
        with swapped(self.model, {self._prefix: self._below_head}):
            yield

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocabulary], in the model's dtype, of head inputs [rows, hidden]."""
        self._below_head.hidden_states = hidden.unsqueeze(0)
        logits: Tensor = self.model(input_ids=None, use_cache=False).logits
        return logits.squeeze(0)

    def new_cache(self, length: int) -> Cache:
        """A cache for texts of so many tokens. One that grows would be copied at every token."""
        return fixed_cache(self.model, length)

    def generate(self, prompts: Tensor, num_tokens: int, suppressed: tuple[int, ...]) -> Tensor:
        """Greedy continuations [prompts, num_tokens] of `prompts` [prompts, tokens], with a cache; `suppressed` tokens
        are never chosen. Nothing of the checkpoint's own generation settings applies."""
        from transformers import GenerationConfig

        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=num_tokens,
            suppress_tokens=list(suppressed) or None,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
            disable_compile=True,
        )
        # It is made here, for the model would keep the length of an earlier.
        cache = self.new_cache(prompts.shape[1] + num_tokens)
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            output: Tensor = self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=settings,
                past_key_values=cache,
            )
        finally:
            self.model.generation_config = own
        return output[:, prompts.shape[1] :]
