"""Plans as a terminal shows them, and as values for JSON: their size and schemes, what they measure, their export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dtmsearch.analysis.format import components, counted, plain, size_in_words
from dtmsearch.console.terminal_tables import labelled, table
from dtmsearch.core.metrics import Summary
from dtmsearch.core.plan import Plan, PlanSize

if TYPE_CHECKING:
    from dtmsearch.analysis.pareto_runs import Candidate
    from dtmsearch.workflows.evaluate import PlanMeasurement, RecoveredModel
    from dtmsearch.workflows.export import Exported
    from dtmsearch.workflows.score import TaskScore
    from dtmsearch.workflows.solve_budgets import SolvedPlan

METRIC_COLUMNS = ("FDT", "SDT", "DPPL", "PPL", "KL")


def size_line(num_compressed: int | None, share: float, bits_per_weight: float, active: float | None = None) -> str:
    """How much is compressed, and the bits per weight; of a mixture those that a token reads (`active`) too."""
    bits = size_in_words(bits_per_weight, active)
    return f"{components(num_compressed)}, {share:.1%} of weights compressed, {bits}"


def size_of(size: PlanSize) -> str:
    """The same of a plan's size."""
    active = size.active_bits_per_weight if size.is_of_mixture else None
    return size_line(size.num_compressed, size.share, size.bits_per_weight, active)


# A plan of more schemes than this is summed up; the query that is printed lists them.
_MOST_SCHEMES = 12


def schemes_line(plan: Plan) -> str:
    """How many components have which scheme."""
    counts = Counter(scheme for _, scheme in plan.entries).most_common()
    if len(counts) > _MOST_SCHEMES:  # a share of its own for every component
        named = ", ".join(f"{number} x {scheme}" for scheme, number in counts[:2])
        return f"{named}, and {len(counts) - 2} others"
    return ", ".join(f"{number} x {scheme}" for scheme, number in counts) or "all dense"


def metric_cells(summary: Summary) -> list[float | None]:
    """The values of `METRIC_COLUMNS`."""
    return [summary.fdt_mean, summary.sdt_mean, summary.dppl, summary.ppl, summary.kl]


def measurement_text(measurement: PlanMeasurement) -> str:
    """One plan's size and metrics, or why there are none."""
    size = measurement.size
    lines = [
        f"{measurement.label} on {counted(measurement.num_prompts, 'prompt')}",
        labelled("plan", measurement.plan.id),
        labelled("size", f"{size_of(size)}, {size.size_mb:.1f} MB"),
        labelled("schemes", schemes_line(measurement.plan)),
        "",
    ]
    if measurement.summary is None:
        return "\n".join([*lines, f"it could not be measured: {measurement.failure}"])
    summary = measurement.summary
    columns = [*METRIC_COLUMNS, "FDT p25", "p50", "p75"]
    cells = [*metric_cells(summary), summary.fdt_p25, summary.fdt_p50, summary.fdt_p75]
    return "\n".join([*lines, table(columns, [cells])])


def measurement_values(measurement: PlanMeasurement) -> dict[str, Any]:
    """A measurement for JSON: its plan as component -> scheme, its size with what follows from it."""
    size = measurement.size
    derived = {"share": size.share, "bits_per_weight": size.bits_per_weight, "size_mb": size.size_mb}
    derived |= {"active_bits_per_weight": size.active_bits_per_weight} if size.is_of_mixture else {}
    values: dict[str, Any] = plain(measurement)
    return values | {"plan_id": measurement.plan.id, "plan": measurement.plan.schemes, "size": values["size"] | derived}


def recovered_text(recovered: RecoveredModel) -> str:
    """A plan's model before and after it was repaired or trained; and where that did it harm."""
    rows = [
        [label, *(metric_cells(summary) if summary is not None else ["not measured"])]
        for label, summary in (("before", recovered.before), ("after", recovered.after))
    ]
    head = f"the plan of {recovered.run}, recovered under its masks: {recovered.weights_file}"
    export = f"to export it: dtmsearch export {recovered.run} --to dense --out DIR --weights {recovered.weights_id}"
    before, after = (None if each is None else each.kl for each in (recovered.before, recovered.after))
    if before is not None and after is not None and after > before:
        export += "\nbut its KL was less before: without --weights the export is of the plan as it was"
    return f"{head}\n\n{table(['recovery', *METRIC_COLUMNS], rows)}\n{export}"


def exported_text(result: Exported) -> str:
    """What an export wrote, how large it is, and what its check measured."""
    from dtmsearch.workflows.export_summary import engine_lines, size_account

    size, check = result.size, result.check
    lines = [
        f"{result.format} in {result.folder}",
        labelled("plan", result.plan.id),
        labelled("size", size_of(size)),
        labelled("files", f"{len(result.files)} with {sum(result.files.values()):,} bytes"),
    ]
    lines += [labelled("weights", f"trained, {result.weights_id}")] if result.weights_id else []
    account = size_account(result)
    lines += [] if account is None else [labelled("tensors", account)]
    if result.engine is not None:
        lines += [labelled("note", note) for note in result.notes]
        return "\n".join([*lines, *(labelled("check", said) for said in engine_lines(result.engine))])
    if check is None:
        return "\n".join(
            [*lines, *(labelled("note", note) for note in result.notes), labelled("check", "not measured")]
        )
    verdict = "as recorded" if check.equal else f"{check.differing} prompts differ"
    on = counted(check.num_prompts, "prompt")
    figures = f"FDT {check.fdt_measured:.4f}, SDT {check.sdt_measured:.4f} on {on}: {verdict}"
    said = [*lines, *(labelled("note", note) for note in result.notes), labelled("check", figures)]
    if check.repacked is not None:
        other = check.repacked
        figures = f"FDT {other.fdt:.4f}, SDT {other.sdt:.4f}: {other.differing} prompts differ"
        said.append(labelled("this CPU", f"{other.error or figures} when bitsandbytes packs the weights anew"))
    return "\n".join(said)


def exported_values(result: Exported) -> dict[str, Any]:
    """An export for JSON: its plan as component -> scheme."""
    values: dict[str, Any] = plain(result)
    return values | {"plan_id": result.plan.id, "plan": result.plan.schemes}


def solved_text(plans: Sequence[SolvedPlan]) -> str:
    """Plans for further budgets, with what is predicted of them."""
    columns = ["bits asked", "bits", "predicted KL", "95% interval", "measured plans compared", "plan"]
    return table(
        columns,
        [
            [
                f"{p.bits_asked:g}",
                f"{p.bits_per_weight:.3f}",
                f"{p.kl:.4f}",
                f"{p.kl_low:.4f} to {p.kl_high:.4f}",
                p.compared_with,
                p.plan_id[:12],
            ]
            for p in plans
        ],
    )


def front_text(candidates: Sequence[Candidate]) -> str:
    """Plans from small to large, those of each model and set of held-out prompts together."""
    columns = ["model", "run", "plan", "bits", "share", *METRIC_COLUMNS, "unbeaten in"]
    return table(columns, [_front_cells(candidate) for candidate in candidates])


def _front_cells(c: Candidate) -> list[object]:
    size = [f"{c.bits_per_weight:.2f}", f"{c.share:.1%}"]
    metrics = [c.fdt_mean, c.sdt_mean, c.dppl, c.ppl, c.kl]
    return [c.model, c.run, c.label, *size, *metrics, " ".join(c.fronts).upper() or None]


def scores_text(scores: Sequence[TaskScore]) -> str:
    """Tasks, the base model beside the compressed one; `change` is compressed minus base with its interval."""
    columns = ["task", "metric", "questions", "base", "compressed", "change", "answers changed", "to wrong", "to right"]
    return table(
        columns,
        [
            [s.task, s.metric, s.num_questions, s.base, s.compressed, _change(s), s.changed, s.to_wrong, s.to_right]
            for s in scores
        ],
    )


def _change(score: TaskScore) -> str:
    difference = score.difference
    if not difference.is_known:
        return f"{difference.mean:+.4f} (too few questions to say)"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
