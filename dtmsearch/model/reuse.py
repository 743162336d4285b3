"""Less than a whole layer: outputs of components that a change in the layer cannot reach are the parent's, and the
last layer runs where something is predicted only.

What reaches what is found out from the model itself, on a few tokens, before anything is measured; nothing here knows
a model's family.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dtmsearch.model.body import Body
from dtmsearch.model.compress.bitsandbytes import runs_by_token
from dtmsearch.model.places import Places
from dtmsearch.plans.components import ModelManifest

_FEW_TOKENS = 4


@dataclass
class Outputs:
    """What the components of a layer made of one batch, in the parent's pass, by component."""

    layer: int
    of: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Calls:
    """How a layer calls its components: their order, and which of its inputs each reads, numbered as they come."""

    order: tuple[str, ...]
    reads: dict[str, int]

    def unreached(self, changed: Collection[str]) -> set[str]:
        """Components whose outputs stay as they are when the weights of `changed` change.

        They are called before the first that changed, or read what was there before its output was.
        """
        if not changed:
            return set(self.order)
        first = min(self.order.index(component) for component in changed)
        earlier = {self.reads[component] for component in self.order[: first + 1]}
        return {component for component in self.order if self.reads[component] in earlier} - set(changed)


class _Recorder(nn.Module):
    """Notes what `inner` makes; `apart` from the tensor that is handed on, where that may be written into."""

    def __init__(self, component: str, inner: nn.Module, outputs: Outputs, apart: bool) -> None:
        super().__init__()
        self.component, self.inner, self.outputs, self.apart = component, inner, outputs, apart

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = self.inner(values)
        self.outputs.of[self.component] = output.clone() if self.apart else output
        return output


class _Recorded(nn.Module):
    def __init__(self, output: Tensor, apart: bool) -> None:
        super().__init__()
        self.output, self.apart = output, apart

    def forward(self, values: Tensor) -> Tensor:
        return self.output.clone() if self.apart else self.output


class _Part(nn.Module):
    """Runs `inner` on some positions only; zeros stand for the others."""

    def __init__(self, inner: nn.Module, positions: slice) -> None:
        super().__init__()
        self.inner, self.positions = inner, positions

    def forward(self, values: Tensor) -> Tensor:
        part: Tensor = self.inner(values[:, self.positions].contiguous())
        output = part.new_zeros(*values.shape[:2], part.shape[-1])
        output[:, self.positions] = part
        return output


class Reuse:
    """What a pass over a layer can be spared. Made while the layers run eagerly; `compiled` if they will not later, for
    compiled code may write into any tensor that it needs no more."""

    def __init__(self, body: Body, manifest: ModelManifest, places: Places, compiled: bool = False) -> None:
        self.places = places
        self._compiled = compiled
        self._written_into: set[str] = set()
        self._layer_of = {component.name: component.layer for component in manifest.components}
        self._last = body.num_layers - 1
        with torch.inference_mode():
            tokens = torch.arange(_FEW_TOKENS, device=body.input_device).unsqueeze(0) % body.vocabulary_size
            self._calls = self._watch(body, tokens)
            self._in_part = self._that_run_in_part(body, tokens)
        self._features = {c.name: c.shape[0] for c in manifest.components}

    def _watch(self, body: Body, tokens: Tensor) -> list[_Calls]:
        """How each layer calls its components; one that is not called once, on every token, is left out. Notes whose
        outputs are written into by what comes after."""
        order: list[tuple[str, Tensor]] = []
        made: list[tuple[str, Tensor, Tensor]] = []

        def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                order.append((name, inputs[0]))
                made.append((name, output, output.clone()))

            return hook

        modules = {name for name, _ in body.model.named_modules()}
        names = [name for name in self._layer_of if name in modules]
        hooks = [self.places.get(name).register_forward_hook(note(name)) for name in names]
        body.finish(tokens, None, 0)
        for hook in hooks:
            hook.remove()
        self._written_into = {name for name, output, before in made if not torch.equal(output, before)}
        names = [name for name, _ in order]
        whole = [(n, v) for n, v in order if names.count(n) == 1 and v.ndim == 3 and v.shape[:2] == tokens.shape]
        calls = []
        for layer in range(body.num_layers):
            here = [(name, values) for name, values in whole if self._layer_of[name] == layer]
            # The tensors are still held, so that no two have the same identity.
            distinct = list(dict.fromkeys(id(values) for _, values in here))
            calls.append(_Calls(tuple(n for n, _ in here), {n: distinct.index(id(v)) for n, v in here}))
        return calls

    def _that_run_in_part(self, body: Body, tokens: Tensor) -> frozenset[str]:
        """Components of the last layer whose outputs at a token reach no later token: poisoned there, nothing shows."""
        state = None if self._last == 0 else body.advance(tokens, None, 0, self._last)
        later = slice(_FEW_TOKENS // 2, None)
        expected = body.finish(tokens, state, self._last)[:, later]
        safe = []
        for component in self._calls[self._last].order:
            inner = self.places.get(component)
            hook = inner.register_forward_hook(_poison)
            found = body.finish(tokens, state, self._last)[:, later]
            hook.remove()
            if torch.equal(found, expected):
                safe.append(component)
        return frozenset(safe)

    def bytes_of(self, layer: int, values: int, itemsize: int) -> int:
        """Memory for the outputs of a layer over `values` tokens."""
        return sum(self._features[c] for c in self._worth_keeping(layer)) * values * itemsize

    def _worth_keeping(self, layer: int) -> set[str]:
        """Components whose outputs another's change does not reach."""
        calls = self._calls[layer]
        return {kept for changed in calls.order for kept in calls.unreached([changed])}

    def _apart(self, component: str) -> bool:
        return self._compiled or component in self._written_into

    @contextmanager
    def recording(self, outputs: Outputs) -> Iterator[None]:
        """Within, a pass over the layer of `outputs` leaves there what the components made."""
        kept = self._worth_keeping(outputs.layer)
        with self.places.holding({c: _Recorder(c, self.places.get(c), outputs, self._apart(c)) for c in kept}):
            yield

    @contextmanager
    def serving(self, outputs: Outputs | None, changed: Collection[str]) -> Iterator[None]:
        """Within, the layer of `outputs` takes from there what a change of the weights of `changed` does not reach.

        Layers below it are those of the parent, those above it may be changed in any way.
        """
        if outputs is None:
            yield
            return
        calls = self._calls[outputs.layer]
        here = [c for c in changed if self._layer_of.get(c, -1) <= outputs.layer]
        known = outputs.of.keys() & calls.unreached(here) if all(c in calls.reads for c in here) else ()
        with self.places.holding({c: _Recorded(outputs.of[c], self._apart(c)) for c in known}):
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
