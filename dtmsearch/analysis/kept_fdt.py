"""What a run says of `min_fdt`: what was asked, what was found on prompts of its own, and what on the held-out ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from dtmsearch.analysis.format import counted
from dtmsearch.config.recorded_text import section_of
from dtmsearch.core.records import RunRecord
from dtmsearch.core.statistics import lower_bound
from dtmsearch.store.store import ResultStore


@dataclass(frozen=True)
class KeptFdt:
    """`asked` of a plan's mean FDT, and what it is: `found` on `num_prompts` prompts that nothing else was measured on,
    and `at_least` so much with `confidence`; on the held-out prompts `held_out`, None where there are none."""

    asked: float
    confidence: float
    found: float
    at_least: float
    num_prompts: int
    held_out: float | None

    def __str__(self) -> str:
        held_out = "" if self.held_out is None else f"; held out {self.held_out:.1f}"
        return (
            f"asked {self.asked:g}; found {self.found:.1f} on {counted(self.num_prompts, 'prompt')} of its own, "
            f"at least {self.at_least:.1f} with {self.confidence:.0%} confidence{held_out}"
        )


def kept_fdt(store: ResultStore, record: RunRecord, held_out: float | None) -> KeptFdt | None:
    """What is known of the final plan of a run that was asked to keep an FDT, which on the held-out prompts has
    `held_out`; None of other runs, and before it is measured."""
    stop = section_of(record.config, "search").get("stop") or {}
    if stop.get("min_fdt") is None or record.min_fdt_reference_id is None or record.final_plan_id is None:
        return None
    where = (pc.field("reference_id") == record.min_fdt_reference_id) & (pc.field("plan_id") == record.final_plan_id)
    rows = store.table("evaluations", ["fdt"], record.run, where & (pc.field("status") == "ok")).to_pylist()
    if not rows:
        return None
    fdt, confidence = np.array(rows[0]["fdt"]), float(stop["min_fdt_confidence"])
    at_least = lower_bound(fdt, 0.0, confidence)
    return KeptFdt(float(stop["min_fdt"]), confidence, float(fdt.mean()), at_least, len(fdt), held_out)
