"""A search as a choice of one option for every unit under a budget: what the solvers work on.

An option is a scheme, `dense` among them; a budget's rules become costs in whole numbers and a capacity. Knows sizes,
never qualities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor, lcm

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.plan import Perturbation, Plan, PlanSize, plan_size
from dtmsearch.core.schemes import DENSE, parse_scheme
from dtmsearch.core.times import PICOSECONDS, TimeRule
from dtmsearch.search.solver.knapsack import Infeasible, Solution
from dtmsearch.search.solver.nested import Costs, Nest, negated
from dtmsearch.search.space import SearchSpace

Floats = NDArray[np.float64]
# An option's index for every unit.
Options = tuple[int, ...]
# Into how many parts the way from no budget to a budget is divided.
_EASIER = 1 << 12


@dataclass(frozen=True)
class Rule:
    """A stop rule as a capacity: a plan meets it whose options' costs [units][options] come to at most that."""

    name: str
    costs: Costs
    capacity: int


class Choices:
    """The options of a search's units. `schemes[u]` lists those of unit u, `dense` first."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.units = space.units
        self.schemes = tuple((DENSE, *(edge.scheme for edge in unit.edges)) for unit in self.units)
        self.nest = Nest.of(self.units, self.schemes)
        self.bits = self._costs(lambda size: size.stored_bits)

    @cached_property
    def _parts(self) -> int:
        """Into how many parts a bit is divided, so that what tokens read of it is a whole number of them."""
        widths = [width for name in self.space.cuts if (width := parse_scheme(name).width) and width.takes_experts]
        numbers = {component.num_experts for component in self.space.components if component.mixture}
        return lcm(*numbers, *(width.left(number) for number in numbers for width in widths))

    @cached_property
    def active_bits(self) -> Costs:
        """What a token reads of the bits of every option, in `_parts` of a bit."""
        return self._costs(lambda size: int(size.active_bits * self._parts))

    @property
    def counted(self) -> Costs:
        """What the budget counts: picoseconds, `active_bits`, or else the bits that are stored."""
        if (rule := self.space.budget.takes_less) is not None:
            return self._times(rule)
        return self.active_bits if self.space.budget.reads_less else self.bits

    def _times(self, rule: TimeRule) -> Costs:
        """Picoseconds of every option."""

        def taken(size: PlanSize) -> int:
            found = None if size.picoseconds is None else size.picoseconds[rule == "prefill_ms"]
            assert found is not None, "a budget of milliseconds has a table of times"
            return found

        return self._costs(taken)

    def _costs(self, cost: Callable[[PlanSize], int]) -> Costs:
        alone = (
            np.array([cost(unit.sizes[scheme]) for scheme in schemes], np.int64)
            for unit, schemes in zip(self.units, self.schemes, strict=True)
        )
        inside = {
            block: {
                unit: np.array([[cost(size) for size in sizes] for sizes in rows], np.int64)
                for unit, rows in units.items()
            }
            for block, units in self._in_cuts.items()
        }
        return Costs(alone, inside)

    @cached_property
    def _in_cuts(self) -> dict[int, dict[int, list[list[PlanSize]]]]:
        """Of blocks that may be cut and what lies in them: what more both come to under each pair of options than the
        sum of what each does alone."""
        space, found = self.space, dict[int, dict[int, list[list[PlanSize]]]]()
        for block, within in self.nest.inside.items():
            name = self.units[block].name
            widths = [parse_scheme(s).width is not None for s in self.schemes[block]]
            if not any(widths):
                continue
            for unit in within:
                parts, own = self.units[unit].components, self.units[unit].sizes
                whole = plan_size(Plan(), parts, space.dense_bits, space.times)
                rows = []
                for width, cut in zip(widths, self.schemes[block], strict=True):
                    alone = plan_size(Plan.of({name: cut} if width else {}), parts, space.dense_bits, space.times)
                    both = [
                        plan_size(
                            Plan.of({name: cut if width else DENSE} | dict.fromkeys((c.name for c in parts), scheme)),
                            *(parts, space.dense_bits, space.times),
                        )
                        for scheme in self.schemes[unit]
                    ]
                    saved = alone.less(whole)
                    rows.append([b.less(own[s]).less(saved) for b, s in zip(both, self.schemes[unit], strict=True)])
                found.setdefault(block, {})[unit] = rows
        return found

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of the budget; one that has every component compressed where there are none."""
        budget, size = self.space.budget, self.space.size(Plan())
        rules: list[Rule] = []
        for name, wanted, scale in (
            ("bits_per_weight", budget.bits_per_weight, size.num_weights),
            ("size_mb", budget.size_mb, 8e6),
        ):
            if wanted is not None:
                rules.append(Rule(name, self.bits, _most(wanted, scale)))
        if budget.active_bits_per_weight is not None:
            whole = float(size.active_weights * self._parts)
            rules.append(Rule("active_bits_per_weight", self.active_bits, _most(budget.active_bits_per_weight, whole)))
        limits: tuple[TimeRule, ...] = ("decode_ms", "prefill_ms")
        for limit in limits:
            most: float | None = getattr(budget, limit)
            if most is not None:
                rules.append(Rule(limit, self._times(limit), _most(most, PICOSECONDS)))
        counted: tuple[tuple[str, float | None, Callable[[PlanSize], int], int], ...] = (
            ("sparsity", budget.sparsity, lambda s: s.pruned_weights, size.num_weights),
            ("share", budget.share, lambda s: s.compressed_weights, size.num_weights),
            ("components", budget.components, lambda s: s.num_compressed, 1),
            ("blocks", budget.blocks, lambda s: s.blocks, 1),
        )
        for name, least, count, total in counted:
            if least is not None:
                rules.append(Rule(name, negated(self._costs(count)), -_least(least, total)))
        if budget.parameters is not None:
            gone = self._costs(lambda s: s.removed_weights)
            rules.append(Rule("parameters", negated(gone), -_least_gone(budget.parameters, size.kept_weights)))
        if budget.flops is not None:
            read = self._costs(lambda s: int(s.removed_active * self._parts))
            least_read = _least_gone(budget.flops, int(size.multiplied_weights * self._parts))
            rules.append(Rule("flops", negated(read), -least_read))
        if not rules:
            counts = negated(self._costs(lambda s: s.num_compressed))
            rules.append(Rule("all components", counts, -len(self.space.components)))
        return tuple(rules)

    def solve(self, damages: Sequence[Floats]) -> Solution:
        """The options of least total damage that meet a rule. Raises `Infeasible` when none can be met."""
        return self._best_rule(damages)[1]

    def _best_rule(self, damages: Sequence[Floats]) -> tuple[Rule, Solution]:
        """The rule that is met with least total damage, and how."""
        solutions: list[tuple[Rule, Solution]] = []
        for rule in self.rules:
            try:
                solutions.append((rule, self.nest.solve(damages, rule.costs, rule.capacity)))
            except Infeasible as error:
                problem = error
        if not solutions:
            raise problem
        return min(solutions, key=lambda found: found[1].loss)

    def within(self, damages: Sequence[Floats], stored_bits: int) -> Solution:
        """The options of least total damage of at most so many stored bits, whatever the rules say."""
        return self.nest.solve(damages, self.bits, stored_bits)

    def on_the_way(self, damages: Sequence[Floats], part: float) -> Options:
        """The options of least total damage within an easier budget, between none and this one: the most of it whose
        damage comes to at most `part` of the budget's own. Raises `Infeasible`."""
        rule, whole = self._best_rule(damages)
        found: Options = (0,) * len(self.units)
        dense = self.cost(rule.costs, found)
        easy, hard = 0, _EASIER
        while hard - easy > 1:
            at = (easy + hard) // 2
            tried = self.nest.solve(damages, rule.costs, dense - (dense - rule.capacity) * at // _EASIER)
            if tried.loss <= part * whole.loss:
                easy, found = at, tried.options
            else:
                hard = at
        return found

    def canonical(self, options: Sequence[int]) -> Options:
        """The choice with nothing chosen for what lies in a block that is dropped."""
        return self.nest.canonical(options)

    def meets(self, options: Sequence[int]) -> bool:
        """Whether a rule is met."""
        return any(self.cost(rule.costs, options) <= rule.capacity for rule in self.rules)

    def neighbour(self, options: Sequence[int], unit: int, direction: int) -> int | None:
        """The option of a unit with the next more (+1) or fewer (-1) stored bits; None at the end."""
        bits = self.bits[unit]
        order = np.argsort(bits, kind="stable").tolist()
        at = order.index(options[unit]) + direction
        return int(order[at]) if 0 <= at < len(order) else None

    @staticmethod
    def cost(costs: Costs, options: Sequence[int]) -> int:
        return costs.of(options)

    def plan(self, options: Sequence[int]) -> Plan:
        return Plan.of(
            {
                component.name: schemes[k]
                for unit, schemes, k in zip(self.units, self.schemes, options, strict=True)
                for component in unit.components
            }
        )

    def perturbation(self, unit: int, option: int) -> Perturbation:
        first, *others = (component.name for component in self.units[unit].components)
        return Perturbation(first, self.schemes[unit][option], tuple(others))

    def uniform(self, scheme: str) -> Options | None:
        """Every unit under one scheme, no block dropped; None where one of them does not have it."""
        parts = [None if unit.is_block else schemes for unit, schemes in zip(self.units, self.schemes, strict=True)]
        if not all(schemes is None or scheme in schemes for schemes in parts) or not any(parts):
            return None
        return tuple(0 if schemes is None else schemes.index(scheme) for schemes in parts)

    def uniforms(self) -> list[Options]:
        """The uniform choices that meet a rule, in order of the schemes."""
        found = [self.uniform(scheme) for scheme in self.space.schemes]
        return [options for options in found if options is not None and self.meets(options)]


def _least_gone(left: float, total: int) -> int:
    """The smallest number of `total` that goes where at most a share is left, as a budget compares it."""
    number = ceil((1.0 - left) * total)
    while number > 0 and 1.0 - (number - 1) / (total or 1) <= left:
        number -= 1
    while number < total and 1.0 - number / (total or 1) > left:
        number += 1
    return number


def _most(wanted: float, scale: float) -> int:
    """The largest whole number that, divided by `scale`, is at most `wanted`: as a budget compares it."""
    number = floor(wanted * scale)
    while (number + 1) / scale <= wanted:
        number += 1
    while number / scale > wanted:
        number -= 1
    return number


def _least(wanted: float, scale: float) -> int:
    number = ceil(wanted * scale)
    while (number - 1) / scale >= wanted:
        number -= 1
    while number / scale < wanted:
        number += 1
    return number
