"""What uniform plans, and llama.cpp's own mixtures, say of a plan on held-out prompts: which of at most its size are
its rivals, whether one does as well, and whether the plan's divergence is that of small noise.

Divergence follows the square root of KL, whatever caused the damage; the factor is the model's and the text's own, and
uniform plans show it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest

from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalResult, Outcome
from dtmsearch.core.gguf_presets import PRESET, largest_preset
from dtmsearch.core.gguf_types import PREFIX
from dtmsearch.core.metrics import rank_key, summarize
from dtmsearch.core.plan import LARGER, Plan, PlanSize
from dtmsearch.core.plan_widths import LAST_LAYERS, ONE_WIDTH, is_even
from dtmsearch.core.schemes import DENSE, DROP, UNQUANTIZED, Line, family_lines, parse_scheme, uniform_parts
from dtmsearch.core.widths import WidthKind
from dtmsearch.search.space import SearchSpace

# So many rivals are measured at most, the largest of each family first; where families stand beside several schemes of
# KV caches, so many of each pair at least.
_MOST_RIVALS, _RIVALS_OF_A_PAIR = 12, 3
# A scheme that the search does not name may take the plan's place within this relative difference in stored bits.
_SAME_SIZE = 0.05
# A share of divergent tokens off that of uniform plans by more than this factor was caused by something else.
_OFF_THE_LAW = 1.5
# Of channels and experts, from the widest on.
_SHARES = tuple(hundredths / 100 for hundredths in range(1, 100))
# Fewer divergent tokens than this in all say too little.
_FEW_DIVERGENT = 100


def uniform_rivals(space: SearchSpace, plan: Plan) -> list[str]:
    """Schemes whose uniform plans may be the best known of at most the plan's size: of every line of the families that
    the search uses (`core.schemes.family_lines`) the least compressed one that stores at most 1% more than the plan;
    where the budget counts the bits that a token reads, or time, one that has it read, or takes, at most 1% more."""
    return rivals_of_size(space, float(space.budget.counted(space.size(plan))))


def rivals_of_size(space: SearchSpace, counted: float) -> list[str]:
    """`uniform_rivals` of a plan of so much of what the budget counts."""
    if space.budget.takes_less is not None:
        return _rivals_in_time(space, LARGER * counted)
    active = space.budget.reads_less
    kinds = Counter(
        (replace(c, name="", layer=0, kind=c.kind if c.is_cache else "", mixture=""), c.read_share)
        for c in space.components
    )
    longest = max(component.shape[1] for component, _ in kinds)
    most = LARGER * counted

    def bits(scheme: str) -> float:
        parts = uniform_parts(scheme)
        sizes = (
            (read if active else 1)
            * number
            * next((part for part in parts if part.takes(component)), UNQUANTIZED).bits_of(component, space.dense_bits)
            for (component, read), number in kinds.items()
        )
        return float(sum(sizes))

    families = []
    for lines in _lines_of(space):
        found: dict[str, float] = {}
        for line in lines:
            # A group as long as a row is a row.
            if (of_line := uniform_parts(line[0])[0]).granularity == "group" and of_line.group_size >= longest:
                continue
            fitting = {scheme: size for scheme in line if (size := bits(scheme)) <= most}
            if fitting:
                best = max(fitting, key=lambda scheme: fitting[scheme])
                found[best] = fitting[best]
        families.append(sorted(found, key=lambda scheme: -found[scheme]))
    in_turn = (scheme for scheme in chain.from_iterable(zip_longest(*families)) if scheme is not None)
    has_caches = any(component.is_cache for component in space.components)
    return list(in_turn)[: max(_MOST_RIVALS, _RIVALS_OF_A_PAIR * len(families) if has_caches else 0)]


def _lines_of(space: SearchSpace) -> list[list[Line]]:
    """Of each family lines of uniform plans' names; where KV caches are searched, each of weights also beside each
    scheme of caches."""
    families = list(family_lines(space.parsed).values())
    caches = [scheme.name for scheme in space.parsed if scheme.is_of_cache]
    of_weights = [lines for lines in families if not parse_scheme(lines[0][0]).is_of_cache]
    beside = [
        [tuple(f"{scheme}+{cache}" for scheme in line) for line in lines] for cache in caches for lines in of_weights
    ]
    return [*beside, *families]


def preset_rivals(space: SearchSpace, counted: float) -> dict[str, Plan]:
    """Of a search among llama.cpp's types, its own mixture (`preset:NAME` -> plan) that stores most among those of at
    most 1% more than so much of what the budget counts; where KV caches are searched, also beside each scheme of these
    (`preset:NAME+kv-fp8`). Empty of other searches, of mixtures of experts, and where
    there is a table of times."""
    if space.times is not None or not any(scheme.name.startswith(PREFIX) for scheme in space.parsed):
        return {}
    assert space.manifest is not None, "a search among llama.cpp's types knows its model"
    most = LARGER * counted

    def fits(plan: Plan) -> bool:
        return float(space.budget.counted(space.size(plan))) <= most

    searched = any(component.is_cache for component in space.components)
    caches = [scheme.name for scheme in space.parsed if scheme.is_of_cache] if searched else []
    found: dict[str, Plan] = {}
    for cache in ("", *caches):
        found |= largest_preset(space.components, space.manifest, fits, cache)
    return found


def shape_rivals(space: SearchSpace, plan: Plan) -> dict[str, Plan]:
    """What rules make of a model's shape that a search of nothing else is held against: `depth_rivals`, and all MLPs
    that may be cut at one width of hundredths, by the rule of the search's first one for channels or experts, that
    comes to at most the plan's size, within the budget if the plan is."""
    found = depth_rivals(space, plan)
    width = next((w for name in space.cuts if (w := parse_scheme(name).width) and w.block_kind == "mlp"), None)
    if width is None or space.schemes:
        return found
    size, ending = space.size(plan), f"{width.rule}{'-repair' if width.repair else ''}"
    for share in _SHARES:
        name = f"{width.kind}-{share:g}-{ending}"
        other = Plan.of({block.name: name for block in space.cut if parse_scheme(name).takes(block)})
        if _fits(space, space.size(other), size):
            return found | {ONE_WIDTH: other}
    return found


def evened(space: SearchSpace, plan: Plan) -> Plan | None:
    """A plan of several widths rounded to one width of each kind of units, as ordinary configurations say it: the
    widest by which as many weights go at least or, where the budget counts time, that takes no longer, of those whose
    times are known; by the rule that most of the plan's own blocks are cut by. None where the plan has one width, or
    blocks that may not be cut, or drops a single block of a layer, which no configuration says."""
    parts = {c.layer for c in space.components if plan.drops(c.name)}
    if is_even(plan, space.components) or any(c.layer in parts and not plan.drops(c.name) for c in space.components):
        return None
    schemes = {name: scheme for name, scheme in plan.entries if name not in plan.widths}
    of_kind: dict[WidthKind, dict[str, str]] = {}
    for name, scheme in plan.widths.items():
        if scheme.width is not None and any(block.name == name for block in space.cut):
            of_kind.setdefault(scheme.width.kind, {})[name] = scheme.name
    for own in of_kind.values():
        schemes |= _one_width(space, own, [block for block in space.cut if not plan.drops(block.name)]) or own
    found = Plan.of(schemes)
    return found if is_even(found, space.components) else None


def _one_width(space: SearchSpace, own: Mapping[str, str], blocks: Sequence[Component]) -> dict[str, str] | None:
    """All of some blocks that are of one kind of units under one width by which as much goes as by their `own`."""
    rules = [f"-{w.rule}{'-repair' if w.repair else ''}" for name in own.values() if (w := parse_scheme(name).width)]
    ((rule, _),) = Counter(rules).most_common(1)
    widths = [width for name in own.values() if (width := parse_scheme(name).width) is not None]
    groups = max(width.groups for width in widths)
    amounts = [f"heads-{kept}:{groups}" for kept in range(groups - 1, 0, -1)]
    amounts = amounts if groups else [f"{widths[0].kind}-{share:g}" for share in _SHARES]
    wanted = space.size(Plan.of(own))
    for amount in amounts:
        alike = {block.name: f"{amount}{rule}" for block in blocks if parse_scheme(f"{amount}{rule}").takes(block)}
        size = space.size(Plan.of(alike))
        if space.budget.takes_less is None:
            enough = size.removed_weights >= wanted.removed_weights
        else:
            enough = size.picoseconds is not None and space.budget.counted(size) <= space.budget.counted(wanted)
        if enough:
            return alike
    return None


def depth_rivals(space: SearchSpace, plan: Plan) -> dict[str, Plan]:
    """Of a search that drops blocks and nothing else, what a rule drops without measuring: as many of the last layers
    as come to at most the plan's size, within the budget if the plan is, of the first of them a single block where that
    is enough; of each what the search may drop. Empty of other searches."""
    if not space.blocks or space.schemes:
        return {}
    size, gone = space.size(plan), Plan()
    of_layers = sorted({block.layer for block in space.blocks}, reverse=True)
    for layer in of_layers:
        here = [block for block in space.blocks if block.layer == layer]
        whole = [block for block in here if block.kind == "layer"]
        single = sorted((b for b in here if b.kind != "layer"), key=lambda block: block.num_weights)
        tried = [
            Plan.of(gone.schemes | {block.name: DROP for block in blocks})
            for blocks in (*([block] for block in single), whole or here)
        ]
        fitting = (other for other in tried if _fits(space, space.size(other), size))
        if (found := next(fitting, None)) is not None:
            return {LAST_LAYERS: found}
        gone = tried[-1]
    return {}


def _rivals_in_time(space: SearchSpace, most: float) -> list[str]:
    """The schemes of the table of times whose uniform plans take at most `most` picoseconds, the least compressed
    first."""
    assert space.times is not None
    known = dict.fromkeys([*space.schemes, *sorted({scheme for scheme, *_ in space.times.rows} - {DENSE})])
    sizes = {scheme: space.size(space.uniform(scheme)) for scheme in known}
    fitting = [s for s, size in sizes.items() if size.picoseconds is not None and space.budget.counted(size) <= most]
    return sorted(fitting, key=lambda scheme: -sizes[scheme].stored_bits)[:_MOST_RIVALS]


def may_take_its_place(space: SearchSpace, plan: Plan, other: Plan) -> bool:
    """Whether a rival is one that the search could have come to: of schemes that it names, or a uniform plan of another
    width in the same granularity and near the plan's size."""
    schemes = set(other.schemes.values())
    if schemes <= set(space.schemes) or (space.blocks and schemes == {DROP}):
        return True
    if space.cut and all(parse_scheme(scheme).width is not None for scheme in schemes):
        return True
    schemes = {scheme for scheme in schemes if not parse_scheme(scheme).is_of_cache}
    if len(schemes) != 1:
        return False
    (scheme,) = schemes
    kin = {sibling for named in space.parsed for sibling in named.kind.siblings(named)}
    count = space.budget.counted
    gap = abs(float(count(space.size(other))) / max(1.0, float(count(space.size(plan)))) - 1.0)
    return scheme in kin and gap <= _SAME_SIZE


def best_rival(
    space: SearchSpace, plans: Mapping[str, Plan], outcomes: Mapping[str, Outcome], metric: str
) -> str | None:
    """The label of the best measured one in `metric` of the uniform plans and mixtures of llama.cpp among `plans` that
    store at most 1% more than `plan`, one of them; None where there is none."""
    count = space.budget.counted
    most = LARGER * float(count(space.size(plans["plan"])))
    keys = {
        label: rank_key(summarize(outcome), metric)
        for label, other in plans.items()
        if label != "plan" and _is_rival(space, label, other) and count(space.size(other)) <= most
        if isinstance(outcome := outcomes.get(label), EvalResult)
    }
    return min(keys, key=lambda label: keys[label], default=None)


def rivals_of(space: SearchSpace, plans: Mapping[str, Plan]) -> list[str]:
    """The labels of what `plan`, one of the plans, must beat: uniform ones, and mixtures of llama.cpp, within the
    budget that store no more."""
    plan = plans["plan"]
    size = space.size(plan)
    return [
        label
        for label, other in plans.items()
        if other.id != plan.id and _is_rival(space, label, other) and _fits(space, space.size(other), size)
    ]


def better_uniform(
    space: SearchSpace, plans: Mapping[str, Plan], outcomes: Mapping[str, Outcome], metric: str
) -> str | None:
    """The label of the best such plan (`rivals_of`) that `plan`, one of `plans`, does not beat in `metric`; None if it
    beats them all. A plan that could not be measured beats nothing."""
    measured = {label: outcomes[label] for label in rivals_of(space, plans)}
    rivals = {
        label: rank_key(summarize(outcome), metric)
        for label, outcome in measured.items()
        if isinstance(outcome, EvalResult)
    }
    if not rivals:
        return None
    best = min(rivals, key=lambda label: rivals[label])
    found = outcomes["plan"]
    beaten = isinstance(found, EvalResult) and rank_key(summarize(found), metric)[0] < rivals[best][0]
    return None if beaten else best


def law_remarks(
    space: SearchSpace, plans: Mapping[str, Plan], outcomes: Mapping[str, Outcome], length: int
) -> list[str]:
    """A line if the plan's SDT leaves the square root of its KL by more than the uniform plans' do. `outcomes` may hold
    more than those of `plans`."""
    factors = {
        label: divergent_share(outcome, length)
        for label, plan in plans.items()
        if plan.entries and isinstance(outcome := outcomes[label], EvalResult)
    }
    own = factors.pop("plan", None)
    others = sorted(f for label, f in factors.items() if f is not None and _is_uniform(space, plans[label]))
    if own is None or not others:
        return []
    usual = others[len(others) // 2]
    if usual / _OFF_THE_LAW <= own <= usual * _OFF_THE_LAW:
        return []
    return [
        f"the plan's share of divergent tokens is {own:.2f} x sqrt(KL), that of uniform plans {usual:.2f}: something "
        "other than small noise happened to it"
    ]


def divergent_share(result: EvalResult, length: int) -> float | None:
    """The share of divergent tokens of a continuation of `length` over the square root of KL in nats; None where KL
    was not measured, or next to nothing diverged."""
    if result.kl is None or result.sdt.sum() < _FEW_DIVERGENT:
        return None
    kl = float(result.kl.mean())
    return float(result.sdt.mean()) / length / kl**0.5 if kl > 0.0 else None


def _fits(space: SearchSpace, size: PlanSize, plan_size: PlanSize) -> bool:
    """Whether a size is at most the plan's, and within the budget if the plan's is."""
    within = space.budget.reached(size) or not space.budget.reached(plan_size)
    count = space.budget.counted
    return within and count(size) <= count(plan_size)


def _is_uniform(space: SearchSpace, plan: Plan) -> bool:
    """Whether the weights that are searched have one scheme, all of them, and the KV caches one; or either one, and the
    others none."""
    groups = [{plan.scheme_of(c.name) for c in space.components if c.is_cache == cache} for cache in (False, True)]
    return bool(plan.entries) and all(len(schemes) <= 1 for schemes in groups)


def _is_rival(space: SearchSpace, label: str, plan: Plan) -> bool:
    return label.startswith((PRESET, LAST_LAYERS, ONE_WIDTH)) or _is_uniform(space, plan)
