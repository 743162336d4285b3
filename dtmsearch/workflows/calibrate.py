"""A run's calibration: cut from its text, its statistics and solved matrices found in the store or made and recorded.

The driver's side: replicas gather and solve, only here is anything written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

from dtmsearch.core.calibration import (
    TOKENS_PER_INPUT,
    Calibration,
    ExpertUse,
    InputStatistics,
    PackedMatrix,
    WeightError,
    too_few_to_solve,
)
from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import IntArray
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import StatisticsRecord
from dtmsearch.core.schemes import Scheme, parse_scheme, solved_pairs
from dtmsearch.search.solver.pruned_units import scheme_name
from dtmsearch.search.space import SearchSpace
from dtmsearch.workflows.session import Session
from dtmsearch.workflows.text_windows import cut_calibration

Pair = tuple[str, str]

# Errors of pruning are known at this many parts of one.
_ERROR_STEPS = 20


class Calibrating:
    """The calibration of a search file, made when it is first needed; replicas have it from then on."""

    def __init__(self, session: Session) -> None:
        self._session, self._file, self._pool, self._writer = session, session.file, session.pool, session.writer
        self._handed: set[Pair] = set()

    @cached_property
    def _calibration(self) -> Calibration:
        how = self._file.calibration_through, self._file.calibration_experts
        cut = self._pool.cut_calibration
        return cut_calibration(self._file, lambda texts, count, tokens, seed: cut(texts, count, tokens, seed, *how))

    @property
    def rows_of_its_own(self) -> list[IntArray]:
        """The tokens [rows, length] that calibration reads beside the search's prompts; without a section of its own it
        reads those."""
        return [] if self._file.calibration is None else [self._calibration.tokens]

    @cached_property
    def id(self) -> str:
        """The calibration's id; it is cut, and its statistics are gathered, if that has not been done."""
        calibration = self._calibration
        statistics = self._session.store.statistics(calibration.id)
        if statistics is None:
            gathered = self._pool.gather_statistics(calibration)
            statistics = self._writer.share(StatisticsRecord(calibration.manifest_id, gathered)).statistics
        self._pool.use_calibration(calibration, statistics)
        if self._session.space.needs_calibration:
            for line in sparsely_reached(self._session.space.components, statistics):
                self._session.note(line)
        return calibration.id

    def for_plans(self, plans: Iterable[Plan]) -> str:
        """Make sure that replicas can apply these plans; the calibration's id, or nothing where none needs it."""
        plans = [plan for plan in plans if plan.needs_calibration]
        if plans:
            self._solve({pair for plan in plans for pair in plan.parsed.items()})
        return self.id if plans else ""

    def for_schemes(self, components: Sequence[Component], schemes: Sequence[str]) -> str:
        """The same for every plan over these components and schemes."""
        return self.for_plans([Plan.uniform(components, scheme) for scheme in schemes])

    def for_space(self, space: SearchSpace) -> str:
        """The same for every plan of a search's space."""
        cuts = [Plan.of({unit.name: edge.scheme}) for unit in space.units if unit.is_block for edge in unit.edges]
        return self.for_plans([*(Plan.uniform(space.components, scheme) for scheme in space.schemes), *cuts])

    def errors(self, components: Sequence[Component], schemes: Sequence[str]) -> dict[Pair, float]:
        """(component, scheme) -> relative squared error of the component's weights; as the run has recorded it. Where
        schemes are calibrated, it is that of the outputs, which alone tells rounding and GPTQ apart."""
        found = self._recorded_errors(components, schemes, lambda: self.for_schemes(components, schemes))
        return {pair: _of_outputs(error) for pair, error in found.items()}

    def _recorded_errors(
        self, components: Sequence[Component], schemes: Sequence[str], calibrated: Callable[[], str]
    ) -> dict[Pair, WeightError]:
        """Errors as the run has recorded them: what a strategy decides by them, a replay decides by them again.
        `calibrated` is asked for the calibration's id, if there is one, where they must be measured."""
        wanted = {(component.name, scheme) for component in components for scheme in schemes}
        known = {(error.component, error.scheme): error for error in self._writer.read(WeightError)}
        if wanted - known.keys():
            given = calibrated()
            found = self._pool.weight_errors([c.name for c in components], list(schemes), given, bool(given))
            self._writer.add(found)
            known = {(error.component, error.scheme): error for error in found}
        return known

    def expert_uses(self, components: Sequence[Component], schemes: Sequence[str]) -> list[ExpertUse]:
        """How the calibration's text uses the experts among these components, and what each scheme does there; as the
        run has recorded it, for what a strategy decides by them, a replay decides by them again."""
        experts = [component for component in components if component.mixture]
        wanted = {(component.mixture, component.expert, scheme) for component in experts for scheme in schemes}
        known = self._writer.read(ExpertUse)
        if wanted - {(use.mixture, use.expert, use.scheme) for use in known}:
            self.for_schemes(experts, schemes)
            found = self._pool.expert_uses([c.name for c in experts], list(schemes), self.id)
            self._writer.add(found)
            return found
        return [use for use in known if (use.mixture, use.expert, use.scheme) in wanted]

    def pruning_errors(self, components: Sequence[Component]) -> dict[str, list[tuple[float, float]]] | None:
        """What a sparsity search that models damages knows of the weights: component -> (pruned share, relative
        squared error of its outputs); None for other searches."""
        search = self._file.search
        if search.allocate != "sensitivity":
            return None
        # SparseGPT's own would have to be solved for at every share; Wanda's have nearly its shape.
        saliency = "wanda" if search.prune == "sparsegpt" else search.prune
        share_of = {scheme_name(saliency, step / _ERROR_STEPS): step / _ERROR_STEPS for step in range(1, _ERROR_STEPS)}
        errors: dict[str, list[tuple[float, float]]] = {component.name: [] for component in components}
        for (component, scheme), error in self._recorded_errors(components, list(share_of), lambda: self.id).items():
            errors[component].append((share_of[scheme], _of_outputs(error)))
        return errors

    def outliers(self) -> dict[int, float] | None:
        """The part of each layer's weights that stand out, for the allocation that wants them."""
        return self._pool.outlier_shares(self.id) if self._file.search.allocate == "owl" else None

    def _solve(self, pairs: set[tuple[str, Scheme]]) -> None:
        """Hand over what is solved, layer by layer, and have the rest solved first."""
        wanted = {(component, scheme.name) for component, scheme in solved_pairs(pairs)} - self._handed
        if not wanted:
            return
        # A part for a replica: a layer, or all that is to be solved one layer after the other.
        parts = self._by_layer if self._file.calibration_through == "base" else _by_scheme
        lacking = wanted - self._session.store.shared_keys(PackedMatrix, self.id)
        tuned = {pair for pair in lacking if parse_scheme(pair[1]).is_tuned}
        missing = [*parts(lacking - tuned), *_by_scheme(tuned)]
        for matrices in self._pool.solve(self.id, missing):
            self._writer.share_parts(self.id, matrices)
        for layer in self._by_layer(wanted):
            recorded = self._session.store.matrices(self.id, {component for component, _ in layer})
            self._pool.use_solved(self.id, [recorded[pair] for pair in layer])
        self._handed |= wanted

    def _by_layer(self, pairs: set[Pair]) -> list[list[Pair]]:
        layers: dict[int, list[Pair]] = {}
        for component, scheme in sorted(pairs):
            layers.setdefault(self._session.manifest.by_name[component].layer, []).append((component, scheme))
        return [layers[layer] for layer in sorted(layers)]


def sparsely_reached(components: Sequence[Component], statistics: InputStatistics) -> list[str]:
    """What is said of experts that too few tokens of the calibration reach."""
    experts = [c for c in components if c.stacked and c.mixture]
    few = [c for c in experts if too_few_to_solve(c, statistics.num_tokens.get(c.name, 0))]
    if not few:
        return []
    name, tokens = min(((c.name, statistics.num_tokens.get(c.name, 0)) for c in few), key=lambda pair: pair[1])
    return [
        f"{len(few)} of {len(experts)} experts' matrices are reached by fewer than {TOKENS_PER_INPUT} calibration "
        f"tokens for each input ({name} by {tokens}): GPTQ and SparseGPT round and prune these as without "
        "calibration; give more text, or calibration.experts: all"
    ]


def _by_scheme(pairs: set[Pair]) -> list[list[Pair]]:
    schemes: dict[str, list[Pair]] = {}
    for component, scheme in sorted(pairs):
        schemes.setdefault(scheme, []).append((component, scheme))
    return list(schemes.values())


def _of_outputs(error: WeightError) -> float:
    """The error of the component's outputs where Hessians told it, else that of its weights."""
    return error.plain if error.weighted_by_hessian is None else error.weighted_by_hessian
