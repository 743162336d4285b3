"""Schemes: how a component is compressed. A scheme's name is its whole identity.

Holds what a scheme is, the families that schemes are of, and the arithmetic of stored sizes. `scheme_names` has the
grammar of names, `built_in_schemes` the families of this package; the tensors are rounded and pruned in
`dtmsearch.model.compress`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import ceil
from typing import Any, Literal, Protocol

from dtmsearch.core import plugins
from dtmsearch.core.number_formats import Rounding
from dtmsearch.core.scheme_names import ALIASES, AUTOROUND, BITSANDBYTES, SALIENCIES, nearest
from dtmsearch.core.widths import RULES, RULES_OF_EXPERTS, Block, Width, nearest_width
from dtmsearch.errors import UserError

DENSE = "dense"
DROP = "drop"
SOURCE = "source"
# Of a scale as it is stored: in a model's 16 bits.
SCALE_BITS = 16
# Between the two of a uniform plan of weights and KV caches.
WITH_CACHE = "+kv-"


@dataclass(frozen=True)
class Pruning:
    """Which weights of a matrix become zero: the least salient ones.

    `saliency` is `magnitude`, `wanda`, `sparsegpt` or `random`. Pruned is either a `share` of the weights or, where
    `pattern` is (N, M), all but N of every M consecutive inputs of a row; of a shorter last group N are kept, too.
    """

    name: str
    saliency: str
    share: float = 0.0
    pattern: tuple[int, int] | None = None

    def pruned_in_row(self, cols: int) -> int:
        """Zeros in each row of `cols` inputs, where every row has as many: under patterns, and by Wanda's saliency."""
        if self.pattern is None:
            return round(self.share * cols)
        kept, of = self.pattern
        return cols // of * (of - kept) + max(0, cols % of - kept)

    def pruned_weights(self, shape: tuple[int, int]) -> int:
        """Zeros in a matrix. Wanda prunes every row alike (arXiv 2306.11695, section 3); the others choose over the
        whole matrix."""
        rows, cols = shape
        if self.pattern is not None or self.saliency == "wanda":
            return rows * self.pruned_in_row(cols)
        return round(self.share * rows * cols)

    def mask_bits(self, shape: tuple[int, int]) -> int:
        """Bits that say where the zeros are.

        Patterns: the place of each kept weight in its group, ceil(log2 M) bits. Shares: one bit a weight or, if that
        is less, the positions of the pruned weights or of the kept ones, ceil(log2 weights) bits each.
        """
        num_weights = shape[0] * shape[1]
        pruned = self.pruned_weights(shape)
        if self.pattern is not None:
            return (num_weights - pruned) * _index_bits(self.pattern[1])
        return min(num_weights, min(pruned, num_weights - pruned) * _index_bits(num_weights))


def _index_bits(count: int) -> int:
    """Bits that tell `count` places apart."""
    return (count - 1).bit_length()


class StoredSomewhere(Block, Protocol):
    """A component, by what its size follows from."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def source_bits(self) -> int: ...

    @property
    def is_cache(self) -> bool: ...

    @property
    def is_block(self) -> bool: ...


@dataclass(frozen=True)
class Scheme:
    """A parsed scheme.

    `family` is `dense`, `rounding` (weight-only AbsMax), `gptq`, `bitsandbytes`, `pruning`, `pair` (pruned, then
    quantized), `drop`, or that of a plugin, which says itself what it stores and makes (`own`). Where there are codes,
    `bits` is their width and `granularity` what shares one scale: `tensor`, `channel` (an output row), `group`
    (`group_size` inputs of a row) or `block` (`group_size` consecutive weights of the flattened matrix); `asymmetric`
    schemes store a zero point with each scale. `quantizer` names the scheme that a pair's pruned weights are quantized
    by. `pruning` is None where nothing is pruned. `rounds_activations`: it rounds what the component reads as well.
    `weights` and `activations` say how, for schemes as engines serve them (`served_schemes`), and are None for others.
    `width` is what is left of a block's units, None where it is no width.
    `scaled` names the scheme that rounds what is left when columns have been multiplied by powers of two, which what
    the component reads is divided by; it is empty where they are not.

    It crosses process borders as its name.
    """

    name: str
    family: str
    bits: int
    granularity: str
    group_size: int = 0
    asymmetric: bool = False
    pruning: Pruning | None = None
    quantizer: str | None = None
    rounds_activations: bool = False
    weights: Rounding | None = None
    activations: Rounding | None = None
    scaled: str = ""
    own: SchemeFamily | None = field(default=None, compare=False, repr=False)
    width: Width | None = None

    def __reduce__(self) -> tuple[Callable[[str], Scheme], tuple[str]]:
        return parse_scheme, (self.name,)

    @property
    def kind(self) -> SchemeFamily:
        """Its family, which says what is common to all of its schemes."""
        return _FAMILIES[self.family]

    @property
    def version(self) -> int | str:
        """Of the arithmetic of its family, and the build of a library that it is computed by."""
        build = self.kind.build()
        return f"{self.kind.version}, {build}" if build else self.kind.version

    @property
    def scale_bits(self) -> int:
        """Bits that a scale takes where it is stored."""
        return self.kind.scale_bits

    @property
    def is_unquantized(self) -> bool:
        """Whether it leaves a component as it is."""
        return self.name == DENSE

    @property
    def is_source(self) -> bool:
        """Whether it leaves a component as it is, and stores it as the base model's own files do."""
        return self.name == SOURCE

    @property
    def is_dropped(self) -> bool:
        """Whether it leaves nothing of a component."""
        return self.name == DROP

    @property
    def pruned_share(self) -> float:
        """The part of a component's weights that it makes zero, as its name says it; 0 for patterns."""
        return 1.0 if self.is_dropped else 0.0 if self.pruning is None else self.pruning.share

    @cached_property
    def rounded_by(self) -> Scheme | None:
        """The scheme by which what is not pruned is rounded; None where nothing is."""
        return parse_scheme(self.quantizer or self.name) if self.bits else None

    @cached_property
    def solved(self) -> Scheme | None:
        """The scheme whose matrix must be solved for by a Hessian before this one can be applied: itself (of a width
        the units that stay and the last matrix are), or the SparseGPT part of a pair that is rounded afterwards; None
        where there is nothing to solve."""
        if not self.needs_hessians:
            return None
        return self if self._is_solved_rounding or self.pruning is None else parse_scheme(self.pruning.name)

    @property
    def _is_solved_rounding(self) -> bool:
        return (self.quantizer or self.name).startswith(("gptq-", AUTOROUND))

    @property
    def is_tuned(self) -> bool:
        """Whether its matrices come of one tuning of the whole model (AutoRound), not of their Hessians alone."""
        return self.name.startswith(AUTOROUND)

    @property
    def needs_hessians(self) -> bool:
        """Whether it follows from X^T X over the component's inputs, or over those of a block's last matrix."""
        return (
            self.width is not None
            or self._is_solved_rounding
            or (self.pruning is not None and self.pruning.saliency == "sparsegpt")
        )

    @property
    def needs_largest_inputs(self) -> bool:
        """Whether a scale of what the component reads is fixed beforehand, by the largest that it reads of a text."""
        return self.activations is not None and self.activations.static

    @property
    def is_of_cache(self) -> bool:
        """Whether it rounds what layers keep of tokens, and no weights."""
        return self.kind.of_cache

    def takes(self, component: StoredSomewhere) -> bool:
        """Whether it is one for such a component: caches have schemes of their own, blocks are dropped, cut or stay."""
        if component.is_block:
            own = self.width is not None and self.width.is_for(component)
            return self.is_unquantized or self.is_dropped or own
        if self.width is not None:
            return False
        return self.is_unquantized or self.is_of_cache == component.is_cache

    def inputs(self, cols: int) -> Rounding | None:
        """How what a matrix of `cols` inputs reads is rounded; None where it is not, or bitsandbytes does it."""
        return self.activations or self.kind.inputs(self, cols)

    def misfit(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix of `shape` cannot be under the scheme in any format, None where it can."""
        return self.kind.misfit(self, shape) if self.weights is None else self.weights.misfit(shape[1])

    @property
    def needs_calibration(self) -> bool:
        """Whether it follows from the component's inputs over calibration text."""
        if (self.own is not None and self.own.needs == "mean_squares") or self.needs_largest_inputs:
            return True
        if self.scaled:
            return True
        return self.needs_hessians or (self.pruning is not None and self.pruning.saliency == "wanda")

    def num_scales(self, shape: tuple[int, int]) -> int:
        """Scales that a matrix of `shape` is stored with."""
        if self.weights is not None:
            return self.weights.num_scales(shape)
        rows, cols = shape
        per_granularity = {
            "none": 0,
            "tensor": 1,
            "channel": rows,
            "group": rows * ceil(cols / self.group_size) if self.group_size else 0,
            "block": ceil(rows * cols / self.group_size) if self.group_size else 0,
        }
        return per_granularity[self.granularity]

    def pruned_weights(self, shape: tuple[int, int]) -> int:
        """Weights that the scheme itself makes zero; small ones that a quantizer rounds to zero are not counted."""
        if self.is_dropped:
            return shape[0] * shape[1]
        return 0 if self.pruning is None else self.pruning.pruned_weights(shape)

    def stored_bits(self, shape: tuple[int, int], dense_bits: int) -> int:
        """Bits that a matrix of `shape` takes: codes or dense values of the weights that are kept, `scale_bits` for
        each scale, `bits` for each zero point, and the mask. A dropped matrix takes none."""
        if self.kind.stored_bits is not None:
            return self.kind.stored_bits(self, shape, dense_bits)
        kept = shape[0] * shape[1] - self.pruned_weights(shape)
        mask_bits = 0 if self.pruning is None else self.pruning.mask_bits(shape)
        per_scale = self.scale_bits + (self.bits if self.asymmetric else 0)
        return kept * (self.bits or dense_bits) + self.num_scales(shape) * per_scale + mask_bits

    def bits_of(self, component: StoredSomewhere, dense_bits: int) -> int:
        """Bits that a component takes under the scheme: `stored_bits` of its shape or, under `source`, what it takes in
        the base model's own files."""
        if self.is_source and component.source_bits:
            return component.source_bits
        return self.stored_bits(component.shape, dense_bits)


UNQUANTIZED = Scheme(DENSE, DENSE, 0, "none")
Shape = tuple[int, int]
Line = tuple[str, ...]


@dataclass(frozen=True)
class SchemeFamily:
    """A kind of scheme: what its names mean, and for a plugin's what it stores and makes.

    `parse` gives the scheme of a name, None for a name of another family. `version` enters the identity of every
    evaluation under the family's schemes: raise it when the same name makes other weights. A plugin also has
    `stored_bits` (scheme, shape [rows, cols], bits of an unquantized weight) and `make` (weight [rows, cols] as a
    tensor, scheme, a function that gives the mean squares [cols] of the component's inputs): the weights under the
    scheme, of the same shape and dtype, and a function of its arguments alone. `needs` says whether `make` asks for
    these mean squares. `examples` are names to show and to suggest.

    `check_installed` raises `LibraryMissing` where this machine lacks a library that `make` computes by, `build` names
    the build of it that is found, which is then part of every version. `pack` and `unpack` are the two halves of a
    `make` that takes long: what is small and kept (an array, or None), and the weights of it.
    `inputs` (scheme, cols): how what a matrix of so many inputs reads is rounded, where that depends on their number.
    `as_module`: its schemes stand in a layer's place as a module of bitsandbytes, not as other weights.
    `rounds_by_number`: they say by `Scheme.weights` and `activations` what they do. `on_grid`: they are codes with
    scales of a tensor, a row or a group, and nothing else. `only_prunes`: they make weights zero, and change no other.
    `of_cache`: they round what attention keeps of tokens, and no weights.
    `scale_bits` are those of a stored scale. `misfit` says why a matrix of a shape cannot be under a scheme.
    `siblings` are the names of schemes that differ from one only in how much they compress, itself among them.
    `uniform_lines` (scheme, granularities) are what a uniform plan of a scheme's kind may be, in lines of schemes that
    differ only in how much they compress.
    """

    name: str
    parse: Callable[[str], Scheme | None]
    version: int | str = 1
    stored_bits: Callable[[Scheme, Shape, int], int] | None = None
    make: Callable[[Any, Scheme, Callable[[], Any]], Any] | None = None
    needs: Literal["nothing", "mean_squares"] = "nothing"
    examples: tuple[str, ...] = ()
    check_installed: Callable[[], object] = lambda: None
    build: Callable[[], str] = lambda: ""
    pack: Callable[[Any, Scheme, Callable[[], Any]], Any] | None = None
    unpack: Callable[[Any, Scheme, Any], Any] | None = None
    inputs: Callable[[Scheme, int], Rounding | None] = lambda scheme, cols: None
    as_module: bool = False
    rounds_by_number: bool = False
    on_grid: bool = False
    only_prunes: bool = False
    of_cache: bool = False
    scale_bits: int = SCALE_BITS
    misfit: Callable[[Scheme, Shape], str | None] = lambda scheme, shape: None
    siblings: Callable[[Scheme], tuple[str, ...]] = lambda scheme: (scheme.name,)
    uniform_lines: Callable[[Scheme, Collection[str]], Sequence[Line]] = lambda scheme, grains: ()


_FAMILIES: dict[str, SchemeFamily] = {}


def register(family: SchemeFamily) -> SchemeFamily:
    """Add a family; its schemes are known in this process from then on.

    Installed packages do so by an entry point of the group `dtmsearch.schemes`, which replicas in other processes and
    on other machines see, too. Raises `UserError` for a name that is taken.
    """
    if family.name in _FAMILIES:
        raise UserError(f"there is a scheme family {family.name!r} already")
    _FAMILIES[family.name] = family
    parse_scheme.cache_clear()
    return family


def uniform_parts(name: str) -> tuple[Scheme, ...]:
    """The schemes of a uniform plan by its name: one, or one of weights and one of KV caches (`int8-channel+kv-fp8`).
    Raises `UserError` for what is none."""
    weights, joint, cache = name.rpartition(WITH_CACHE)
    if not (joint and weights):
        return (parse_scheme(name),)
    return parse_scheme(weights), parse_scheme(f"{WITH_CACHE[1:]}{cache}")


def check_libraries(schemes: Iterable[str]) -> None:
    """Raises `LibraryMissing` where this machine lacks a library that one of these schemes is computed by."""
    for name in schemes:
        parse_scheme(name).kind.check_installed()


def unregister(name: str) -> None:
    """Forget a family that was added."""
    del _FAMILIES[name]
    parse_scheme.cache_clear()


def families() -> tuple[SchemeFamily, ...]:
    """All families, those of installed packages last. Raises `UserError` for a package that cannot be loaded."""
    for plugin in plugins.plugins(plugins.SCHEMES):
        family = plugin.added
        if not isinstance(family, SchemeFamily):
            raise UserError(f"{plugin.name} of {plugin.version} is {type(family).__name__}, wanted a SchemeFamily")
        if family.name not in _FAMILIES:
            # Its own version, and the package's: either may stand for other weights.
            register(replace(family, version=f"{plugin.version}, {family.version}"))
    return tuple(_FAMILIES.values())


@lru_cache(maxsize=4096)
def parse_scheme(name: str) -> Scheme:
    """The scheme of a name. Raises `UserError` that names the nearest scheme when there is none of that name."""
    found = _parsed(name)
    if found is None:
        families()
        found = _parsed(name)
    if found is None:
        raise UserError(_unknown(name))
    return found


def _parsed(name: str) -> Scheme | None:
    name = ALIASES.get(name, name)
    for family in _FAMILIES.values():
        scheme = family.parse(name)
        if scheme is not None:
            return scheme if family.make is None else replace(scheme, family=family.name, own=family)
    return None


def _unknown(name: str) -> str:
    name = name[:100]
    near = nearest_width(name) or nearest(name, (DENSE, DROP, *_examples_of_plugins()))
    return (
        f"unknown scheme {name!r}; the nearest is {near!r}. Schemes are {DENSE}, {', '.join(BITSANDBYTES)}, "
        "intN-tensor, intN-channel, intN-gK (N from 2 to 8 bits, K inputs to a group), with or without -asym, the same "
        "with gptq- before it, or awq- or autoround- but for -tensor; "
        f"{', '.join(f'{s}-S' for s in SALIENCIES)} (S the pruned share between 0 and 1, such as 0.5, or N:M "
        "for N kept of every M inputs, such as 2:4; random-0.5-s1 has another mask than random-0.5); an int one, a "
        "plus sign and a pruning one for "
        f"both; {DROP}; and of blocks channels-S-RULE and heads-N:M-RULE (N groups kept of M; RULE is one of "
        f"{', '.join(RULES)}), with or without -repair, and experts-S-RULE ({', '.join(RULES_OF_EXPERTS)})"
        f"{''.join(f'; {example}' for example in _examples_of_plugins())}"
    )


def _examples_of_plugins() -> tuple[str, ...]:
    further = (family for family in _FAMILIES.values() if family.make is not None or family.rounds_by_number)
    return tuple(example for family in further for example in family.examples)


def solved_pairs(pairs: Iterable[tuple[str, Scheme]]) -> list[tuple[str, Scheme]]:
    """What has to be solved for before components can be under schemes: (component, `Scheme.solved`), each once."""
    return list(dict.fromkeys((component, scheme.solved) for component, scheme in pairs if scheme.solved is not None))


def siblings(name: str) -> tuple[str, ...]:
    """Schemes that differ from this one only in how much they compress, itself among them.

    Of rounding and GPTQ every bit width (of a pair under the same pruning); of pruning every twentieth as the share,
    or every N of the same M.
    """
    scheme = parse_scheme(name)
    return scheme.kind.siblings(scheme)


# Granularities that uniform plans are made in, beside those of the schemes that a search names.
_USUAL_GRAINS = ("tensor", "channel", "g32", "g64", "g128")


def family_lines(schemes: Iterable[Scheme]) -> dict[str, list[Line]]:
    """family -> what a uniform plan of the families of some schemes may be, in lines of schemes that differ only in how
    much they compress (`SchemeFamily.uniform_lines`).

    Of rounding and GPTQ a line for each granularity, with zero points and without: the usual ones, and group sizes that
    the schemes have; of pairs the same under each pruning that is named; of pruning a line for each saliency (shares by
    hundredths) and pattern length; of bitsandbytes a line for each scheme of as many bits.
    """
    schemes = list(schemes)
    grains = dict.fromkeys((*_USUAL_GRAINS, *(f"g{s.group_size}" for s in schemes if s.granularity == "group")))
    lines: dict[str, list[Line]] = {}
    for scheme in schemes:
        found = scheme.kind.uniform_lines(scheme, grains)
        if found:
            own = lines.setdefault(scheme.family, [])
            own += [line for line in found if line not in own]
    return lines
