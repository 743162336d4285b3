"""AutoRound (arXiv 2309.05516) by its own library: rounding and ranges of all matrices of a layer are tuned together,
by signs of the gradients of what the layer's outputs lose over calibration text, layer by layer upwards.

The library runs in a process of its own, on the model's own folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dtmsearch.core import autoround_library
from dtmsearch.core.schemes import Scheme
from dtmsearch.errors import UserError
from dtmsearch.model.compress.rounding import Codes

# As many as its authors tune by (section 4.1).
_ITERATIONS = 200
_SCRIPT = Path(__file__).with_name("autoround_process.py")


def tuned(
    folder: str, layers: Sequence[str], scheme: Scheme, tokens: Tensor, dtype: torch.dtype, device: torch.device,
    trust_remote_code: bool,
) -> dict[str, Codes]:  # fmt: skip
    """The codes of linear layers of the model in a folder under a scheme, by the text `tokens` [rows, length]. Scales
    have 16 bits: the model's own where `dtype` has as many, else float16.

    Raises `LibraryMissing` without the library, and `UserError` with its last words where it fails or leaves a layer.
    """
    program = autoround_library.python()
    scale_dtype = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16
    with tempfile.TemporaryDirectory(prefix="dtmsearch-autoround-") as scratch:
        request, given, out = (Path(scratch) / name for name in ("request.json", "tokens.st", "out.st"))
        save_file({"tokens": tokens.cpu().long().contiguous()}, given)
        asked = {
            "model": str(Path(folder).absolute()) if Path(folder).is_dir() else folder,
            "layers": list(layers),
            "tokens": str(given),
            "out": str(out),
            "bits": scheme.bits,
            "group": scheme.group_size,
            "symmetric": not scheme.asymmetric,
            "dtype": str(dtype).removeprefix("torch."),
            "scale_dtype": str(scale_dtype).removeprefix("torch."),
            "iterations": _ITERATIONS,
            "device": str(device),
            "trust_remote_code": trust_remote_code,
        }
        request.write_text(json.dumps(asked), encoding="utf-8")
        _run(program, request, scratch)
        found = load_file(out) if out.is_file() else {}
    left = [name for name in layers if f"{name}.codes" not in found]
    if left:
        raise UserError(f"AutoRound has left {left[0]} and {len(left) - 1} others as they are: give them other schemes")
    return {name: _codes_of(found, name, scheme, scale_dtype) for name in layers}


def _run(program: str, request: Path, scratch: str) -> None:
    environment = {k: v for k, v in os.environ.items() if program == sys.executable or k != "PYTHONPATH"}
    command = [program, str(_SCRIPT), str(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=scratch)  # noqa: S603
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"AutoRound failed: {(lines or ['it said nothing'])[-1][:300]}")


def _codes_of(found: dict[str, Tensor], name: str, scheme: Scheme, scale_dtype: torch.dtype) -> Codes:
    codes = found[f"{name}.codes"]
    block = scheme.group_size or codes.shape[1]
    return Codes(codes, found[f"{name}.scales"], found.get(f"{name}.zeros"), block, scheme.bits, scale_dtype)
