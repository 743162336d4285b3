"""Where a folder holds the scales of columns: the columns of compressed matrices are multiplied by them, and what
stands before, a norm or the rows of up, is divided. All are powers of two, so that nothing is rounded by it.

Who reads a norm, and that down reads a product with up, is found out from the model itself: by the functions that it
calls with tensors without values. That a norm's outputs follow its weights is tried.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dtmsearch.core.fusion import input_readers
from dtmsearch.core.schemes import Scheme
from dtmsearch.export.job import Job, refuse
from dtmsearch.model.compress.number_rounding import NumberCodes
from dtmsearch.model.compress.rounding import Codes
from dtmsearch.model.modules.tensor_names import tensor_of
from dtmsearch.model.modules.usage import run_without_values

_TRIED_TOKENS = 19


@dataclass(frozen=True)
class Folds:
    """What a folder's tensors are multiplied by, by their names there: `columns` [cols] of matrices that stay
    unquantized, `rows` [rows] of those whose outputs are scaled, and of norms and biases; `components` [rows] of the
    plan's own, by name."""

    columns: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    components: Mapping[str, Tensor] = field(default_factory=dict)

    def applied(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as the folder holds it."""
        if name in self.columns:
            tensor = tensor * self.columns[name].to(tensor)
        if name in self.rows:
            factors = self.rows[name].to(tensor)
            tensor = tensor * (factors if tensor.ndim == 1 else factors.unsqueeze(1))
        return tensor

    def applied_to_codes(self, component: str, codes: Codes | NumberCodes) -> Codes | NumberCodes:
        """The codes of a component whose outputs are scaled: its rows' scales are."""
        factors = self.components.get(component)
        if factors is None:
            return codes
        return replace(codes, scales=codes.scales * factors.to(codes.scales).unsqueeze(1))


def folds_of(job: Job, format_name: str) -> Folds:
    """The folds of a plan; none where it scales no columns. Raises `UserError` with the components that stand in the
    way of one."""
    scaled = {name: scheme for name, scheme in job.plan.parsed.items() if scheme.scaled}
    readers = input_readers(job.manifest.components)
    groups = {readers[name]: scheme for name, scheme in scaled.items() if name in readers}
    if not groups:
        return Folds()
    trace = _traced(job, format_name)
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    for group, scheme in groups.items():
        scales = job.compressor.column_scales(group[0], scheme)
        if scales is None or bool((scales == 1).all()):
            continue
        scales = scales.cpu()
        scaling, matrices = _place(job, trace, group, format_name)
        for module in matrices:
            other = job.plan.scheme(module)
            if other.is_unquantized:
                columns[tensor_of(f"{module}.weight", job.shapes)] = scales
            elif other != scheme:
                what = f"{module}: {other.name} reads what {group[0]}: {scheme.name} has scaled"
                why = "what reads the same has one scheme that scales columns, or stays unquantized (search: fused)"
                raise refuse(format_name, why, [what])
            elif module not in group:  # attention and MLP behind one norm
                what = f"{module} reads what {group[0]} does, and each of them scales it its own way ({scheme.name})"
                raise refuse(format_name, f"{scaling} has room for one scale of each output", [what])
        before[scaling] = 1 / scales
        held = {tensor_of(f"{scaling}.{leaf}", job.shapes) for leaf in ("weight", "bias")} & job.shapes.keys()
        rows |= dict.fromkeys(held, 1 / scales)
    return Folds(columns, rows, before)


def _place(job: Job, trace: _Calls, group: tuple[str, ...], format_name: str) -> tuple[str, list[str]]:
    """The module whose outputs are scaled for a group of components, and the matrices that read them."""
    leader = group[0]
    found = trace.inputs.get(leader)
    if found is None:
        raise refuse(format_name, "its scales have no place", [f"{leader}: the model calls it in no way that is known"])
    matrices = trace.only_multiplied(found)
    if matrices is None or not set(group) <= set(matrices):
        raise refuse(
            *(format_name, "its scales have no place"),
            [f"{leader}: what it reads is used by more than linear layers"],
        )
    norm = trace.norms.get(found)
    if norm is not None:
        _try_norm(job, norm, format_name, leader)
        return norm, matrices
    up = trace.factor(found)
    if up is None or job.manifest.by_name.get(up) is None:
        raise refuse(format_name, "its scales have no place", [f"{leader}: it reads neither a norm nor a product"])
    other = job.plan.scheme(up)
    if not other.is_unquantized and not _has_row_scales(other):
        why = "the rows of what stands before it have no scales of their own, which they could be divided in"
        raise refuse(format_name, why, [f"{leader}: behind {up}: {other.name}"])
    return up, matrices


def _has_row_scales(scheme: Scheme) -> bool:
    """Whether each row's scales are its own, floats or powers of two: of a tensor, of blocks, and beside the scale of a
    tensor they are not."""
    if scheme.weights is not None:
        return scheme.weights.grain in ("channel", "group") and scheme.weights.scale == "float"
    return scheme.kind.on_grid and scheme.granularity in ("channel", "group")


@dataclass
class _Calls(TorchFunctionMode):
    """Which functions a pass has called on which tensors. Holds these, so that no two have one identity."""

    names: Mapping[int, str]
    inputs: dict[str, int] = field(default_factory=dict)
    norms: dict[int, str] = field(default_factory=dict)
    _outputs: dict[int, str] = field(default_factory=dict)
    _products: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _uses: dict[int, list[str]] = field(default_factory=dict)
    _held: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [value for value in _flat((args, kwargs or {})) if isinstance(value, Tensor)]
        if not any(isinstance(value, Tensor) for value in _flat(made)):
            return made  # its shape, its dtype: nothing is computed
        self._held += [*given, made]
        if func is nn.functional.linear and id(args[1]) in self.names:
            matrix = self.names[id(args[1])]
            self.inputs.setdefault(matrix, id(args[0]))
            self._uses.setdefault(id(args[0]), []).append(matrix)
            self._outputs[id(made)] = matrix
            return made
        if any(value is made for value in given):  # of the dtype or the shape that was asked for
            return made
        for value in given:
            self._uses.setdefault(id(value), []).append("")
        if func in (torch.mul, Tensor.mul, Tensor.__mul__) and len(given) == 2:
            self._products[id(made)] = tuple(id(value) for value in given)
        return made

    def only_multiplied(self, tensor: int) -> list[str] | None:
        """The matrices that a tensor is multiplied by; None where anything else is done with it."""
        uses = self._uses.get(tensor, [])
        return None if "" in uses else list(dict.fromkeys(uses))

    def factor(self, tensor: int) -> str | None:
        """The matrix whose outputs, and nothing else of them, a product has as one of its two factors; of two such it
        is `up`."""
        factors = self._products.get(tensor, ())
        plain = [self._outputs[f] for f in factors if f in self._outputs and self._uses[f] == [""]]
        return plain[0] if len(plain) == 1 else None


def _flat(values: Any) -> Iterable[Any]:
    if isinstance(values, tuple | list):
        for value in values:
            yield from _flat(value)
    elif isinstance(values, dict):
        yield from _flat(list(values.values()))
    else:
        yield values


def _traced(job: Job, format_name: str) -> _Calls:
    """The functions that the model calls over a few tokens, without values."""
    model = job.empty
    names = {
        id(parameter): name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if name.endswith(".weight")
    }
    calls = _Calls(names)

    def noting(name: str) -> Any:
        def note(module: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                calls.norms[id(output)] = name
                calls._held.append(output)

        return note

    found = [(n, m) for n, m in model.named_modules() if _is_norm(m)]
    hooks = [module.register_forward_hook(noting(name)) for name, module in found]
    try:
        with calls:
            run_without_values(model, torch.zeros(1, _TRIED_TOKENS, dtype=torch.long, device="meta"))
    except Exception as error:  # whatever a model's own code raises over tensors without values
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        why = f"where its scales belong cannot be found out, for the model does not run without values ({said})"
        raise refuse(format_name, why, [f"{n}: {s}" for n, s in job.plan.entries if "-" in s][:1]) from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and not any(module.children())


def _try_norm(job: Job, name: str, format_name: str, leader: str) -> None:
    """Raises `UserError` for a norm whose outputs are not in proportion to its weights."""
    norm = copy.deepcopy(job.empty.get_submodule(name)).to_empty(device="cpu")
    drawn = torch.Generator().manual_seed(0)
    size = norm.weight.shape[0]
    factors = torch.exp2(torch.randint(-4, 4, (size,), generator=drawn).float())
    own = {n: torch.randn(p.shape, generator=drawn) for n, p in norm.named_parameters()}
    values = torch.randn(2, size, generator=drawn)
    plain = torch.func.functional_call(norm, own, (values,))
    scaled = torch.func.functional_call(norm, {n: value * factors for n, value in own.items()}, (values,))
    if not torch.equal(plain * factors, scaled):
        why = f"its scales have no place: the outputs of {name} ({type(norm).__name__}) do not follow its weights"
        raise refuse(format_name, why, [leader])
