"""Products of gradients with what options change, taken on the way down through the layers that are here.

Each layer runs again with gradients, and of its components the inputs x and the gradients d at their outputs are at
hand for one batch. A change D of a weight changes the output by D x, so a prompt's product with it is <sum over tokens
of d x^T, D>: the prompt's gradient is made once for all schemes and let go. What changes more than weights is run, and
its output compared. Memory: one layer's changes.

Experts of a mixture read tokens of all prompts side by side: a layer with such runs prompt by prompt. Of those that lie
in stacks the products themselves are watched; x and d of one layer's are kept, and changes made an expert at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.prices import FloatArray, PriceKind, PriceRequest
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import UserError
from dtmsearch.model.calibration.calibrator import AnyCalibrator
from dtmsearch.model.calibration.expert_inputs import ExpertProducts
from dtmsearch.model.compress.number_rounding import RoundsInputs
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.modules.compat import Conv1D
from dtmsearch.model.modules.kv_caches import CachedPart
from dtmsearch.model.weights.applied import Weights

# Values of prompts' gradients that are held at once, and the prompts of which they are a multiple where there are so
# many: those that a GPU's matrix products take together.
_MOST_VALUES = {"cpu": 1 << 26, "cuda": 3 << 30}
_PROMPTS_TOGETHER = {"cpu": 1, "cuda": 64}


@dataclass(frozen=True)
class Change:
    """What options make of one component: `weights` [schemes, rows x cols] are the differences of its weights under
    those that change nothing else, `modules` stand for the others. `at` and `modules_at` are their places among all
    schemes."""

    at: Sequence[int]
    weights: Tensor | None
    modules_at: Sequence[int]
    modules: Sequence[nn.Module]


@dataclass(frozen=True)
class Seen:
    """A call of a component: its input, its output, both [prompts, tokens, features]; of an expert in a stack, whose
    rows of several prompts are filled up with zeros to the same number, no output."""

    inputs: Tensor
    output: Tensor | None


class _TokensTogether(Exception):
    """A component has read tokens of several prompts side by side."""


class PricedLayers:
    """The layers of `body` that are here, and what schemes make of their components."""

    def __init__(self, body: Body, weights: Weights, calibrator: AnyCalibrator, manifest: ModelManifest) -> None:
        self._body, self._weights, self._calibrator = body, weights, calibrator
        self._layer_of = {name: component.layer for name, component in manifest.by_name.items()}

    def here(self, components: Sequence[str]) -> list[str]:
        """Those of some components that lie in these layers."""
        return [component for component in components if self._layer_of[component] in self._body.own]

    def outside(self, components: Sequence[str]) -> str:
        """The first of some components that lies in no layer of the model; empty where all do."""
        return next((c for c in components if not 0 <= self._layer_of[c] < self._body.num_layers), "")

    def unpriceable(self, components: Sequence[str]) -> str:
        """Why products with some components of these layers cannot be told; empty where they can."""
        watched = self._experts(components).components
        for component in components:
            if component not in watched and not isinstance(
                self._weights.module(component), nn.Linear | Conv1D | CachedPart | RoundsInputs
            ):
                return f"{component} lies in a stack of matrices in which no product is told from another's"
        return ""

    def lowest(self, components: Sequence[str]) -> int:
        """The lowest layer of some components, which may be elsewhere."""
        return min(self._layer_of[component] for component in components)

    def _experts(self, components: Sequence[str]) -> ExpertProducts:
        """Those of some components that lie in stacks."""
        return ExpertProducts(self._body.model, components)

    def down(
        self,
        request: PriceRequest,
        batches: Sequence[Tensor],
        states: Sequence[list[Tensor]],
        gradients: Sequence[Tensor],
    ) -> tuple[dict[str, FloatArray], list[Tensor]]:
        """Products [samples, schemes] of the request's components in these layers, and the gradients at the input of
        the lowest of them, where components lie below.

        `batches` hold the request's samples, `states` theirs at every boundary of these layers, which are let go, and
        `gradients` those at the output of the highest. Raises `UserError` where products with experts cannot be told.
        """
        own = self._body.own
        components = self.here(request.components)
        experts, lowest = self._experts(components), self.lowest(request.components)
        by_layer: dict[int, list[str]] = {}
        for component in components:
            by_layer.setdefault(self._layer_of[component], []).append(component)
        samples = sum(map(len, batches))
        found = {component: np.zeros((samples, len(request.schemes)), np.float32) for component in components}
        reached, starts = list(gradients), _starts(batches)

        def changes(component: str) -> Change:
            return self._changes(component, request.schemes)

        for layer in reversed(range(max(lowest, own.start), own.stop)):
            here = by_layer.get(layer, [])
            modules = {c: self._weights.module(c) for c in here if c not in experts.components}
            way = _Layer(self._body, layer, modules, experts.of(here), changes, request, samples, layer > lowest)
            for at, batch in enumerate(batches):
                states[at].pop()
                below = states[at][-1] if layer > 0 else None
                reached[at] = way.down(batch, below, reached[at], starts[at])
            found |= {component: products.cpu().numpy() for component, products in way.products().items()}
            del way
        return found, reached

    def _changes(self, component: str, schemes: Sequence[str]) -> Change:
        """What schemes make of a component, beside what stands there."""
        parsed = [parse_scheme(scheme) for scheme in schemes]
        own, now = self._weights.original(component), self._weights.dense_standing(component)
        changes_more = [self._weights.rounds_inputs(component, scheme, own.shape[-1]) for scheme in parsed]
        runs = [at for at in range(len(parsed)) if now is None or changes_more[at]]
        rounds = [at for at in range(len(parsed)) if at not in runs]
        modules = [
            self._weights.made(component, parsed[at])
            if changes_more[at]
            else _Linear(self._calibrator.applied(component, own, parsed[at]), self._weights.module(component))
            for at in runs
        ]
        if now is None or not rounds:
            return Change(rounds, None, runs, modules)
        # A CPU multiplies 32 bits fastest; sums are of 32 bits at least either way.
        dtype = own.dtype if own.is_cuda or own.dtype == torch.float64 else torch.float32
        changes = torch.empty(len(rounds), own.numel(), dtype=dtype, device=own.device)
        for row, at in zip(changes, rounds, strict=True):
            changed = self._calibrator.applied(component, own, parsed[at])
            if changed.dtype == now.dtype == dtype:
                torch.sub(changed, now, out=row.view_as(now))  # of 32 bits on the way
            else:
                row.copy_((changed.to(torch.promote_types(dtype, torch.float32)) - now).reshape(-1))
        return Change(rounds, changes, runs, modules)


def _starts(batches: Sequence[Tensor]) -> list[int]:
    """The place of each batch's first sample."""
    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + len(batch))
    return starts


class _Linear(nn.Module):
    """A component with other weights [rows, cols], where a module stands that has none of its own."""

    def __init__(self, weight: Tensor, like: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = weight, getattr(like, "bias", None)

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.linear(values, self.weight, self.bias)


class _Layer:
    """A layer on the way down: gradients go through it batch by batch, and products with changes of its components are
    added up. `modules` are these components, `experts` those that lie in stacks; gradients go `further` down or not."""

    def __init__(
        self,
        body: Body,
        layer: int,
        modules: Mapping[str, nn.Module],
        experts: ExpertProducts,
        changes_of: Callable[[str], Change],
        request: PriceRequest,
        samples: int,
        further: bool,
    ) -> None:
        self._body, self._layer, self._further = body, layer, further
        self._modules, self._experts, self._changes_of = modules, experts, changes_of
        self._samples, self._num_schemes, self._kind = samples, len(request.schemes), request.kind
        with torch.no_grad():
            self._changes = {component: changes_of(component) for component in modules}
        self._sums: dict[str, Tensor] = {}
        self._held: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
        self._apart = bool(experts.components)

    def down(self, tokens: Tensor, below: Tensor | None, above: Tensor, start: int) -> Tensor:
        """The gradient at the layer's input, where it is wanted further down, of a batch whose first sample is
        `start`."""
        if not self._apart:
            try:
                return self._piece(tokens, below, above, start)
            except _TokensTogether:
                self._apart = True
        pieces = [slice(at, at + 1) for at in range(len(tokens))]
        return torch.cat([
            self._piece(tokens[own], None if below is None else below[own], above[own], start + own.start)
            for own in pieces
        ])  # fmt: skip

    def _piece(self, tokens: Tensor, below: Tensor | None, above: Tensor, start: int) -> Tensor:
        gradient, seen = self._through(tokens, below, above)
        with torch.no_grad():
            for component, calls in seen.items():
                part = self._sums_of(component, calls[0][1])[start : start + len(tokens)]
                for call, own in calls:
                    _add(part, call, own, self._changes[component], self._kind)
        for component, (inputs, own) in self._experts.pairs().items():
            self._held.setdefault(component, []).append((start, inputs, own))
        return gradient

    def _sums_of(self, component: str, like: Tensor) -> Tensor:
        """Products [samples, schemes], where the component is: the host waits for a layer, not for a batch."""
        if component not in self._sums:
            self._sums[component] = like.new_zeros(self._samples, self._num_schemes, dtype=torch.float32)
        return self._sums[component]

    def products(self) -> dict[str, Tensor]:
        """Products [samples, schemes] of the components, all batches done. Raises `UserError` where nothing was seen of
        what lies in stacks."""
        if unseen := self._experts.unseen(self._held):
            raise UserError(f"prices cannot be had: no product with {unseen} or another matrix of its stack is seen")
        with torch.no_grad():
            for component in sorted(self._held):
                prompts, inputs, gradients = zip(*self._held.pop(component), strict=True)
                padded = [pad_sequence(list(rows), batch_first=True) for rows in (inputs, gradients)]
                part = padded[1].new_zeros(len(prompts), self._num_schemes, dtype=torch.float32)
                _add(part, Seen(padded[0], None), padded[1], self._changes_of(component), self._kind)
                self._sums_of(component, part)[list(prompts)] = part
        return self._sums

    def _through(
        self, tokens: Tensor, below: Tensor | None, above: Tensor
    ) -> tuple[Tensor, dict[str, list[tuple[Seen, Tensor]]]]:
        """The gradient at the layer's input (where it is wanted further down, else that at its output), and the calls
        of its modules with the gradients at their outputs."""
        body, calls = self._body, list[tuple[str, Seen]]()
        leaf = below.detach().requires_grad_() if below is not None and self._further else below
        with torch.enable_grad(), _watching(self._modules, calls), self._experts.forward() as entered:
            output = body.through(leaf, self._layer, self._layer + 1, lambda: body.run(tokens))
        wanted = [seen.output for _, seen in calls if seen.output is not None]
        own = [leaf] if leaf is not None and leaf.requires_grad else []
        with self._experts.backward():
            found = torch.autograd.grad(output, own + wanted + entered, above, allow_unused=True)
        seen: dict[str, list[tuple[Seen, Tensor]]] = {}
        for (component, call), gradient in zip(calls, found[len(own) : len(own) + len(calls)], strict=True):
            one = _of_prompts(call, len(tokens))
            if gradient is not None:
                seen.setdefault(component, []).append((one, gradient.reshape(*one.inputs.shape[:2], -1)))
        return (found[0] if own else above), seen


def _of_prompts(call: Seen, prompts: int) -> Seen:
    """A call's rows by prompts: all that it has are one prompt's, if there is but one. Raises `_TokensTogether`."""
    inputs, output = call.inputs, call.output
    assert output is not None
    if prompts == 1:
        inputs, output = (rows.reshape(1, -1, rows.shape[-1]) for rows in (inputs, output))
    elif inputs.ndim != 3 or len(inputs) != prompts:
        raise _TokensTogether
    return Seen(inputs, output.detach())


@contextmanager
def _watching(modules: Mapping[str, nn.Module], calls: list[tuple[str, Seen]]) -> Iterator[None]:
    """Within, calls of modules are noted, and gradients reach their outputs."""

    def noting(component: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            calls.append((component, Seen(args[0].detach(), output)))

        return note

    hooks = [module.register_forward_hook(noting(component)) for component, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# What a score of a kind sums over a component's outputs or weights.
_SUMMED: dict[PriceKind, Callable[[Tensor], Tensor]] = {"squared": Tensor.square, "changes": Tensor.abs}


def _add(part: Tensor, call: Seen, gradient: Tensor, change: Change, kind: PriceKind) -> None:
    """Add a call's products to `part` [prompts, schemes]."""
    summed = _SUMMED.get(kind, lambda values: values)

    def at_outputs(moved: Tensor) -> Tensor:
        products: Tensor = summed(gradient.float() * moved.float())
        return products.sum(dim=(1, 2))

    if change.weights is not None and kind == "squared":
        for at, weight in zip(change.at, change.weights, strict=True):
            moved = call.inputs.to(weight.dtype) @ weight.reshape(gradient.shape[2], call.inputs.shape[2]).t()
            part[:, at] += at_outputs(moved)
    elif change.weights is not None:
        part[:, list(change.at)] += _with_weights(call.inputs, gradient, summed(change.weights), summed).float()
    for at, module in zip(change.modules_at, change.modules, strict=True):
        assert call.output is not None, "what lies in a stack has no modules"
        part[:, at] += at_outputs(module(call.inputs).float() - call.output.float())


def _with_weights(inputs: Tensor, gradient: Tensor, weights: Tensor, of_gradient: Callable[[Tensor], Tensor]) -> Tensor:
    """Inner products [prompts, schemes] of what is made `of_gradient` of prompts' weight gradients with changes of the
    weights, in float32."""
    size = inputs.shape[2] * gradient.shape[2]
    together = _PROMPTS_TOGETHER[inputs.device.type]
    chunk = max(1, _MOST_VALUES[inputs.device.type] // size)
    chunk -= chunk % together if chunk > together else 0
    found = []
    for x, d in zip(inputs.split(chunk), gradient.split(chunk), strict=True):
        own = of_gradient(torch.bmm(d.to(weights.dtype).transpose(1, 2), x.to(weights.dtype)))
        found.append((weights @ own.reshape(len(x), -1).t()).t())
    return torch.cat(found)
