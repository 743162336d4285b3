"""When one plan makes another needless: as small or smaller, and as good or better. Pure.

Knows sizes and qualities, nothing of where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A plan's size (less is better) and quality (more is better)."""

    size: float
    quality: float

    def dominates(self, other: Point) -> bool:
        """At least as good in both, better in one."""
        return self.size <= other.size and self.quality >= other.quality and self != other


def front(points: Sequence[Point]) -> list[bool]:
    """For each point whether no other dominates it. Of equal ones all are on the front."""
    order = sorted(range(len(points)), key=lambda i: (points[i].size, -points[i].quality))
    on_front = [False] * len(points)
    best: Point | None = None
    for i in order:
        point = points[i]
        if best is None or not best.dominates(point):
            on_front[i] = True
            best = point if best is None or point.quality > best.quality else best
    return on_front


class Race:
    """Searches that shrink a model step by step, held against each other while they run.

    One is dominated when at `patience` decisions in a row another of its group had come to a plan as small or smaller
    that was better by at least `margin`. Groups hold what can be compared: the same model on the same prompts.
    """

    def __init__(self, margin: float, patience: int) -> None:
        self._margin, self._patience = margin, patience
        self._curves: dict[str, dict[str, list[Point]]] = {}
        self._behind: dict[str, int] = {}

    def add(self, group: str, search: str, point: Point) -> str | None:
        """Note a search's next plan; the name of the search that dominates it, if one does."""
        curves = self._curves.setdefault(group, {})
        curves.setdefault(search, []).append(point)
        ahead = next((name for name, curve in curves.items() if name != search and self._is_ahead(curve, point)), None)
        self._behind[search] = 0 if ahead is None else self._behind.get(search, 0) + 1
        return ahead if self._behind[search] >= self._patience else None

    def _is_ahead(self, curve: Sequence[Point], point: Point) -> bool:
        return any(p.size <= point.size and p.quality >= point.quality + self._margin for p in curve)
