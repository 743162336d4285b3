"""Recipes: a plan in the words of other quantizers, for them to carry out. `llm-compressor`, `model-optimizer`,
`auto-round` and `mlx-lm` each get the file that they read, which names a width and a group for every component.

The rounding is theirs then, not the search's: a plan says how many bits a matrix gets, they choose the codes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pprint import pformat
from typing import Any

from dtmsearch.core.schemes import Scheme
from dtmsearch.export.job import Job, Written, refuse
from dtmsearch.model.compress.quantization_arguments import inputs_arguments, weights_arguments

# Why a quantizer cannot carry out a scheme; None where it can.
Obstacle = Callable[[Scheme], str | None]

_MLX_BITS, _MLX_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
_THEIRS = "Rounding and calibration are {tool}'s own: nothing was quantized here, and FDT is to be measured afterwards."
LLM_COMPRESSOR = "llm-compressor"


@dataclass(frozen=True)
class Recipe:
    """Another quantizer's file: its `name`, its `text` for a job, how a person applies it, and what it cannot do."""

    tool: str
    file: str
    text: Callable[[Job], str]
    use: str
    obstacle: Obstacle

    def write(self, job: Job, folder: Path) -> Written:
        """Put the recipe into a folder. Raises `UserError` for a plan with schemes that the quantizer does not have,
        for trained weights, and for components that are no linear layers of their own."""
        if job.trained is not None:
            why = "the plan is over weights that were trained; export it as `dense` and give the recipe for that folder"
            raise refuse(self.tool, why, [f"trained weights {job.weights_id}"])
        reasons = {name: self._obstacle(job, name, scheme) for name, scheme in job.plan.parsed.items()}
        offending = [f"{name}: {job.plan.scheme_of(name)}: {why}" for name, why in reasons.items() if why]
        if offending:
            raise refuse(self.tool, "its recipes do not go so far", offending)
        path = folder / self.file
        path.write_text(self.text(job), encoding="utf-8")
        notes = [self.use.format(model=job.manifest.model, file=self.file), _THEIRS.format(tool=self.tool)]
        solved = [scheme for scheme in job.plan.parsed.values() if scheme.solved]
        if self.tool == "auto-round":
            solved = [scheme for scheme in solved if not scheme.is_tuned]
        if solved and self.tool != LLM_COMPRESSOR:
            named = solved[0].name.partition("-")[0]
            notes.append(f"Components under `{named}-...` get their width and group; {self.tool} solves its own way.")
        return Written((path,), notes=notes)

    def _obstacle(self, job: Job, name: str, scheme: Scheme) -> str | None:
        if scheme.scaled:
            return f"it scales columns, which a recipe has no numbers for; {scheme.scaled} has the same bits"
        if not (scheme.kind.on_grid or (scheme.kind.rounds_by_number and self.tool == LLM_COMPRESSOR)):
            return "it is no rounding that its files have a name for"
        component = job.manifest.by_name[name]
        if component.stacked or component.transposed:
            return "it is no linear layer of its own"
        if scheme.granularity == "group" and component.shape[1] % scheme.group_size:
            return f"its rows of {component.shape[1]} weights are no multiple of {scheme.group_size}"
        return self.obstacle(scheme)


def _by_scheme(job: Job) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, scheme in job.plan.entries:
        found.setdefault(scheme, []).append(name)
    return found


def llm_compressor_text(job: Job) -> str:
    """`recipe.yaml`: a modifier that rounds, one that solves by GPTQ, one that has AutoRound tune, or several, with a
    group of modules a scheme."""
    import yaml

    modifiers: dict[str, Any] = {}
    for name, components in _by_scheme(job).items():
        scheme = job.plan.scheme(components[0])
        kind = "QuantizationModifier" if scheme.solved is None else "GPTQModifier"
        kind = "AutoRoundModifier" if scheme.is_tuned else kind
        groups = modifiers.setdefault(kind, {"config_groups": {}})["config_groups"]
        groups[name] = {"targets": components, "weights": weights_arguments(scheme)}
        if (inputs := inputs_arguments(scheme)) is not None:
            groups[name]["input_activations"] = inputs
    for modifier in modifiers.values():
        modifier["ignore"] = list(job.unquantized)
    return yaml.safe_dump({"compression_stage": {"compression_modifiers": modifiers}}, sort_keys=False, width=120)


def model_optimizer_text(job: Job) -> str:
    """`quant_config.py`: `QUANT_CONFIG` for `mtq.quantize`. All quantizers are off but those of the plan's weights."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, scheme in job.plan.parsed.items():
        settings: dict[str, Any] = {"num_bits": scheme.bits}
        if scheme.granularity == "group":
            settings["block_sizes"] = {-1: scheme.group_size}
        else:
            settings["axis"] = 0 if scheme.granularity == "channel" else None
        entries.append({"quantizer_name": f"*{name}.weight_quantizer", "cfg": settings, "enable": True})
    config = {"quant_cfg": entries, "algorithm": "max"}
    return f'"""A dtmsearch plan for NVIDIA Model-Optimizer."""\n\nQUANT_CONFIG = {pformat(config, sort_dicts=False)}\n'


def auto_round_text(job: Job) -> str:
    """`layer_config.json`: bits, group and symmetry of every linear layer, 16 bits where the plan leaves it."""
    layers: dict[str, dict[str, Any]] = {}
    for name in (*job.plan.schemes, *job.unquantized):
        scheme = job.plan.scheme(name)
        layers[name] = {"bits": 16} if scheme.is_unquantized else {"bits": scheme.bits, "data_type": "int"}
        if not scheme.is_unquantized:
            layers[name] |= {"group_size": scheme.group_size or -1, "sym": not scheme.asymmetric, "act_bits": 16}
    return json.dumps(layers, indent=1) + "\n"


def mlx_lm_text(job: Job) -> str:
    """`mlx_predicate.py`: `quant_predicate` for `mlx_lm.convert`, False for what stays as it is."""
    layers = {name: {"bits": scheme.bits, "group_size": scheme.group_size} for name, scheme in job.plan.parsed.items()}
    return (
        '"""A dtmsearch plan for mlx-lm."""\n\n'
        f"LAYERS = {pformat(layers)}\n\n\n"
        "def quant_predicate(path, module, *further):\n"
        "    return LAYERS.get(path, False)\n"
    )


def _of_model_optimizer(scheme: Scheme) -> str | None:
    return "it rounds weights around zero; give the scheme without -asym" if scheme.asymmetric else None


def _of_auto_round(scheme: Scheme) -> str | None:
    return "it has no scale for a whole matrix; channel or groups" if scheme.granularity == "tensor" else None


def _of_mlx(scheme: Scheme) -> str | None:
    if scheme.bits not in _MLX_BITS or scheme.group_size not in _MLX_GROUPS:
        return f"it has {_listed(_MLX_BITS)} bits in groups of {_listed(_MLX_GROUPS)}"
    return None if scheme.asymmetric else "it stores a zero point with each scale; give the scheme with -asym"


def _listed(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


RECIPES: Mapping[str, Recipe] = {
    recipe.tool: recipe
    for recipe in (
        Recipe(
            LLM_COMPRESSOR,
            "recipe.yaml",
            llm_compressor_text,
            "Apply it with llm-compressor: `oneshot(model={model!r}, recipe={file!r}, output_dir=...)`, and with "
            "`dataset=...` where it says GPTQ, AutoRound or fixed scales of inputs. vLLM loads what it writes.",
            lambda _: None,
        ),
        Recipe(
            "model-optimizer",
            "quant_config.py",
            model_optimizer_text,
            "Apply it with Model-Optimizer: `from quant_config import QUANT_CONFIG`, then "
            "`mtq.quantize(model, QUANT_CONFIG, forward_loop=...)` and `export_hf_checkpoint`.",
            _of_model_optimizer,
        ),
        Recipe(
            "auto-round",
            "layer_config.json",
            auto_round_text,
            "Apply it with AutoRound: `AutoRound({model!r}, layer_config=json.load(open({file!r})))`, then "
            "`quantize_and_save(...)`.",
            _of_auto_round,
        ),
        Recipe(
            "mlx-lm",
            "mlx_predicate.py",
            mlx_lm_text,
            "Apply it with mlx-lm: `from mlx_predicate import quant_predicate`, then "
            "`mlx_lm.convert({model!r}, mlx_path=..., quantize=True, quant_predicate=quant_predicate)`.",
            _of_mlx,
        ),
    )
}
