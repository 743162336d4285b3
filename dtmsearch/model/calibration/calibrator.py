"""A replica's calibrations: it gathers their statistics, solves what schemes need solved, and says how far schemes move
weights.

Works on the unquantized model, to which it brings the replica back where that is needed. Knows nothing of evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from dtmsearch.core.calibration import (
    Calibration,
    ExpertUse,
    FloatArray,
    InputStatistics,
    PackedMatrix,
    WeightError,
    too_few_to_weigh,
)
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import Scheme, solved_pairs
from dtmsearch.model.calibration.calibration_texts import CalibrationTexts
from dtmsearch.model.calibration.expert_use import expert_uses
from dtmsearch.model.calibration.hessians import Hessians
from dtmsearch.model.calibration.matrix_solver import MatrixSolver
from dtmsearch.model.calibration.weight_errors import ErrorMeter, applied
from dtmsearch.model.calibration.width_solver import WidthSolver
from dtmsearch.model.compress.compressor import Fetch
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.weights.standing import Standing


class AnyCalibrator(Protocol):
    """What a replica asks of its calibrator, whether its layers lie in one process or in several."""

    def use(self, calibration: Calibration, statistics: InputStatistics | None) -> None: ...

    def fetch_from(self, calibration_id: str, fetch: Fetch) -> None: ...

    def statistics(self, calibration_id: str) -> InputStatistics: ...

    def activate(self, calibration_id: str) -> None: ...

    def prepare(self, plans: Iterable[Plan], calibration_id: str | None = None) -> None: ...

    def solve(self, pairs: Iterable[tuple[str, Scheme]]) -> list[PackedMatrix]: ...

    def weight_errors(
        self, components: Sequence[str], schemes: Sequence[Scheme], calibration_id: str, by_hessian: bool
    ) -> list[WeightError]: ...

    def applied(self, component: str, weight: Tensor, scheme: Scheme) -> Tensor: ...

    def rest(self) -> None: ...

    def forget(self) -> None: ...


class Calibrator:
    """The calibrations that a replica was given, one of them active: a face for what works by them.

    Statistics and Hessians are those of the base model; matrices are solved for the weights that the model stands on.
    `body` is the pass as far as it goes here, `rows_in_batch` gives the rows of a batch for rows of so many tokens
    where the text begins here.
    """

    def __init__(
        self,
        body: Body,
        standing: Standing,
        manifest: ModelManifest,
        rows_in_batch: Callable[[int], int] = lambda tokens: 1,
    ) -> None:
        self._body, self._standing, self._manifest = body, standing, manifest
        self.texts = CalibrationTexts(body, manifest, rows_in_batch)
        self.hessians = Hessians(self.texts, standing, manifest)
        self.solver = MatrixSolver(self.texts, self.hessians, standing, manifest)
        self.widths = WidthSolver(self.texts, self.solver, self.hessians, standing, manifest)
        self._errors = ErrorMeter(self.hessians, self.solver, standing, manifest, self.statistics)
        self._statistics: dict[str, InputStatistics] = {}

    def use(self, calibration: Calibration, statistics: InputStatistics | None) -> None:
        """Take a calibration; where there are no statistics of it yet, they are gathered when first needed."""
        self.texts.take(calibration)
        if statistics is not None:
            self._statistics[calibration.id] = statistics

    def fetch_from(self, calibration_id: str, fetch: Fetch) -> None:
        """Where matrices solved by a calibration may be had."""
        self.solver.fetch_from(calibration_id, fetch)

    def statistics(self, calibration_id: str) -> InputStatistics:
        """Gather, if they are not known, mean squares and largest values of all components' inputs."""
        if calibration_id not in self._statistics:
            with self._standing.on_base(), self._standing.eagerly():
                squares, tokens, largest = self.texts.gatherer(self.texts.known(calibration_id)).mean_squares()
            squares |= self._unweighed(tokens)
            self._statistics[calibration_id] = InputStatistics(calibration_id, squares, tokens, largest)
        return self._statistics[calibration_id]

    def _unweighed(self, tokens: Mapping[str, int]) -> dict[str, FloatArray]:
        """Mean squares of 1 for experts that too few tokens reach, by how many reach which component."""
        experts = [c for c in self._manifest.components if c.stacked and c.layer in self._body.own]
        few = [c for c in experts if too_few_to_weigh(c, tokens.get(c.name, 0))]
        return {c.name: np.ones(c.shape[1], np.float32) for c in few}

    def activate(self, calibration_id: str) -> None:
        """Calibrate by this one from now on. Raises `ValueError` for one that was not given."""
        if self.texts.active == calibration_id:
            return
        self.texts.known(calibration_id)
        statistics = self.statistics(calibration_id)
        self._standing.rest_on(self._standing.weights_id)  # dense: what stands there may be calibrated by another
        self.texts.active = calibration_id
        self.forget()
        compressor = self._standing.weights.compressor
        compressor.calibrate(calibration_id, statistics, self._body.input_device)

    def prepare(self, plans: Iterable[Plan], calibration_id: str | None = None) -> None:
        """Make sure that these plans can be applied: by the calibration given, else the active or the first one."""
        plans = [plan for plan in plans if plan.needs_calibration]
        if plans:
            self.activate(self.texts.usual if calibration_id is None else calibration_id)
            self.solve([pair for plan in plans for pair in plan.parsed.items()])

    def solve(self, pairs: Iterable[tuple[str, Scheme]]) -> list[PackedMatrix]:
        """Solve for (component, scheme) pairs by the active calibration, blocks under widths among them; see
        `MatrixSolver.solve`."""
        pairs = list(pairs)
        matrices = [(name, scheme) for name, scheme in pairs if scheme.width is None]
        blocks = [(name, scheme) for name, scheme in pairs if scheme.width is not None]
        found = self.solver.solve(matrices)
        found += self.widths.solve(blocks) if blocks else []
        place = {(name, scheme.name): at for at, (name, scheme) in enumerate(solved_pairs(pairs))}
        return sorted(found, key=lambda packed: place[packed.component, packed.scheme])

    def weight_errors(
        self, components: Sequence[str], schemes: Sequence[Scheme], calibration_id: str, by_hessian: bool
    ) -> list[WeightError]:
        """Errors of every scheme on every component, in this order of nesting; see `Replica.weight_errors`."""
        self._standing.rest_on_base()
        if calibration_id:
            self.activate(calibration_id)
        return self._errors.of(components, schemes, calibration_id, by_hessian)

    def expert_uses(self, components: Sequence[str], schemes: Sequence[Scheme], calibration_id: str) -> list[ExpertUse]:
        """See `dtmsearch.model.calibration.expert_use.expert_uses`, of a calibration's text on the base model."""
        held = [self._manifest.by_name[name] for name in components]
        with self._standing.on_base(), self._standing.eagerly():
            return expert_uses(
                self.texts.gatherer(self.texts.known(calibration_id)), self._standing.weights, held, schemes
            )

    def applied(self, component: str, weight: Tensor, scheme: Scheme) -> Tensor:
        """The dense matrix [rows, cols] of a component under a scheme."""
        return applied(self._standing.weights, component, weight, scheme)

    def rest(self) -> None:
        """Let go of the text's states, for evaluations need the room."""
        self.hessians.rest()

    def forget(self) -> None:
        """Let go of all that can be gathered again."""
        self.hessians.forget()
