"""The figures of a report as Altair charts. Knows what a row means to the eye, nothing of stores or pages."""

from __future__ import annotations

from dtmsearch.report.charts.bits_spent import spending_figures
from dtmsearch.report.charts.drawing import Figure, plan_name, save, title_of, unchecked
from dtmsearch.report.charts.foreseen import foreseen_figures
from dtmsearch.report.charts.front import front_figures
from dtmsearch.report.charts.heatmaps import plan_figures, price_figures, schemes_of, sensitivity_figures
from dtmsearch.report.charts.quality import (
    course_figures,
    held_out_figures,
    interaction_figures,
    survival_figures,
    sweep_figures,
)
from dtmsearch.report.charts.sparsity_charts import sparsity_figures
from dtmsearch.report.charts.tree import tree_figures
from dtmsearch.report.facts import RunFacts

__all__ = ["Figure", "figures", "plan_name", "save", "schemes_of", "title_of"]


_DRAWN = (
    held_out_figures,
    sensitivity_figures,
    price_figures,
    plan_figures,
    spending_figures,
    front_figures,
    foreseen_figures,
    course_figures,
    survival_figures,
    interaction_figures,
    tree_figures,
    sparsity_figures,
    sweep_figures,
)


def figures(facts: RunFacts) -> list[Figure]:
    """Every figure that the rows of a run bear."""
    with unchecked():
        return [figure for drawn in _DRAWN for figure in drawn(facts)]
