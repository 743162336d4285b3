"""A model that learns: what of it is trained, from which weights, by which loss and optimiser, one step at a time.

accelerate spreads it over devices and processes, each of which sees its own rows. Knows nothing of where rows come
from, of how long a training lasts, or of files other than the weights that it starts from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional

from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.errors import UserError
from dtmsearch.model.modules.compat import flattens_parameters, keep_no_activations, plain_names
from dtmsearch.model.modules.discovery import find_layers
from dtmsearch.model.modules.loading import load_model
from dtmsearch.model.training.masks import Masks
from dtmsearch.model.training.recipe import Recipe
from dtmsearch.model.weights.trained import overlay

_BETAS = (0.9, 0.95)
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def accelerator_for(recipe: Recipe) -> Accelerator:
    """This process among those of a training, at the recipe's precision. Raises `UserError` where accelerate is
    configured to flatten parameters, over which masks cannot be laid."""
    wanted = recipe.precision
    if wanted == "auto":
        wanted = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    # On CPUs accelerate joins the other processes only when told that there is nothing else.
    accelerator = Accelerator(
        mixed_precision="bf16" if wanted == "bfloat16" else "no", cpu=not torch.cuda.is_available()
    )
    if flattens_parameters(accelerator):
        raise UserError(
            "masks need parameters that keep their shapes, but accelerate is configured for FSDP of version 1: set "
            "fsdp_version: 2 in its configuration, or FSDP_VERSION=2"
        )
    return accelerator


class Learner:
    """The model of a checkpoint in `source`, with the weights of the files `over` put over it in turn, and masks of
    weights that are kept, by the names of their parameters.

    Embeddings and the head stay as they are, so that distributions remain comparable with the base model's at the
    same cost.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        spec: ModelSpec,
        source: Path,
        over: Sequence[Path],
        kept: Mapping[str, Tensor],
    ) -> None:
        self._accelerator, self._recipe = accelerator, recipe
        device = accelerator.device
        model = load_model(source, replace(spec, dtype="float32"), device)
        _make_trainable(model)
        for path in over:
            overlay(model, path)
        if recipe.checkpointing:
            keep_no_activations(model)
        self._teacher = load_model(source, spec, device) if recipe.asks_base else None
        self._read = _states_read(model, kept)
        optimizer = torch.optim.AdamW(_groups(model, recipe), betas=_BETAS, fused=True)
        self._model, self._optimizer = accelerator.prepare(model, optimizer)
        # Asked for now: cut up between devices, they are others than before.
        named = plain_names(dict(accelerator.unwrap_model(self._model).named_parameters()))
        self._trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        self._masks = Masks(named, kept)

    def learn(self, step: int, parts: Sequence[Tensor]) -> Tensor:
        """Take step `step` with this process's rows of the batch, in parts; their mean loss, on the device."""
        recipe = self._recipe
        torch.manual_seed(1_000_003 * recipe.seed + step)  # dropout, where a model has any
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        total = torch.zeros((), device=self._accelerator.device)
        for number, rows in enumerate(parts):
            with self._synchronising(number == len(parts) - 1):
                loss = self._loss(rows) / len(parts)
                self._accelerator.backward(loss)
            total += loss.detach()
        if step < recipe.masked_steps:
            self._masks.hold()
        self._accelerator.clip_grad_norm_(self._trained.values(), recipe.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _synchronising(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged between processes once a batch, with its last part."""
        synchronising: AbstractContextManager[Any] = nullcontext() if last else self._accelerator.no_sync(self._model)
        return synchronising

    def _loss(self, rows: Tensor) -> Tensor:
        if self._teacher is None:
            loss: Tensor = self._model(input_ids=rows, labels=rows, use_cache=False).loss
            return loss
        hidden = self._recipe.distill_hidden > 0.0
        made = self._model(input_ids=rows, use_cache=False, output_hidden_states=hidden)
        with torch.no_grad():
            base = self._teacher(input_ids=rows, use_cache=False, output_hidden_states=hidden)
        logits = made.logits[:, :-1].flatten(0, 1).float()
        own, wanted = logits.log_softmax(dim=1), base.logits[:, :-1].flatten(0, 1).float().log_softmax(dim=1)
        on_text = functional.nll_loss(own, rows[:, 1:].flatten())
        to_base = functional.kl_div(own, wanted, reduction="batchmean", log_target=True)
        loss = (1.0 - self._recipe.distill) * on_text + self._recipe.distill * to_base
        if hidden:
            pairs = [(made.hidden_states[at], base.hidden_states[at]) for at in self._read]
            loss = loss + self._recipe.distill_hidden * torch.stack([_distance(*pair) for pair in pairs]).mean()
        return loss

    def check_masks(self, what: str) -> None:
        """Raise `UserError` where a weight is not zero that ought to be."""
        self._masks.check(what)

    def weights(self) -> dict[str, Tensor]:
        """What is trained, whole and on the CPU, in the first process; nothing in the others. All must ask."""
        model: dict[str, Any] = get_model_state_dict(self._model, options=_WHOLE)
        return {name: model[name] for name in self._trained} if self._accelerator.is_main_process else {}

    def state(self) -> dict[str, Tensor]:
        """All that a training goes on with, as `weights`: of each parameter its own and its optimiser's tensors."""
        model, optimizer = self._state()
        if not self._accelerator.is_main_process:
            return {}
        tensors = {f"model {name}": model[name] for name in self._trained}
        for name, state in optimizer["state"].items():
            tensors |= {f"{key} {name}": value for key, value in state.items()}
        return tensors

    def put_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from such a state, of which only the first process's counts."""
        model, optimizer = self._state()  # for all that a state leaves out: it follows from the recipe
        if self._accelerator.is_main_process:  # the others have no whole state; they get theirs from the first
            for key, tensor in tensors.items():
                kind, _, name = key.partition(" ")
                if kind == "model":
                    model[name] = tensor
                else:
                    optimizer["state"][name][kind] = tensor
        several = self._accelerator.num_processes > 1
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
        set_model_state_dict(self._model, model, options=options)
        set_optimizer_state_dict(self._model, self._bare_optimizer, optimizer, options=options)

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's and the optimiser's state, whole and on the CPU, from all processes."""
        return get_state_dict(self._model, self._bare_optimizer, options=_WHOLE)

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        bare: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        return bare


def _states_read(model: nn.Module, kept: Mapping[str, Tensor]) -> list[int]:
    """Which of a model's hidden states, as transformers numbers them, something reads that learns: those before layers
    of which something is left, but for the embeddings, and the last."""
    name, layers = find_layers(model)
    gone = {parameter for parameter, mask in kept.items() if not bool(mask.any())}
    found = [
        at
        for at, layer in enumerate(layers)
        if any(p.ndim > 1 and f"{name}.{at}.{own}" not in gone for own, p in layer.named_parameters())
    ]
    return [*(at for at in found if at > 0), len(layers)]


def _distance(states: Tensor, wanted: Tensor) -> Tensor:
    """How far hidden states [rows, tokens, size] are from others, squared and over these' squares: the mean over
    tokens, so that the few of which some are very large count as much as others do."""
    base = wanted.float()
    away = (states.float() - base).square().sum(-1) / base.square().sum(-1).clamp_(min=1e-12)
    return away.mean()


def _make_trainable(model: nn.Module) -> None:
    """Let all learn but the embeddings and the head."""
    fixed = {id(p) for module in _ends(model) for p in module.parameters()}
    model.train()
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()  # what is mapped from a file cannot be written
        parameter.requires_grad_(id(parameter) not in fixed)


def _ends(model: Any) -> list[nn.Module]:
    find_layers(model)  # a model without layers is no language model of ours
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group | {"lr": recipe.lr_at(0)} for group in groups if group["params"]]
