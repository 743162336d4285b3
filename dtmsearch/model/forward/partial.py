"""The forward pass of a causal language model, cut at the boundaries between its layers.

Boundary l is the input of layer l. The model's own code runs at every cut: layers that are not wanted are replaced by
stand-ins that hand their input on, or a stored state in its place, so that masks, positions, norms and the head's
extras stay those of the model's family. Where that does not give, bit by bit, what the whole model gives, there is no
cut: the pass starts at the next boundary below that is one, or at the tokens. Knows nothing of plans or metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dtmsearch.core.decoding import GREEDY, Decoding
from dtmsearch.errors import UserError
from dtmsearch.model.forward.boundary_states import Below, Elsewhere, State
from dtmsearch.model.forward.proofs import CacheKind, Proved, ProvedPass
from dtmsearch.model.forward.shared_noise import Sampling
from dtmsearch.model.forward.stand_ins import HiddenStates, StandIn, below_head
from dtmsearch.model.modules.blocks import Returned, returned_kind, state_of
from dtmsearch.model.modules.compat import Cache, fixed_cache, no_packed_sequences
from dtmsearch.model.modules.discovery import find_layers
from dtmsearch.model.modules.loading import vocabulary_size
from dtmsearch.model.modules.swapping import swapped

log = logging.getLogger(__name__)
_proved: Proved[ProvedPass] = Proved()

# Tokens of each of the two prompts on which cuts are proved.
PROVED_TOKENS = 16
# Logits that differ by less of their standard deviation may change places by rounding.
_TIE = 0.1


class Body:
    """A model whose forward pass can start and end at any boundary.

    All tensors of states are [prompts, tokens, hidden]. Every method must run under `torch.inference_mode`. Of a model
    whose other layers have no weights here, `own` are those that have. What was proved of one `known_as` the same in
    this process is not proved again.
    """

    # Passes that are begun before the first is waited for; whether it is said when passes may not start everywhere.
    passes_ahead, warns = 0, True
    # Tokens of a continuation by which its way of generating is proved.
    _proved_continuation = PROVED_TOKENS // 2

    def __init__(self, model: Any, own: range | None = None, known_as: Hashable = None) -> None:
        self.model = model
        self.layers_name, self._layers = find_layers(model)
        self._real = list(self._layers)
        self.own = range(len(self._real)) if own is None else own
        self._stand_ins = [StandIn(layer, index) for index, layer in enumerate(self._real)]
        self._below_name = below_head(model, self.layers_name)
        self._below_head = HiddenStates(model.get_submodule(self._below_name))
        self.head_apart = True
        self.cuts = frozenset(range(self.num_layers + 1))
        self.vocabulary_size = vocabulary_size(model)
        self._new_cache: Callable[[int], Cache | None] | None = self.new_cache
        if own is not None:
            self._note_what_layers_return()
            return
        known = _proved.of(known_as)
        if known is None:
            self._prove()
            _proved.keep(known_as, self._found_out())
        else:
            self._take(known)
        if self.warns and (said := self.how_it_runs()):
            log.warning("%s", said)

    def _found_out(self) -> ProvedPass:
        returned = tuple(stand_in.returns for stand_in in self._stand_ins)
        ours = self._new_cache == self.new_cache
        cache: CacheKind = "none" if self._new_cache is None else "ours" if ours else "its own"
        return ProvedPass(self.head_apart, self.cuts, returned, cache)

    def _take(self, proved: ProvedPass) -> None:
        self.head_apart, self.cuts = proved.head_apart, proved.cuts
        for stand_in, kind in zip(self._stand_ins, proved.returned, strict=True):
            stand_in.returns = kind
        self._new_cache = {"ours": self.new_cache, "its own": _no_cache, "none": None}[proved.cache]

    def _prove(self) -> None:
        """Find out, on two prompts of random tokens, where a pass may be cut: where one that starts there gives what
        the whole model gives, bit by bit; whether the head may be run by itself; and which cache gives its own tokens.
        """
        with torch.inference_mode():
            tokens, others = self.random_prompts()
            logits = self._whole_logits(tokens)
            self.head_apart = self._proves_head_apart(tokens, logits)
            whole = self.run(tokens)
            self.cuts = frozenset({0})
            if self._proves(lambda: self._notes_returned(tokens)):
                self.cuts |= self._proved_cuts(tokens, others, whole)
            self._new_cache = self._proved_cache(tokens, logits)

    def random_prompts(self) -> Tensor:
        """Two batches of two prompts on which things are proved, the same at every start."""
        generator = torch.Generator().manual_seed(0)
        shape = 2, 2, PROVED_TOKENS
        return torch.randint(1, max(2, self.vocabulary_size - 1), shape, generator=generator).to(self.input_device)

    def how_it_runs(self) -> str:
        """Where the model's passes may start, for a person; empty where they may at every layer."""
        name = type(self.model).__name__
        if len(self.cuts) > self.num_layers:
            return ""
        if self.cuts <= {0, self.num_layers}:
            return f"{name} runs whole: a pass that starts above its first layer is not the same"
        missing = sorted(set(range(self.num_layers)) - self.cuts)
        return f"{name} runs from lower layers: a pass that starts at layer {_listed(missing)} is not the same"

    def _proves(self, test: Callable[[], bool]) -> bool:
        """Whether a test holds; what goes wrong in the model's code, which may not expect what it gets, says no."""
        try:
            return test()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            log.debug("%s: %s: %s", type(self.model).__name__, type(error).__name__, error)
            return False

    def _proves_head_apart(self, tokens: Tensor, logits: Tensor) -> bool:
        """Whether the head, run by itself, gives what the whole model gives, `logits` of `tokens`."""
        return self._proves(lambda: _alike(self._logits_apart(tokens), logits))

    def _logits_apart(self, tokens: Tensor) -> Tensor:
        hidden = self.run(tokens)
        with self.head_only():
            return self.logits(hidden.reshape(-1, hidden.shape[-1])).reshape(*tokens.shape, -1)

    def _notes_returned(self, tokens: Tensor) -> bool:
        self._note_what_layers_return()
        return True

    def _proved_cuts(self, tokens: Tensor, others: Tensor, whole: Tensor) -> set[int]:
        """Boundaries from which a pass gives the head's inputs `whole` of `tokens`. Before it the model runs over
        `others`, lest layers below find what they left of the same tokens."""
        states: list[Tensor] = []

        def found_states() -> bool:
            states.extend(self.boundaries(tokens))
            return len(states) == self.num_layers + 1  # not of layers that run several times

        if not self._proves(found_states):
            return set()
        self.run(others)

        def same(boundary: int) -> bool:
            return torch.equal(self.finish(tokens, states[boundary], boundary), whole)

        def reached(start: int, stop: int) -> bool:
            found = self.advance(tokens, states[start] if start else None, start, stop)
            return isinstance(found, Tensor) and torch.equal(found, states[stop])

        everywhere = range(1, self.num_layers + 1)
        self.cuts = frozenset(range(self.num_layers + 1))  # none is spared while they are tried
        right = {b for b in reversed(everywhere) if self._proves(lambda b=b: same(b))}  # type: ignore[misc]
        start = 0
        for boundary in sorted(right - {self.num_layers}):
            if self._proves(lambda b=boundary, a=start: reached(a, b)):  # type: ignore[misc]
                start = boundary
            else:
                right.discard(boundary)
        return right

    def _proved_cache(self, tokens: Tensor, logits: Tensor) -> Callable[[int], Cache | None] | None:
        """What makes the cache to generate with: ours, which does not grow; else (a function that gives none) the
        model's own; None where it is to have none. Tokens generated with it are the whole model's best, or near to."""
        for make in (self.new_cache, _no_cache):
            self._new_cache = make
            if self._proves(lambda: self.generates_own(tokens)):
                return make
        return None

    def generates_own(self, tokens: Tensor) -> bool:
        """Whether what is generated from the first half of `tokens` are the best tokens of single passes, or near."""
        prompts = tokens[:, : PROVED_TOKENS // 2]
        found = self.generate(prompts, self._proved_continuation, ())
        own = self._whole_logits(torch.cat([prompts, found], dim=1))[:, prompts.shape[1] - 1 : -1].float()
        chosen = own.gather(2, found.to(own.device).unsqueeze(2)).squeeze(2)
        return bool((own.amax(2) - chosen <= _TIE * own.std(2)).all())

    def _whole_logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

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

    @property
    def cached_bytes(self) -> int:
        """Bytes that a cache of keys and values keeps of a token at most."""
        return 2 * self.num_layers * self.hidden_bytes

    def _note_what_layers_return(self) -> None:
        """Tensors or tuples; a layer that is not here returns what those that are do, so one of the guesses is
        right."""
        returned: dict[int, Returned] = {}

        def note(layer: nn.Module, args: Any, output: Any) -> None:
            returned[self._real.index(layer)] = returned_kind(output)

        hooks = [self._real[index].register_forward_hook(note) for index in self.own]
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self.input_device)
        try:
            self._guess_returned(tokens, returned)
        finally:
            for hook in hooks:
                hook.remove()

    def _guess_returned(self, tokens: Tensor, returned: dict[int, Returned]) -> None:
        whole = len(self.own) == self.num_layers
        guesses: tuple[Returned, ...] = (None, (tuple, 2))
        for guess in guesses:
            for index, stand_in in enumerate(self._stand_ins):
                stand_in.returns = returned.get(index, guess)
            with torch.inference_mode(), self._only(self.own.start, self.own.stop):
                try:
                    self.run(tokens)
                except Exception as error:  # whatever the model's code makes of what it did not expect
                    if whole:
                        raise
                    if guess is not None:
                        raise self.uncuttable(f"its layers do not take what stands for another ({error})") from error
            for index, kind in returned.items():
                self._stand_ins[index].returns = kind
            if whole or returned.get(self.own.start) == guess:
                return

    def uncuttable(self, why: str) -> UserError:
        """The error of a model that cannot be cut into stages."""
        return UserError(
            f"{type(self.model).__name__} cannot be cut into stages: {why}. Give each replica one process (without "
            "--nodes-per-replica), whose GPUs --gpus-per-replica says"
        )

    @property
    def input_device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def device_of(self, layer: int) -> torch.device:
        """Where a layer lies; of one that is not here, or above the last, where passes begin."""
        weights = next(self._real[layer].parameters(), None) if layer < self.num_layers else None
        return self.input_device if weights is None or weights.is_meta else weights.device

    @property
    def device_ends(self) -> list[int]:
        """For each device, in the order in which a pass comes to them, the layer above the last that lies there."""
        devices = [self.device_of(layer) for layer in range(self.num_layers)]
        return [layer + 1 for layer in range(self.num_layers) if devices[layer] not in devices[layer + 1 :]]

    @property
    def num_devices(self) -> int:
        """On how many devices the layers lie."""
        return len(self.device_ends)

    def run(self, tokens: Tensor) -> Tensor:
        """The head's input, at every token, through whatever stands in the layers' places; of a head that cannot be
        run by itself its output."""
        with no_packed_sequences():
            if not self.head_apart:
                logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
                return logits
            below = self.model.get_submodule(self._below_name)
            hidden: Tensor = below(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden

    def is_cut(self, boundary: int) -> bool:
        """Whether a pass may start at a boundary; if not, it starts below it."""
        return boundary in self.cuts

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
        if isinstance(state, Below):
            start, state = state.start, state.state
        last = max(boundary for boundary in self.cuts if boundary <= stop)
        if last <= start:
            assert not isinstance(state, Elsewhere)
            return Below(state, start)
        with self._only(start, last):
            self._enter(state, start)
            self.run(tokens)
            seen = self._stand_ins[last].seen
        assert seen is not None
        return seen if last == stop else Below(seen, last)

    def finish(self, tokens: Tensor, state: State | None, start: int) -> Tensor:
        """The head's input, at every token, from the state at boundary `start` (None at boundary 0)."""
        if isinstance(state, Below):
            start, state = state.start, state.state
        with self._only(start, self.num_layers):
            self._enter(state, start)
            return self.run(tokens)

    def head_input(self, tokens: Tensor, state: Tensor) -> Tensor:
        """The head's input, at every token, from the last layer's output."""
        return self.finish(tokens, state, self.num_layers)

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
        return state_of(found[0])

    def boundaries(self, tokens: Tensor) -> list[Tensor]:
        """The states at all boundaries from the first layer's input to the last one's output, [layers + 1]; more where
        layers run several times."""
        found: list[Tensor] = []

        def note(layer: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any], output: Any) -> None:
            if not found:
                found.append(args[0] if args else named["hidden_states"])
            found.append(state_of(output))

        hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in self._real]
        try:
            self.run(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def own_boundaries(self, tokens: Tensor, state: Tensor | None) -> list[Tensor]:
        """The states at the boundaries of the layers that are here, from that at the lowest (None at boundary 0)."""
        with self._only(self.own.start, self.own.stop):
            self._enter(state, self.own.start)
            return self.boundaries(tokens)

    def boundaries_of(self, batches: Sequence[Tensor]) -> list[list[Tensor]]:
        """`boundaries` of each batch."""
        return [self.boundaries(batch) for batch in batches]

    def _enter(self, state: State | None, start: int) -> None:
        assert (state is None) == (start == 0) and not isinstance(state, Elsewhere | Below)
        if state is not None:
            self._stand_ins[start - 1].state = state

    @contextmanager
    def head_only(self) -> Iterator[None]:
        """Within, `logits` may be called; the body cannot run."""
        if self.head_apart:
            with swapped(self.model, {self._below_name: self._below_head}):
                yield
        else:
            yield

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocabulary], in the model's dtype, of head inputs [rows, hidden]."""
        if not self.head_apart:
            return hidden
        self._below_head.hidden_states = hidden.unsqueeze(0)
        nothing = torch.zeros(1, 1, dtype=torch.long, device=hidden.device).expand(1, len(hidden))
        logits: Tensor = self.model(input_ids=nothing, use_cache=False).logits
        return logits.squeeze(0)

    def new_cache(self, length: int) -> Cache:
        """A cache for texts of so many tokens. One that grows would be copied at every token."""
        return fixed_cache(self.model, length)

    def generate(
        self, prompts: Tensor, num_tokens: int, suppressed: tuple[int, ...], decoding: Decoding = GREEDY
    ) -> Tensor:
        """Continuations [prompts, num_tokens] of `prompts` [prompts, tokens], with a cache; `suppressed` tokens are
        never chosen. Nothing of the checkpoint's own generation settings applies."""
        from transformers import GenerationConfig

        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=num_tokens,
            suppress_tokens=list(suppressed) or None,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=self._new_cache is not None,
            disable_compile=True,
        )
        # It is made here, for the model would keep the length of an earlier.
        cache = None if self._new_cache is None else self._new_cache(prompts.shape[1] + num_tokens)
        options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        sampling = Sampling.of(decoding, prompts)
        if sampling is not None:
            options["logits_processor"] = [sampling.processor(prompts.shape[1], suppressed)]
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            output: Tensor = self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=settings,
                **options,
            )
        finally:
            self.model.generation_config = own
        return output[:, prompts.shape[1] :]


def _no_cache(length: int) -> None:
    """The model makes its own."""


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """Whether logits are the same but for what other shapes of a product may do in their last bits."""
    if torch.equal(found, wanted):
        return True
    room = 16 * torch.finfo(wanted.dtype).eps * float(wanted.abs().amax())
    return found.shape == wanted.shape and float((found - wanted).abs().amax()) <= room


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return f"{shown} and {len(numbers) - 5} others" if len(numbers) > 5 else shown
