"""Plans: component -> scheme. Their identity, their differences, their sizes, and the budgets that they meet."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import starmap
from typing import Any

from dtmsearch.core.components import Component
from dtmsearch.core.identity import identity_of_text
from dtmsearch.core.scheme_names import ALIASES
from dtmsearch.core.schemes import DENSE, DROP, UNQUANTIZED, Scheme, parse_scheme, uniform_parts
from dtmsearch.core.times import PICOSECONDS, Picoseconds, TimeRule, Times
from dtmsearch.core.widths import Width, width_of
from dtmsearch.errors import LibraryMissing

DROPPED = parse_scheme(DROP)
# A uniform plan that stores up to so much more than a plan counts as of at most its size.
LARGER = 1.01


@dataclass(frozen=True)
class Perturbation:
    """One edge of the search tree: `component`, and those tied to it, take `scheme`."""

    component: str
    scheme: str
    tied: tuple[str, ...] = ()

    @property
    def components(self) -> tuple[str, ...]:
        """The component, and those tied to it."""
        return (self.component, *self.tied)

    def __str__(self) -> str:
        return f"{'+'.join(self.components)}={self.scheme}"


@lru_cache(maxsize=1 << 16)
def _canonical_entry(component: str, scheme: str) -> str:
    return f"{json.dumps(component, ensure_ascii=False)}:{json.dumps(scheme)}"


@dataclass(frozen=True)
class Plan:
    """A choice of scheme for every component; a component that is absent stays dense.

    `entries` are (component, scheme) pairs in order of name, none of them dense: make plans with `Plan.of`.
    """

    entries: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def of(schemes: Mapping[str, str]) -> Plan:
        """A plan from component -> scheme; `dense` may be among the schemes, and other names of some. What lies in
        something that is dropped has no scheme of its own."""
        entries = tuple(sorted((c, ALIASES.get(s, s)) for c, s in schemes.items() if s != DENSE))
        return Plan(_without_insides(entries) if DROP in schemes.values() else entries)

    @staticmethod
    def uniform(components: Iterable[Component], scheme: str) -> Plan:
        """Every one of some components under one scheme, or under one of weights and one of KV caches
        (`int8-channel+kv-fp8`); those that it is not for stay as they are."""
        parts = uniform_parts(scheme)
        return Plan.of({c.name: part.name for c in components for part in parts if part.takes(c)})

    @cached_property
    def id(self) -> str:
        """Identity over the canonical JSON of the mapping; put together from cached parts, for it is asked often."""
        return identity_of_text("{" + ",".join(starmap(_canonical_entry, self.entries)) + "}")

    @cached_property
    def schemes(self) -> dict[str, str]:
        """Component -> scheme name, of what is compressed."""
        return dict(self.entries)

    def __getstate__(self) -> dict[str, object]:
        """What crosses a process border: the entries, the identity, which takes longer to find than to send, and the
        versions of schemes that who asks knows (see `check_versions`)."""
        versions = self.scheme_versions
        return {"entries": self.entries, "id": self.id} | ({"scheme_versions": versions} if versions else {})

    @cached_property
    def parsed(self) -> dict[str, Scheme]:
        """Compressed component -> its scheme."""
        return {component: parse_scheme(scheme) for component, scheme in self.entries}

    def scheme(self, component: str) -> Scheme:
        """The scheme of a component, that of unquantized ones for those that are absent; of what lies in something
        that is dropped `drop`."""
        found = self.parsed.get(component)
        if found is not None:
            return found
        return DROPPED if self.dropped and self.drops(component) else UNQUANTIZED

    @cached_property
    def dropped(self) -> frozenset[str]:
        """What is dropped by name: matrices, blocks, layers."""
        return frozenset(component for component, scheme in self.entries if scheme == DROP)

    @cached_property
    def widths(self) -> dict[str, Scheme]:
        """Block -> the scheme by which it is cut."""
        return {name: parse_scheme(scheme) for name, scheme in self.entries if width_of(scheme) is not None}

    def shown_scheme_of(self, component: Component) -> str:
        """As `scheme_of`; of what is unquantized in a block that is cut, the width."""
        own, width = self.scheme_of(component.name), self.widths.get(component.block)
        return own if own != DENSE or width is None else width.name

    def width_of(self, component: Component) -> Width | None:
        """What is left of the units of the block that a matrix lies in; None where that is not cut."""
        found = self.widths.get(component.block) if self.widths else None
        return None if found is None else found.width

    def by_matrices(self, components: Iterable[Component]) -> Plan:
        """The plan with what lies in dropped blocks dropped by name, of a model's matrices: what training holds at zero
        are matrices."""
        inside = {c.name for c in components if c.name not in self.dropped and self.drops(c.name)}
        blocks = {name for name in self.dropped if any(_lies_in(c, (name,)) for c in inside)}
        return Plan.of({c: s for c, s in self.entries if c not in blocks} | dict.fromkeys(inside, DROP))

    def drops(self, component: str) -> bool:
        """Whether nothing is left of a component, dropped by its own name or within a block or a layer."""
        return component in self.dropped or _lies_in(component, self.dropped)

    @cached_property
    def needs_calibration(self) -> bool:
        """Whether what the plan makes of the model depends on calibration text."""
        return any(parse_scheme(scheme).needs_calibration for scheme in {scheme for _, scheme in self.entries})

    @cached_property
    def scheme_versions(self) -> dict[str, int | str]:
        """See `versions_of`."""
        return versions_of(scheme for _, scheme in self.entries)

    def scheme_of(self, component: str) -> str:
        """As `scheme`, by name; `dense` where the plan leaves a component as it is."""
        found = self.schemes.get(component)
        return found or (DROP if self.dropped and self.drops(component) else DENSE)

    def changes(self, other: Plan) -> dict[str, Scheme]:
        """As `diff`, with schemes."""
        return {component: self.parsed.get(component, UNQUANTIZED) for component in self.diff(other)}

    def with_(self, perturbation: Perturbation) -> Plan:
        """The plan with a perturbation made."""
        entries = list(self.entries)
        for component in perturbation.components:
            at = bisect_left(entries, (component, ""))
            found = at < len(entries) and entries[at][0] == component
            entries[at : at + found] = [] if perturbation.scheme == DENSE else [(component, perturbation.scheme)]
        return Plan(_without_insides(entries) if perturbation.scheme == DROP else tuple(entries))

    def diff(self, other: Plan) -> dict[str, str]:
        """What to change in `other` to get this plan: component -> its scheme here (`dense` where absent), in order of
        name."""
        gone = dict.fromkeys(other.schemes.keys() - self.schemes.keys(), DENSE)
        return dict(sorted({**gone, **dict(set(self.entries) - set(other.entries))}.items()))

    def __len__(self) -> int:
        return len(self.entries)


def _lies_in(component: str, blocks: Container[str]) -> bool:
    """Whether a component lies in one of some modules, by their paths."""
    at = component.rfind(".")
    while at > 0:
        if component[:at] in blocks:
            return True
        at = component.rfind(".", 0, at)
    return False


def _without_insides(entries: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Entries without those of what lies in something that is dropped."""
    entries = tuple(entries)
    dropped = {component for component, scheme in entries if scheme == DROP}
    return tuple(entry for entry in entries if not _lies_in(entry[0], dropped))


@dataclass(frozen=True)
class PlanSize:
    """What a plan amounts to over the components of a search.

    `share` is the part of their weights that lies in compressed components; `bits_per_weight` counts scales and zero
    points; `sparsity` is the part of their weights that is zero by the plan. `read_bits` and `read_weights` are what a
    token reads of the stored bits and the weights: an expert's counted by the share of the experts that it is given to;
    None where no component is an expert's, and a token reads all. `picoseconds` are those of a token and of a prompt
    by a table of times, None where there is none, or it lacks a row. `blocks` counts the attention and MLP blocks that
    are dropped whole, `removed_weights` the weights of all that is dropped, and `removed_read` what a token would have
    read of them, where it does not read all. `num_cached`: what of `num_weights` is no weights but numbers that KV
    caches hold, which are neither kept nor multiplied with as weights are.
    """

    num_compressed: int
    num_weights: int
    compressed_weights: int
    stored_bits: int
    pruned_weights: int = 0
    read_bits: Fraction | None = None
    read_weights: Fraction | None = None
    picoseconds: Picoseconds | None = None
    blocks: int = 0
    removed_weights: int = 0
    removed_read: Fraction | None = None
    num_cached: int = 0

    @property
    def share(self) -> float:
        """The part of the weights that lies in compressed components, 0 to 1."""
        return self.compressed_weights / self.num_weights

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, those of unquantized components among them."""
        return self.stored_bits / self.num_weights

    @property
    def is_of_mixture(self) -> bool:
        """Whether some of the components are experts', of which a token reads a part."""
        return self.read_bits is not None

    @property
    def active_bits(self) -> Fraction:
        """Stored bits that a token reads."""
        return Fraction(self.stored_bits) if self.read_bits is None else self.read_bits

    @property
    def active_weights(self) -> Fraction:
        """Weights that a token reads."""
        return Fraction(self.num_weights) if self.read_weights is None else self.read_weights

    @property
    def active_bits_per_weight(self) -> float:
        """Stored bits of the weights that a token reads, for each of them."""
        return float(self.active_bits / self.active_weights)

    @property
    def sparsity(self) -> float:
        """The part of the weights that the plan makes zero, 0 to 1."""
        return self.pruned_weights / self.num_weights

    @property
    def parameters(self) -> float:
        """The part of the weights that is left once what is dropped is taken out, 0 to 1. What is pruned within a
        matrix is not; what KV caches hold is in neither count."""
        return 1.0 - self.removed_weights / (self.kept_weights or 1)

    @property
    def flops(self) -> float:
        """The part of a token's multiplications with weights that is left, 0 to 1: an expert's counted by the share of
        tokens that it is given. What KV caches hold is in neither count."""
        return float(1 - self.removed_active / (self.multiplied_weights or 1))

    @property
    def kept_weights(self) -> int:
        """Weights that the unquantized model keeps: without what KV caches hold."""
        return self.num_weights - self.num_cached

    @property
    def multiplied_weights(self) -> Fraction:
        """Weights that a token is multiplied with in the unquantized model: without what KV caches hold."""
        return self.active_weights - self.num_cached

    @property
    def removed_active(self) -> Fraction:
        """What a token would have read of the weights that are dropped."""
        return Fraction(self.removed_weights) if self.removed_read is None else self.removed_read

    def less(self, other: PlanSize) -> PlanSize:
        """What this size is more than another of the same components, in all that adds up over components."""
        counted: dict[str, Any] = {
            each.name: None
            if getattr(self, each.name) is None
            else getattr(self, each.name) - getattr(other, each.name)
            for each in fields(self)
            if each.name != "picoseconds"
        }
        if self.picoseconds is None or other.picoseconds is None:
            return PlanSize(**counted)
        (decode, prefill), (less, of_prompt) = self.picoseconds, other.picoseconds
        taken = decode - less, None if prefill is None or of_prompt is None else prefill - of_prompt
        return PlanSize(**counted | {"picoseconds": taken})

    @property
    def decode_ms(self) -> float | None:
        """Milliseconds of the components for one token, by the search's table of times."""
        return None if self.picoseconds is None else self.picoseconds[0] / PICOSECONDS

    @property
    def prefill_ms(self) -> float | None:
        """Milliseconds of the components for a prompt of the table's length; None of mixtures, too."""
        taken = None if self.picoseconds is None else self.picoseconds[1]
        return None if taken is None else taken / PICOSECONDS

    @property
    def size_mb(self) -> float:
        """Stored size in megabytes of 10^6 bytes."""
        return self.stored_bits / 8e6


def versions_of(schemes: Iterable[str]) -> dict[str, int | str]:
    """Scheme family -> version of its arithmetic, of those that have had another or come from another package."""
    found = {parse_scheme(scheme) for scheme in set(schemes)}
    return {scheme.family: scheme.version for scheme in found if scheme.version != 1 or scheme.own is not None}


def check_versions(asked: Mapping[str, int | str], schemes: Iterable[str]) -> None:
    """Raises `LibraryMissing` unless schemes are computed here as who asks for them says: what is made here is recorded
    under the versions, and builds of libraries, of there."""
    here = versions_of(schemes)
    for family in sorted(asked.keys() | here.keys()):
        if asked.get(family) != here.get(family):
            own, theirs = (found.get(family, "no version of its own") for found in (here, asked))
            raise LibraryMissing(
                f"schemes of the family {family} are computed here by another version or build ({own}) than where the "
                f"search runs ({theirs}), under which values are recorded: have the same on every machine"
            )


def plan_size(plan: Plan, components: Sequence[Component], dense_bits: int, times: Times | None = None) -> PlanSize:
    """Size of a plan over `components`; what the plan says of other components is left out."""
    held: list[Component] = []
    num_compressed = num_weights = compressed_weights = stored_bits = pruned_weights = num_cached = 0
    # Of experts, by the share of tokens that reads them.
    of_bits, of_weights = dict[Fraction, int](), dict[Fraction, int]()
    blocks, removed_weights, removed_read = set[str](), 0, Fraction(0)
    for component in components:
        scheme = plan.scheme(component.name)
        left = cut_by(plan, component) if plan.widths else component
        if left.num_weights:
            held.append(left)
        gone = component.num_weights - left.num_weights
        num_weights += component.num_weights
        num_cached += component.num_weights if component.is_cache else 0
        bits = scheme.bits_of(left, dense_bits) if left.num_weights else 0
        stored_bits += bits
        if component.mixture:
            of_bits[left.read_share] = of_bits.get(left.read_share, 0) + bits
            of_weights[component.read_share] = of_weights.get(component.read_share, 0) + component.num_weights
        if gone or not (scheme.is_unquantized or scheme.is_source):
            num_compressed += 1
            compressed_weights += component.num_weights
            pruned_weights += gone + scheme.pruned_weights(left.shape)
        removed_weights += gone
        if left is not component:  # of fewer experts each has more of the tokens
            removed_read += component.num_weights * component.read_share - left.num_weights * left.read_share
        if scheme.is_dropped and not component.is_cache:
            removed_weights += component.num_weights
            removed_read += component.num_weights * component.read_share
            blocks |= {component.block} - {component.name} if component.name not in plan.dropped else set()
    every = plan.schemes if not plan.dropped else {c.name: plan.scheme_of(c.name) for c in components}
    size = PlanSize(
        *(num_compressed, num_weights, compressed_weights, stored_bits, pruned_weights),
        picoseconds=None if times is None else times.total(held, every),
        blocks=len(blocks),
        removed_weights=removed_weights,
        num_cached=num_cached,
    )
    if not of_weights:
        return size
    read_bits = stored_bits - sum(((1 - share) * bits for share, bits in of_bits.items()), Fraction(0))
    read_weights = num_weights - sum(((1 - share) * weights for share, weights in of_weights.items()), Fraction(0))
    return replace(size, read_bits=read_bits, read_weights=read_weights, removed_read=removed_read)


@dataclass(frozen=True)
class Budget:
    """The stop rules that a plan's size alone decides; None where there is no such rule."""

    share: float | None = None
    components: int | None = None
    bits_per_weight: float | None = None
    sparsity: float | None = None
    size_mb: float | None = None
    active_bits_per_weight: float | None = None
    decode_ms: float | None = None
    prefill_ms: float | None = None
    blocks: int | None = None
    parameters: float | None = None
    flops: float | None = None

    def reached(self, size: PlanSize) -> bool:
        """True once any of the rules is met."""
        return (
            (self.share is not None and size.share >= self.share)
            or (self.components is not None and size.num_compressed >= self.components)
            or (self.bits_per_weight is not None and size.bits_per_weight <= self.bits_per_weight)
            or (self.sparsity is not None and size.sparsity >= self.sparsity)
            or (self.size_mb is not None and size.size_mb <= self.size_mb)
            or (self.active_bits_per_weight is not None and size.active_bits_per_weight <= self.active_bits_per_weight)
            or _is_within(size.decode_ms, self.decode_ms)
            or _is_within(size.prefill_ms, self.prefill_ms)
            or (self.blocks is not None and size.blocks >= self.blocks)
            or (self.parameters is not None and size.parameters <= self.parameters)
            or (self.flops is not None and size.flops <= self.flops)
        )

    @property
    def limits_size(self) -> bool:
        """True when the budget counts bits or milliseconds, so that a component may be compressed further in a later
        step."""
        return self.stores_less or self.reads_less or self.takes_less is not None

    @property
    def stores_less(self) -> bool:
        """True when stored bits are counted."""
        return self.bits_per_weight is not None or self.size_mb is not None

    @property
    def reads_less(self) -> bool:
        """True when the bits that a token reads are counted, and stored ones are not."""
        return self.active_bits_per_weight is not None and not self.stores_less

    @property
    def takes_less(self) -> TimeRule | None:
        """The time that is counted, where no bits are: a token's, else a prompt's."""
        if self.stores_less or self.reads_less:
            return None
        if self.decode_ms is not None:
            return "decode_ms"
        return None if self.prefill_ms is None else "prefill_ms"

    def counted(self, size: PlanSize) -> Fraction:
        """What plans are held against others of their size by: picoseconds where the budget counts time, the bits that
        a token reads where it counts these, else all bits that are stored. Raises `ValueError` for a size without the
        time that is counted."""
        if self.takes_less is not None:
            taken = None if size.picoseconds is None else size.picoseconds[self.takes_less == "prefill_ms"]
            if taken is None:
                raise ValueError("the table of times lacks a row for this plan")
            return Fraction(taken)
        return size.active_bits if self.reads_less else Fraction(size.stored_bits)


def _is_within(taken: float | None, most: float | None) -> bool:
    return taken is not None and most is not None and taken <= most


def cut_by(plan: Plan, component: Component) -> Component:
    """A component as it is in a plan that cuts its block, of fewer rows or columns, or one of fewer experts."""
    width = plan.width_of(component)
    if width is None or component.is_cache or not width.is_of(component):
        return component
    left = width.left(component.num_experts) if width.takes_experts else component.num_experts
    return replace(component, shape=width.cut(component), num_experts=left)
