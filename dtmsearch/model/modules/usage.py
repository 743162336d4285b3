"""How a model's own code uses its parameters: which of them tokens are multiplied with, along which of their sides, and
which of these choose among experts. Found by running the model on a few tokens without any values (PyTorch's meta
device), with every operation watched; knows no family.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dtmsearch.model.modules.compat import Operations, leaves_of, storage_of
from dtmsearch.model.modules.empty import made_again

log = logging.getLogger(__name__)

# Tokens of the pass: more than a window or a chunk of tiny models, and no size that a weight is likely to have.
_TOKENS = 19
# Questions about values are answered with so many rows at most.
_MOST_ROWS = 64

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "mv", "addmv", "dot", "_grouped_mm"}
_PRODUCTS |= {"grouped_mm_fallback", "addbmm", "_scaled_mm"}
# The operand that is added, where a product has one.
_ADDING = {"addmm", "baddbmm", "addmv", "addbmm"}
# What is made of a tensor of the same shape, value for value.
_COPIES = {"_to_copy", "clone", "contiguous", "to", "detach", "lift_fresh", "alias_copy", "_copy_from"}
_GATHERS = {"index", "index_select"}
# What a tensor lends its shape only.
_FACTORIES = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
_FACTORIES |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"}
_WHOLE_NUMBERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
# Where tokens meet each other: what comes out is no longer the output of one matrix.
_MEETINGS = {"convolution", "embedding", "_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention"}


@dataclass(frozen=True)
class Use:
    """How a parameter is multiplied with tokens: `inputs` is the side along which sums run, `outputs` the other side;
    `stack` is the side along which matrices lie, if there are several, and `count` how many. `routes`: what it gives
    chooses among experts."""

    inputs: int
    outputs: int
    stack: int | None = None
    count: int = 1
    routes: bool = False


@dataclass(frozen=True)
class Usage:
    """Parameter -> its use. `other` are parameters that the pass has touched otherwise, by the operation that did;
    `failed` says why there was no pass. `chosen`: of what chooses among experts, (for a token, of how many)."""

    uses: Mapping[str, Use]
    other: Mapping[str, str]
    failed: str = ""
    chosen: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Origin:
    """Where values come from: a parameter, and which of its sides runs along each stride."""

    parameter: str
    sides: Mapping[int, int]


@dataclass
class _Watching:
    origins: dict[int, _Origin] = field(default_factory=dict)
    """By storage."""
    of_tokens: set[int] = field(default_factory=set)
    flows: dict[int, frozenset[str]] = field(default_factory=dict)
    """Storage -> parameters whose products flow there, value for value."""
    chosen: dict[int, frozenset[str]] = field(default_factory=dict)
    """Storage of whole numbers -> parameters by whose products these were chosen."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    uses: dict[str, Use] = field(default_factory=dict)
    both_ways: set[str] = field(default_factory=set)
    other: dict[str, str] = field(default_factory=dict)
    routing: set[str] = field(default_factory=set)
    readers: dict[str, set[str]] = field(default_factory=dict)
    """Parameter -> parameters whose products read what flows from its own."""
    held: list[Tensor] = field(default_factory=list)
    largest: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Parameter -> (how many, of how many) of each choice of the largest of its products."""

    def note(self, name: str, arguments: Sequence[Any], made: Any) -> None:
        tensors, outputs = _tensors_in(arguments), _tensors_in([made])
        if not outputs or name in _FACTORIES:
            return
        self.routing = self.routing.union(*(self.chosen.get(storage_of(t), frozenset()) for t in tensors))
        if name in _PRODUCTS:
            flows = self._product(name, tensors)
        else:
            flows = frozenset[str]()
            if name not in _MEETINGS:
                flows = flows.union(*(self.flows.get(storage_of(t), frozenset()) for t in tensors))
            self._touch(name, tensors, outputs)
            self._choose(name, flows, tensors, outputs)
        tokens = any(storage_of(t) in self.of_tokens for t in tensors)
        for output in outputs:
            key = storage_of(output)
            if tokens and key not in self.origins:
                self.of_tokens.add(key)
            if flows and output.dtype in _WHOLE_NUMBERS:
                self.chosen[key] = self.chosen.get(key, frozenset()) | flows
            elif flows:
                self.flows[key] = self.flows.get(key, frozenset()) | flows
            self.held.append(output)

    def _choose(self, name: str, flows: frozenset[str], tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        indices = next((o for o in outputs if o.dtype in _WHOLE_NUMBERS), None)
        if name == "topk" and indices is not None and indices.ndim:
            for parameter in flows:
                self.largest.setdefault(parameter, []).append((int(indices.shape[-1]), int(tensors[0].shape[-1])))

    def choices(self) -> dict[str, tuple[int, int]]:
        """How many a router chooses for a token, of how many. Of several choices that among most counts: groups of
        experts are chosen before."""
        return {name: max(each, key=lambda choice: choice[1]) for name, each in self.largest.items()}

    def _touch(self, name: str, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Parameters pass on through copies and gathers; views share their storage. All else uses them otherwise."""
        own = [(t, o) for t in tensors if (o := self.origins.get(storage_of(t))) is not None]
        for tensor, origin in own:
            output = outputs[0]
            if storage_of(output) == storage_of(tensor):
                continue
            if name in _COPIES and output.shape == tensor.shape:
                self._passes_on(tensor, output, origin, list(range(tensor.ndim)))
            elif name in _GATHERS and tensor is tensors[0]:
                kept = tensor.ndim - 1  # indices stand for the first side alone
                lead = output.ndim - kept
                self._passes_on(tensor, output, origin, [0] * lead + list(range(1, tensor.ndim)))
            else:
                self.other.setdefault(origin.parameter, name)

    def _passes_on(self, tensor: Tensor, output: Tensor, origin: _Origin, places: Sequence[int]) -> None:
        sides = [origin.sides.get(stride) for stride in tensor.stride()]
        found = {
            stride: side for stride, at in zip(output.stride(), places, strict=True) if (side := sides[at]) is not None
        }
        self.origins[storage_of(output)] = _Origin(origin.parameter, found)

    def _product(self, name: str, tensors: Sequence[Tensor]) -> frozenset[str]:
        first, second = tensors[1:3] if name in _ADDING else tensors[:2]
        flowing: set[str] = set()
        for weight, values, at in ((second, first, -1 if name == "linear" else -2), (first, second, -1)):
            origin = self.origins.get(storage_of(weight))
            if origin is None:
                continue
            if storage_of(values) not in self.of_tokens:
                self.other.setdefault(origin.parameter, f"{name}, of what no token changes")
                continue
            if weight.ndim < 2:
                self.other.setdefault(origin.parameter, f"{name} as a vector")
                continue
            self._use(origin, weight, at)
            flowing.add(origin.parameter)
            for source in self.flows.get(storage_of(values), ()):
                self.readers.setdefault(source, set()).add(origin.parameter)
        if not flowing:
            for tensor in (first, second):
                for source in self.flows.get(storage_of(tensor), ()):
                    self.readers.setdefault(source, set()).add("")
        return frozenset(flowing)

    def _use(self, origin: _Origin, weight: Tensor, at: int) -> None:
        sides = [origin.sides.get(stride) for stride in weight.stride()]
        other = -1 if at == -2 else -2
        inputs, outputs = sides[at], sides[other]
        shape = self.shapes[origin.parameter]
        if inputs is None and outputs is not None:  # a side of one has any stride
            inputs = next(
                (side for side, size in enumerate(shape) if side != outputs and size == weight.shape[at]), None
            )
        if outputs is None and inputs is not None:
            outputs = next((s for s, size in enumerate(shape) if s != inputs and size == weight.shape[other]), None)
        if inputs is None or outputs is None or inputs == outputs:
            self.other.setdefault(origin.parameter, "a product along no side of its own")
            return
        stack, count = None, 1
        left = [side for side in range(len(shape)) if side not in (inputs, outputs)]
        if len(left) == 1:
            stack, count = left[0], shape[left[0]]
        elif left:
            self.other.setdefault(origin.parameter, f"a product of {len(shape)} sides")
            return
        elif weight.shape[at] < shape[inputs] and shape[inputs] % weight.shape[at] == 0:
            stack, count = inputs, shape[inputs] // weight.shape[at]
        elif weight.shape[other] < shape[outputs] and shape[outputs] % weight.shape[other] == 0:
            stack, count = outputs, shape[outputs] // weight.shape[other]
        found = Use(inputs, outputs, stack, count)
        known = self.uses.setdefault(origin.parameter, found)
        if (known.inputs, known.outputs) != (found.inputs, found.outputs):
            self.both_ways.add(origin.parameter)

    def routers(self) -> set[str]:
        """What chooses among experts, and what nothing but these reads."""
        found = set(self.routing)
        while True:
            more = {name for name, readers in self.readers.items() if readers and readers <= found} - found
            if not more:
                return found
            found |= more


def _tensors_in(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple | dict):
            found += [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]
    return found


class _Operations(Operations):
    """Notes every operation, and answers what only values could: all experts are hit, every mask holds somewhere."""

    def __init__(self, note: Callable[[str, Sequence[Any], Any], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return 1 if args[0].dtype is not torch.bool else True
        if name in ("nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave", "bincount"):
            made = _answered(name, args, named)
        elif name == "_grouped_mm":  # which takes some dtypes only
            made = args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1])
        elif name == "equal":
            return True
        else:
            made = made_again(name, func, args, named)
        self._note(name, [*args, *named.values()], made)
        return made


def _answered(name: str, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    values = args[0]
    if name == "nonzero":
        return values.new_empty(min(max(values.shape, default=1), _MOST_ROWS), values.ndim, dtype=torch.long)
    if name == "bincount":
        return values.new_empty(max(int(named.get("minlength", args[2] if len(args) > 2 else 0)), 1), dtype=torch.long)
    if name == "repeat_interleave":
        return values.new_empty(int(named.get("output_size") or len(values)), dtype=torch.long)
    if name == "masked_select":
        return values.new_empty(min(values.numel(), _MOST_ROWS))
    flat = values.reshape(-1)[: min(values.numel(), _MOST_ROWS)]
    return flat.clone(), torch.zeros_like(flat, dtype=torch.long), torch.zeros_like(flat, dtype=torch.long)


class _Questions(TorchFunctionMode):
    """Answers what code asks of values in Python."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is Tensor.tolist:
            return _nested(args[0].shape)
        if func in (torch.split, Tensor.split) and isinstance(args[1], list | tuple):
            args = (args[0], _fitting(args[0], args[1], *args[2:], **named), *args[2:])
        return func(*args, **named)


def _nested(shape: Sequence[int]) -> Any:
    return 1 if not shape else [_nested(shape[1:]) for _ in range(shape[0])]


def _fitting(values: Tensor, sizes: Sequence[int], dim: int = 0) -> list[int]:
    """Sizes that add up to the side that is split: those that came from values do not."""
    room = values.shape[dim] - sum(sizes[:-1])
    return [*sizes[:-1], room] if room >= 0 else list(sizes)


def run_without_values(
    model: nn.Module, tokens: Tensor, note: Callable[[str, Sequence[Any], Any], None] = lambda name, given, made: None
) -> None:
    """A model without values over `tokens` without values. `note` is told of every operation: its name, arguments and
    what it has made. Raises whatever the model's own code cannot do without values."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(_Questions())
        stack.enter_context(_Operations(note))
        model(input_ids=tokens, use_cache=False)


def usage_of(model: nn.Module) -> Usage:
    """How a model without values (on the meta device) uses its parameters. Nothing of the model changes."""
    watching = _Watching()
    for name, parameter in model.named_parameters():
        watching.shapes[name] = tuple(parameter.shape)
        watching.origins[storage_of(parameter)] = _Origin(
            name, {stride: side for side, stride in reversed(list(enumerate(parameter.stride())))}
        )
    failed = ""
    tokens = torch.empty(1, _TOKENS, dtype=torch.long, device="meta")
    watching.of_tokens.add(storage_of(tokens))
    try:
        run_without_values(model, tokens, watching.note)
    except Exception as error:  # whatever the model's code cannot do without values
        failed = f"{type(error).__name__}: {error}"
        log.debug("no pass without values over a %s: %s", type(model).__name__, failed)
    routers = watching.routers()
    uses = {
        name: Use(use.inputs, use.outputs, use.stack, use.count, name in routers)
        for name, use in watching.uses.items()
        if name not in watching.both_ways
    }
    other = {name: what for name, what in watching.other.items() if name not in uses}
    other |= dict.fromkeys(watching.both_ways, "products along either side")
    return Usage(uses, other, failed, watching.choices())
