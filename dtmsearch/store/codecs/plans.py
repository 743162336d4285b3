"""From plans to rows, each with its stored bits, and what a plan amounts to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.plan import Plan, cut_by, plan_size
from dtmsearch.core.schemes import DENSE, parse_scheme
from dtmsearch.store.codecs.columns import coded, from_columns
from dtmsearch.store.schemas import PLANS

# Of a (component, scheme) pair: their codes, stored bits, weights; of what is searched of it, which is itself or what
# lies in a block, the number of components, their weights, and the bits that they are spared.
_NUMBERS = 7


@dataclass(frozen=True)
class PlanFigures:
    """What a plan amounts to over the search's components, as `core.plan.PlanSize` counts it.
    `active_bits_per_weight` is None where no component is an expert's."""

    num_compressed: int
    share: float
    bits_per_weight: float
    active_bits_per_weight: float | None = None


class PlanRows:
    """Turns plans into rows and figures, with a lookup for each (component, scheme) pair and the rest in numpy:
    a search records a hundred thousand plans of hundreds of components."""

    def __init__(self, manifest: ModelManifest, searched: Sequence[Component]) -> None:
        self._manifest = manifest
        self._searched = frozenset(c.name for c in searched)
        self._total_weights = sum(c.num_weights for c in searched)
        self._mixed = any(c.mixture for c in searched)
        self._read_weights = float(sum(c.num_weights * c.read_share for c in searched))
        self._number_of_pair: dict[tuple[str, str], int] = {}
        self._component_codes: dict[str, int] = {}
        self._scheme_codes: dict[str, int] = {}
        self._pair_rows: list[tuple[int, ...]] = []
        self._pairs = np.empty((0, _NUMBERS), np.int64)
        # The bits of a pair that a token is spared to read.
        self._unread: list[float] = []

    def table(self, plans: Sequence[Plan]) -> pa.Table:
        numbers, lengths = self._numbers(plans)
        component, scheme, stored_bits, num_weights = self._pairs[numbers].T[:4]
        plan_codes = np.repeat(np.arange(len(plans), dtype=np.int32), lengths)
        columns = {
            "plan_id": coded(plan_codes, [p.id for p in plans]),
            "component": coded(component, list(self._component_codes)),
            "scheme": coded(scheme, list(self._scheme_codes)),
            "stored_bits": pa.array(stored_bits),
            "num_weights": pa.array(num_weights),
        }
        return from_columns(PLANS, columns)

    def figures(self, plans: Sequence[Plan]) -> list[PlanFigures]:
        cut = [at for at, plan in enumerate(plans) if plan.widths]
        if cut:  # what lies in a cut block is not the sum of entries
            figures = {at: self._figures_of(plans[at]) for at in cut}
            others = iter(self.figures([plan for plan in plans if not plan.widths]))
            return [figures[at] if at in figures else next(others) for at in range(len(plans))]
        numbers, lengths = self._numbers(plans)
        owner = np.repeat(np.arange(len(plans)), lengths)
        dense_bits = self._manifest.dense_bits
        counts, weights, saved = np.zeros((3, len(plans)), np.int64)
        for found, column in zip((counts, weights, saved), self._pairs[numbers].T[4:], strict=True):
            np.add.at(found, owner, column)
        active = self._active(owner, np.array(self._unread, np.float64)[numbers], len(plans))
        return [
            PlanFigures(c, w / self._total_weights, (self._total_weights * dense_bits - s) / self._total_weights, a)
            for c, w, s, a in zip(counts.tolist(), weights.tolist(), saved.tolist(), active, strict=True)
        ]

    def _figures_of(self, plan: Plan) -> PlanFigures:
        """Figures of a plan that cuts blocks."""
        known = self._manifest.by_name
        for name, _ in plan.entries:
            if name not in known:
                raise ValueError(f"the plan names {name!r}, which {self._manifest.model} does not have")
        size = plan_size(plan, [known[name] for name in sorted(self._searched)], self._manifest.dense_bits)
        active = size.active_bits_per_weight if self._mixed else None
        return PlanFigures(size.num_compressed, size.share, size.bits_per_weight, active)

    def _active(
        self, owner: NDArray[np.int64], unread_bits: NDArray[np.float64], number: int
    ) -> Sequence[float | None]:
        """Bits per weight that a token reads of each plan, by the bits that it need not read of each pair."""
        if not self._mixed:
            return [None] * number
        saved = np.zeros(number)
        np.add.at(saved, owner, unread_bits)
        found: list[float | None] = (self._manifest.dense_bits - saved / self._read_weights).tolist()
        return found

    def _numbers(self, plans: Sequence[Plan]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The pair numbers of all entries of all plans, one plan after the other, and each plan's length."""
        entries = list(chain.from_iterable(plan.entries for plan in plans))
        try:
            numbers = list(map(self._number_of_pair.__getitem__, entries))
        except KeyError:
            for entry in dict.fromkeys(entries):
                if entry not in self._number_of_pair:
                    self._learn(entry)
            self._pairs = np.array(self._pair_rows, np.int64).reshape(-1, _NUMBERS)
            return self._numbers(plans)
        return np.array(numbers, np.int64), np.array([len(plan) for plan in plans], np.int64)

    def _learn(self, entry: tuple[str, str]) -> None:
        name, scheme = entry
        component = self._manifest.by_name.get(name)
        if component is None:
            raise ValueError(f"the plan names {name!r}, which {self._manifest.model} does not have")
        assert scheme != DENSE, "plans leave dense components out"
        parsed, dense_bits = parse_scheme(scheme), self._manifest.dense_bits
        inside = [c for c in self._manifest.by_name.values() if name in (c.block, c.layer_name) and not c.is_block]
        searched = [c for c in (inside if component.is_block else [component]) if c.name in self._searched]
        own = Plan.of({name: scheme}) if component.is_block else Plan()
        stored = [parsed.bits_of(cut_by(own, c), dense_bits) for c in searched]
        spared = [c.num_weights * dense_bits - bits for c, bits in zip(searched, stored, strict=True)]
        self._unread.append(float(sum(bits * c.read_share for c, bits in zip(searched, spared, strict=True))))
        self._number_of_pair[entry] = len(self._pair_rows)
        self._pair_rows.append(
            (
                self._component_codes.setdefault(name, len(self._component_codes)),
                self._scheme_codes.setdefault(scheme, len(self._scheme_codes)),
                sum(stored) if parsed.width is not None else parsed.bits_of(component, dense_bits),
                component.num_weights,
                len(searched),
                sum(c.num_weights for c in searched),
                sum(spared),
            )
        )


def plan_of(table: pa.Table) -> Plan:
    """The plan whose rows these are."""
    return Plan.of(dict(zip(table["component"].to_pylist(), table["scheme"].to_pylist(), strict=True)))
