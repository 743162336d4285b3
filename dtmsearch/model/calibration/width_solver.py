"""Decides which units of blocks stay under widths, and fits what stays, by the active calibration.

A layer's blocks are taken together, and layers upwards, so that the text goes once through the model. Everything is of
the base model's inputs and of the weights that the model stands on; what is at hand is not made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtmsearch.core.calibration import PackedMatrix
from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.schemes import Scheme
from dtmsearch.core.widths import Width, side_of
from dtmsearch.errors import UserError
from dtmsearch.model.calibration.calibration_texts import CalibrationTexts
from dtmsearch.model.calibration.expert_scores import Routed, chosen_experts, needs_text, routed_by, scores
from dtmsearch.model.calibration.hessians import Hessians
from dtmsearch.model.calibration.matrix_solver import MatrixSolver
from dtmsearch.model.compress.width import chosen, first_by_inverse, indices, packed_cut, refitted, summed
from dtmsearch.model.modules.cut_blocks import why_not_cut
from dtmsearch.model.modules.fewer_experts import parts_of, why_not_fewer
from dtmsearch.model.weights.standing import Standing

# Tokens on which cut blocks are tried.
_PROOF_TOKENS = 16


class WidthSolver:
    """See the module. Pairs are (block, scheme of a width)."""

    def __init__(
        self,
        texts: CalibrationTexts,
        solver: MatrixSolver,
        hessians: Hessians,
        standing: Standing,
        manifest: ModelManifest,
    ) -> None:
        self._texts, self._solver, self._hessians = texts, solver, hessians
        self._standing, self._manifest = standing, manifest
        self._saliences: dict[str, Tensor] = {}
        self._orders: dict[str, Tensor] = {}
        self._routed: dict[str, Routed] = {}
        self._of: tuple[str | None, str] = None, ""
        self._proven = set[tuple[type, str, int]]()

    def solve(self, pairs: Iterable[tuple[str, Scheme]]) -> list[PackedMatrix]:
        """What stays of blocks under widths, packed, in order of the pairs; it is at hand from then on."""
        compressor = self._standing.weights.compressor
        self._solver.choose_fetch()
        if self._of != (now := (self._texts.active, self._standing.weights_id)):
            self._saliences, self._orders, self._routed, self._of = {}, {}, {}, now
        wanted = {(block, scheme.name): scheme for block, scheme in pairs}
        held = ((pair, compressor.solved(pair[0], scheme)) for pair, scheme in wanted.items())
        found = {pair: packed for pair, packed in held if packed is not None}
        missing = {pair: scheme for pair, scheme in wanted.items() if pair not in found}
        for (block, _), scheme in missing.items():
            self._prove(self._manifest.by_name[block], scheme)
        by_layer: dict[int, list[tuple[str, Scheme]]] = {}
        for (block, _), scheme in missing.items():
            by_layer.setdefault(self._manifest.by_name[block].layer, []).append((block, scheme))
        for layer in sorted(by_layer):
            for block, scheme in sorted(by_layer[layer], key=lambda pair: (pair[0], pair[1].name)):
                packed = self._packed(self._manifest.by_name[block], scheme)
                found[block, scheme.name] = packed
        # At the end: what stands on trained weights forgets all at every look at the base.
        for packed in found.values():
            compressor.keep(packed)
        compressor.trim(wanted.keys())
        return [found[pair] for pair in wanted]

    def _prove(self, block: Component, scheme: Scheme) -> None:
        """Raises `UserError` for a block whose code does not compute, once it is cut, what it does where the last
        matrix has zeros for what goes: it may take heads apart by a number of its own, or have something further of
        each unit. Each kind of block is tried once in a process, on a few tokens, in at least 32 bits."""
        width, body = scheme.width, self._standing.body
        module = body.model.get_submodule(block.name)
        assert width is not None
        kind = type(module), width.kind, width.groups
        if kind in self._proven or body.how_it_runs():
            return
        inside = [c for c in self._manifest.components if c.block == block.name]
        with self._standing.on_base(), self._standing.eagerly(), torch.no_grad():
            tokens = self._texts.gatherer(self._texts.in_use).batches[0][:1, :_PROOF_TOKENS]
            args, kwargs = _arguments_of(body.model, module, tokens)
            self._standing.weights.need(block.name)
            if width.takes_experts:
                left = width.left(block.num_experts)
                problem = why_not_fewer(module, parts_of(body.model, block, inside), left, args, kwargs)
            else:
                problem = why_not_cut(module, block.name, inside, width, args, kwargs)
        if problem:
            raise UserError(
                f"{block.name} cannot be cut by {scheme.name}: {problem}. Leave such widths out (search.cut)"
            )
        self._proven.add(kind)

    def _packed(self, block: Component, scheme: Scheme) -> PackedMatrix:
        width = scheme.width
        assert width is not None
        inside = [c for c in self._manifest.components if c.block == block.name]
        if width.takes_experts:
            return self._fewer(block, scheme, [c for c in inside if c.mixture])
        last = inside[-1]
        hessian: Tensor | None = None
        if width.repair:
            hessian = self._hessian(last)
        salience = self._salience(inside, width) if width.rule == "gradient" else None
        weights = self._standing.weights
        own = {c.name: (c, weights.original(c.name)) for c in inside}
        whole, units = own[last.name][1], width.units(last)
        order = None
        if width.rule == "ziplm":
            key = f"{block.name} {units}"
            if key not in self._orders:
                hessian = self._hessian(last) if hessian is None else hessian
                self._orders[key] = first_by_inverse(whole, hessian, units)
            order = self._orders[key]
        squares = None
        if width.rule == "wanda":
            squares = weights.compressor.mean_squares(last.name).to(whole.device)
        kept = chosen(block.name, width, own, squares, salience, order)
        repaired, at = None, indices(last, kept, units)
        gone = torch.ones(whole.shape[1], dtype=torch.bool, device=whole.device)
        gone[at] = False
        if width.repair and bool(whole[:, gone].any()):  # not where training has held it at zero
            assert hessian is not None
            # As the checkpoint holds it, so that what is measured can be written.
            dtype: torch.dtype = getattr(torch, self._manifest.dtype)
            repaired = refitted(whole, hessian, at).to(dtype)
        return packed_cut(block.name, scheme.name, at, last.shape, repaired)

    def _fewer(self, block: Component, scheme: Scheme, experts: Sequence[Component]) -> PackedMatrix:
        """The experts that stay of a block's mixture."""
        width, weights = scheme.width, self._standing.weights
        assert width is not None
        if needs_text(width) and block.name not in self._routed:

            def said(why: str) -> str:
                return f"{block.name} cannot be cut by {scheme.name}: {why}. Take the rule magnitude or random"

            with self._standing.on_base(), self._standing.eagerly():
                gatherer = self._texts.gatherer(self._texts.in_use)
                self._routed[block.name] = routed_by(gatherer, weights, block, experts, said)
        worth = scores(width, block, experts, weights, self._routed.get(block.name))
        return packed_cut(block.name, scheme.name, chosen_experts(width, worth), (1, block.num_experts), None)

    def _hessian(self, last: Component) -> Tensor:
        for found in self._hessians.of_layer(last.layer):
            if last.name in found.components:
                return found.hessian
        raise UserError(
            f"{last.name} cannot be calibrated: no token of the calibration text reached it as a module of its own"
        )

    def _salience(self, inside: Sequence[Component], width: Width) -> Tensor:
        """Sums [units] of |weight x gradient| over all weights of each unit, of the loss of the calibration text's next
        tokens (LLM-Pruner, arXiv 2305.11627, section 3.2: its first-order importance of elements)."""
        if inside[0].name not in self._saliences:
            with self._standing.on_base(), self._standing.eagerly():
                self._saliences |= self._every_salience()
        units = width.units(inside[-1])
        return torch.stack([summed(self._saliences[c.name], c, units) for c in inside]).sum(0)

    def _every_salience(self) -> Mapping[str, Tensor]:
        """The same sums of each component over its outputs or, of a block's last matrix, its inputs."""
        body = self._standing.body
        said = body.how_it_runs()
        if self._standing.weights.pass_through:
            said = "its weights pass through the GPU layer by layer"
        if said:
            raise UserError(
                f"the rule gradient takes a backward pass through the model, and {said}: use ziplm or wanda"
            )
        weights = self._standing.weights
        with torch.inference_mode(False), torch.enable_grad():
            weights.let_gradients_through()
            found: dict[str, Tensor] = {}
            held = {c.name: c for c in self._manifest.components if not (c.stacked or c.mixture)}
            parameters: dict[str, Any] = {name: weights.module(name).weight for name in held}
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            try:
                for batch in self._texts.gatherer(self._texts.in_use).batches:
                    tokens = batch.clone()  # no backward pass is taken through what came to be in inference mode
                    body.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
                for name, parameter in parameters.items():
                    if parameter.grad is None:  # no token reached it
                        continue
                    values = (parameter.detach() * parameter.grad).abs().double()
                    along = 1 if (side_of(held[name]) == "rows") != held[name].transposed else 0
                    found[name] = values.sum(along)
            finally:
                for parameter in parameters.values():
                    parameter.requires_grad_(False)
                    parameter.grad = None
        return found


def _arguments_of(model: Any, module: nn.Module, tokens: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a module is called with as the model reads some tokens."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        hook.remove()
    return found[0]
