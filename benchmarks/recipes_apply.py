"""A recipe carried out by the library that it is for, in an environment that has it: benchmarks/recipes.py starts it.

    python benchmarks/recipes_apply.py llm-compressor|model-optimizer|auto-round|mlx-lm MODEL RECIPE FOUND

Writes {"version": ..., "layers": {module: [bits, group]}} of what the library has quantized; a group is 0 where a whole
row shares a scale.
"""

from __future__ import annotations

import importlib.metadata
import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

Layers = dict[str, list[int]]


def llm_compressor(model: str, recipe: Path) -> Layers:
    from llmcompressor import oneshot

    with tempfile.TemporaryDirectory() as folder:
        compressed: Any = oneshot(model=model, recipe=str(recipe), output_dir=folder)
        config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    assert compressed is not None
    groups = config["config_groups"].values()
    return {
        name: [group["weights"]["num_bits"], max(group["weights"]["group_size"] or 0, 0)]
        for group in groups
        for name in group["targets"]
    }


def model_optimizer(model: str, recipe: Path) -> Layers:
    import modelopt.torch.quantization as mtq
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    config = runpy.run_path(str(recipe))["QUANT_CONFIG"]
    tokens = torch.arange(32)[None]
    mtq.quantize(loaded, config, forward_loop=lambda m: m(input_ids=tokens))
    found: Layers = {}
    for name, module in loaded.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            found[name] = [int(quantizer.num_bits), int((quantizer.block_sizes or {}).get(-1, 0))]
    return found


def auto_round(model: str, recipe: Path) -> Layers:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    layers = json.loads(recipe.read_text())
    rounder = AutoRound(loaded, tokenizer, iters=0, layer_config=layers, device_map="cpu", disable_opt_rtn=True)
    rounded, _ = rounder.quantize()
    found: Layers = {}
    for name, module in rounded.named_modules():
        bits = getattr(module, "bits", 16)
        if name in layers and bits < 16:
            found[name] = [int(bits), max(int(module.group_size), 0)]
    return found


def mlx_lm(model: str, recipe: Path) -> Layers:
    from mlx_lm import convert

    predicate = runpy.run_path(str(recipe))["quant_predicate"]
    with tempfile.TemporaryDirectory() as folder:
        convert(model, mlx_path=f"{folder}/out", quantize=True, quant_predicate=predicate)
        config = json.loads((Path(folder) / "out" / "config.json").read_text())["quantization"]
    own = {name: settings for name, settings in config.items() if isinstance(settings, dict)}
    return {name: [settings["bits"], settings["group_size"]] for name, settings in own.items()}


TOOLS = {
    "llm-compressor": (llm_compressor, "llmcompressor"),
    "model-optimizer": (model_optimizer, "nvidia-modelopt"),
    "auto-round": (auto_round, "auto-round"),
    "mlx-lm": (mlx_lm, "mlx-lm"),
}


def main() -> None:
    tool, model, recipe, out = sys.argv[1:]
    apply, package = TOOLS[tool]
    layers = apply(model, Path(recipe))
    Path(out).write_text(json.dumps({"version": importlib.metadata.version(package), "layers": layers}))


if __name__ == "__main__":
    main()
