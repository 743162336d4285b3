"""The paper's sparsity search ("Divergent Token Metrics", arXiv 2311.01544, section 4): rounds of probing every
component alone, allocating what is to be pruned, and training what is left.

Knows how rounds follow each other and what they ask for. How shares follow from measurements is arithmetic of its own
(`allocate`); what training does is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import ceil, floor

from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalFailure, Outcome
from dtmsearch.core.metrics import Summary, summarize
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.core.schemes import DENSE, DROP, parse_scheme
from dtmsearch.errors import SearchFailed
from dtmsearch.search.loop import Ask, Decision
from dtmsearch.search.solver import allocation as allocate
from dtmsearch.search.solver.allocation import Allocation, Curve, DamageCurve
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.rounds import RequestFactory

# Trains a plan's model: (round from 0, plan, weights that it is pruned from) -> the trained weights.
Recover = Callable[[int, Plan, str], str]
# Relative weight errors of a component at pruned shares, in order of the shares.
Errors = Mapping[str, Sequence[tuple[float, float]]]

# The published probes, as multiples of what a round adds, and those of the error model, as shares of what is left.
PUBLISHED_PROBES = (0.5, 1.5)
MODEL_PROBES = (0.5, 0.85)
# Statistics that the threshold allocation ranks by, each with those that divide its plateaus.
_RANKINGS: dict[str, tuple[str, ...]] = {
    "fdt75": ("fdt75", "fdt_mean", "kl"),
    "fdt_mean": ("fdt_mean", "kl"),
    "sdt": ("sdt", "kl"),
    "kl": ("kl",),
}
_SHARE_DIGITS = 6
# Saliencies that prune as many weights in every row.
_ROWS_ALIKE = ("wanda",)
_CURVE_STEPS = 50


@dataclass(frozen=True)
class SparsitySettings:
    """What a sparsity search is.

    `rounds`: percentage points that each adds. `allocate`: a statistic of the threshold allocation (`fdt75` as
    published, `fdt_mean`, `sdt`, `kl`), `sensitivity` or `knapsack` (least sum of KL damages, with the error model or
    without), `owl` or `uniform`. `prune`: the saliency. `probe_points`: empty for the allocation's own.
    `probe_every`: `sensitivity` allocates no more points than these before it probes again, over what it has
    allocated. `cap`: the most that any component is pruned. `continuation_tokens` is the most that FDT can be.
    """

    rounds: tuple[float, ...]
    allocate: str = "sensitivity"
    prune: str = "magnitude"
    probe_points: tuple[float, ...] = ()
    probe_every: float = 25.0
    cap: float = 1.0
    continuation_tokens: int = 100

    @cached_property
    def targets(self) -> tuple[float, ...]:
        """The share of all weights that is pruned after each round."""
        return tuple(round(points, 9) / 100.0 for points in accumulate(self.rounds))

    def stages(self, number: int) -> int:
        """In how many equal parts what a round adds is allocated, each after probes of its own."""
        return ceil(self.rounds[number] / self.probe_every - 1e-9) if self.allocate == "sensitivity" else 1

    def stage_target(self, number: int, stage: int) -> float:
        """The share of all weights that is pruned after a stage of a round, both from 0."""
        before = self.targets[number - 1] if number else 0.0
        return before + (self.targets[number] - before) * (stage + 1) / self.stages(number)


@dataclass(frozen=True)
class Milestone:
    """A model that a round came to: a plan, over the base model's weights (``) or trained ones."""

    label: str
    plan: Plan
    weights_id: str


@dataclass(frozen=True)
class _Unit:
    """Components that change together."""

    components: tuple[Component, ...]

    @property
    def name(self) -> str:
        return self.components[0].name

    @cached_property
    def num_weights(self) -> int:
        return sum(component.num_weights for component in self.components)

    def edge(self, scheme: str) -> Perturbation:
        return Perturbation(self.name, scheme, tuple(component.name for component in self.components[1:]))

    def pruned(self, scheme: str) -> int:
        return sum(parse_scheme(scheme).pruned_weights(component.shape) for component in self.components)


class Sparsity:
    """Rounds of probes, one allocation, its plan's evaluation, and training where `recover` is given.

    A round that adds much is allocated in stages: damages do not add up over half of a model, so the second stage's
    probes start from the plan of the first.

    Every round leaves a decision for its pruned plan and, where it trains, one for the trained model. A round's plan
    prunes the weights that the rounds before it trained, so shares are of the whole component and never fall.
    `errors` are what `sensitivity` knows of the weights; without them they count as normally distributed. `outliers`
    gives the part of each layer's weights that `owl` calls outliers.
    """

    def __init__(
        self,
        space: SearchSpace,
        request_for: RequestFactory,
        settings: SparsitySettings,
        rank_by: str = "fdt",
        recover: Recover | None = None,
        errors: Errors | None = None,
        outliers: Mapping[int, float] | None = None,
    ) -> None:
        self._space, self._request_for, self._settings, self._rank_by = space, request_for, settings, rank_by
        self._recover, self._errors, self._outliers = recover, errors, outliers
        self._units = tuple(_Unit(unit.components) for unit in space.units)
        self._weights = [unit.num_weights for unit in self._units]
        self._round = self._stage = 0
        self._plan, self._weights_id = Plan(), ""
        self._shares = [0.0] * len(self._units)
        self._present: Summary | None = None  # of the model that this round prunes; None for the dense one
        self._unasked: list[Ask] = []
        self._waiting: dict[str, tuple[int, float]] = {}
        self._answers: dict[tuple[int, float], Summary] = {}
        self._known: dict[str, Summary | EvalFailure] = {}  # all that was told, by request
        self._candidate: Plan | None = None
        self._to_train = False
        self._decisions: list[Decision] = []
        self._remarks: list[str] = []
        self._num_asked = 0
        self.milestones: list[Milestone] = []
        self._begin_round()

    @property
    def done(self) -> bool:
        return self._round == len(self._settings.rounds)

    @property
    def step(self) -> int:
        return len(self._decisions)

    @property
    def best(self) -> Plan | None:
        return self._decisions[-1].plan if self._decisions else None

    @property
    def weights_id(self) -> str:
        """The weights that the best plan prunes."""
        return self.milestones[-1].weights_id if self.milestones else ""

    @property
    def decisions(self) -> Sequence[Decision]:
        return self._decisions

    @property
    def remarks(self) -> Sequence[str]:
        return self._remarks

    def expected_evaluations(self) -> int:
        if self.done:
            return self._num_asked
        settings, probes = self._settings, len(self._units) * self._num_points
        trains = self._recover is not None
        left = (
            settings.stages(self._round) - self._stage
        )  # this round's plans to come; the first one's probes are asked
        to_come = range(self._round + 1, len(settings.rounds))
        stages = left + sum(settings.stages(number) for number in to_come)
        trained = trains * (len(to_come) + (not self._trained))
        return self._num_asked + stages * (probes + 1) - probes * (left > 0) + trained

    def ask(self) -> list[Ask]:
        while self._to_train:
            self._train()
            if not self._waiting:  # the trained model was measured before
                self._go_on()
        asks, self._unasked = self._unasked, []
        return asks

    def tell(self, request_id: str, outcome: Outcome) -> None:
        key = self._waiting.pop(request_id)
        self._known[request_id] = outcome if isinstance(outcome, EvalFailure) else summarize(outcome)
        self._answer(key, self._known[request_id])
        if not self._waiting:
            self._go_on()

    def _answer(self, key: tuple[int, float], found: Summary | EvalFailure) -> None:
        if not isinstance(found, EvalFailure):
            self._answers[key] = found
        elif key[0] < 0:
            raise SearchFailed(f"the model of round {self._round + 1} cannot be measured: {found.message}")

    def _go_on(self) -> None:
        """All that was asked is answered: allocate, or decide."""
        if self._candidate is None:
            self._propose()
            return
        summary = self._answers.pop((-1, 0.0))
        self._decide(summary)
        if self._recover is not None and not self._trained:
            self._to_train = True
        else:
            self._round += 1
            self._begin_round()

    # A round: probes, the plan, its training.

    @property
    def _num_points(self) -> int:
        kind = self._settings.allocate
        if kind in ("uniform", "owl"):
            return 0
        return len(self._settings.probe_points or (MODEL_PROBES if kind == "sensitivity" else PUBLISHED_PROBES))

    def _begin_round(self) -> None:
        self._candidate, self._trained, self._stage = None, False, 0
        if not self.done:
            self._begin_stage()

    def _begin_stage(self) -> None:
        self._answers = {}
        if self._stage:
            self._ask((-1, 0.0), self._plan)
        for number, unit in enumerate(self._units):
            for share in self._probed_shares(number):
                self._ask((number, share), self._plan.with_(unit.edge(scheme_name(self._settings.prune, share))))
        if not self._waiting:
            self._propose()

    def _probed_shares(self, number: int) -> list[float]:
        """Pruned shares at which a unit is measured. None lies at or beyond its end, which is assumed."""
        settings, now = self._settings, self._shares[number]
        if not self._num_points:
            return []
        if settings.allocate == "sensitivity":
            parts = [(1.0 - now) * point for point in settings.probe_points or MODEL_PROBES]
        else:
            parts = [settings.rounds[self._round] / 100 * p for p in settings.probe_points or PUBLISHED_PROBES]
        shares = (round(now + part, _SHARE_DIGITS) for part in parts)
        return [share for share in shares if now < share < 1.0]

    def _ask(self, key: tuple[int, float], plan: Plan) -> None:
        request = replace(self._request_for(plan, self._plan), weights_id=self._weights_id)
        if request.id in self._waiting:
            return  # two shares that are one scheme
        if request.id in self._known:  # a plan of an earlier round or stage, over the same weights
            self._answer(key, self._known[request.id])
            return
        self._waiting[request.id] = key
        self._unasked.append(Ask(request, None if key[0] < 0 else self._edge(plan, key[0])))
        self._num_asked += 1

    def _edge(self, plan: Plan, number: int) -> Perturbation:
        unit = self._units[number]
        return unit.edge(plan.scheme_of(unit.name))

    def _propose(self) -> None:
        """Allocate what this stage of the round adds; have the plan measured, or probe on from it."""
        self._present = self._answers.pop((-1, 0.0), self._present)
        if self._num_points and not self._answers and any(share < 1.0 for share in self._shares):
            raise SearchFailed(f"no probe of round {self._round + 1} could be measured")
        target = self._settings.stage_target(self._round, self._stage)
        wanted = floor(target * sum(self._weights) + 1e-6)
        if self._settings.allocate == "uniform":
            schemes = [scheme_name(self._settings.prune, target)] * len(self._units)
        else:
            found = self._allocated(wanted)
            self._remark(found)
            shares = [now + added for now, added in zip(self._shares, found.shares, strict=True)]
            schemes = fitted_schemes(shares, self._units, self._settings.prune, wanted, self._settings.cap)
        plan = Plan()
        for unit, scheme in zip(self._units, schemes, strict=True):
            plan = plan.with_(unit.edge(scheme))
        self._shares = [share_of(scheme) for scheme in schemes]
        self._stage += 1
        if self._stage < self._settings.stages(self._round):
            self._plan = plan
            self._begin_stage()
        else:
            self._candidate = plan
            self._ask((-1, 0.0), plan)
            if not self._waiting:
                self._go_on()

    def _allocated(self, wanted: int) -> Allocation:
        kind, settings = self._settings.allocate, self._settings
        left = wanted - sum(now * number for now, number in zip(self._shares, self._weights, strict=True))
        caps = [max(settings.cap - now, 0.0) for now in self._shares]
        left = max(left, 0.0)
        if kind == "sensitivity":
            return allocate.knapsack_allocation(self._modelled_damages(), self._weights, left, caps)
        if kind == "knapsack":
            return allocate.knapsack_allocation(self._measured_damages(), self._weights, left, caps)
        if kind == "owl":
            assert self._outliers is not None
            by_unit = [self._outliers[unit.components[0].layer] for unit in self._units]
            return allocate.owl_allocation(by_unit, self._weights, self._shares, wanted)
        rankings = [self._curves(statistic) for statistic in _RANKINGS[kind]]
        return allocate.threshold_allocation(rankings, self._weights, left, caps)

    def _remark(self, found: Allocation) -> None:
        if found.plateau > 0.0:
            statistic, *ties = _RANKINGS[self._settings.allocate]
            self._remarks.append(
                f"round {self._round + 1}: {statistic} is the same for many components at the level that meets the "
                f"target; the published allocation would have pruned {found.plateau / sum(self._weights):.1%} of the "
                f"weights beyond it. They were told apart by {', then '.join(ties)}"
                if ties
                else f"round {self._round + 1}: components that {statistic} does not tell apart were pruned alike"
            )

    def _decide(self, summary: Summary) -> None:
        assert self._candidate is not None
        plan, size = self._candidate, self._space.size(self._candidate)
        self._decisions.append(Decision(self.step, plan, None, summary.value(self._rank_by), size, summary))
        label = f"round-{self._round + 1}:{size.sparsity:.1%}" + (":trained" if self._trained else "")
        self.milestones.append(Milestone(label, plan, self._weights_id))
        self._plan, self._present = plan, summary

    def _train(self) -> None:
        assert self._recover is not None and self._candidate is not None
        self._weights_id = self._recover(self._round, self._candidate, self._weights_id)
        self._to_train, self._trained = False, True
        self._ask((-1, 0.0), self._candidate)

    # What was measured, as curves.

    def _measured(self, number: int, value: Callable[[Summary], float]) -> list[tuple[float, float]]:
        """(Pruned share, value) of a unit's probes, in order of the shares."""
        found = [(share, value(summary)) for (unit, share), summary in self._answers.items() if unit == number]
        return sorted(found)

    def _curves(self, statistic: str) -> list[Curve]:
        """Every unit's quality over its added share."""
        quality = _QUALITIES[statistic]
        largest_kl = max((_kl(summary) for summary in self._answers.values()), default=0.0)
        tokens = float(self._settings.continuation_tokens)
        best, worst = {"sdt": (0.0, -tokens), "kl": (0.0, -2.0 * largest_kl)}.get(statistic, (tokens, 0.0))
        if self._present is not None and statistic != "fdt75":  # the published one assumes its maximum in every round
            best = quality(self._present)
        curves = []
        for number, now in enumerate(self._shares):
            points = [(share - now, value) for share, value in self._measured(number, quality)]
            curves.append(allocate.curve(points, 1.0 - now, best, min(worst, best)))
        return curves

    @property
    def _present_kl(self) -> float:
        return 0.0 if self._present is None else _kl(self._present)

    def _measured_damages(self) -> list[DamageCurve]:
        """KL damages beyond that of the present model, as far as they were measured."""
        present = self._present_kl
        curves = []
        for number, now in enumerate(self._shares):
            points = [(share - now, kl - present) for share, kl in self._measured(number, _kl)]
            curves.append(allocate.power_curve(points, 1.0 - now))
        return curves

    def _modelled_damages(self) -> list[DamageCurve]:
        present = self._present_kl
        measured = [
            [(share, kl - present) for share, kl in self._measured(number, _kl)] for number in range(len(self._units))
        ]
        grid = [step / _CURVE_STEPS for step in range(1, _CURVE_STEPS + 1)]
        error = self._error if self._errors is not None else _gaussian_error
        return allocate.modelled_damages(measured, self._shares, [grid] * len(self._units), error)

    def _error(self, number: int, share: float) -> float:
        """The relative weight error of a unit's first component, in a straight line between the shares known."""
        assert self._errors is not None
        points = [(0.0, 0.0), *self._errors[self._units[number].name], (1.0, 1.0)]
        for (left, low), (right, high) in pairwise(points):
            if share <= right:
                return low + (high - low) * (share - left) / (right - left)
        return points[-1][1]


def _gaussian_error(_number: int, share: float) -> float:
    return allocate.gaussian_pruning_error(share)


def _kl(summary: Summary) -> float:
    return summary.value("kl")


_QUALITIES: dict[str, Callable[[Summary], float]] = {
    "fdt75": lambda summary: summary.fdt_p75,
    "fdt_mean": lambda summary: summary.fdt_mean,
    "sdt": lambda summary: -summary.sdt_mean,
    "kl": lambda summary: -_kl(summary),
}


def scheme_name(prune: str, share: float) -> str:
    """The scheme that prunes a share of a component: `dense` at none, `drop` at all of it."""
    digits = f"{share:.{_SHARE_DIGITS}f}"
    if float(digits) <= 0.0:
        return DENSE
    return DROP if float(digits) >= 1.0 else f"{prune}-{digits.rstrip('0')}"


def share_of(scheme: str) -> float:
    """The share that a scheme of `scheme_name` prunes."""
    parsed = parse_scheme(scheme)
    return 1.0 if parsed.family == DROP else 0.0 if parsed.pruning is None else parsed.pruning.share


def fitted_schemes(
    shares: Sequence[float], units: Sequence[_Unit], prune: str, wanted: int, cap: float = 1.0
) -> list[str]:
    """Schemes nearest to shares, none above `cap`, that together prune no more than `wanted` weights, and less by no
    more than a step of one unit: a weight in every row where rows are pruned alike, elsewhere one weight or one of a
    million parts."""
    steps = [_num_steps(unit, prune) for unit in units]
    counts = [floor(share * number + 1e-6) for share, number in zip(shares, steps, strict=True)]
    rests = [share * number - count for share, number, count in zip(shares, steps, counts, strict=True)]

    def scheme(at: int) -> str:
        return scheme_name(prune, counts[at] / steps[at])

    def move(at: int, by: int) -> int:
        """Weights that are pruned more after moving a unit's share by some steps."""
        before = units[at].pruned(scheme(at))
        counts[at] += by
        return units[at].pruned(scheme(at)) - before

    total = sum(unit.pruned(scheme(at)) for at, unit in enumerate(units))
    for at in sorted(range(len(units)), key=lambda index: -rests[index]):
        if total > wanted and counts[at]:
            total += move(at, -1)
        elif rests[at] > 0.0 and (counts[at] + 1) / steps[at] <= cap:
            gained = move(at, 1)
            if total + gained > wanted:
                gained += move(at, -1)
            total += gained
    return [scheme(at) for at in range(len(units))]


def _num_steps(unit: _Unit, prune: str) -> int:
    if prune in _ROWS_ALIKE:
        return max(component.shape[1] for component in unit.components)
    return min(int(10**_SHARE_DIGITS), unit.num_weights)
