"""A plan by another tool's allocator, in an environment that has that tool: benchmarks/peers.py starts it.

    python benchmarks/peers_allocate.py modelopt|modelopt-groups|auto-round MODEL TEXT --widths 3,4,6,8 --bits 4 --out F

Writes {"plan": {component: scheme}, "seconds": ..., "version": ...}. Budgets count code bits, for scales take as much
in every scheme. Scores and solver are the tool's own, in groups of 128, symmetric; nothing is quantized.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 128


def by_modelopt(
    model: Any, rows: torch.Tensor, widths: list[int], bits: float, groups: bool
) -> tuple[dict[str, int], str]:
    """`auto_quantize` with its gradient score; q, k, v and others in one format, as it would, or each matrix alone."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import algorithms

    formats: list[Any] = [
        {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {
                    "quantizer_name": "*weight_quantizer",
                    "cfg": {"num_bits": width, "block_sizes": {-1: GROUP}},
                    "enable": True,
                },
            ],
            "algorithm": "max",
        }
        for width in widths
    ]
    if not groups:
        algorithms.AutoQuantizeGradientSearcher.quant_grouping_rules = []
    constraints = {"effective_bits": bits, "cost": {"excluded_module_name_patterns": ["*lm_head*"]}}
    mtq.auto_quantize(
        model, constraints=constraints, quantization_formats=formats, data_loader=list(rows.split(4)),
        forward_step=lambda m, batch: m(input_ids=batch, labels=batch), loss_func=lambda output, batch: output.loss,
        disabled_layers=["*lm_head*"], num_calib_steps=1, num_score_steps=len(rows) // 4,
    )  # fmt: skip
    found: dict[str, int] = {}
    names = [name for name, module in model.named_modules() if hasattr(module, "weight_quantizer")]
    for name in names:
        quantizer = model.get_submodule(name).weight_quantizer
        if quantizer.is_enabled and "lm_head" not in name:
            found[name] = int(quantizer.num_bits)
    return found, importlib.metadata.version("nvidia-modelopt")


def by_auto_round(
    model: Any, tokenizer: Any, text: Path, widths: list[int], bits: float, scratch: Path
) -> tuple[dict[str, int], str]:
    """`AutoScheme`'s scores and choice, from 16 rows of 256 tokens."""
    from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
    from auto_round.schemes import QuantizationScheme

    data = scratch.with_suffix(".jsonl")
    words = text.read_text(encoding="utf-8")
    pieces = [words[at : at + 4_000] for at in range(0, min(len(words), 400_000), 4_000)]
    data.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    options = [QuantizationScheme(bits=w, group_size=GROUP, sym=True, act_bits=16) for w in widths]
    scheme = AutoScheme(
        avg_bits=bits, options=options, nsamples=16, seqlen=256, batch_size=8, ignore_scale_zp_bits=True,
        enable_torch_compile=False, device_map=str(model.device), low_gpu_mem_usage=False, low_cpu_mem_usage=False,
    )  # fmt: skip
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    for name, module in model.named_modules():
        module.global_name = name
    found = GenScheme(scheme, model, names, {}, str(data), str(model.device), tokenizer, False).get_layer_config()
    return {name: int(own["bits"]) for name, own in found.items() if name in names}, importlib.metadata.version(
        "auto-round"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["modelopt", "modelopt-groups", "auto-round"])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--widths", required=True)
    parser.add_argument("--bits", type=float, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200, help="of a row")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    widths = [int(width) for width in given.widths.split(",")]
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval().to(device)
    tokens = tokenizer(given.text.read_text(encoding="utf-8")[:2_000_000], return_tensors="pt").input_ids[0]
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(tokens) - given.tokens, (given.rows,), generator=generator)
    rows = torch.stack([tokens[at : at + given.tokens] for at in starts.tolist()]).to(device)
    started_at = time.perf_counter()
    if given.peer == "auto-round":
        found, version = by_auto_round(model, tokenizer, given.text, widths, given.bits, given.out)
    else:
        found, version = by_modelopt(model, rows, widths, given.bits, given.peer == "modelopt-groups")
    seconds = time.perf_counter() - started_at
    plan = {name: f"int{bits}-g{GROUP}" for name, bits in found.items()}
    given.out.write_text(json.dumps({"plan": plan, "seconds": seconds, "version": version}))


if __name__ == "__main__":
    main()
