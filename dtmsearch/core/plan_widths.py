"""How wide a plan leaves the blocks of a model."""

from __future__ import annotations

from collections.abc import Iterable

from dtmsearch.core.components import Component
from dtmsearch.core.plan import Plan
from dtmsearch.core.widths import WidthKind

# The labels of the plan that drops a model's last layers, of the one that cuts all blocks alike, and of a plan with its
# widths made even.
LAST_LAYERS, ONE_WIDTH, EVENED = "rule:last-layers", "rule:one-width", "rule:even-widths"


def widths_left(plan: Plan, components: Iterable[Component]) -> dict[WidthKind, dict[int, tuple[int, int]]]:
    """Of each kind of units that a plan cuts anywhere, the layers that have a block of them, and how many of how many
    units are left there; without what is dropped. Groups of heads are counted where they are cut."""
    found: dict[WidthKind, dict[int, tuple[int, int]]] = {}
    for width in {scheme.width for scheme in plan.widths.values() if scheme.width is not None}:
        for component in components:
            known = found.setdefault(width.kind, {})
            of_kind = width.is_of(component) and component.layer not in known and not plan.drops(component.name)
            if of_kind:
                own = plan.width_of(component)
                units = (own or width).units(component)
                known[component.layer] = (units if own is None else own.left(units)), units
    return found


def is_even(plan: Plan, components: Iterable[Component]) -> bool:
    """Whether all layers of a plan that cuts blocks are of one width."""
    return all(len(set(layers.values())) <= 1 for layers in widths_left(plan, components).values())
