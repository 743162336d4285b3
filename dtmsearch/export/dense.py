"""`dense`: an ordinary checkpoint whose weights are what the plan makes of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dtmsearch.export.folder import ShardWriter, copy_other_files
from dtmsearch.export.job import Job, Written, refuse
from dtmsearch.model.compress.rounding import round_weight
from dtmsearch.plans.schemes import Scheme, parse_scheme

# They round activations too, which no weights can tell.
_ROUNDS_ACTIVATIONS = ("w8a8", "llm-int8")


def write_dense(job: Job, folder: Path) -> Written:
    """Raises `ValueError` for schemes that are more than weights."""
    more = [f"{name}: {scheme}" for name, scheme in job.plan.entries if scheme in _ROUNDS_ACTIVATIONS]
    if more:
        raise refuse("dense", "these schemes round activations as well; `bitsandbytes` holds them", more)
    writer = ShardWriter(folder, job)
    compressed_bytes = plan_bytes = 0
    for name, tensor in job.tensors():
        component = job.component(name)
        if component is not None:
            scheme = parse_scheme(job.plan.scheme_of(component.name))
            tensor = dense_weight(tensor, scheme, job.scale_dtype)
            compressed_bytes += tensor.numel() * tensor.element_size()
        writer.add(name, tensor)
    files = writer.close()
    copy_other_files(job, folder)
    plan_bytes = job.plan_bytes
    extra = writer.tensor_bytes - plan_bytes
    return Written(files, writer.tensor_bytes, {"compressed components written dense": extra} if extra else {})


def dense_weight(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
    """What a scheme makes of a component's weights, in their own dtype."""
    matrix = weight if weight.ndim == 2 else weight.unsqueeze(0)
    if scheme.family == "rounding":
        return round_weight(matrix, scheme, scale_dtype).reshape(weight.shape)
    from dtmsearch.model.compress.bitsandbytes import compressed_module, restored_weight

    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    return restored_weight(compressed_module(linear, matrix, scheme)).to(weight.dtype)
