"""What a checkpoint has of mixtures with fewer experts: tensors that go, that are named by another number, and that are
smaller."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dtmsearch.core.components import Component
from dtmsearch.errors import UserError
from dtmsearch.export.job import Job
from dtmsearch.model.modules.compat import names_in_files
from dtmsearch.model.modules.fewer_experts import ExpertTensor, MixtureParts, parts_of

# What families call the experts of a mixture in their configurations.
_NUMBERS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def numbers_in(text: Any, whole: int, left: int) -> dict[str, int]:
    """What a configuration says of `left` experts in each mixture, of which it has had `whole`; empty where it has no
    name for them that is known."""
    own: Mapping[str, str] = getattr(text, "attribute_map", None) or {}
    return {own.get(name, name): left for name in _NUMBERS if getattr(text, name, None) == whole}


@dataclass(frozen=True)
class SmallerMixture:
    """A mixture in `block` of which the experts `kept` stay; `parts` are those of the block, `experts` its matrices by
    kind and number."""

    block: Component
    kept: tuple[int, ...]
    parts: MixtureParts
    experts: Mapping[str, Mapping[int, Component]]

    def of(self, tensor: ExpertTensor, values: Tensor) -> Tensor:
        """What is left of a tensor with a part of each expert."""
        return tensor.of(values, torch.tensor(self.kept), self.block.num_experts)

    def shape_of(self, tensor: ExpertTensor, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is left."""
        size = shape[tensor.side] // self.block.num_experts * len(self.kept)
        return (*shape[: tensor.side], size, *shape[tensor.side + 1 :])

    def moved(self, component: Component) -> Component | None:
        """A matrix of an expert by the number that it has afterwards; None where its expert goes."""
        if component.expert not in self.kept:
            return None
        name = self.experts[component.kind][self.kept.index(component.expert)].name
        return replace(component, name=name, num_experts=len(self.kept))


def smaller_mixtures(job: Job) -> dict[str, SmallerMixture]:
    """The mixtures of which a job's plan takes experts, by their blocks. Raises `UserError` where the store does not
    hold which."""
    found: dict[str, SmallerMixture] = {}
    for name, scheme in job.plan.widths.items():
        if scheme.width is None or not scheme.width.takes_experts:
            continue
        block = job.manifest.by_name[name]
        inside = [c for c in job.manifest.components if c.block == name]
        try:
            cut = job.compressor.cut(name, scheme, block.num_experts, job.device)
        except ValueError as error:
            raise UserError(f"{error}: the store does not hold it") from error
        experts: dict[str, dict[int, Component]] = {}
        for component in inside:
            if component.mixture:
                experts.setdefault(component.kind, {})[component.expert] = component
        found[name] = SmallerMixture(block, tuple(cut.kept.tolist()), parts_of(job.empty, block, inside), experts)
    return found


class MixtureTensors:
    """The tensors of a job's files that are not as they were for what its plan takes of mixtures."""

    def __init__(self, job: Job, mixtures: Mapping[str, SmallerMixture]) -> None:
        self._job, self._mixtures = job, mixtures

    def named(self, tensor: str) -> str | None:
        """The name of a tensor afterwards; None where it goes with its expert."""
        return self._names.get(tensor, tensor)

    def of(self, tensor: str, values: Tensor) -> Tensor:
        """What is left of a tensor."""
        found = self._parts.get(tensor)
        return values if found is None else found[0].of(found[1], values)

    @cached_property
    def _parts(self) -> dict[str, tuple[SmallerMixture, ExpertTensor]]:
        found: dict[str, tuple[SmallerMixture, ExpertTensor]] = {}
        for mixture in self._mixtures.values():
            for tensor in mixture.parts.tensors:
                name = self._in_files(mixture, tensor)
                if name is not None:
                    found[name] = mixture, tensor
        return found

    def _in_files(self, mixture: SmallerMixture, tensor: ExpertTensor) -> str | None:
        """The tensor of the files that is a parameter or buffer of a mixture's block; None of a stack that lies there
        in tensors of its experts. Raises `UserError` for one that cannot be found."""
        shapes, own = self._job.shapes, f"{mixture.block.name}.{tensor.path}"
        name = self._job.tensor_of(own)
        if name in shapes:
            return name
        shape = tuple(self._job.empty.get_submodule(mixture.block.name).state_dict()[tensor.path].shape)
        if (renamed := self._renamed(own, shape, tensor.side)) is not None:
            return renamed
        owner = mixture.block.name + (f".{tensor.module}" if tensor.module else "")
        if not tensor.is_router and any(
            c.stacked and c.name.startswith(f"{owner}.") and c.name.endswith(f".{tensor.name}") and c.apart
            for own_kind in mixture.experts.values()
            for c in own_kind.values()
        ):
            return None
        raise UserError(
            f"{mixture.block.name} cannot be cut in files: they hold {own} under another name. Export --to json keeps "
            "the plan"
        )

    def _renamed(self, parameter: str, shape: tuple[int, ...], side: int) -> str | None:
        """The tensor of the files that a parameter of some shape is but for its name; None where it is put together of
        several, or lies otherwise. `side` is that of the experts."""
        sides = [4, 6, 10][: len(shape)]  # small, and even: some families put two matrices in one
        sides[side] = shape[side]
        probe = torch.arange(math.prod(sides)).view(sides)
        found = names_in_files(self._job.empty, {parameter: probe})
        (name, there), *others = found.items()
        same = not others and torch.equal(there, probe) and self._job.shapes.get(name) == shape
        return name if same else None

    @cached_property
    def _names(self) -> dict[str, str | None]:
        """Of tensors that belong to one expert, how they are named afterwards."""
        found: dict[str, str | None] = {}
        for mixture in self._mixtures.values():
            for expert, names in self._of_experts(mixture):
                place = mixture.kept.index(expert) if expert in mixture.kept else None
                for kind, tensors in names.items():
                    own = (None,) * len(tensors)
                    there = own if place is None else self._job.tensors_of(mixture.experts[kind][place].name)
                    found |= dict(zip(tensors, there, strict=True))
            self._check_all(mixture, found)
        return found

    def _of_experts(self, mixture: SmallerMixture) -> Iterator[tuple[int, dict[str, tuple[str, ...]]]]:
        """Each expert with the tensors, by kind, that are its own."""
        for expert in range(mixture.block.num_experts):
            own = {kind: self._job.tensors_of(of_kind[expert].name) for kind, of_kind in mixture.experts.items()}
            yield expert, {kind: names for kind, names in own.items() if not set(names) & self._parts.keys()}

    def _check_all(self, mixture: SmallerMixture, named: Mapping[str, str | None]) -> None:
        """Raises `UserError` for a tensor beside those of an expert's matrices, of which nothing is known."""
        beside = {name.rpartition(".")[0] for name in named}
        for name in self._job.shapes:
            if name not in named and name.rpartition(".")[0] in beside:
                raise UserError(
                    f"{mixture.block.name} cannot be cut in files: {name} lies beside an expert's matrix. Export --to "
                    "json keeps the plan"
                )
