"""Units of a search: components that change together, and blocks. Which are tied, and how one is compressed further."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dtmsearch.core.components import Component, Experts
from dtmsearch.core.plan import Perturbation, PlanSize
from dtmsearch.core.schemes import DENSE
from dtmsearch.errors import UserError


@dataclass(frozen=True)
class Unit:
    """Components that change together, in model order.

    `edges` are the perturbations that are ever legal, in order of the schemes; `sizes` gives the unit's own size under
    every scheme, `dense` among them.
    """

    components: tuple[Component, ...]
    edges: tuple[Perturbation, ...]
    sizes: dict[str, PlanSize]

    @property
    def name(self) -> str:
        return self.components[0].name

    @property
    def is_block(self) -> bool:
        """Whether it is what may be dropped whole, with the units that lie in it."""
        return self.components[0].is_block


def narrowest(unit: Unit) -> str:
    """The scheme that leaves least of a block."""
    return max(unit.edges, key=lambda edge: unit.sizes[edge.scheme].removed_weights).scheme


def steps_of(unit: Unit, cost_of: Callable[[PlanSize], int]) -> list[tuple[float, int, int]]:
    """(harm, cost saved, perturbations that are legal no more) of each step in which a unit is compressed further, each
    time as little as its schemes allow."""
    if unit.is_block:
        size = unit.sizes[narrowest(unit)]
        return [(float(size.removed_weights), -cost_of(size), 1)]
    sizes = {cost_of(unit.sizes[edge.scheme]): unit.sizes[edge.scheme] for edge in unit.edges}
    steps, before, harm_before = [], cost_of(unit.sizes[DENSE]), 0.0
    for cost, size in sorted(sizes.items(), reverse=True):
        harm = size.num_weights * 4.0**-size.bits_per_weight
        gone = sum(cost <= cost_of(unit.sizes[edge.scheme]) < before for edge in unit.edges)
        steps.append((harm - harm_before, before - cost, gone))
        before, harm_before = cost, harm
    return steps


def tied_sets(
    components: tuple[Component, ...], tied: tuple[tuple[str, ...], ...], experts: Experts
) -> dict[str, tuple[Component, ...]]:
    """Name of a tied component -> all that change with it, itself included, in model order."""
    names = {c.name for c in components}
    kinds = {c.kind for c in components}
    group_of: dict[str, int] = {}
    sets: dict[tuple[int, str | None], list[Component]] = {}
    for number, group in enumerate(tied):
        for entry in group:
            if entry not in names and entry not in kinds:
                raise UserError(_unknown_tied(entry, names, kinds))
        for component in components:
            if component.name not in group and component.kind not in group:
                continue
            if group_of.setdefault(component.name, number) != number:
                both = " and ".join(f"[{', '.join(tied[n])}]" for n in (group_of[component.name], number))
                raise UserError(f"tied: {component.name} is in two groups, {both}; a component can be in one only")
            # Components that are named are tied with each other wherever they lie.
            parent = None if component.name in group else component.name.rpartition(".")[0]
            sets.setdefault((number, parent), []).append(component)
    found = {component.name: tuple(together) for together in sets.values() for component in together}
    return found if experts == "expert" else _with_mixtures(components, found)


def _with_mixtures(
    components: tuple[Component, ...], tied: dict[str, tuple[Component, ...]]
) -> dict[str, tuple[Component, ...]]:
    """The same sets, those of a mixture's experts put together with all other experts of it."""
    names: dict[str, set[str]] = {}
    for component in components:
        if component.mixture:
            partners = tied.get(component.name, (component,))
            names.setdefault(component.mixture, set()).update(c.name for c in partners)
    found = dict(tied)
    for mixture in names.values():
        together = tuple(c for c in components if c.name in mixture)
        found |= dict.fromkeys((c.name for c in together), together)
    return found


def _unknown_tied(entry: str, names: Iterable[str], kinds: Iterable[str]) -> str:
    # A text with a dot is meant as a component's name, any other as a kind.
    alike = sorted(names) if "." in entry else sorted(kinds)
    nearest = difflib.get_close_matches(entry, alike, n=1, cutoff=0.0)
    return (
        f"tied: {entry!r} is neither a kind nor the name of a component of this search; the nearest is {nearest[0]!r} "
        f"(kinds are {', '.join(sorted(kinds))})"
    )


def check_ties(units: tuple[Unit, ...], blocks: tuple[Component, ...]) -> None:
    """Raise `UserError` for components that are tied though a block that may be dropped holds some of them alone."""
    names = {block.name for block in blocks}
    for unit in units:
        held = [names & {c.block, c.layer_name} for c in unit.components]
        if any(each != held[0] for each in held):
            raise UserError(
                f"tied: {unit.name} and {unit.components[-1].name} lie in different blocks that search.drop may drop "
                "each by itself, or search.cut cut: leave one of both out"
            )
