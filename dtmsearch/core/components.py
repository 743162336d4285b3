"""Components and the manifest of a model: names, shapes, layers, kinds, and an identity by content.

Which modules of a model's tree are components is decided in `dtmsearch.model.modules.discovery`; what a checkpoint's
files say is read in `dtmsearch.core.checkpoint_files`.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cached_property
from typing import Literal

from dtmsearch.core.checkpoint_files import DTYPE_BITS
from dtmsearch.core.widths import Width, is_cuttable, no_experts, width_of
from dtmsearch.errors import UserError

# Kinds of what a layer keeps of every token: the keys and the values of its attention.
CACHE_KINDS = ("cached_keys", "cached_values")
# Kinds of what can be taken out of a model whole: a layer's attention, its MLP, and the layer.
BlockKind = Literal["attention", "mlp", "layer"]
BLOCK_KINDS: tuple[BlockKind, ...] = ("attention", "mlp", "layer")
# What modules that stand in a layer are called, by the kind of block that they are.
_BLOCK_NAMES: tuple[tuple[str, BlockKind], ...] = (
    *((part, "attention") for part in ("attn", "attention")),
    *((part, "mlp") for part in ("mlp", "ffn", "feed_forward", "feedforward", "moe", "experts")),
)
# What of a mixture's experts must share a scheme: all that stand in a layer, or nothing.
Experts = Literal["layer", "expert"]
_ALL = Fraction(1)


@dataclass(frozen=True)
class Component:
    """One weight matrix of the model.

    `name` is the path of its module, `layer` the index of its layer (-1 before the layers, the number of layers
    after them), `kind` its role inside the layer (`q`, `down`, ...), `shape` its rows (outputs) and columns (inputs).
    `transposed`: the model keeps it as columns by rows. `stacked`: it lies with others, of other experts, in one
    parameter of the model. Of an expert's matrix `mixture` is the path of the module that chooses among the experts,
    `num_experts` how many there are, and `experts_per_token` how many of them a token is given to; else "", 0 and 0.
    `apart`: though `stacked` in the model, it is a tensor of its own in the files, or two above each other.
    `source_bits` are those that it takes in a base model that comes quantized, 0 where it is not quantized there.
    """

    name: str
    layer: int
    kind: str
    shape: tuple[int, int]
    transposed: bool = False
    stacked: bool = False
    mixture: str = ""
    num_experts: int = 0
    experts_per_token: int = 0
    source_bits: int = 0
    apart: bool = False

    @property
    def is_cache(self) -> bool:
        """Whether it is no weights but what a layer keeps of every token: a row a token and head, of `model.kv_cache`'s
        tokens."""
        return self.kind in CACHE_KINDS

    @property
    def is_block(self) -> bool:
        """Whether it is no matrix but all that lies in a module: a row with as many columns as its matrices have
        weights. One that holds experts says of which mixture."""
        return self.kind in BLOCK_KINDS

    @cached_property
    def layer_name(self) -> str:
        """The path of the layer that it lies in; empty outside the layers."""
        parts = self.name.split(".")
        return ".".join(parts[: parts.index(str(self.layer)) + 1]) if str(self.layer) in parts else ""

    @cached_property
    def block(self) -> str:
        """The path of the module of its layer that it lies in; its own where that is no other."""
        inside = self.name[len(self.layer_name) + 1 :].partition(".")[0]
        return f"{self.layer_name}.{inside}" if self.layer_name and inside else self.name

    @property
    def num_weights(self) -> int:
        """Rows times columns."""
        return self.shape[0] * self.shape[1]

    @property
    def expert(self) -> int:
        """The number of the expert that it belongs to; -1 where it belongs to none."""
        parts = self.name[len(self.mixture) + 1 :].split(".") if self.mixture else []
        return next((int(part) for part in parts if part.isdigit()), -1)

    @property
    def read_share(self) -> Fraction:
        """The share of tokens that read it: of an expert's matrix that of the experts which a token is given to."""
        return Fraction(self.experts_per_token, self.num_experts) if self.mixture else _ALL


# In the place of a hash of content: what is measured of a model object is not stored, and no file need have its weights
IN_MEMORY = "in-memory"


@dataclass(frozen=True)
class ModelManifest:
    """What a model consists of, without its weights.

    `components` are the matrices inside the layers, in model order; `others` the embeddings, norms, routers and the
    head, which a search includes only by name. `routers` names the linear layers that choose among experts, or weigh
    one, which published checkpoints and engines keep unquantized. `dtype` is that of the checkpoint's weights. `id`
    follows the content of the weights' files and the configuration, not the folder. `source` describes the format of a
    base model that comes quantized; `dtype` is then that which it is unquantized to. `kv_cache`: the tokens, and the
    texts of so many, whose KV caches are among `others`; None where none are.
    """

    model: str
    revision: str | None
    dtype: str
    num_layers: int
    content_hash: str
    components: tuple[Component, ...]
    others: tuple[Component, ...] = field(default=())
    routers: tuple[str, ...] = field(default=())
    source: str = ""
    kv_cache: tuple[int, int] | None = None

    @property
    def id(self) -> str:
        """Identity by content: weights, configuration and components, not the path."""
        return self.content_hash

    @property
    def dense_bits(self) -> int:
        """Bits of one uncompressed weight in the checkpoint."""
        return DTYPE_BITS[self.dtype]

    @cached_property
    def by_name(self) -> dict[str, Component]:
        """Components by their names, blocks and layers among them."""
        return {c.name: c for c in (*self.blocks, *self.components, *self.others)}

    @cached_property
    def blocks(self) -> tuple[Component, ...]:
        """What can be taken out whole, in model order: the attention and the MLP of each layer, where they are modules
        of their own, and each layer."""
        return blocks_of(self.components)

    def in_plans(self, named: Container[str]) -> tuple[Component, ...]:
        """The matrices inside the layers, and what else a plan names: embeddings, the head."""
        return (*self.components, *(other for other in self.others if other.name in named))

    def droppable(
        self, kinds: Collection[BlockKind], components: Iterable[Component], exclude: tuple[str, ...] = ()
    ) -> tuple[Component, ...]:
        """The blocks of some kinds all of whose matrices are among the components, without those that match an
        `exclude` pattern: what is not searched stays.

        Raises `UserError` for a kind of which there is none.
        """
        components = tuple(components)
        searched = {component.name for component in components}
        held = {name for component in components for name in (component.block, component.layer_name)}
        asked = [b for b in self.blocks if b.kind in kinds and b.name in held and not _matches(b, exclude)]
        stays: dict[str, str] = {}
        for component in self.components:
            if component.name not in searched:
                for name in (component.block, component.layer_name):
                    stays.setdefault(name, component.name)
        found = [block for block in asked if block.name not in stays]
        for kind in kinds:
            if not any(block.kind == kind for block in found):
                partly = next((block.name for block in asked if block.kind == kind), None)
                if partly is not None:
                    raise UserError(
                        f"search.drop: no {kind} of {self.model} is searched whole: {partly} cannot be dropped without "
                        f"{stays[partly]}, which is not searched. Search all that lies in it (search.components), or "
                        f"leave {kind} out of search.drop"
                    )
                inside = sorted({c.block.rpartition(".")[2] for c in self.components if c.block != c.name})
                raise UserError(
                    f"search.drop: no {kind} of {self.model} can be dropped; modules of their own in its layers, with "
                    f"matrices that are searched, are {', '.join(inside) or 'none'}. Give [layer]"
                )
        return tuple(found)

    def cuttable(
        self, cuts: Iterable[str], components: Iterable[Component], exclude: tuple[str, ...] = ()
    ) -> tuple[Component, ...]:
        """The blocks that one of some widths (`channels-0.25-wanda`) is for, all of whose matrices are among the
        components, without those that match an `exclude` pattern.

        Raises `UserError` for a width of which there is no such block.
        """
        searched = {component.name for component in components}
        found: dict[str, Component] = {}
        for name in cuts:
            width = width_of(name)
            assert width is not None, "the search file knows widths"
            kind = [b for b in self.blocks if b.kind == width.block_kind and not _matches(b, exclude)]
            own = [block for block in kind if self._is_cuttable(width, block, searched)]
            if not own:
                if width.takes_experts:
                    raise UserError(f"search.cut: {name} {self._why_no_experts(width, kind, searched)}")
                inside = sorted({c.kind for c in self.components if kind and c.block == kind[0].name})
                raise UserError(
                    f"search.cut: {name} cuts nothing of any {width.block_kind} of {self.model} that is searched "
                    f"whole: its matrices are {', '.join(inside) or 'none'}. Channels are cut of an MLP whose last "
                    "matrix reads all that the others give (of many in steps of 32), heads of an attention of q, k, v "
                    "and o with as many key heads as the name says; both must be searched (search.components)"
                )
            found |= {block.name: block for block in own}
        return tuple(block for block in self.blocks if block.name in found)

    def _is_cuttable(self, width: Width, block: Component, searched: Container[str]) -> bool:
        inside = [c for c in self.components if c.block == block.name]
        if width.takes_experts:
            return not self._no_experts_of(width, block, inside, searched)
        plain = all(c.name in searched and not c.mixture and not c.stacked for c in inside)
        return plain and is_cuttable(width, inside) and width.left(width.units(inside[-1])) < width.units(inside[-1])

    def _no_experts_of(
        self, width: Width, block: Component, inside: Sequence[Component], searched: Container[str]
    ) -> str:
        """Why no experts can be taken of a block; empty where they can."""
        why = no_experts(width, inside)
        if why:
            return why
        if missing := [c.name for c in inside if c.name not in searched]:
            return f"{missing[0]} is not searched"
        if not f"{block.mixture}.".startswith(f"{block.name}."):
            return f"its router stands beside it, in {block.mixture}"
        routers = [name for name in self.routers if name in searched and name.startswith(f"{block.name}.")]
        return f"its router {routers[0]} is searched, of which rows go" if routers else ""

    def _why_no_experts(self, width: Width, blocks: Sequence[Component], searched: Container[str]) -> str:
        """Why a width takes experts of none of a model's MLPs."""
        mixed = [block for block in blocks if block.mixture]
        if not mixed:
            return f"takes experts, and no MLP of {self.model} that is searched is a mixture of them"
        inside = [c for c in self.components if c.block == mixed[0].name]
        return f"takes no experts of {mixed[0].name}: {self._no_experts_of(width, mixed[0], inside, searched)}"

    def select(self, include: tuple[str, ...], exclude: tuple[str, ...] = ()) -> tuple[Component, ...]:
        """Components whose name or kind matches an `include` pattern and no `exclude` pattern (shell patterns).

        Embeddings, norms, routers and the head are chosen only by a pattern that names them: one whose text holds their
        own last name, so never by `*`. Raises `UserError` for an include pattern that matches nothing.
        """
        chosen = [c for c in self.components if _matches(c, include)]
        chosen += [c for c in self.others if any(c.name.rpartition(".")[2] in p and _matches(c, (p,)) for p in include)]
        for pattern in include:
            if not any(_matches(c, (pattern,)) for c in chosen):
                kinds = ", ".join(sorted({c.kind for c in self.components}))
                raise UserError(
                    f"components.include: {pattern!r} matches none of the {len(self.components)} components of "
                    f"{self.model}; patterns match names such as {self.components[0].name!r} or kinds ({kinds})"
                )
        kept = tuple(c for c in chosen if not _matches(c, exclude))
        if not kept:
            raise UserError(f"components.exclude {list(exclude)} leaves no component of {self.model}")
        return kept


def _block_kind(name: str) -> BlockKind | None:
    """What a module that stands in a layer is by its name."""
    return next((kind for part, kind in _BLOCK_NAMES if part in name.rpartition(".")[2].lower()), None)


def kind_of_block(component: Component) -> str:
    """Whether the block that a matrix lies in is an attention or an MLP; empty where it lies in none of its own."""
    return _block_kind(component.block) or "" if component.block != component.name else ""


def is_block_name(name: str) -> bool:
    """Whether a path is named as those of blocks and layers are: it ends with the layer's number, or with what stands
    in it and is called an attention or an MLP."""
    before, _, last = name.rpartition(".")
    return last.isdigit() or (before.rpartition(".")[2].isdigit() and _block_kind(name) is not None)


def blocks_of(components: Iterable[Component]) -> tuple[Component, ...]:
    """The blocks and layers that some matrices lie in, in model order, each layer after its blocks."""
    found: dict[str, Component] = {}
    layers: dict[int, list[Component]] = {}
    for component in components:
        if component.layer_name:
            layers.setdefault(component.layer, []).append(component)
    for layer, inside in layers.items():
        blocks: dict[str, int] = {}
        mixed: dict[str, Component] = {}
        for component in inside:
            if component.block != component.name:
                blocks[component.block] = blocks.get(component.block, 0) + component.num_weights
                if component.mixture:
                    mixed.setdefault(component.block, component)
        for name, weights in blocks.items():
            kind = _block_kind(name)
            if kind is not None:
                found[name] = Component(name, layer, kind, (1, weights))
                if (expert := mixed.get(name)) is not None:
                    mixture = expert.mixture, expert.num_experts, expert.experts_per_token
                    found[name] = Component(name, layer, kind, (1, weights), False, False, *mixture)
        name = inside[0].layer_name
        found[name] = Component(name, layer, "layer", (1, sum(c.num_weights for c in inside)))
    return tuple(found.values())


def _matches(component: Component, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(component.name, p) or fnmatchcase(component.kind, p) for p in patterns)
