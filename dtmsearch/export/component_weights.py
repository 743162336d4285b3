"""What a plan makes of one component's weights, for exporters: a dense matrix, or the codes of it."""

from __future__ import annotations

from torch import Tensor, nn

from dtmsearch.core.components import Component
from dtmsearch.core.schemes import Scheme
from dtmsearch.errors import UserError
from dtmsearch.export.job import Job
from dtmsearch.model.compress.number_rounding import NumberCodes
from dtmsearch.model.compress.packing import packed_codes
from dtmsearch.model.compress.rounding import Codes, round_codes


def component_codes(job: Job, component: Component, weight: Tensor) -> Codes | NumberCodes:
    """The codes, scales and zero points of a component under a rounding or GPTQ scheme, or one that says how it rounds
    weights. Raises `UserError` for a matrix that has not been solved for."""
    scheme = job.plan.scheme(component.name)
    if scheme.weights is not None:
        return job.compressor.number_codes(component.name, weight, scheme)
    if scheme.solved is None:
        scales = job.compressor.column_scales(component.name, scheme)
        scaled = weight if scales is None else weight * scales.to(weight)
        return round_codes(scaled, scheme, job.scale_dtype)
    packed = job.compressor.solved(component.name, scheme)
    if packed is None:
        raise UserError(f"{component.name} has not been solved for {scheme.name}: the store does not hold it")
    return packed_codes(packed, weight.device)


def component_dense(job: Job, component: Component, weight: Tensor, other: Scheme | None = None) -> Tensor:
    """The component's weights under its scheme, or another, in their own dtype and shape."""
    scheme = other or job.plan.scheme(component.name)
    matrix = weight if weight.ndim == 2 else weight.unsqueeze(0)
    if not scheme.kind.as_module:
        return job.compressor.compress(component.name, matrix, scheme).reshape(weight.shape)
    from dtmsearch.model.compress.bitsandbytes_layers import compressed_module, restored_weight

    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    return restored_weight(compressed_module(linear, matrix, scheme)).to(weight.dtype).reshape(weight.shape)
