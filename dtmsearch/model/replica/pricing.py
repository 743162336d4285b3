"""Products of gradients with what options change, a prompt at a time, taken at the outputs of components.

One pass up keeps the states between layers; on the way down each layer runs again with gradients, and of its
components the inputs x and the gradients d at their outputs are at hand for one batch. A change D of a weight changes
the output by D x, so a prompt's product with it is <sum over tokens of d x^T, D>: the prompt's gradient is made once
for all schemes and let go. What changes more than weights is run, and its output compared. Memory: the weights, states
of one request between layers, one layer's changes.

Experts of a mixture read tokens of all prompts side by side: a layer with such runs prompt by prompt. Of those that lie
in stacks the products themselves are watched; x and d of one layer's are kept, and changes made an expert at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import Reference
from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import FloatArray, PriceKind, PriceRequest
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import UserError
from dtmsearch.model.calibration.calibrator import AnyCalibrator
from dtmsearch.model.calibration.expert_inputs import ExpertProducts
from dtmsearch.model.compress.number_rounding import RoundsInputs
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.modules.compat import Conv1D
from dtmsearch.model.modules.kv_caches import CachedPart
from dtmsearch.model.replica.loaded_reference import greedy
from dtmsearch.model.weights.applied import Weights

# Values of prompts' gradients that are held at once, and the prompts of which they are a multiple where there are so
# many: those that a GPU's matrix products take together.
_MOST_VALUES = {"cpu": 1 << 26, "cuda": 3 << 30}
_PROMPTS_TOGETHER = {"cpu": 1, "cuda": 64}
# Logits that are held at once.
_MOST_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 28}


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


class Pricer:
    """Takes products on a replica's model. `eager` is a context in which layers run as they were loaded,
    `rows_in_batch` gives the rows of a batch for rows of so many tokens."""

    def __init__(
        self,
        body: Body,
        weights: Weights,
        calibrator: AnyCalibrator,
        manifest: ModelManifest,
        eager: Callable[[], AbstractContextManager[None]],
        rows_in_batch: Callable[[int], int],
    ) -> None:
        self._body, self._weights, self._calibrator = body, weights, calibrator
        self._layer_of = {name: component.layer for name, component in manifest.by_name.items()}
        self._eager, self._rows_in_batch = eager, rows_in_batch

    def unpriceable(self, components: Sequence[str]) -> str:
        """See `Replica.unpriceable`."""
        if len(self._body.own) != self._body.num_layers:
            return "the model's layers lie in several processes, through which no backward pass is taken"
        if self._body.how_it_runs() or not self._body.head_apart:
            return f"no backward pass goes layer by layer: {self._body.how_it_runs() or 'its head runs within it'}"
        watched = self._experts(components).components
        for component in components:
            if component not in watched and not isinstance(
                self._weights.module(component), nn.Linear | Conv1D | CachedPart | RoundsInputs
            ):
                return f"{component} lies in a stack of matrices in which no product is told from another's"
            if not 0 <= self._layer_of[component] < self._body.num_layers:
                return f"{component} lies outside the layers"
        return ""

    def _experts(self, components: Sequence[str]) -> ExpertProducts:
        """Those of some components that lie in stacks."""
        return ExpertProducts(self._body.model, components)

    def products(self, request: PriceRequest, reference: Reference, stand_on: Callable[[Plan], None]) -> FloatArray:
        """Products [samples, components, schemes]. `stand_on` has the model under a plan, on the base model's weights.

        Raises `UserError`.
        """
        if problem := self.unpriceable(request.components):
            raise UserError(f"prices cannot be had: {problem}. Choose a strategy that measures, such as sensitivity")
        prompts = (np.arange(*request.samples) % reference.num_prompts).astype(np.int32)
        tokens = torch.from_numpy(greedy(reference, prompts)).long().to(self._body.input_device)
        rows = self._rows_in_batch(tokens.shape[1])
        base_hidden = None
        with torch.no_grad():
            if request.kind == "slope":
                stand_on(Plan())
                with self._eager():
                    states = [self._body.finish(batch, None, 0) for batch in tokens.split(rows)]
                base_hidden = [state[:, reference.prompt_tokens - 1 : -1].clone() for state in states]
            plans = [request.around, *(Plan.of(dict.fromkeys(request.components, s)) for s in request.schemes)]
            self._calibrator.prepare(plans, request.calibration_id or None)
            stand_on(request.around)
            self._calibrator.rest()
            self._weights.let_gradients_through()
        with self._eager():
            return _products(
                self._body,
                request,
                self._layer_of,
                self._weights.module,
                self._experts(request.components),
                lambda component: self._changes(component, request.schemes),
                tokens,
                reference.prompt_tokens,
                rows,
                base_hidden,
            )

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


class _Linear(nn.Module):
    """A component with other weights [rows, cols], where a module stands that has none of its own."""

    def __init__(self, weight: Tensor, like: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = weight, getattr(like, "bias", None)

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.linear(values, self.weight, self.bias)


def _products(
    body: Body,
    request: PriceRequest,
    layer_of: Mapping[str, int],
    module_of: Callable[[str], nn.Module],
    experts: ExpertProducts,
    changes_of: Callable[[str], Change],
    tokens: Tensor,
    targets_from: int,
    rows: int,
    base_hidden: Sequence[Tensor] | None = None,
) -> FloatArray:
    """Products [samples, components, schemes] of a request.

    `tokens` [samples, tokens] are those of its samples, predicted from position `targets_from`; a batch has `rows` of
    them. `base_hidden` are the base model's inputs of the head, a batch at a time, for the slope. `experts` are the
    components that lie in stacks. Raises `UserError` where products with these cannot be told.
    """
    first = request.samples[0]
    batches = tokens.split(rows)
    starts = [first + rows * index for index in range(len(batches))]
    found = np.zeros((len(tokens), len(request.components), len(request.schemes)), np.float32)
    place = {component: index for index, component in enumerate(request.components)}
    by_layer: dict[int, list[str]] = {}
    for component in request.components:
        by_layer.setdefault(layer_of[component], []).append(component)
    with torch.no_grad():
        states = body.boundaries_of(batches)
    gradients = [
        _of_head(body, request, batch, state[-1], targets_from, start, None if base_hidden is None else base_hidden[at])
        for at, (batch, state, start) in enumerate(zip(batches, states, starts, strict=True))
    ]
    lowest = min(by_layer)
    for layer in reversed(range(lowest, body.num_layers)):
        here = by_layer.get(layer, [])
        modules = {component: module_of(component) for component in here if component not in experts.components}
        way = _Layer(body, layer, modules, experts.of(here), changes_of, request, len(tokens), layer > lowest)
        for at, batch in enumerate(batches):
            states[at].pop()
            below = states[at][-1] if layer > 0 else None
            gradients[at] = way.down(batch, below, gradients[at], at * rows)
        for component, products in way.products().items():
            found[:, place[component]] = products.cpu().numpy()
        del way
    return found


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


def _of_head(
    body: Body,
    request: PriceRequest,
    tokens: Tensor,
    state: Tensor,
    targets_from: int,
    first_sample: int,
    base_hidden: Tensor | None,
) -> Tensor:
    """The gradient at the last layer's output."""
    leaf = state.detach().requires_grad_()
    with torch.enable_grad():
        hidden = body.finish(tokens, leaf, body.num_layers)[:, targets_from - 1 : -1]
        rows = hidden.reshape(-1, hidden.shape[-1])
        base_rows = None if base_hidden is None else base_hidden.reshape(rows.shape)
        targets = tokens[:, targets_from:].to(rows.device).reshape(-1)
        drawn = _drawn(request, first_sample, len(tokens), hidden.shape[1])
        wanted = torch.from_numpy(drawn).to(rows.device).reshape(-1)
        total = torch.zeros_like(rows)
        chunk = max(1, _MOST_LOGITS[rows.device.type] // body.vocabulary_size)
        with body.head_only():
            for at in range(0, len(rows), chunk):
                part = rows[at : at + chunk].detach().requires_grad_()
                logits = body.logits(part)
                with torch.no_grad():
                    own = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
                    if base_rows is not None:
                        own -= body.logits(base_rows[at : at + chunk]).to(own.dtype).softmax(dim=1)
                    else:
                        draws = request.kind == "fisher"
                        labels = _labels(own, wanted[at : at + chunk]) if draws else targets[at : at + chunk]
                        own[torch.arange(len(own), device=own.device), labels] -= 1.0
                (total[at : at + chunk],) = torch.autograd.grad(logits, part, own.to(logits.dtype))
        (gradient,) = torch.autograd.grad(rows, leaf, total)
    return gradient


def _drawn(request: PriceRequest, first_sample: int, samples: int, positions: int) -> NDArray[np.float64]:
    """Numbers between 0 and 1, [samples, positions], that follow from the seed and the sample alone."""
    return np.stack([np.random.default_rng((request.seed, first_sample + i)).random(positions) for i in range(samples)])


def _labels(probabilities: Tensor, drawn: Tensor) -> Tensor:
    """Tokens [rows] drawn from `probabilities` [rows, vocabulary] by numbers between 0 and 1: where these lie in their
    cumulative sums."""
    sums = probabilities.double().cumsum(dim=1)
    found = torch.searchsorted(sums, (drawn.to(sums) * sums[:, -1]).unsqueeze(1), right=True).squeeze(1)
    return found.clamp_(max=probabilities.shape[1] - 1)


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
