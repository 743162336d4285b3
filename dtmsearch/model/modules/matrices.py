"""Weight matrices as families keep them, seen as all others see them: [outputs, inputs], by a component's name.

Linear layers are that already; GPT-2's Conv1D keeps the transpose; mixtures of experts keep all experts of a layer in
one parameter, along any side of it. Which of these a search can choose among follows from how the model's own code uses
them (`usage.py`): the kernels of convolutions, matrices of one attention head each, tables of positions and vectors
that are multiplied value by value are none of them. Knows no family's name.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dtmsearch.model.modules.compat import Conv1D
from dtmsearch.model.modules.empty import without_values
from dtmsearch.model.modules.usage import Usage, Use, usage_of

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_NO_USAGE = Usage({}, {}, "not looked at")
_OTHERWISE = {
    "embedding": "an embedding: searched where it is named",
    "convolution": "the kernel of a convolution",
}
# By the class and the configuration of a model: it is asked for at every loading.
_known: dict[str, Usage] = {}
_MOST_KNOWN = 32
# How configurations call the experts of a token.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class Slice:
    """Where a matrix lies in a parameter that holds several: the `index`-th of `count` parts along `side`."""

    parameter: str
    side: int
    index: int
    count: int


@dataclass(frozen=True)
class Matrix:
    """A matrix found in a model: its name, shape [outputs, inputs], whether the model keeps its transpose, and where it
    lies, if in a parameter that holds several. `routes`: it chooses among experts, or weighs one."""

    name: str
    shape: tuple[int, int]
    transposed: bool = False
    slice: Slice | None = None
    routes: bool = False


@dataclass(frozen=True)
class LeftOut:
    """A parameter, of more than one side, that holds no matrix of a search, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Found:
    """All of a model's matrices that tokens are multiplied with, in its own order, and what else has several sides.
    `reached` are all parameters that the tokens' pass used in any way; None where there was no such pass."""

    matrices: tuple[Matrix, ...]
    left_out: tuple[LeftOut, ...]
    reached: frozenset[str] | None = None


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is one matrix with, perhaps, a bias."""
    return isinstance(module, nn.Linear | Conv1D)


def settings_of(config: Any) -> str:
    """What a configuration says, but for where it was read."""
    return json.dumps({**json.loads(config.to_json_string(use_diff=False)), "_name_or_path": ""}, sort_keys=True)


def known_usage(model: Any) -> Usage:
    """How a model, with values or without, uses its parameters."""
    config = getattr(model, "config", None)
    if config is None:
        return Usage({}, {}, f"{type(model).__name__} has no configuration")
    key = f"{type(model).__module__}.{type(model).__qualname__} {settings_of(config)}"
    if key not in _known:
        while len(_known) >= _MOST_KNOWN:
            del _known[next(iter(_known))]
        _known[key] = _usage_of_twin(model)
    return _known[key]


def _usage_of_twin(model: Any) -> Usage:
    if all(parameter.is_meta for parameter in model.parameters()):
        return usage_of(model)
    try:
        with without_values():
            twin = type(model)(copy.deepcopy(model.config)).eval()
    except Exception as error:  # whatever a class of somebody's own does
        return Usage({}, {}, f"{type(error).__name__}: {error}")
    return usage_of(twin)


def matrices_of(model: nn.Module) -> Iterator[Matrix]:
    """All matrices that tokens are multiplied with in a model, in its own order; those of a stack one by one."""
    return iter(found_in(model, known_usage(model)).matrices)


def sliced_matrices(model: nn.Module) -> dict[str, Matrix]:
    """Those that lie in a parameter with others, by name. Models that have none are not run for it."""
    own = (m for m in model.modules() if not is_matrix(m) and not isinstance(m, nn.Embedding))
    if not any(p.ndim > 1 for m in own for p in m.parameters(recurse=False)):
        return {}
    return {matrix.name: matrix for matrix in matrices_of(model) if matrix.slice is not None}


def found_in(model: nn.Module, usage: Usage = _NO_USAGE) -> Found:
    """The matrices of a model by the use that it makes of its parameters. What the pass did not reach is taken for what
    its likes in other layers, and for other experts, are."""
    likes: dict[str, Use] = {}
    for name, use in usage.uses.items():
        like = likes.setdefault(_pattern(name), use)
        if use.routes and not like.routes:
            likes[_pattern(name)] = use
    routing = {pattern for pattern, use in likes.items() if use.routes}
    matrices: list[Matrix] = []
    left_out: list[LeftOut] = []
    for name, parameter, module in _own_parameters(model):
        alike = likes.get(_pattern(name))
        found = (
            _in_module(name, module, alike, usage)
            if is_matrix(module)
            else _in_stack(name, parameter, alike, routing, usage)
        )
        if isinstance(found, str):
            reason = "no token reaches it" if not usage.failed and not _touched(name, usage, likes) else found
            left_out.append(LeftOut(name, tuple(parameter.shape), reason))
        else:
            matrices += found
    reached = None if usage.failed else frozenset({*usage.uses, *usage.other})
    return Found(tuple(_by_expert(matrices)), tuple(left_out), reached)


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Parameters of more than one side, each once, with the modules that own them."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{prefix}.{name}" if prefix else name), parameter, module


def _pattern(name: str) -> str:
    return _NUMBER.sub("#", name)


def _touched(name: str, usage: Usage, likes: Mapping[str, Use]) -> bool:
    return name in usage.other or _pattern(name) in likes


def _in_module(name: str, module: nn.Module, use: Use | None, usage: Usage) -> list[Matrix] | str:
    """The matrix that a module is; why there is none to search if so."""
    if name.rpartition(".")[2] != "weight":
        return "no weight of its module"
    if use is None and not usage.failed:
        return f"its weights are changed before they are used, or used otherwise ({usage.other.get(name, 'nothing')})"
    weight: Any = module.weight
    transposed = isinstance(module, Conv1D)
    if use is not None and (use.inputs == 0) != transposed:
        return "multiplied along the other side than its module says"
    rows, cols = reversed(weight.shape) if transposed else weight.shape
    routes = rows == 1 or (use is not None and use.routes)
    return [Matrix(name.removesuffix(".weight"), (int(rows), int(cols)), transposed, None, routes)]


def _in_stack(
    name: str, parameter: nn.Parameter, use: Use | None, routing: set[str], usage: Usage
) -> list[Matrix] | str:
    """The matrices of experts that a parameter holds; why there are none to search if so."""
    if use is None:
        operation = usage.other.get(name, "nothing that is known")
        return _OTHERWISE.get(operation, f"tokens are not multiplied with it: used in {operation}")
    if use.routes and name.endswith(".weight"):
        return [Matrix(name.removesuffix(".weight"), _sides(parameter, use), use.inputs < use.outputs, None, True)]
    if use.stack is None or use.count < 2:
        return "a parameter of its own, no linear layer"
    blocks = _blocks(_pattern(name))
    if not any(router.startswith(block) for router in routing for block in blocks):
        return "matrices of heads, which nothing chooses among"
    rows, cols = _sides(parameter, use)
    owner, _, leaf = name.rpartition(".")
    return [
        Matrix(
            f"{owner}.{index}.{leaf}", (rows, cols), use.inputs < use.outputs, Slice(name, use.stack, index, use.count)
        )
        for index in range(use.count)
    ]


def _sides(parameter: nn.Parameter, use: Use) -> tuple[int, int]:
    """Outputs and inputs of each matrix in a parameter."""
    rows, cols = (parameter.shape[s] // (use.count if s == use.stack else 1) for s in (use.outputs, use.inputs))
    return rows, cols


def _blocks(pattern: str) -> list[str]:
    """What a parameter lies in below its layer, from the inside out, as beginnings of names."""
    parts = pattern.split(".")
    lowest = parts.index("#") + 1 if "#" in parts else 0
    return [".".join(parts[:end]) + "." for end in range(len(parts) - 2, lowest, -1)]


def _by_expert(matrices: Sequence[Matrix]) -> Iterator[Matrix]:
    """The same, with the stacks of one module told expert by expert."""
    waiting: list[Matrix] = []
    for matrix in matrices:
        if waiting and (matrix.slice is None or _owner(matrix) != _owner(waiting[0])):
            yield from sorted(waiting, key=lambda m: m.slice.index)  # type: ignore[union-attr]
            waiting = []
        if matrix.slice is None:
            yield matrix
        else:
            waiting.append(matrix)
    yield from sorted(waiting, key=lambda m: m.slice.index)  # type: ignore[union-attr]


def _owner(matrix: Matrix) -> str:
    return matrix.slice.parameter.rpartition(".")[0] if matrix.slice else ""


@dataclass(frozen=True)
class Mixture:
    """What chooses among experts: the path of its module, among how many, and how many it gives a token to."""

    name: str
    num_experts: int
    experts_per_token: int


def mixtures_of(model: nn.Module) -> dict[str, Mixture]:
    """The matrices of experts, by name, each with the mixture that it belongs to: the innermost module around it in
    which something chooses. Those that several tokens share, or all, belong to none."""
    usage = known_usage(model)
    routing = {_pattern(name): name for name, use in usage.uses.items() if use.routes}
    placed: dict[str, tuple[str, str, int]] = {}
    indices: dict[tuple[str, str], set[int]] = {}
    for matrix in found_in(model, usage).matrices:
        own = matrix.slice.parameter if matrix.slice else f"{matrix.name}.weight"
        block = None if matrix.routes else next(
            (b for b in _blocks(_pattern(own)) if any(router.startswith(b) for router in routing)), None
        )  # fmt: skip
        if block is None:
            continue
        depth = block.count(".")
        mixture, rest = ".".join(own.split(".")[:depth]), own.split(".")[depth:]
        numbers = [part for part in rest if part.isdigit()]
        if matrix.slice is not None:
            placed[matrix.name] = mixture, block, matrix.slice.count
        elif numbers:  # a module of its own for each expert
            placed[matrix.name] = mixture, block, 0
            indices.setdefault((mixture, _pattern(own)), set()).add(int(numbers[0]))
    counts = {mixture: len(found) for (mixture, _), found in indices.items()}
    found: dict[str, Mixture] = {}
    for name, (mixture, block, number) in placed.items():
        number = number or counts[mixture]
        chosen, among = _choice(
            model, usage, [r for pattern, r in routing.items() if pattern.startswith(block)], number
        )
        found[name] = Mixture(mixture, among, chosen)
    return found


def _choice(model: Any, usage: Usage, routers: Sequence[str], num_experts: int) -> tuple[int, int]:
    """How many experts a token is given to, of how many: by what the pass has chosen, else by the configuration; all
    where neither tells. Some may be none that hold weights (LongCat's)."""
    known = (usage.chosen.get(router) for router in routers)
    fitting = [choice for choice in known if choice is not None and choice[1] >= num_experts]
    if fitting:
        return fitting[0]
    config = model.config.get_text_config()
    named = (getattr(config, key, None) for key in _EXPERTS_PER_TOKEN)
    chosen = next((number for number in named if isinstance(number, int) and number > 0), num_experts)
    return min(chosen, num_experts), num_experts


class StackedMatrix(nn.Module):
    """One expert's matrix in a stacked parameter: read as a copy, written into its place."""

    def __init__(self, parameter: nn.Parameter, place: Slice, transposed: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_stack", parameter)  # it is the model's, and no parameter of this module's own
        self._place, self._transposed = place, transposed

    def _view(self) -> Tensor:
        stack: Tensor = self._stack.data  # type: ignore[assignment]
        return matrix_in(stack, self._place, self._transposed)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The stack that it lies in, which says where it is."""
        yield self._stack  # type: ignore[misc]

    def read(self) -> Tensor:
        return self._view().clone().contiguous()

    def write(self, weight: Tensor) -> None:
        self._view().copy_(weight)


def matrix_in(stack: Tensor, place: Slice, transposed: bool) -> Tensor:
    """The matrix [outputs, inputs] at a place of a parameter, as a view of it."""
    size = stack.shape[place.side] // place.count
    view = stack.narrow(place.side, place.index * size, size)
    view = view.squeeze(place.side) if view.ndim > 2 else view
    return view.t() if transposed else view


def read(module: nn.Module) -> Tensor:
    """The matrix [outputs, inputs] of a module, as a pointer where the module is one matrix."""
    if isinstance(module, StackedMatrix):
        return module.read()
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.t() if isinstance(module, Conv1D) else weight


def write(module: nn.Module, weight: Tensor) -> None:
    """Put a matrix [outputs, inputs] into a module, by pointer where the module is one matrix."""
    if isinstance(module, StackedMatrix):
        module.write(weight)
    elif isinstance(module, Conv1D):
        module.weight.data, module.nf = weight.t().contiguous(), len(weight)  # its code asks for the outputs
    else:
        module.weight.data = weight
