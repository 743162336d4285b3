"""The base model as transformers loads it, for plans over what its files hold in another form: every matrix is put
under its scheme in memory, and named as in the files again by transformers' own conversion, in the other direction.

Needs the memory of the whole model, where other exports hold a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dtmsearch.core.checkpoint_files import read_header, weight_files
from dtmsearch.errors import UserError
from dtmsearch.export.component_weights import component_dense
from dtmsearch.export.job import Job
from dtmsearch.model.modules.compat import is_ignored, names_in_files, tied_parameters
from dtmsearch.model.modules.loading import model_as_loaded
from dtmsearch.model.modules.matrices import read, sliced_matrices, write
from dtmsearch.model.modules.slots import Places


def load(job: Job) -> Any:
    """The base model, in the job's dtype. Raises `UserError` for trained weights, which lie in files alone."""
    if job.trained is not None:
        raise UserError(
            f"the trained weights {job.weights_id} cannot be put into the files of {job.manifest.model}: transformers "
            "puts these tensors together when it loads them"
        )
    return model_as_loaded(job.folder, job.dtype, job.trust_remote_code)


@torch.no_grad()
def put_under_plan(job: Job, model: Any) -> None:
    """Give a model's components the weights that the plan makes of them."""
    places = Places(model, {})
    for name in job.plan.schemes:
        module = places.get(name)
        weight = read(module).to(job.device)
        write(module, component_dense(job, job.manifest.by_name[name], weight).to("cpu"))


def own_tensors(model: Any) -> dict[str, Tensor]:
    """A model's tensors by its own names, without those that are others'."""
    tied = tied_parameters(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def left_in_files(job: Job, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that the model's class leaves out, such as layers that predict further tokens: they are kept."""
    for path in weight_files(job.folder):
        for name in read_header(path):
            if is_ignored(model, name):
                with safe_open(path, framework="pt") as file:
                    yield name, file.get_tensor(name)


def dense_tensors(job: Job) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the model under the plan, as its files name them."""
    model = load(job)
    put_under_plan(job, model)
    yield from names_in_files(model, own_tensors(model)).items()
    yield from left_in_files(job, model)


def merges_experts(job: Job) -> bool:
    """Whether the files hold apart what the model has in one parameter: experts, each by itself."""
    places = {matrix.slice.parameter for matrix in sliced_matrices(job.empty).values() if matrix.slice is not None}
    return bool(places - job.shapes.keys())


def unmerged_tensors(job: Job) -> Iterator[tuple[str, str, Tensor]]:
    """All tensors of the model, each as (its own name, that in the files, the tensor). What the loader would put
    together of several tensors bears its own name, under which it is loaded as it is: a loader of quantized models
    would look for quantized parts."""
    model = load(job)
    for name, tensor in own_tensors(model).items():
        yield name, _name_alone(model, name, tensor), tensor
    for name, tensor in left_in_files(job, model):
        yield name, name, tensor


def unmerged_names(job: Job) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same without values: own name -> (that in the files, shape)."""
    own = own_tensors(job.empty)
    return {name: (_name_alone(job.empty, name, tensor), tuple(tensor.shape)) for name, tensor in own.items()}


def _name_alone(model: Any, name: str, tensor: Tensor) -> str:
    """What the files call a tensor, or its own name where they hold it in another form."""
    try:
        named = names_in_files(model, {name: tensor})
    except Exception:  # of one that is told from several only
        return name
    ((other, value), *more) = named.items()
    same = value.shape == tensor.shape and (tensor.is_meta or torch.equal(value, tensor))
    return other if same and not more else name
