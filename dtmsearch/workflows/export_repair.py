"""Plans that split what vLLM fuses: refused, with the repairs there are and what each costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalRequest, EvalResult, ReplicaSettings
from dtmsearch.core.fusion import tied_plan, untied_groups
from dtmsearch.core.holders import VLLM_TOGETHER
from dtmsearch.core.plan import Plan, plan_size
from dtmsearch.core.plan_file import plan_to_json
from dtmsearch.export.formats.compressed_tensors import NAME as PACKED
from dtmsearch.export.job import Job, refuse
from dtmsearch.model.replica.replica import Replica
from dtmsearch.workflows.export_source import Source


def require_tied(found: Source, target: Path, job: Job) -> None:
    """Raises `UserError` for a plan that splits what vLLM fuses, with the repairs there are and what each costs."""
    components, bits = found.manifest.components, job.dtype.itemsize * 8
    groups = untied_groups(found.plan, components)
    if not groups:
        return
    lines = [_said(found.plan, group) for group in groups]
    repairs = {word: tied_plan(found.plan, groups, bits, word == "widest") for word in ("widest", "narrowest")}
    fdt = _fdt_of(found, repairs)
    before = plan_size(found.plan, components, bits).stored_bits
    for word, plan in repairs.items():
        change = (plan_size(plan, components, bits).stored_bits - before) / 8
        lines.append(f"repair: each to its {word} scheme: {change:+,.0f} bytes, {fdt[word][1]}")
    # The narrower one costs nothing if it says the same.
    cheapest = "narrowest" if fdt["narrowest"][0] >= fdt["unrepaired"][0] else "widest"
    path = target.with_name(target.name + ".repaired.json")
    path.write_text(plan_to_json(repairs[cheapest], found.manifest, found.weights_id), encoding="utf-8")
    lines.append(f"the cheapest repair ({cheapest}) is in {path}; measure it with `dtmsearch evaluate`, then export it")
    lines.append(
        "or search with `fused: true` (and `experts: layer`), which ties them from the start; or --runtime transformers"
    )
    raise refuse(PACKED, VLLM_TOGETHER, lines)


def _said(plan: Plan, group: Sequence[Component]) -> str:
    """The schemes of a group: of each component, or of all of a mixture's how many have which."""
    if not group[0].mixture:
        return ", ".join(f"{c.name}: {plan.scheme_of(c.name)}" for c in group)
    counts = Counter(plan.scheme_of(c.name) for c in group)
    schemes = ", ".join(f"{number} x {scheme}" for scheme, number in counts.most_common())
    return f"the experts of {group[0].mixture}: {schemes}"


def _fdt_of(found: Source, plans: Mapping[str, Plan]) -> dict[str, tuple[float, str]]:
    """Mean FDT of plans, and of the found one as `unrepaired`, with words for it."""
    if found.recorded is None:
        return dict.fromkeys((*plans, "unrepaired"), (0.0, "FDT not measured: the store has no reference for it"))
    reference = found.recorded.reference
    replica = Replica(found.spec, ReplicaSettings(weights_folder=str(found.trained.parent) if found.trained else ""))
    replica.use(reference)
    if any(plan.needs_calibration for plan in plans.values()):
        return dict.fromkeys((*plans, "unrepaired"), (0.0, "FDT not measured: it needs the search's calibration"))
    prompts = (0, reference.num_prompts)
    requests = [EvalRequest(plan, reference.id, prompts, weights_id=found.weights_id) for plan in plans.values()]
    before = float(found.recorded.fdt.mean())
    fdt = {"unrepaired": (before, f"FDT {before:.2f}")}
    for word, outcome in zip(plans, replica.evaluate(requests), strict=True):
        assert isinstance(outcome, EvalResult), outcome
        mean = float(outcome.fdt.mean())
        fdt[word] = (mean, f"FDT {mean:.2f} ({mean - before:+.2f})")
    return fdt
