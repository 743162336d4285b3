"""bitsandbytes' own modules in place of a dense linear layer, so that what is measured is what is served.

bitsandbytes is imported where the first of its modules is made: it takes seconds, which no other scheme needs.
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dtmsearch.core.scheme_names import BITSANDBYTES_BLOCK
from dtmsearch.core.schemes import Scheme
from dtmsearch.errors import UserError
from dtmsearch.model.modules.compat import keep_scales

# At import it reports that an optional kernel of the hub is absent; at every first call that it casts to float16,
# which is what LLM.int8() is.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

# Activation features above it stay in 16 bits; 0 is plain AbsMax of weights and activations.
OUTLIER_THRESHOLD = {"w8a8": 0.0, "llm-int8": 6.0}


def compressed_module(linear: nn.Linear, weight: Tensor, scheme: Scheme) -> nn.Module:
    """A bitsandbytes module that computes what `linear` does with `weight` [rows, cols] under `scheme`."""
    make = _int8_module if scheme.name in OUTLIER_THRESHOLD else _4bit_module
    module = make(linear, weight.detach(), scheme)
    module.bias = linear.bias
    with torch.no_grad():
        compressed: nn.Module = module.to(weight.device).eval().requires_grad_(False)
    return compressed


def _modules() -> Any:  # it ships types that say less than they should
    from bitsandbytes import nn as bitsandbytes_nn

    return bitsandbytes_nn


def _int8_module(linear: nn.Linear, weight: Tensor, scheme: Scheme) -> Any:
    modules = _modules()
    module = modules.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=OUTLIER_THRESHOLD[scheme.name],
        device="meta",
    )
    module.weight = modules.Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False)
    if not runs_by_token(module):
        run_row_by_row(module)
    return module


@cache
def _row_by_row() -> type[nn.Module]:
    """A module of LLM.int8() that sees each sequence of a batch by itself, as when it is served alone."""

    class RowByRow(_modules().Linear8bitLt):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            """[rows, tokens, inputs] -> [rows, tokens, outputs]. Raises `UserError` where rows cannot be told apart."""
            if x.ndim != 3:
                raise UserError(
                    "llm-int8 picks its outlier columns over a sequence's tokens, but this component (of an expert, "
                    "most likely) is given tokens of several sequences as one list. Take w8a8 or int8-channel for it"
                )
            own = super().forward
            rows: Tensor = torch.cat([own(row) for row in x.split(1)]) if len(x) > 1 else own(x)
            return rows

    return RowByRow


def run_row_by_row(module: nn.Module) -> None:
    """Let a module of LLM.int8() see each sequence of a batch by itself. It picks its outlier columns over all tokens
    that it sees: otherwise what a sequence comes to would follow from what else is in its batch."""
    module.__class__ = _row_by_row()


def _4bit_module(linear: nn.Linear, weight: Tensor, scheme: Scheme) -> Any:
    modules = _modules()
    module = modules.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=weight.dtype,
        quant_type=scheme.name,
        device="meta",
    )
    # What is measured is what the file holds, which is what GPUs and other CPUs multiply with (`compat.repacks_4bit`).
    keep_scales(module)
    module.weight = modules.Params4bit(
        weight.clone(),
        requires_grad=False,
        quant_type=scheme.name,
        blocksize=BITSANDBYTES_BLOCK,
        compress_statistics=False,
    )
    return module


def runs_by_token(module: nn.Module) -> bool:
    """False for LLM.int8(), which picks its outlier columns over the tokens of a sequence."""
    if "bitsandbytes" not in sys.modules:
        return True
    return not (isinstance(module, _modules().Linear8bitLt) and module.state.threshold > 0)


def restored_weight(module: nn.Module) -> Tensor:
    """The dense weights [rows, cols] that a 4-bit module of ours multiplies with."""
    from bitsandbytes import functional

    weight: Any = module.weight
    restored: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
    return restored
