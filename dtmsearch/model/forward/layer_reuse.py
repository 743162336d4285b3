"""Less than a whole layer: what a change in the layer cannot reach is the parent's, and the last layer runs where
something is predicted only.

What reaches what is found out from the model itself, on a few tokens, before anything is measured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtmsearch.core.components import ModelManifest
from dtmsearch.model.compress.bitsandbytes_layers import runs_by_token
from dtmsearch.model.forward.boundary_states import State
from dtmsearch.model.forward.call_trace import watch, weighted_modules
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.forward.proofs import Proved, ProvedReuse
from dtmsearch.model.modules.discovery import find_layers
from dtmsearch.model.modules.slots import Places

log = logging.getLogger(__name__)

_FEW_TOKENS = 4
_proved: Proved[ProvedReuse] = Proved()


@dataclass
class Outputs:
    """What the components of a layer, and blocks of them, made of one batch in the parent's pass, by name."""

    layer: int
    of: dict[str, Any] = field(default_factory=dict)


class _Recorder(nn.Module):
    """Notes what `inner` makes; `apart` from the tensor that is handed on, where that may be written into."""

    def __init__(self, name: str, inner: Callable[..., Any], outputs: Outputs, apart: bool) -> None:
        super().__init__()
        self.name, self.inner, self.outputs, self.apart = name, inner, outputs, apart

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        self.outputs.of[self.name] = _copy(output) if self.apart else output
        return output


class _Recorded(nn.Module):
    def __init__(self, output: Any, apart: bool) -> None:
        super().__init__()
        self.output, self.apart = output, apart

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _copy(self.output) if self.apart else self.output


def _copy(output: Any) -> Any:
    return output.clone() if isinstance(output, Tensor) else (output[0].clone(), *output[1:])


class _Part(nn.Module):
    """Runs `inner` on some positions only; zeros stand for the others."""

    def __init__(self, inner: nn.Module, positions: slice) -> None:
        super().__init__()
        self.inner, self.positions = inner, positions

    def forward(self, values: Tensor) -> Tensor:
        part: Tensor = self.inner(values[:, self.positions].contiguous())
        output = part.new_empty(*values.shape[:2], part.shape[-1])
        output[:, : self.positions.start] = 0
        output[:, self.positions] = part
        output[:, self.positions.stop :] = 0
        return output


class Reuse:
    """What a pass over a layer can be spared. Made while the layers run eagerly; `compiled` if they will not later, for
    compiled code may write into any tensor that it needs no more, and hands nothing but components out of its hands.
    `known_as`: see `Body`."""

    def __init__(
        self,
        body: Body,
        manifest: ModelManifest,
        places: Places,
        compiled: bool = False,
        known_as: Hashable = None,
    ) -> None:
        self.places = places
        self._compiled = compiled
        self._layer_of = {component.name: component.layer for component in manifest.components}
        self._last = body.num_layers - 1
        blocks = {} if compiled else weighted_modules(*find_layers(body.model), self._layer_of)
        self._blocks = {name: module for name, (_, module) in blocks.items()}
        known_as = known_as and (known_as, compiled)
        proved = _proved.of(known_as)
        if proved is None:
            proved = self._prove(body, blocks)
            _proved.keep(known_as, proved)
        self._watched, self._in_part, self._reusing = proved.watched, proved.in_part, proved.reusing

    def _prove(self, body: Body, blocks: Mapping[str, tuple[int, nn.Module]]) -> ProvedReuse:
        modules = {name for name, _ in body.model.named_modules()}
        components = {name: self.places.get(name) for name in self._layer_of if name in modules}
        layer_of = self._layer_of | {name: layer for name, (layer, _) in blocks.items()}
        with torch.inference_mode():
            tokens = torch.arange(_FEW_TOKENS, device=body.input_device).unsqueeze(0) % body.vocabulary_size
            run = partial(body.finish, tokens, None, 0)
            self._watched = watch(components, self._blocks, layer_of, body.num_layers, tuple(tokens.shape), run)
            self._in_part = frozenset[str]()
            if body.is_cut(self._last):
                self._in_part = self._proved_in_part(body, tokens, self._that_run_in_part(body, tokens))
            self._reusing = frozenset(range(body.num_layers))  # none is spared while they are tried
            self._reusing = self._proved_reusing(body, tokens)
        return ProvedReuse(self._watched, self._in_part, self._reusing)

    def _proved_in_part(self, body: Body, tokens: Tensor, components: frozenset[str]) -> frozenset[str]:
        """The components if the last layer gives the same where something is predicted when they run there only; none
        if not, for the model's code may ask more of them than a call."""
        state = None if self._last == 0 else body.advance(tokens, None, 0, self._last)
        later = slice(_FEW_TOKENS // 2, _FEW_TOKENS - 1)
        expected = body.finish(tokens, state, self._last)[:, later]
        self._in_part = components
        try:
            with self.predicting(later):
                found = body.finish(tokens, state, self._last)[:, later]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            log.debug("the last layer runs whole: %s: %s", type(error).__name__, error)
            return frozenset()
        # Fewer rows may be multiplied by another kernel, so that last bits differ.
        return components if torch.allclose(found, expected, rtol=0.02, atol=0.02) else frozenset()

    def _proved_reusing(self, body: Body, tokens: Tensor) -> frozenset[int]:
        """The layers that give the same, bit by bit, with what was recorded in place of what a change spares."""
        found: set[int] = set()
        state: State | None = None
        for layer in range(body.num_layers):
            if self._proves_reuse(body, tokens, state, layer):
                found.add(layer)
            if layer < self._last:
                state = body.advance(tokens, state, layer, layer + 1)
        return frozenset(found)

    def _proves_reuse(self, body: Body, tokens: Tensor, state: State | None, layer: int) -> bool:
        last = layer == self._last
        if not body.is_cut(layer) or not (last or body.is_cut(layer + 1)) or not self._watched.calls[layer].components:
            return False

        def run() -> Any:
            return body.finish(tokens, state, layer) if last else body.advance(tokens, state, layer, layer + 1)

        components = self._watched.calls[layer].components
        outputs = Outputs(layer)
        try:
            with self.recording(outputs):
                expected = run()
            for changed in dict.fromkeys((components[0], components[-1])):
                with self.serving(outputs, [changed]):
                    if not torch.equal(run(), expected):
                        return False
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the model's code does without a module that it asks for
            log.debug("layer %d always runs whole: %s: %s", layer, type(error).__name__, error)
            return False
        return True

    def _that_run_in_part(self, body: Body, tokens: Tensor) -> frozenset[str]:
        """Components of the last layer whose outputs at a token reach no later token: poisoned there, nothing shows."""
        state = None if self._last == 0 else body.advance(tokens, None, 0, self._last)
        later = slice(_FEW_TOKENS // 2, None)
        expected = body.finish(tokens, state, self._last)[:, later]
        safe = []
        for component in self._watched.calls[self._last].components:
            inner = self.places.get(component)
            hook = inner.register_forward_hook(_poison)
            try:
                found = body.finish(tokens, state, self._last)[:, later]
            finally:
                hook.remove()
            if torch.equal(found, expected):
                safe.append(component)
        return frozenset(safe)

    def bytes_of(self, layer: int, values: int, itemsize: int) -> int:
        """Memory for the outputs of a layer over `values` tokens."""
        return sum(self._watched.features[name] for name in self._worth_keeping(layer)) * values * itemsize

    def _worth_keeping(self, layer: int) -> set[str]:
        """Whatever a change of one component spares."""
        if layer not in self._reusing:
            return set()
        calls = self._watched.calls[layer]
        return {kept for changed in calls.components for kept in calls.spared([changed])}

    def _apart(self, name: str) -> bool:
        return self._compiled or name in self._watched.written_into

    @contextmanager
    def recording(self, outputs: Outputs) -> Iterator[None]:
        """Within, a pass over the layer of `outputs` leaves there what its modules made."""
        inner: dict[str, Callable[..., Any]] = {}
        for name in self._worth_keeping(outputs.layer):
            inner[name] = self._blocks[name].forward if name in self._blocks else self.places.get(name)
        with self._calling({name: _Recorder(name, own, outputs, self._apart(name)) for name, own in inner.items()}):
            yield

    @contextmanager
    def serving(self, outputs: Outputs | None, changed: Collection[str]) -> Iterator[None]:
        """Within, the layer of `outputs` takes from there what a change of the weights of `changed` does not reach.

        Layers below it are those of the parent, those above it may be changed in any way.
        """
        if outputs is None:
            yield
            return
        calls = self._watched.calls[outputs.layer]
        here = [c for c in changed if self._layer_of.get(c, -1) <= outputs.layer]
        known = outputs.of.keys() & calls.spared(here) if all(c in calls.reads for c in here) else ()
        with self._calling({name: _Recorded(outputs.of[name], self._apart(name)) for name in known}):
            yield

    @contextmanager
    def _calling(self, others: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within, others are called in the place of components and blocks. Blocks stay where they are, for the layer
        may ask them for more than their outputs."""
        with ExitStack() as stack:
            stack.enter_context(self.places.holding({n: m for n, m in others.items() if n not in self._blocks}))
            for name in others.keys() & self._blocks.keys():
                stack.enter_context(_answering(self._blocks[name], others[name].forward))
            yield

    @contextmanager
    def predicting(self, positions: slice) -> Iterator[None]:
        """Within, the last layer's results hold at `positions` alone. To be entered before recording and serving."""
        inner = {c: self.places.get(c) for c in self._in_part}
        with self.places.holding({c: _Part(m, positions) for c, m in inner.items() if runs_by_token(m)}):
            yield


def _poison(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    poisoned = output.clone()
    poisoned[:, : _FEW_TOKENS // 2] = torch.nan
    return poisoned


@contextmanager
def _answering(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, `forward` is what runs where `module` is called."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own
