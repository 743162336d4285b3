"""Products with compressed matrices as they are served: PyTorch's own kernels and bitsandbytes' modules, for timing.

A search measures rounded weights in the model's dtype, whose products take as long as unrounded ones; what a scheme
saves shows only in a kernel that reads its codes. Values are random: products of zeros draw less power, and run faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dtmsearch.core.schemes import Scheme, parse_scheme
from dtmsearch.model.compress.bitsandbytes_layers import compressed_module
from dtmsearch.model.modules.compat import int4_product, int8_product

Product = Callable[[Tensor], object]
# Groups of inputs that PyTorch's kernel for 4 bits takes.
_INT4_GROUPS = (32, 64, 128, 256)


def served(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Product | None:
    """The product of inputs [1, tokens, inputs] with a matrix [outputs, inputs] under a scheme; None where no kernel
    here runs it. What is pruned is multiplied with like the rest."""
    if scheme.is_dropped:
        return lambda inputs: None
    if scheme.quantizer:
        scheme = parse_scheme(scheme.quantizer)
    outputs, inputs = shape
    if scheme.is_unquantized or scheme.kind.only_prunes:
        return partial(nn.functional.linear, weight=torch.randn(shape, dtype=dtype, device=device))
    if scheme.kind.as_module:
        with torch.device("meta"):
            linear = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
        return compressed_module(linear, torch.randn(shape, dtype=dtype, device=device), scheme)
    if not scheme.kind.on_grid or dtype != torch.bfloat16:
        return None
    if scheme.bits == 8 and scheme.granularity in ("channel", "tensor") and not scheme.asymmetric:
        return int8_product(shape, device)
    if scheme.bits == 4 and scheme.group_size in _INT4_GROUPS and inputs % scheme.group_size == 0:
        return int4_product(shape, scheme.group_size, device)
    return None
