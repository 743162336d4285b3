"""What a plan makes of one component's weights, for exporters: a dense matrix, or the codes of it."""

from __future__ import annotations

from torch import Tensor, nn

from dtmsearch.export.job import Job
from dtmsearch.model.compress.pruning import Pruner
from dtmsearch.model.compress.rounding import Codes, round_codes, round_weight
from dtmsearch.plans.components import Component
from dtmsearch.plans.schemes import Scheme, parse_scheme


def component_codes(job: Job, component: Component, weight: Tensor) -> Codes:
    """The codes, scales and zero points of a component under a scheme that has them."""
    scheme = _scheme(job, component)
    return round_codes(_pruned(component, weight, scheme), scheme, job.scale_dtype)


def component_dense(job: Job, component: Component, weight: Tensor) -> Tensor:
    """The component's weights after compression, in their own dtype and shape."""
    scheme = _scheme(job, component)
    matrix = weight if weight.ndim == 2 else weight.unsqueeze(0)
    if scheme.family == "drop":
        return weight.new_zeros(weight.shape)
    if scheme.family == "bitsandbytes":
        from dtmsearch.model.compress.bitsandbytes import compressed_module, restored_weight

        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        return restored_weight(compressed_module(linear, matrix, scheme)).to(weight.dtype).reshape(weight.shape)
    matrix = _pruned(component, matrix, scheme)
    if scheme.bits:
        matrix = round_weight(matrix, scheme, job.scale_dtype)
    return matrix.reshape(weight.shape)


def _scheme(job: Job, component: Component) -> Scheme:
    scheme = parse_scheme(job.plan.scheme_of(component.name))
    if scheme.needs_calibration:
        raise ValueError(
            f"{component.name}: {scheme.name} follows from calibration text, which an export does not have"
        )
    return scheme


def _pruned(component: Component, weight: Tensor, scheme: Scheme) -> Tensor:
    return weight if scheme.pruning is None else Pruner().prune(component.name, weight, scheme.pruning)
