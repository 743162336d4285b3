"""What is left of a pruned model, fitted to the base model's hidden states by least squares: no gradients, no steps.

A block that is left ends in a matrix that adds to the hidden states. Where the blocks behind it are gone, this matrix
is fitted anew, from below, over what the pruned model itself reads of some text: the hidden states after it are to be
nearest to the base model's behind what is gone. So it makes up for that, and for what went astray before. ReplaceMe
(arXiv 2505.02819) fits a linear map in the place of a run of layers, and puts it into the MLP before them; ZipLM and
SparseGPT fit what stays of a matrix to that matrix's own outputs.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtmsearch.core.components import Component, blocks_of
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.core.widths import side_of
from dtmsearch.errors import UserError
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.modules.blocks import as_returned, returned_kind, state_of
from dtmsearch.model.modules.discovery import components_of
from dtmsearch.model.modules.loading import load_model
from dtmsearch.model.modules.matrices import read, write
from dtmsearch.model.weights.trained import overlay

log = logging.getLogger(__name__)

# Added to the diagonal of a Hessian, as parts of its mean; taken is the one by which each half of the rows serves the
# other best.
_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# How far what a layer adds may be from its blocks' outputs, over its norm, for it to do nothing but add them.
_MOST_OTHERWISE = 1e-2
# Tokens that are read at once.
_BATCH_TOKENS = 8_192


@dataclass(frozen=True)
class _Block:
    """A block of a model: whether all of it is gone, or anything `pruned`; the matrix that it ends in, and which of
    its weights [outputs, inputs] may be fitted, None where none may."""

    place: Component
    gone: bool
    pruned: bool
    last: str | None
    open: Tensor | None


@dataclass
class Sums:
    """Over rows of text, X being what a matrix reads and R what its output lacks: X'X [cols, cols], X'R [cols, rows of
    the matrix] and the sum of R's squares."""

    hessian: Tensor | float = 0.0
    moment: Tensor | float = 0.0
    squares: float = 0.0

    def add(self, read: Tensor, lacks: Tensor) -> None:
        self.hessian = self.hessian + (read.T @ read).double()
        self.moment = self.moment + (read.T @ lacks).double()
        self.squares += float(lacks.double().square().sum())

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.hessian + other.hessian, self.moment + other.moment, self.squares + other.squares)

    def left_by(self, change: Tensor) -> float:
        """The sum of squares that is left with `change` [cols, rows of the matrix] in the matrix."""
        assert isinstance(self.hessian, Tensor)
        return self.squares + float((change * (self.hessian @ change - 2.0 * self.moment)).sum())

    def solved(self, columns: Tensor, damping: float) -> Tensor:
        """The change (H + d)^-1 M of some columns, zero in the others."""
        assert isinstance(self.hessian, Tensor) and isinstance(self.moment, Tensor)
        inner = self.hessian[columns][:, columns]
        inner.diagonal().add_(damping * inner.diagonal().mean().clamp_(min=torch.finfo(torch.float64).tiny))
        found = torch.zeros_like(self.moment)
        found[columns] = torch.cholesky_solve(self.moment[columns], torch.linalg.cholesky(inner))
        return found


def fitted_change(first: Sums, second: Sums, columns: Tensor) -> tuple[Tensor | None, float]:
    """The change [cols, rows of the matrix], of some columns alone, that is fitted to both halves of the rows, with the
    damping that serves each half best where the change is fitted to the other; None where none serves it. With the
    share of R's squares that is left so."""

    def crossed(damping: float) -> float:
        return second.left_by(first.solved(columns, damping)) + first.left_by(second.solved(columns, damping))

    left, damping = min((crossed(damping), damping) for damping in _DAMPINGS)
    before = first.squares + second.squares
    if not left < before:
        return None, 1.0
    return (first + second).solved(columns, damping), left / before


@dataclass
class _Noted:
    """What was seen as a layer ran: its input and output, what matrices read, what blocks gave."""

    entered: Tensor | None = None
    left: Tensor | None = None
    read: dict[str, Tensor] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)

    def after(self, blocks: Collection[str], scale: float) -> Tensor:
        """The hidden states with what some blocks add to them."""
        assert self.entered is not None
        return self.entered + scale * sum(self.given[name] for name in blocks)


class _Reader:
    """A model that some text goes through layer by layer; its states before the layer `at`."""

    def __init__(self, body: Body, batches: Sequence[Tensor]) -> None:
        self._body, self._batches = body, batches
        self._states: list[Tensor | None] = [None] * len(batches)
        self.at = 0

    def advance(self, layer: int) -> None:
        """Have the text come to a layer, as the model is by now."""
        while self.at < layer:
            self._states = [noted.left for noted in self.through((), ())]
            self.at += 1

    def through(self, blocks: Collection[str], matrices: Collection[str], silent: str = "") -> Iterator[_Noted]:
        """What is seen as each batch goes through the present layer, in which one block may give zeros."""
        model, name = self._body.model, f"{self._body.layers_name}.{self.at}"
        for tokens, state in zip(self._batches, self._states, strict=True):
            noted = _Noted()
            with _noting(model, name, blocks, matrices, silent, noted):
                noted.left = self._body.through(state, self.at, self.at + 1, partial(self._body.run, tokens))
            yield noted


@contextmanager
def _noting(
    model: nn.Module, layer: str, blocks: Collection[str], matrices: Collection[str], silent: str, noted: _Noted
) -> Iterator[None]:
    def entered(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        noted.entered = args[0] if args else named["hidden_states"]

    def given(name: str) -> Any:
        return lambda _, args, output: noted.given.update({name: state_of(output)})

    def read_by(name: str) -> Any:
        return lambda _, args: noted.read.update({name: args[0]})

    def silenced(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return as_returned(torch.zeros_like(state_of(output)), returned_kind(output))

    hooks = [model.get_submodule(layer).register_forward_pre_hook(entered, with_kwargs=True)]
    hooks += [model.get_submodule(name).register_forward_hook(given(name)) for name in blocks]
    hooks += [model.get_submodule(name).register_forward_pre_hook(read_by(name)) for name in matrices]
    hooks += [model.get_submodule(silent).register_forward_hook(silenced)] if silent else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def repaired(
    spec: ModelSpec, source: Path, over: Sequence[Path], kept: Mapping[str, Tensor], rows: Tensor
) -> dict[str, Tensor]:
    """The parameters, by name, that a repair changes of a checkpoint in `source` with the weights of the files `over`
    put over it in turn; see `Repair`."""
    wide = replace(spec, dtype="float32")
    base, model = (load_model(source, wide, rows.device).eval() for _ in range(2))
    for path in over:
        overlay(model, path)
    found = {name: value.cpu().contiguous() for name, value in Repair(model, base, rows, kept).run().items()}
    del base, model
    gc.collect()  # what reads models layer by layer refers to itself, and a training needs the memory
    if rows.is_cuda:
        torch.cuda.empty_cache()
    return found


class Repair:
    """Fits a pruned `model`, in place, to the `base` model over `rows` [rows, tokens] of text; both of 32 bits and on
    one device. `kept` are masks of weights that are kept, by the names of their parameters."""

    def __init__(self, model: nn.Module, base: nn.Module, rows: Tensor, kept: Mapping[str, Tensor]) -> None:
        with torch.inference_mode():
            own, wanted = Body(model), Body(base)
        if said := own.how_it_runs() or wanted.how_it_runs():
            raise UserError(f"recovery.repair_tokens: {said}; leave repair_tokens at 0")
        at_once = max(1, min(_BATCH_TOKENS // rows.shape[1], len(rows) // 2))
        batches = rows.split(at_once)
        if len(batches) < 2:
            raise UserError("recovery.repair_tokens: the text must have two rows at least, one to test the other's fit")
        self._model, self._base = model, base
        self._own, self._wanted = _Reader(own, batches), _Reader(wanted, batches)
        held = _blocks(model, base, kept)
        self._scales, self._blocks = self._found(_Reader(wanted, batches[:1]), held, own.num_layers)

    @torch.inference_mode()
    def _found(self, reader: _Reader, held: Mapping[str, _Block], num_layers: int) -> tuple[list[float], list[_Block]]:
        """By what a layer multiplies its blocks' outputs before it adds them, and the blocks in the order in which they
        are added. Raises `UserError` for a model whose layers do more than that."""
        scales, order = list[float](), list[_Block]()
        for layer in range(num_layers):
            reader.advance(layer)
            own = {name: block for name, block in held.items() if block.place.layer == layer}
            lasts = [block.last for block in own.values() if block.last is not None]
            noted = next(iter(reader.through(own, lasts)))
            assert noted.entered is not None and noted.left is not None
            added = (noted.left - noted.entered).double()
            given = torch.stack([*noted.given.values(), torch.zeros_like(added)]).double().sum(0)
            scale = float((added * given).sum() / given.square().sum().clamp_(min=1e-30))
            if float((added - scale * given).norm()) > _MOST_OTHERWISE * float(added.norm()):
                raise UserError(
                    f"recovery.repair_tokens: layer {layer} of {type(self._model).__name__} does more than add what "
                    f"its blocks give ({', '.join(noted.given) or 'it has none'}), so what one lacks cannot be fitted; "
                    "leave repair_tokens at 0"
                )
            scales.append(scale)
            blocks = [self._checked(own[name], noted) for name in noted.given]
            if self._side_by_side(reader, noted):
                # They read the same and are added in any order: what is left makes up for what is gone beside it.
                blocks.sort(key=lambda block: block.gone)
            order += blocks
        return scales, order

    def _side_by_side(self, reader: _Reader, noted: _Noted) -> bool:
        """Whether a layer's other blocks give what they gave where its first one gives zeros."""
        first, *others = noted.given or [""]
        if not others:
            return False
        without = next(iter(reader.through(others, (), first)))
        return all(torch.equal(without.given[name], noted.given[name]) for name in others)

    def _checked(self, block: _Block, noted: _Noted) -> _Block:
        """A block; of one that does something to what its last matrix gives this matrix may not be fitted."""
        if block.last is None or block.last not in noted.read:
            return replace(block, last=None, open=None)
        made = self._base.get_submodule(block.last)(noted.read[block.last])
        given = noted.given[block.place.name]
        same = made.shape == given.shape and float((made - given).norm()) <= _MOST_OTHERWISE * float(given.norm())
        return block if same else replace(block, last=None, open=None)

    @torch.inference_mode()
    def run(self) -> dict[str, Tensor]:
        """Fit the blocks behind which some are gone, and those that are themselves pruned; the parameters that changed,
        by name; none where there are no such blocks, or none of them may be fitted.

        The others stay as they are: fitted as well, they come nearer to the base model's states on the text, yet the
        model's continuations go further from the base's on two of three models (docs/structured.md)."""
        changed: dict[str, Tensor] = {}
        for at, block in enumerate(self._blocks):
            end = at
            while end + 1 < len(self._blocks) and self._blocks[end + 1].gone:
                end += 1
            if block.last is None or not (end > at or block.pruned):
                continue
            change = self._change(at, end)
            if change is not None:
                module = self._model.get_submodule(block.last)
                assert block.open is not None
                now = read(module)
                write(module, now + change.T.to(now) * block.open.to(now.device))
                changed[f"{block.last}.weight"] = module.weight.data  # type: ignore[assignment]
        if not changed:
            log.warning(
                "nothing is fitted: no block stands before one that is dropped, or is cut, and ends in a matrix of "
                "which whole columns are left and that a fit serves"
            )
        return changed

    def _change(self, at: int, end: int) -> Tensor | None:
        """The change [cols, rows] of the matrix that a block ends in, fitted to the states after another, if any."""
        block, layer = self._blocks[at], self._blocks[at].place.layer
        assert block.last is not None and block.open is not None
        self._own.advance(layer)
        self._wanted.advance(self._blocks[end].place.layer)
        before, until = self._until(at - 1, layer), self._until(end, self._blocks[end].place.layer)
        halves = Sums(), Sums()
        wanted = self._wanted.through(until, ())
        own = self._own.through([*before, block.place.name], [block.last])
        for number, (want, have) in enumerate(zip(wanted, own, strict=True)):
            scale = self._scales[layer]
            goal = want.after(until, self._scales[self._blocks[end].place.layer])
            lacks = (goal - have.after(before, scale)) / scale - have.given[block.place.name]
            halves[number % 2].add(have.read[block.last].flatten(0, -2), lacks.flatten(0, -2))
        columns = block.open.any(0).nonzero().squeeze(1).to(lacks.device)
        change, left = fitted_change(*halves, columns)
        log.info("%s: fitted, %.2f of the squares are left", block.last, left)
        return change

    def _until(self, at: int, layer: int) -> list[str]:
        """The blocks of a layer up to a place among all."""
        return [block.place.name for block in self._blocks[: at + 1] if block.place.layer == layer]


def _blocks(model: nn.Module, base: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, _Block]:
    """The attention and MLP blocks of a model, by name."""
    components = components_of(model)
    found = {}
    for place in blocks_of(components):
        if place.kind == "layer":
            continue
        inside = [c for c in components if c.block == place.name]
        masks = {c.name: mask for c in inside if (mask := kept.get(f"{c.name}.weight")) is not None}
        gone = len(masks) == len(inside) and not any(bool(mask.any()) for mask in masks.values())
        pruned = any(not bool(mask.all()) for mask in masks.values())
        last = inside[-1]
        fits = not gone and not any(c.stacked or c.mixture for c in inside) and side_of(last) == "cols"
        weights = _open(last, read(base.get_submodule(last.name)), masks.get(last.name)) if fits else None
        found[place.name] = _Block(place, gone, pruned, None if weights is None else last.name, weights)
    return found


def _open(last: Component, own: Tensor, mask: Tensor | None) -> Tensor | None:
    """The weights of a matrix that may be fitted: those of the columns that stay, where what is gone are whole columns,
    but for weights that are zero in the base model's `own`. None where it is pruned weight by weight."""
    if mask is None:
        return torch.ones(last.shape, dtype=torch.bool)
    mask = mask.t() if last.transposed else mask
    there = mask.any(0)
    pruned = ~mask & (own.to(mask.device) != 0)
    return None if bool(pruned[:, there].any()) else mask
