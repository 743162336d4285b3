"""The paper's sparsity search ("Divergent Token Metrics", arXiv 2311.01544, section 4): rounds of probing every
component alone, allocating what is to be pruned, and training what is left.

How shares follow from measurements is arithmetic of its own (`dtmsearch.search.solver.pruned_shares`); a training is
asked for as a plan's evaluation is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import ceil, floor

from dtmsearch.core.evaluation import EvalFailure, EvalResult
from dtmsearch.core.metrics import Summary, summarize
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.core.strategy_settings import PruningSettings
from dtmsearch.errors import SearchFailed
from dtmsearch.search.protocols import TrainRequest
from dtmsearch.search.solver.allocation import Allocation
from dtmsearch.search.solver.pruned_shares import RANKINGS, Errors, Probed, ShareAllocation
from dtmsearch.search.solver.pruned_units import SHARE_DIGITS, fitted_schemes, scheme_name, share_of, units_of
from dtmsearch.search.strategies.generator import Milestone, Part, Procedure, Script, Trial
from dtmsearch.search.strategies.task import Task

# The published probes, as multiples of what a round adds, and those of the error model, as shares of what is left.
PUBLISHED_PROBES = (0.5, 1.5)
MODEL_PROBES = (0.5, 0.85)


@dataclass(frozen=True, kw_only=True)
class SparsitySettings(PruningSettings):
    """What a sparsity search is.

    `rounds`: percentage points that each adds. `trains`: whether the model of every round is trained. `allocate`: a
    statistic of the threshold allocation (`fdt75` as published, `fdt_mean`, `sdt`, `kl`), `sensitivity` or `knapsack`
    (least sum of KL damages, with the error model or without), `owl` or `uniform`. `prune`: the saliency.
    `probe_points`: empty for the allocation's own. `probe_every`: `sensitivity` allocates no more points than these
    before it probes again, over what it has allocated. `cap`: the most that any component is pruned.
    """

    rounds: tuple[float, ...]
    trains: bool = False

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

    @property
    def points(self) -> tuple[float, ...]:
        """Where every unit is probed, as `probe_points`."""
        if self.allocate in ("uniform", "owl"):
            return ()
        return self.probe_points or (MODEL_PROBES if self.allocate == "sensitivity" else PUBLISHED_PROBES)

    def probed_shares(self, number: int, now: float) -> list[float]:
        """Pruned shares at which a round measures a unit that is pruned by `now`. None lies at or beyond its end, which
        is assumed."""
        whole = 1.0 - now if self.allocate == "sensitivity" else self.rounds[number] / 100
        shares = (round(now + whole * point, SHARE_DIGITS) for point in self.points)
        return [share for share in shares if now < share < 1.0]


@dataclass(frozen=True)
class _Model:
    """What is pruned further: a plan over some weights, the share that it prunes of each unit, and its summary (None
    for the unpruned model, and for the plan of a stage until it is measured)."""

    plan: Plan
    weights_id: str
    shares: Sequence[float]
    summary: Summary | None = None


class Sparsity(Procedure):
    """Rounds of probes, one allocation, its plan's evaluation, and training where the settings say so.

    A round that adds much is allocated in stages: damages do not add up over half of a model, so the second stage's
    probes start from the plan of the first.

    Every round leaves a decision for its pruned plan and, where it trains, one for the trained model. A round's plan
    prunes the weights that the rounds before it trained, so shares are of the whole component and never fall.
    `errors` and `outliers` are those of a `ShareAllocation`.
    """

    def __init__(
        self,
        task: Task,
        settings: SparsitySettings,
        errors: Errors | None = None,
        outliers: Mapping[int, float] | None = None,
    ) -> None:
        super().__init__(task.space, task.request_for)
        self._settings, self._rank_by = settings, task.rank_by
        self._units = units_of(task.space)
        limits = settings.cap, task.continuation_tokens
        self._allocation = ShareAllocation(settings.allocate, self._units, *limits, errors, outliers)
        self.remarks: list[str] = []

    def script(self) -> Script:
        settings = self._settings
        model = _Model(Plan(), "", [0.0] * len(self._units))
        for number in range(len(settings.rounds)):
            for stage in range(settings.stages(number)):
                probed = yield from self._probe(model, number, stage)
                plan, shares = self._allocated(probed, number, stage)
                parent, model = model.plan, _Model(plan, model.weights_id, shares)
            model = yield from self._measure(model, number, parent)
            self.milestones.append(Milestone(self._label(number, plan), plan, model.weights_id))
            if settings.trains:
                weights_id = yield from self._train(TrainRequest(number, plan, model.weights_id))
                model = yield from self._measure(_Model(plan, weights_id, shares), number, plan)
                self.milestones.append(Milestone(f"{self._label(number, plan)}:trained", plan, weights_id))

    def _probe(self, model: _Model, number: int, stage: int) -> Part[Probed]:
        """Every unit of a model pruned further alone; and the model itself, where that is the plan of a stage."""
        self._foresee_from(number, stage)
        keys: list[tuple[int, float]] = []
        trials = [self._trial(model, model.plan)] if stage else []
        for unit, now in enumerate(model.shares):
            for share in self._settings.probed_shares(number, now):
                edge = self._units[unit].edge(scheme_name(self._settings.prune, share))
                trials.append(self._trial(model, model.plan.with_(edge), edge))
                keys.append((unit, share))
        answers = list((yield trials)) if trials else []
        present = self._summary(answers.pop(0), number) if stage else model.summary
        found = zip(keys, answers, strict=True)
        probes = {key: summarize(answer) for key, answer in found if isinstance(answer, EvalResult)}
        if self._settings.points and not probes and any(share < 1.0 for share in model.shares):
            raise SearchFailed(f"no probe of round {number + 1} could be measured")
        return Probed(model.shares, present, probes)

    def _allocated(self, probed: Probed, number: int, stage: int) -> tuple[Plan, list[float]]:
        """The plan of a stage, and the share that it prunes of each unit."""
        settings = self._settings
        target = settings.stage_target(number, stage)
        wanted = floor(target * sum(unit.num_weights for unit in self._units) + 1e-6)
        if settings.allocate == "uniform":
            schemes = [scheme_name(settings.prune, target)] * len(self._units)
        else:
            found = self._allocation.added(probed, wanted)
            self._remark(found, number)
            shares = [now + added for now, added in zip(probed.shares, found.shares, strict=True)]
            schemes = fitted_schemes(shares, self._units, settings.prune, wanted, settings.cap)
        plan = Plan()
        for unit, scheme in zip(self._units, schemes, strict=True):
            plan = plan.with_(unit.edge(scheme))
        return plan, [share_of(scheme) for scheme in schemes]

    def _measure(self, model: _Model, number: int, parent: Plan) -> Part[_Model]:
        """A round's model, which is decided for, with its summary."""
        (answer,) = yield [self._trial(model, model.plan, parent=parent)]
        summary = self._summary(answer, number)
        self._conclude(model.plan, answer, self._rank_by)
        return _Model(model.plan, model.weights_id, model.shares, summary)

    def _trial(self, model: _Model, plan: Plan, edge: Perturbation | None = None, parent: Plan | None = None) -> Trial:
        return Trial(plan, (0, self.num_prompts), model.plan if parent is None else parent, edge, model.weights_id)

    def _summary(self, answer: EvalResult | EvalFailure, number: int) -> Summary:
        if isinstance(answer, EvalFailure):
            raise SearchFailed(f"the model of round {number + 1} cannot be measured: {answer.message}")
        return summarize(answer)

    def _label(self, number: int, plan: Plan) -> str:
        return f"round-{number + 1}:{self._space.size(plan).sparsity:.1%}"

    def _foresee_from(self, number: int, stage: int) -> None:
        """From a stage on: its probes and those to come, every stage's plan, every trained model."""
        settings, rounds = self._settings, range(number, len(self._settings.rounds))
        stages = sum(settings.stages(each) for each in rounds) - stage
        probes = len(self._units) * len(settings.points)
        trials = stages * (probes + 1) + (1 if stage else 0) + len(rounds) * settings.trains
        self._foresee((trials, self.num_prompts))

    def _remark(self, found: Allocation, number: int) -> None:
        if found.plateau > 0.0:
            statistic, *ties = RANKINGS[self._settings.allocate]
            beyond = found.plateau / sum(unit.num_weights for unit in self._units)
            self.remarks.append(
                f"round {number + 1}: {statistic} is the same for many components at the level that meets the "
                f"target; the published allocation would have pruned {beyond:.1%} of the "
                f"weights beyond it. They were told apart by {', then '.join(ties)}"
                if ties
                else f"round {number + 1}: components that {statistic} does not tell apart were pruned alike"
            )
