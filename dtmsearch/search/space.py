"""The space of a search: which perturbations are legal from a plan, which components change together, when to end.

Knows sizes, never qualities: what a perturbation does to the model is measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import ceil

from dtmsearch.core.components import Component, Experts, ModelManifest
from dtmsearch.core.plan import Budget, Perturbation, Plan, PlanSize, cut_by, plan_size
from dtmsearch.core.schemes import DENSE, DROP, Scheme, parse_scheme
from dtmsearch.core.times import PICOSECONDS, Picoseconds, Times
from dtmsearch.errors import UserError
from dtmsearch.search.units import Unit, check_ties, narrowest, steps_of, tied_sets


@dataclass(frozen=True)
class SearchSpace:
    """What a search may choose from.

    `components` in model order, `schemes` in the order in which they are tried. An entry of a `tied` group is a kind
    (components of that group's kinds in the same parent module change together) or a component's full name (the named
    components of the group change together). `experts`: with `layer` all matrices of all experts of a mixture change
    together, as engines run them. `dense_bits` is the size of an uncompressed weight, `times` what components take to
    run, for budgets of milliseconds. `manifest` is of the whole model, which rivals that follow a rule of its layers
    need. `blocks` are attentions, MLPs and layers that may be dropped whole: what lies in them has no scheme then.
    `cut` are blocks that may be cut to `cuts`, each a width (`channels-0.25-wanda`) for some of them.

    Raises `UserError` for tied names that match nothing, a component in two groups, a scheme that a component's shape
    does not fit, a budget out of reach, and times that lack a row.
    """

    components: tuple[Component, ...]
    schemes: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...] = ()
    dense_bits: int = 16
    budget: Budget = field(default_factory=Budget)
    experts: Experts = "layer"
    times: Times | None = None
    manifest: ModelManifest | None = None
    blocks: tuple[Component, ...] = ()
    cut: tuple[Component, ...] = ()
    cuts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_shapes(self.components, self.parsed, self.shapes_blocks)
        _check_times(self.times, self.budget, self.components)
        if self.times is not None:
            self.times.require((*self.components, *self._cut_matrices), self.schemes)
        check_ties(self._units_of_matrices, (*self.blocks, *self.cut))
        _check_budget(self.budget, self._units_that_stay, self._of_blocks)

    @cached_property
    def parsed(self) -> tuple[Scheme, ...]:
        """The schemes to choose from."""
        return tuple(parse_scheme(name) for name in self.schemes)

    @property
    def _cut_matrices(self) -> list[Component]:
        """The matrices of blocks that may be cut, as each width leaves them."""
        plans = [Plan.of({b.name: name}) for b in self.cut for name in self.cuts if parse_scheme(name).takes(b)]
        found = [cut_by(plan, c) for plan in plans for c in self.components if c.block in plan.schemes]
        return [matrix for matrix in found if matrix.num_weights]

    @property
    def needs_calibration(self) -> bool:
        """Whether one of the schemes or widths follows from calibration text."""
        return any(parse_scheme(name).needs_calibration for name in (*self.schemes, *self.cuts))

    @property
    def shapes_blocks(self) -> bool:
        """Whether blocks may be dropped or cut."""
        return bool(self.blocks or self.cut)

    def perturbations(self, plan: Plan) -> list[Perturbation]:
        """Legal edges from a plan, in model order of the components, then in order of the schemes.

        Where the budget counts bits, every component may go on to fewer stored bits than it has, where it counts time
        to less time; elsewhere a component is compressed at most once.
        """
        schemes = plan.schemes
        legal: list[Perturbation] = []
        units = self.units if not plan.dropped else [u for u in self.units if u.name in schemes or self._stays(u, plan)]
        if self.budget.limits_size or self.cut:
            for unit in units:
                if not (self.budget.limits_size or unit.is_block):
                    legal += [] if unit.name in schemes else unit.edges
                    continue
                if unit.is_block and self.cut:  # what is cut may be cut further
                    gone = unit.sizes[schemes.get(unit.name, DENSE)].removed_weights
                    legal += [edge for edge in unit.edges if unit.sizes[edge.scheme].removed_weights > gone]
                    continue
                cost = self._cost(unit.sizes[schemes.get(unit.name, DENSE)])
                legal += [edge for edge in unit.edges if self._cost(unit.sizes[edge.scheme]) < cost]
        else:
            for unit in units:
                if unit.name not in schemes:
                    legal += unit.edges
        return legal

    def _stays(self, unit: Unit, plan: Plan) -> bool:
        """Whether something of a unit is left to be chosen a scheme for."""
        inside = self.inside(unit.components[0]) if unit.is_block else unit.components
        return not all(plan.drops(part.name) for part in inside)

    def size(self, plan: Plan) -> PlanSize:
        """Size of a plan over the components of this search."""
        return plan_size(plan, self.components, self.dense_bits, self.times)

    def _cost(self, size: PlanSize) -> int:
        """What a component goes on to less of: stored bits, or picoseconds where the budget counts time."""
        return int(self.budget.counted(size)) if self.budget.takes_less else size.stored_bits

    def uniform(self, scheme: str) -> Plan:
        """Every component of the search under one scheme."""
        return Plan.uniform(self.components, scheme)

    def progress(self, plan: Plan) -> float:
        """How much of the way from the unquantized model to the search's end a plan has come; from 1 on all of it."""
        size, dense, budget = self.size(plan), self._dense_size, self.budget
        # Where blocks are dropped under a rule, matrices are no measure: an attention has as many as an MLP, of fewer
        # weights.
        by_rule = budget.limits_size or (self.shapes_blocks and budget != Budget())
        ways = [] if by_rule else [size.num_compressed / len(self.components)]
        for reached, wanted in ((size.share, budget.share), (size.sparsity, budget.sparsity)):
            ways += [reached / wanted] if wanted else []
        ways += [size.num_compressed / budget.components] if budget.components else []
        ways += [size.blocks / budget.blocks] if budget.blocks else []
        for left, limit in ((size.parameters, budget.parameters), (size.flops, budget.flops)):
            ways += [(1.0 - left) / (1.0 - limit)] if limit is not None else []
        if budget.bits_per_weight:
            ways.append(
                (dense.bits_per_weight - size.bits_per_weight) / (dense.bits_per_weight - budget.bits_per_weight)
            )
        if budget.size_mb:
            ways.append((dense.size_mb - size.size_mb) / (dense.size_mb - budget.size_mb))
        if budget.active_bits_per_weight:
            own = dense.active_bits_per_weight
            ways.append((own - size.active_bits_per_weight) / (own - budget.active_bits_per_weight))
        for before, now, most in (
            (dense.decode_ms, size.decode_ms, budget.decode_ms),
            (dense.prefill_ms, size.prefill_ms, budget.prefill_ms),
        ):
            if most is not None and before is not None and now is not None:
                ways.append((before - now) / (before - most))
        return max(ways)

    @cached_property
    def expected_course(self) -> tuple[tuple[float, int], ...]:
        """(progress, number of legal perturbations) after each step to be expected of a search that takes the least
        harmful one.

        A perturbation's harm is not known here. Where the budget counts bits it is taken as that of rounding evenly
        spread weights, 4^-bits for each; else all are taken as alike.
        """
        if not self.budget.limits_size:
            legal = len(self.perturbations(Plan()))
            steps = self.expected_steps
            return tuple((step / steps, max(legal - step * len(self.schemes), 0)) for step in range(1, ceil(steps) + 1))
        legal = sum(len(unit.edges) for unit in self.units)
        steps_of_units = [step for unit in self.units for step in steps_of(unit, self._cost)]
        dense = cost = self._cost(self._dense_size)
        wanted = self._most_cost
        course = []
        for _, saved, gone in sorted(steps_of_units):
            cost, legal = cost - saved, legal - gone
            course.append(((dense - cost) / (dense - wanted), legal))
            if cost <= wanted:
                break
        return tuple(course)

    @property
    def _most_cost(self) -> float:
        """What the budget leaves of `_cost`."""
        budget, limits = self.budget, []
        if budget.takes_less is not None:
            most: float = getattr(budget, budget.takes_less)
            return most * PICOSECONDS
        if budget.bits_per_weight is not None:
            limits.append(budget.bits_per_weight * self._dense_size.num_weights)
        if budget.size_mb is not None:
            limits.append(budget.size_mb * 8e6)
        if budget.active_bits_per_weight is not None:  # what is read, taken for what is stored
            limits.append(budget.active_bits_per_weight * self._dense_size.num_weights)
        return max(limits)

    @cached_property
    def expected_steps(self) -> float:
        """Perturbations from the unquantized model to the end of the search, each taken as an average one; by the
        expected course where the budget counts bits."""
        if self.budget.limits_size:
            return len(self.expected_course)
        uniform = [self.progress(self.uniform(scheme)) for scheme in self.schemes]
        useful = [progress for progress in uniform if progress > 0]
        if self.shapes_blocks:  # so many average ones come to the end
            each = [self.progress(Plan.of({unit.name: unit.edges[0].scheme})) for unit in self.units if unit.is_block]
            return len(each) / max(sum(each), 1e-9)
        return len(self.units) * len(useful) / sum(useful)

    @property
    def expected_cost(self) -> float:
        """What the plan at the end of the search will come to about, in what the budget counts: as much of every scheme
        alone as ends the search, on average over the schemes."""
        dense = float(self.budget.counted(self._dense_size))
        ends = []
        for scheme in self.schemes:
            uniform = self.uniform(scheme)
            if (progress := self.progress(uniform)) > 0:
                ends.append(dense - (dense - float(self.budget.counted(self.size(uniform)))) / max(progress, 1.0))
        if not ends and not self.budget.limits_size:
            return dense
        # No uniform plan gains where each is slower in some shape: a mixed one ends at the budget.
        return sum(ends) / len(ends) if ends else self._most_cost

    @cached_property
    def _dense_size(self) -> PlanSize:
        return self.size(Plan())

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """What is chosen a scheme for: components alone or tied together, in model order; then blocks that may be
        dropped or cut."""
        names = {block.name for block in (*self.blocks, *self.cut)}
        known = () if self.manifest is None else self.manifest.blocks
        blocks = (*self.blocks, *self.cut) if self.manifest is None else (b for b in known if b.name in names)
        return (*self._units_of_matrices, *map(self._unit_of_block, dict.fromkeys(blocks)))

    @cached_property
    def _units_of_matrices(self) -> tuple[Unit, ...]:
        partners = tied_sets(self.components, self.tied, self.experts)
        units: list[Unit] = []
        seen: set[str] = set()
        for component in self.components:
            if component.name not in seen:
                together = partners.get(component.name, (component,))
                seen.update(c.name for c in together)
                units.append(self._unit(together))
        return tuple(units)

    def inside(self, block: Component) -> tuple[Component, ...]:
        """The components of the search that lie in a block."""
        return tuple(c for c in self.components if block.name in (c.block, c.layer_name))

    def _unit_of_block(self, block: Component) -> Unit:
        """A block, whose size is what dropping or cutting it changes: nothing of it is counted while what lies in it
        is, unquantized."""
        inside = self.inside(block)
        cuts = [name for name in self.cuts if block in self.cut and parse_scheme(name).takes(block)]
        schemes = [*cuts, *([DROP] if block in self.blocks else [])]
        before = plan_size(Plan(), inside, self.dense_bits, self.times)
        sizes = {DENSE: before.less(before)}
        for scheme in schemes:
            after = plan_size(Plan.of({block.name: scheme}), inside, self.dense_bits, self.times)
            sizes[scheme] = after.less(before)
        edges = (Perturbation(block.name, scheme) for scheme in schemes if sizes[scheme].removed_weights)
        return Unit((block,), tuple(edges), sizes)

    @cached_property
    def _units_that_stay(self) -> tuple[Unit, ...]:
        """Those that no block may take with it."""
        gone = {component.name for block in (*self.blocks, *self.cut) for component in self.inside(block)}
        return tuple(unit for unit in self._units_of_matrices if unit.name not in gone)

    @cached_property
    def _of_blocks(self) -> PlanSize | None:
        """The size of all that lies in blocks when all of these are dropped, or cut as far as they may be."""
        inside = tuple(dict.fromkeys(c for block in (*self.blocks, *self.cut) for c in self.inside(block)))
        least = {unit.name: narrowest(unit) for unit in self.units if unit.is_block}
        plan = Plan.of(least | dict.fromkeys((block.name for block in self.blocks), DROP))
        plan = Plan.of(plan.schemes | self._least_in_cuts(plan))
        return plan_size(plan, inside, self.dense_bits, self.times) if inside else None

    def _least_in_cuts(self, plan: Plan) -> dict[str, str]:
        """What stays of blocks that a plan cuts, each under the scheme of fewest bits."""
        return {
            c.name: min(unit.edges, key=lambda edge: unit.sizes[edge.scheme].stored_bits).scheme
            for unit in self._units_of_matrices
            if unit.edges
            for c in unit.components
            if plan.width_of(c) is not None and not plan.drops(c.name)
        }

    def _unit(self, together: tuple[Component, ...]) -> Unit:
        first, *others = (c.name for c in together)
        taken = [scheme.name for scheme in self.parsed if all(scheme.takes(c) for c in together)]
        edges = tuple(Perturbation(first, scheme, tuple(others)) for scheme in taken)
        schemes = DENSE, *self.schemes
        sizes = {s: plan_size(Plan.uniform(together, s), together, self.dense_bits, self.times) for s in schemes}
        if self.budget.limits_size:
            edges = tuple(e for e in edges if self._cost(sizes[e.scheme]) < self._cost(sizes[DENSE]))
        return Unit(together, edges, sizes)


def _check_shapes(components: tuple[Component, ...], schemes: tuple[Scheme, ...], with_blocks: bool) -> None:
    """Raise `UserError` for a scheme that no format has for the shape of a component, and for components that no scheme
    is for, or schemes that are for none."""
    idle = [c.name for c in components if not any(scheme.takes(c) for scheme in schemes)]
    if idle and not (with_blocks and not schemes):
        raise UserError(
            f"search.schemes has none for {idle[0]} and {len(idle) - 1} others: KV caches take kv-fp8, kv-int8 and "
            "kv-int4, weights all others. Add one, or leave these out (components)"
        )
    unused = [scheme.name for scheme in schemes if scheme.is_of_cache and not any(scheme.takes(c) for c in components)]
    if unused:
        raise UserError(
            f"search.schemes: {unused[0]} is for KV caches, and the search has none: give model.kv_cache a context, "
            "and components.include patterns such as '*.kv_cache.keys' and '*.kv_cache.values'"
        )
    for scheme in schemes:
        own = [c for c in components if scheme.takes(c)]
        misfits = [(c.name, why) for c in own if (why := scheme.misfit(c.shape)) is not None]
        if misfits:
            name, why = misfits[0]
            others = f" and {len(misfits) - 1} others" if len(misfits) > 1 else ""
            raise UserError(
                f"{scheme.name} is none for {name}{others}: {why}. Leave these components out (components.exclude) or "
                "take another scheme"
            )


def _check_times(times: Times | None, budget: Budget, components: Sequence[Component]) -> None:
    """Raise `UserError` for a budget of milliseconds that nothing is known for."""
    if times is None and (budget.decode_ms is not None or budget.prefill_ms is not None):
        raise UserError("a budget of milliseconds needs search.times: what matrices take to run (dtmsearch profile)")
    if budget.prefill_ms is not None and any(component.mixture for component in components):
        raise UserError(
            "stop.prefill_ms cannot be told of this model: an expert is given a share of a prompt's tokens, which "
            "takes more than that share of the time. Give stop.decode_ms"
        )


def _least_times(choices: Sequence[Sequence[PlanSize]]) -> Picoseconds | None:
    """The least picoseconds that units can come to, of a token and of a prompt each; None where they are not known."""
    taken = [[size.picoseconds for size in sizes if size.picoseconds is not None] for sizes in choices]
    if not all(taken):
        return None
    prompts = [[prefill for _, prefill in times if prefill is not None] for times in taken]
    return sum(min(decode for decode, _ in times) for times in taken), sum(map(min, prompts)) if all(prompts) else None


def _check_budget(budget: Budget, units: tuple[Unit, ...], of_blocks: PlanSize | None) -> None:
    """Raise `UserError` for a stop rule that no plan of these units meets, with all blocks dropped."""
    choices = [[unit.sizes[DENSE], *(unit.sizes[edge.scheme] for edge in unit.edges)] for unit in units]
    choices += [] if of_blocks is None else [[of_blocks]]
    extreme = PlanSize(
        num_compressed=sum(max(size.num_compressed for size in sizes) for sizes in choices),
        num_weights=sum(sizes[0].num_weights for sizes in choices),
        compressed_weights=sum(max(size.compressed_weights for size in sizes) for sizes in choices),
        stored_bits=sum(min(size.stored_bits for size in sizes) for sizes in choices),
        pruned_weights=sum(max(size.pruned_weights for size in sizes) for sizes in choices),
        read_bits=sum((min(size.active_bits for size in sizes) for sizes in choices), Fraction(0)),
        read_weights=sum((sizes[0].active_weights for sizes in choices), Fraction(0)),
        picoseconds=_least_times(choices),
        blocks=sum(max(size.blocks for size in sizes) for sizes in choices),
        removed_weights=sum(max(size.removed_weights for size in sizes) for sizes in choices),
        removed_read=sum((max(size.removed_active for size in sizes) for sizes in choices), Fraction(0)),
        num_cached=sum(sizes[0].num_cached for sizes in choices),
    )
    for rule, bound, most in (
        ("share", extreme.share, True),
        ("components", extreme.num_compressed, True),
        ("bits_per_weight", extreme.bits_per_weight, False),
        ("sparsity", extreme.sparsity, True),
        ("size_mb", extreme.size_mb, False),
        ("active_bits_per_weight", extreme.active_bits_per_weight, False),
        ("decode_ms", extreme.decode_ms, False),
        ("prefill_ms", extreme.prefill_ms, False),
        ("blocks", extreme.blocks, True),
        ("parameters", extreme.parameters, False),
        ("flops", extreme.flops, False),
    ):
        wanted: float | None = getattr(budget, rule)
        if wanted is not None and bound is not None and (bound < wanted if most else bound > wanted):
            raise UserError(
                f"stop.{rule}: {wanted} is out of reach of these components and schemes; the "
                f"{'most' if most else 'least'} that they can come to is {bound}"
            )
