"""Between a search and its validation: the smallest of its plans that is shown to keep `stop.min_fdt`, on prompts that
neither search nor validation sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dtmsearch.analysis.format import counted
from dtmsearch.core.evaluation import EvalResult, Reference
from dtmsearch.core.metrics import summarize
from dtmsearch.core.plan import Plan
from dtmsearch.core.variant import Variant
from dtmsearch.search.min_fdt import bound, smallest_that_keeps
from dtmsearch.workflows.calibrate import Calibrating
from dtmsearch.workflows.session import Session, whole_request


@dataclass(frozen=True)
class KeptPlan:
    """The plan that is shown to keep `min_fdt`, and that in words."""

    plan: Plan
    said: str


def keep_fdt(session: Session, calibrating: Calibrating, ladder: Sequence[Plan], reference: Reference) -> KeptPlan:
    """The last of `ladder`, from the least compressed plan to the search's own, that is shown to keep `min_fdt` on a
    reference that the replicas hold; the unquantized model where none is. Raises `SearchStopped`."""
    stop = session.file.search.stop
    assert stop.min_fdt is not None
    calibration_id = calibrating.for_plans(ladder)
    requests = {
        f"min_fdt:{i}": whole_request(Variant(plan, "", calibration_id), reference) for i, plan in enumerate(ladder)
    }
    outcomes = list(session.measure(requests, "choice").values())
    asked = f"min_fdt {stop.min_fdt:g}"
    on = f"on {counted(reference.num_prompts, 'prompt')} of its own"
    kept = smallest_that_keeps(outcomes, stop.min_fdt, stop.min_fdt_confidence)
    if kept is None:
        return KeptPlan(Plan(), f"{asked}: no plan is shown to keep it {on}, so the unquantized model is the plan")
    found = outcomes[kept]
    assert isinstance(found, EvalResult)
    said = (
        f"{asked}: {on} the plan has {summarize(found).fdt_mean:.1f}, and at least "
        f"{bound(found, stop.min_fdt_confidence):.1f} with {stop.min_fdt_confidence:.0%} confidence"
    )
    if kept < len(ladder) - 1:
        said += "; the plan that the search came to is not shown to keep it"
    return KeptPlan(ladder[kept], said)
