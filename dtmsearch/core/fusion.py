"""Components that serving runtimes multiply as one matrix, and which must therefore share a scheme there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dtmsearch.core.components import Component
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import Scheme

# As vLLM stacks them (its qkv_proj and gate_up_proj); of experts it makes one layer (its FusedMoE).
FUSED_KINDS = (("q", "k", "v"), ("gate", "up"))


def fused_groups(components: Iterable[Component]) -> list[tuple[Component, ...]]:
    """Sets of components that an engine runs as one, in model order: the kinds of one of `FUSED_KINDS` in one module,
    and all matrices of all experts of a mixture."""
    groups: dict[tuple[str, tuple[str, ...]], list[Component]] = {}
    for component in components:
        if component.mixture:
            groups.setdefault((component.mixture, ()), []).append(component)
            continue
        for kinds in FUSED_KINDS:
            if component.kind in kinds:
                groups.setdefault((component.name.rpartition(".")[0], kinds), []).append(component)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def scale_partners(components: Iterable[Component]) -> dict[str, tuple[str, ...]]:
    """Component -> itself and those whose weights share the scale of a whole tensor with its: the kinds of one of
    `FUSED_KINDS` in one module, which engines multiply as one matrix; of experts each by itself."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for component in components:
        for kinds in FUSED_KINDS:
            if component.kind in kinds:
                groups.setdefault((component.name.rpartition(".")[0], kinds), []).append(component.name)
    return {name: tuple(group) for group in groups.values() for name in group}


def input_readers(components: Iterable[Component]) -> dict[str, tuple[str, ...]]:
    """Component -> itself and those that read the same, where what they read may be scaled by what stands before them:
    q, k, v of one module and its gate and up, before which is a norm; down behind gate and up, whose rows scale it.
    Matrices of experts are none of these, for a router reads what they do."""
    components = [component for component in components if not component.mixture and not component.stacked]
    found = {name: group for name, group in scale_partners(components).items() if len(group) > 1}
    behind = {group[0].rpartition(".")[0] for group in found.values()}
    downs = (c for c in components if c.kind == "down" and c.name.rpartition(".")[0] in behind)
    return found | {component.name: (component.name,) for component in downs}


def untied_groups(plan: Plan, components: Iterable[Component]) -> list[tuple[Component, ...]]:
    """The fused groups to which a plan gives more than one scheme."""
    return [group for group in fused_groups(components) if len({plan.scheme_of(c.name) for c in group}) > 1]


def tied_plan(plan: Plan, groups: Sequence[Sequence[Component]], dense_bits: int, widest: bool) -> Plan:
    """`plan` with each group under one of its members' schemes: that which makes the group largest, or smallest."""
    schemes = dict(plan.schemes)
    for group in groups:

        def bits(scheme: Scheme, group: Sequence[Component] = group) -> int:
            return sum(scheme.bits_of(c, dense_bits) for c in group)

        choices = sorted({plan.scheme(c.name) for c in group}, key=lambda scheme: scheme.name)
        chosen = max(choices, key=bits) if widest else min(choices, key=bits)
        schemes |= dict.fromkeys((c.name for c in group), chosen.name)
    return Plan.of(schemes)
