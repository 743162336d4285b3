"""AutoRound itself, in a process of its own: `python autoround_process.py REQUEST.json`. Its environment need not have
this package; so nothing of it is imported here.

The request names a model's folder, the tokens to calibrate by, the linear layers that are tuned and how; into `out` go
codes, scales and zero points of each. What AutoRound changes of a process, seeds, logs and transformers, stays here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def tuned(request: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What becomes of the layers that the request names."""
    dtype, trusts = getattr(torch, request["dtype"]), bool(request["trust_remote_code"])
    folder, bits, symmetric = request["model"], int(request["bits"]), bool(request["symmetric"])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trusts)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts)
    names = set(request["layers"])
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    rows = load_file(request["tokens"])["tokens"]
    rounder: Any = AutoRound(
        model,
        tokenizer,
        bits=bits,
        group_size=int(request["group"]) or -1,
        sym=symmetric,
        scale_dtype={"float16": "fp16", "bfloat16": "bf16"}[request["scale_dtype"]],
        layer_config={name: {"bits": 16} for name in linear if name not in names},
        dataset=[row[None] for row in rows],
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=min(8, len(rows)),
        iters=int(request["iterations"]),
        seed=0,
        device_map=request["device"],
    )
    rounded, _ = rounder.quantize()
    found: dict[str, torch.Tensor] = {}
    for name, module in rounded.named_modules():
        if name in names and isinstance(getattr(module, "scale", None), torch.Tensor):
            found |= _codes(name, module, bits, symmetric)
    return found


def _codes(name: str, module: Any, bits: int, symmetric: bool) -> dict[str, torch.Tensor]:
    """Codes [rows, cols], int8 around zero or uint8 from zero, of weights that are numbers of the grid."""
    weight = module.weight.detach().float().cpu()
    rows, cols = weight.shape
    scales = module.scale.reshape(rows, -1).float().cpu()
    block = -(-cols // scales.shape[1]) if scales.shape[1] == 1 else int(module.group_size)
    spread = scales.repeat_interleave(block, 1)[:, :cols]
    around = torch.where(spread == 0, 0.0, weight / spread).round_()
    if symmetric:
        half = 2 ** (bits - 1)
        return {f"{name}.codes": around.clamp_(-half, half - 1).to(torch.int8), f"{name}.scales": scales}
    zeros = torch.as_tensor(module.zp).float().cpu().reshape(rows, -1).expand_as(scales)
    codes = (around + zeros.repeat_interleave(block, 1)[:, :cols]).clamp_(0, 2**bits - 1)
    zero = zeros.round().to(torch.uint8).contiguous()
    return {f"{name}.codes": codes.to(torch.uint8), f"{name}.scales": scales, f"{name}.zeros": zero}


def main(path: str) -> None:
    """Carry out the request in a file."""
    asked = json.loads(Path(path).read_text(encoding="utf-8"))
    save_file(tuned(asked), asked["out"])


if __name__ == "__main__":
    main(sys.argv[1])
