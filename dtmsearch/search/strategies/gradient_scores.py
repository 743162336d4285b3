"""Scores by which other tools allocate bits, taken as prices are, for comparisons on identical weights and prompts.

Both are of the log loss of a sample's own tokens, and end in the exact solver's plan for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.plan import Plan
from dtmsearch.core.strategy_settings import FisherSettings
from dtmsearch.search.solver.fisher_form import Prices
from dtmsearch.search.strategies.generator import Script
from dtmsearch.search.strategies.priced import Floats, TakePrices
from dtmsearch.search.strategies.solver_based import Solver
from dtmsearch.search.strategies.task import Task


class _GradientScores(Solver, ABC):
    """The plan of least summed score, measured."""

    def __init__(self, task: Task, take: TakePrices | None, settings: FisherSettings = FisherSettings()) -> None:
        super().__init__(task)
        self._price, self._samples, self._length = take, (0, settings.samples), task.continuation_tokens

    def script(self) -> Script:
        self._foresee((1, self.num_prompts))
        assert self._price is not None, "whoever makes the strategy says by what prices are taken"
        space = self._choices.space
        names = [component.name for component in space.components]
        summed = Prices.of(self._choices, names, space.schemes, self._scores(self._price), self._length)
        damages: list[Floats] = [own.mean(axis=0) / self._length for own in summed.products]
        found, answer = yield from self._measurable(damages, (0, self.num_prompts))
        self._lead(found, answer)

    @abstractmethod
    def _scores(self, price: TakePrices) -> NDArray[np.float32]:
        """Scores [samples, components, schemes] of the whole space."""


class SquaredGradients(_GradientScores):
    """The diagonal of the empirical Fisher form at outputs: the sum over a component's outputs of the square of the
    loss's gradient times the square of what an option changes there (the gradient score of NVIDIA Model-Optimizer's
    `auto_quantize`; here the loss is that of the continuation)."""

    def _scores(self, price: TakePrices) -> NDArray[np.float32]:
        return price("squared", Plan(), self._samples)


class GradientChanges(_GradientScores):
    """The sum over a component's weights of |gradient x what its scheme has changed|, in the model that is compressed
    uniformly with that scheme (the score of AutoRound's `AutoScheme`; here a sample's gradient, there a batch's)."""

    def _scores(self, price: TakePrices) -> NDArray[np.float32]:
        space = self._choices.space
        around = [space.uniform(scheme) for scheme in space.schemes]
        return np.concatenate([price("changes", plan, self._samples) for plan in around], axis=2)
