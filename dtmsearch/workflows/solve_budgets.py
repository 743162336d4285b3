"""Plans for further budgets from the prices that a run has taken, with what they are predicted to cost. Nothing is
measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc

from dtmsearch.analysis.summary import record_of
from dtmsearch.config import SearchFile
from dtmsearch.config.stop_section import StopSection
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.plan import Plan
from dtmsearch.core.plan_file import plan_to_json
from dtmsearch.core.records import RunRecord
from dtmsearch.errors import UserError
from dtmsearch.search.solver.choices import Choices, Options
from dtmsearch.search.solver.fisher_form import Prices
from dtmsearch.search.solver.knapsack import Infeasible, front
from dtmsearch.store.codecs import price_blocks
from dtmsearch.store.codecs.tables import components_of
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.build import space_of
from dtmsearch.workflows.lookup import stored_file

_DTYPES = {16: "bfloat16", 32: "float32"}
# The logarithm of measured over predicted KL where no plan was measured: what it comes to for small damage, by how much
# it grows with predicted KL (what second order does not see), at most, and its spread about that
# (docs/search-quality.md).
_CHOSEN, _BEYOND, _MOST_BEYOND, _UNMEASURED = 0.05, 1.15, 1.2, 0.15
_NORMAL_95 = 1.96
# A budget in bits that excludes nothing but the unquantized model.
_ALL_BUT_DENSE = 1.0 - 1e-9


@dataclass(frozen=True)
class SolvedPlan:
    """The best plan by prices within `bits_asked` stored bits per weight, its own size, and the KL in nats per token
    that is predicted of it, with a 95% interval. `compared_with` measured plans put the prediction right."""

    bits_asked: float
    bits_per_weight: float
    kl: float
    kl_low: float
    kl_high: float
    compared_with: int
    plan_id: str
    plan: str


@dataclass(frozen=True)
class ForeseenPlan:
    """A plan's stored bits per weight, and the KL in nats per token that prices foresee of it, with a 95% interval."""

    bits_per_weight: float
    kl: float
    kl_low: float
    kl_high: float


@dataclass(frozen=True)
class PredictedFront:
    """What prices foresee over all sizes: the best plans (`front`, from few bits to many, at most as many as were asked
    for) and the uniform ones (`uniform`, by scheme). `compared_with` measured plans put the predictions right."""

    front: list[ForeseenPlan]
    uniform: dict[str, ForeseenPlan]
    compared_with: int


def solve_budgets(results: ResultStore, run: str, bits: Sequence[float]) -> list[SolvedPlan]:
    """Plans for budgets in stored bits per weight, in the order asked for. Raises `UserError` for a run without prices,
    for what is no budget, and for one out of reach."""
    for each in bits:
        if not (math.isfinite(each) and each > 0.0):
            raise UserError(f"got {each:g} stored bits per weight; a positive number is wanted, such as 3.5")
    foresight = _foresight(results, run)
    return [_solved(foresight, each) for each in bits]


def predicted_front(results: ResultStore, run: str, up_to: float = 0.0, most: int = 60) -> PredictedFront:
    """What a run's prices foresee of the best plan of every size: from the smallest that its schemes allow up to the
    largest uniform plan's, or to `up_to` bits per weight if that is more. Raises `UserError` for a run without prices.
    """
    foresight = _foresight(results, run)
    choices = foresight.choices
    every = {scheme: choices.uniform(scheme) for scheme in choices.space.schemes}
    uniform = {scheme: foresight.of(options) for scheme, options in every.items() if options is not None}
    largest = [plan.bits_per_weight for plan in uniform.values()] or [float(foresight.manifest.dense_bits)]
    up_to = max(up_to, *largest)
    found = front(foresight.prices.damages(), choices.bits)
    bits = np.array([foresight.bits(options) for options in found])
    shown = np.flatnonzero(bits <= up_to + 1e-9)
    wanted = np.linspace(bits[0], bits[shown[-1]], min(most, len(shown)))
    kept = dict.fromkeys(int(np.argmin(np.abs(bits - each))) for each in wanted)
    return PredictedFront([foresight.of(found[at]) for at in kept], uniform, len(foresight.ratios))


@dataclass(frozen=True, eq=False)
class _Foresight:
    """What is known of the plans of a run that has taken prices. `ratios` as `_ratios` has them."""

    manifest: ModelManifest
    file: SearchFile
    choices: Choices
    prices: Prices
    ratios: list[tuple[float, float]]

    def bits(self, options: Options) -> float:
        """Stored bits per weight."""
        return self.choices.cost(self.choices.bits, options) / self._num_weights

    @cached_property
    def _num_weights(self) -> int:
        return self.choices.space.size(Plan()).num_weights

    def of(self, options: Options) -> ForeseenPlan:
        predicted = self.prices.additive(options)
        ratio, spread = _ratio_at(self.ratios, predicted.mean)
        error = math.hypot(spread, predicted.error / max(predicted.mean, 1e-12))
        kl = predicted.mean * math.exp(ratio)
        low, high = kl * math.exp(-_NORMAL_95 * error), kl * math.exp(_NORMAL_95 * error)
        return ForeseenPlan(self.bits(options), kl, low, high)


def _foresight(results: ResultStore, run: str) -> _Foresight:
    """Raises `UserError` for a run without prices."""
    record, file = record_of(results, run), stored_file(results, run)
    manifest = _manifest(results, record)
    names, products = _products(results, record, file, manifest)
    choices = Choices(space_of(file, manifest))
    if choices.space.budget.takes_less is not None:  # plans are foreseen by their bits, whatever the run counted
        choices = _within_bits(file, manifest, _ALL_BUT_DENSE * manifest.dense_bits)
    prices = Prices.of(choices, names, file.search.schemes, products, file.prompts.continuation_tokens)
    return _Foresight(manifest, file, choices, prices, _ratios(results, record, choices, prices))


def _manifest(results: ResultStore, record: RunRecord) -> ModelManifest:
    """What the store knows of a run's model: enough to count sizes and name plans."""
    rows = results.table("components", where=pc.field("manifest_id") == record.manifest_id)
    if rows.num_rows == 0:
        raise UserError(f"run {record.run!r} has not read its model yet: continue it with `dtmsearch resume`")
    first = rows.slice(0, 1).to_pylist()[0]
    components = tuple(dict.fromkeys(components_of(rows)))
    layers = 1 + max(component.layer for component in components)
    dtype = _DTYPES.get(first["dense_bits"], "float32")
    return ModelManifest(
        first["model"], None, dtype, layers, str(record.manifest_id), components, source=first["source"] or ""
    )


def _products(
    results: ResultStore, record: RunRecord, file: SearchFile, manifest: ModelManifest
) -> tuple[list[str], Any]:
    """The components that are priced, and products [samples, components, schemes]."""
    base = (pc.field("kind") == "fisher") & (pc.field("around_plan_id") == Plan().id)
    rows = results.table("prices", run=record.run, where=base)
    if rows.num_rows == 0:
        raise UserError(
            f"run {record.run!r} has taken no prices: only strategies fisher and auto take them, and {record.run!r} is "
            f"a search by {file.search.strategy}" + (" that has not begun to" if record.status != "finished" else "")
        )
    blocks = price_blocks.blocks_of(rows)
    priced = {component for component, _ in next(iter(blocks.values()))}
    names = [component.name for component in manifest.components if component.name in priced]
    parts = [[[blocks[first][c, s] for s in file.search.schemes] for c in names] for first in sorted(blocks)]
    return names, np.concatenate([np.array(part).transpose(2, 0, 1) for part in parts])


def _within_bits(file: SearchFile, manifest: ModelManifest, bits: float) -> Choices:
    """The choices of a search file whose budget is so many stored bits per weight."""
    asked = file.search.model_copy(update={"stop": StopSection(bits_per_weight=bits)})
    return Choices(space_of(file.model_copy(update={"search": asked}), manifest))


def _solved(foresight: _Foresight, bits: float) -> SolvedPlan:
    manifest = foresight.manifest
    choices = _within_bits(foresight.file, manifest, bits)
    try:
        options = choices.solve(foresight.prices.damages()).options
    except Infeasible:
        raise UserError(f"{bits:g} bits per weight are out of reach of this run's schemes") from None
    found, plan = foresight.of(options), choices.plan(options)
    return SolvedPlan(
        bits_asked=bits,
        bits_per_weight=found.bits_per_weight,
        kl=found.kl,
        kl_low=found.kl_low,
        kl_high=found.kl_high,
        compared_with=len(foresight.ratios),
        plan_id=plan.id,
        plan=plan_to_json(plan, manifest),
    )


def _ratios(results: ResultStore, record: RunRecord, choices: Choices, prices: Prices) -> list[tuple[float, float]]:
    """(log predicted, log of measured over predicted KL) of the whole plans that the run has measured."""
    columns = ["plan_id", "kl", "num_prompts", "num_compressed", "reference_id", "status"]
    rows = results.table("evaluations", columns, run=record.run).to_pylist()
    least = len(choices.space.components) // 2
    whole = {
        row["plan_id"]: row["kl"]
        for row in sorted(rows, key=lambda row: row["num_prompts"] or 0)
        if row["status"] == "ok" and row["kl"] and row["num_compressed"] > least
    }
    found = []
    for plan_id, kl in whole.items():
        plan = results.plan(plan_id, record.run)
        options = None if plan is None else _options_of(choices, plan)
        predicted = 0.0 if options is None else prices.additive(options).mean
        if predicted > 0.0:
            found.append((math.log(predicted), math.log(kl / predicted)))
    return found


def _options_of(choices: Choices, plan: Plan) -> tuple[int, ...] | None:
    """A plan as a choice of options; None where it is of other schemes."""
    options = []
    for unit, schemes in zip(choices.units, choices.schemes, strict=True):
        scheme = plan.scheme_of(unit.name)
        if scheme not in schemes:
            return None
        options.append(schemes.index(scheme))
    return tuple(options)


def _ratio_at(ratios: Sequence[tuple[float, float]], at: float) -> tuple[float, float]:
    """The log ratio to expect where `at` is predicted, and its standard deviation: by what measured plans are off the
    usual one, the nearer in log predicted KL the more they count."""
    usual = _usual_ratio(at)
    if not ratios or at <= 0.0:
        return usual, _UNMEASURED
    distance = np.array([abs(predicted - math.log(at)) for predicted, _ in ratios])
    values = np.array([ratio - _usual_ratio(math.exp(predicted)) for predicted, ratio in ratios])
    weights = np.exp(-distance)
    mean = float((weights * values).sum() / weights.sum())
    scatter = float((weights * (values - mean) ** 2).sum() / weights.sum())
    return usual + mean, math.sqrt(scatter + (_UNMEASURED**2) * min(1.0, float(distance.min()) + 1.0 / len(ratios)))


def _usual_ratio(predicted: float) -> float:
    """The log ratio to expect before anything is measured."""
    return _CHOSEN + min(_BEYOND * predicted, _MOST_BEYOND)
