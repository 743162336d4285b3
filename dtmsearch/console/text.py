"""What the command line says of runs, plans and machines: as text for a person, as values for JSON.

Knows what a summary holds and how a person reads it; measures and reads nothing itself.
"""

from __future__ import annotations

import datetime
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dtmsearch.analysis.failure import headline
from dtmsearch.analysis.format import components, counted, duration, edge_in_words, plain, size_in_words, with_interval
from dtmsearch.analysis.metric_text import metric_value
from dtmsearch.console.plan_picture import plan_picture
from dtmsearch.console.terminal_tables import table
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.metrics import Summary
from dtmsearch.core.plan import Plan, PlanSize
from dtmsearch.core.schemes import DENSE
from dtmsearch.core.statistics import PairedDifference
from dtmsearch.core.strategy_settings import RANK_BY

if TYPE_CHECKING:
    from dtmsearch.analysis.pareto_runs import Candidate
    from dtmsearch.analysis.summary import RunOverview, RunSummary
    from dtmsearch.analysis.verdict import ValidationRow
    from dtmsearch.core.holders import SchemeFacts
    from dtmsearch.workflows.doctor import Finding
    from dtmsearch.workflows.estimate import Estimate
    from dtmsearch.workflows.evaluate import PlanMeasurement, RecoveredModel
    from dtmsearch.workflows.export import Exported
    from dtmsearch.workflows.kept_models import KeptModels
    from dtmsearch.workflows.list_components import Cost, ModelComponents
    from dtmsearch.workflows.profile import Profile
    from dtmsearch.workflows.score import TaskScore
    from dtmsearch.workflows.solve_budgets import SolvedPlan
    from dtmsearch.workflows.sweep import SweepOutcome

# A label before its text, as `status` shows them.
_LABEL_WIDTH = 11
_METRIC_COLUMNS = ("FDT", "SDT", "DPPL", "PPL", "KL")
# To be pasted between double quotes in a shell, so without ", $, ` and !.
PLAN_QUERY = "SELECT component, scheme FROM plans WHERE plan_id = '{plan_id}' ORDER BY component"


# What a replica does with the hidden states of parent plans, by where it keeps them.
_STATES_KEPT = {
    "auto": "chosen by the memory there is",
    "device": "hidden states of the parent are kept at every layer, beside the model",
    "host": "hidden states of the parent are kept at every layer, in the host's memory",
    "together": "weights pass through the device, all candidates go up the layers together",
    "sweep": "hidden states of the parent are kept at one layer, carried upward as candidates come",
}


def run_text(summary: RunSummary, long: bool = False) -> str:
    """What the store knows of a run. Its verdict is a sentence, `long` all that there is to say of it."""
    lines = [f"run {summary.run}: {_status(summary)}"]
    lines += [_message(summary.status, summary.message)] if summary.message else []
    lines.append(_line("model", summary.model or "not read yet"))
    lines += [_line("KV cache", summary.kv_cache)] if summary.kv_cache else []
    lines.append(_line("search", _effort(summary)))
    lines += [_line("prompts", summary.search_text)] if summary.search_text else []
    lines += [_line("held out", summary.held_out_text)] if summary.held_out_text else []
    if summary.last_step is not None:
        step = summary.last_step
        value = metric_value(summary.rank_by, step.score, with_unit=True)
        choice = edge_in_words(step.perturbation) if step.perturbation else "chosen as a whole"
        lines.append(_line("last step", f"{step.step}: {choice}, {value} on the search's prompts"))
    lines += _plan_lines(summary)
    lines += [_line("min_fdt", str(summary.min_fdt))] if summary.min_fdt else []
    if summary.final_plan is not None:
        picture = plan_picture(summary.final_plan, summary.components)
        lines += ["", textwrap.indent(picture, "  ")] if picture else []
    if summary.validation:
        lines += ["", "On held-out prompts:", validation_table(summary.validation, summary.rank_by)]
    return "\n".join([*lines, "", summary.verdict if long else summary.verdict_in_brief or summary.verdict])


def run_values(summary: RunSummary) -> dict[str, Any]:
    """A run's summary for JSON, its plan as component -> scheme; the model's components stand in the store."""
    values: dict[str, Any] = plain(replace(summary, components=()))
    del values["components"]
    values["final_plan"] = None if summary.final_plan is None else summary.final_plan.schemes
    return values


def _message(status: str, message: str) -> str:
    """Of a failed run what failed; JSON holds all that was said."""
    return _line("failed", headline(message)) if status == "failed" else _line("message", message)


def _line(label: str, text: str) -> str:
    return f"  {label:<{_LABEL_WIDTH}}{text}"


def _status(summary: RunSummary) -> str:
    if summary.missing:
        what = " and ".join(summary.missing)
        return f"incomplete: rows of {what} are lost; `run` or `resume` measures them again"
    if summary.already_complete:
        return "already complete"
    if summary.interrupted:
        return f"interrupted: no driver works on it; {_continuing(summary)}"
    return {"stopped": f"stopped; {_continuing(summary)}"}.get(summary.status, summary.status)


def _continuing(summary: RunSummary) -> str:
    if summary.continue_command is None:
        return "`resume` continues it"
    return f"where it was submitted, `{summary.continue_command}` continues it"


def _effort(summary: RunSummary) -> str:
    failed = ", ".join(f"{number} {kind}" for kind, number in summary.failures.items())
    took = "" if summary.wall_seconds is None else f" in {duration(summary.wall_seconds)}"
    return f"{summary.num_steps} steps, {summary.num_evaluations} evaluations{f' ({failed})' if failed else ''}{took}"


def _plan_lines(summary: RunSummary) -> list[str]:
    if summary.final_plan_id is None:
        return []
    lines = [_line("plan", summary.final_plan_id)]
    if summary.share is not None and summary.bits_per_weight is not None:
        bits = summary.bits_per_weight, summary.active_bits_per_weight
        lines.append(_line("size", _size(summary.num_compressed, summary.share, *bits)))
    if summary.final_plan is not None:
        lines.append(_line("schemes", _schemes(summary.final_plan)))
    lines += [_line("files", summary.written)] if summary.written else []
    lines += [_line("experts", summary.experts)] if summary.experts else []
    lines += [_line("source", summary.source)] if summary.source else []
    return lines


def model_components_text(found: ModelComponents) -> str:
    """What a model's components are, and what is left out: lines of at most some 60 characters."""
    rows = [[k.kind, k.number, f"{k.shape[0]} x {k.shape[1]}", f"{k.share:.2%}"] for k in found.kinds]
    lines = [
        f"{found.architecture}, {found.num_layers} layers,",
        f"{_count(found.num_weights)} weights, {found.bytes_16_bits / 1e9:,.2f} GB in 16 bits",
        *([f"comes as {found.source}, searched unquantized"] if found.source else []),
        *textwrap.wrap(found.experts, 60),
        f"{found.num_components:,} components hold {found.share:.2%} of all weights:",
        "",
        table(["kind", "number", "outputs x inputs", "share"], rows),
        "",
        "Left out:",
    ]
    for left in found.left_out:
        text = f"{left.share:.2%} in {left.number:,} {'tensor' if left.number == 1 else 'tensors'}: {left.reason}"
        lines += textwrap.wrap(text, 60, subsequent_indent="  ")
        lines += textwrap.wrap(f"such as {left.example}", 60, initial_indent="  ", subsequent_indent="  ")
    lines += ["", *_cost_lines(found)]
    if found.untried:
        said = f"told by the classes of modules, for the model's code does not run without values: {found.untried}"
        lines += ["", *textwrap.wrap(said, 60)]
    return "\n".join(lines)


def _cost_lines(found: ModelComponents) -> list[str]:
    cost = found.cost
    gpus = f"{cost.num_gpus} GPU{'' if cost.num_gpus == 1 else 's'} of {cost.gpu_gb:g} GB"
    tied = "" if cost.num_units == found.num_components else ", the experts of a layer together"
    said = [
        f"A replica takes about {cost.replica_bytes / 1e9:,.1f} GB: {gpus}.",
        f"A token is multiplied with {_count(cost.active_weights)} weights.",
        f"At {cost.tflops:g} x 10^12 operations a second (--tflops), loading, reference and validation aside:",
        f"prices of every option ({cost.samples} samples of {cost.row_tokens} tokens): {_time(cost.price_seconds)}",
        f"each of {counted(cost.num_units, 'unit')} measured alone under one scheme{tied} ({cost.prompts} prompts): "
        f"{_time(cost.probe_seconds)}",
        *_way_lines(cost),
    ]
    return [line for text in said for line in textwrap.wrap(text, 60, subsequent_indent="  ")]


def _way_lines(cost: Cost) -> list[str]:
    """The ways of a machine of several GPUs, or of one that does not hold the model."""
    if not cost.ways or (len(cost.ways) == 1 and cost.ways[0].replicas == 1 and not cost.ways[0].options):
        return []
    return [
        "On the whole machine, prices and that probe:",
        *(
            f"- {way.means}{f' ({way.options})' if way.options else ''}, {counted(way.replicas, 'replica')}: "
            f"{_time(way.price_seconds)}, {_time(way.probe_seconds)}"
            for way in cost.ways
        ),
    ]


def _time(seconds: float) -> str:
    """A foretold time for a person."""
    for size, name in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.2g} {name}" if seconds < 100 * size else f"{seconds / size:,.0f} {name}"
    return f"{seconds:.2g} seconds"


def _count(number: int) -> str:
    """A number of weights for a person."""
    return f"{number / 1e9:,.2f} billion" if number >= 10**9 else f"{number / 1e6:,.2f} million"


def schemes_text(facts: Sequence[SchemeFacts]) -> str:
    """What is known of schemes: a row each."""
    rows = [
        [f.scheme, f.family, f"{f.bits_per_weight:.3f}", f.needs, ", ".join(f.at_size) or "none", _held_larger(f)]
        for f in facts
    ]
    return table(["scheme", "family", "bits", "needs", "written at its size by", "larger"], rows)


def profile_text(found: Profile) -> str:
    """What products take: a row for each scheme and shape, and how much faster than unquantized."""
    dense = {(row.outputs, row.inputs): row for row in found.rows if row.scheme == DENSE}
    rows = []
    for row in found.rows:
        base = dense[row.outputs, row.inputs]
        faster = [f"{base.decode_ms / row.decode_ms:.2f}x", f"{base.prefill_ms / row.prefill_ms:.2f}x"]
        shape = f"{row.outputs} x {row.inputs}"
        decode, prefill = f"{row.decode_ms:.4g}", f"{row.prefill_ms:.4g}"
        rows.append([row.scheme, shape, decode, faster[0], prefill, faster[1]])
    lines = [
        f"on {found.device}, a token alone (decode) and {found.prefill_tokens} at once (prefill):",
        table(["scheme", "matrix", "decode ms", "speed-up", "prefill ms", "speed-up"], rows),
    ]
    if found.left_out:
        lines.append(f"left out, for no kernel here runs them: {', '.join(found.left_out)}")
    return "\n".join(lines)


def _held_larger(facts: SchemeFacts) -> str:
    larger = [held for held in facts.held if held.bits_per_weight is not None and not held.at_size]
    return ", ".join(f"{held.holder}: {held.bits_per_weight:.2f}" for held in larger) or "-"


def _size(num_compressed: int | None, share: float, bits_per_weight: float, active: float | None = None) -> str:
    bits = size_in_words(bits_per_weight, active)
    return f"{components(num_compressed)}, {share:.1%} of weights compressed, {bits}"


def _size_of(size: PlanSize) -> str:
    active = size.active_bits_per_weight if size.is_of_mixture else None
    return _size(size.num_compressed, size.share, size.bits_per_weight, active)


# A plan of more schemes than this is summed up; the query that is printed lists them.
_MOST_SCHEMES = 12


def _schemes(plan: Plan) -> str:
    counts = Counter(scheme for _, scheme in plan.entries).most_common()
    if len(counts) > _MOST_SCHEMES:  # a share of its own for every component
        named = ", ".join(f"{number} x {scheme}" for scheme, number in counts[:2])
        return f"{named}, and {len(counts) - 2} others"
    return ", ".join(f"{number} x {scheme}" for scheme, number in counts) or "all dense"


def validation_table(rows: Sequence[ValidationRow], rank_by: str = RANK_BY) -> str:
    """The final plan beside uniform ones; `ahead` is its value minus theirs, paired over prompts, with the interval: of
    the metric that the search ranks by, and of FDT. The metric that the search ranks by comes first."""
    compared = tuple(dict.fromkeys((rank_by, "fdt")))
    others = [name for name in _METRIC_COLUMNS if name.lower() not in compared]
    mixed = any(row.active_bits_per_weight is not None for row in rows)
    figures = (name for metric in compared for name in (metric.upper(), _ahead_title(metric)))
    columns = ["plan", "bits", *(["bits read"] if mixed else []), *figures]
    cells = [_validation_cells(row, compared, others, mixed) for row in rows]
    return table([*columns, *others, "share", "components"], cells)


def _ahead_title(metric: str) -> str:
    found = METRICS[metric]
    title = found.title or metric
    if found.mean == "geometric":
        return f"plan's ln {title} more by"
    return f"plan's {title} {'ahead' if found.higher_is_better else 'more'} by"


def _validation_cells(row: ValidationRow, compared: Sequence[str], others: Sequence[str], mixed: bool) -> list[object]:
    share = f"{row.share:.1%}"
    cells: list[object] = [row.uniform_scheme or row.label, f"{row.bits_per_weight:.2f}"]
    active = row.active_bits_per_weight
    cells += [None if active is None else f"{active:.2f}"] if mixed else []
    if row.summary is None:
        unmeasured = [None] * (2 * len(compared) - 2 + len(others))
        return [*cells, None, row.failure, *unmeasured, share, row.num_compressed]
    values = row.summary.metrics
    for metric in compared:
        digits = 2 if metric in ("fdt", "sdt") else 4
        cells += [values.get(metric), _ahead(row.vs_plan(metric), digits)]
    return [*cells, *(values.get(name.lower()) for name in others), share, row.num_compressed]


def _metric_cells(summary: Summary) -> list[float | None]:
    return [summary.fdt_mean, summary.sdt_mean, summary.dppl, summary.ppl, summary.kl]


def _ahead(difference: PairedDifference | None, digits: int) -> str:
    if difference is None:
        return ""
    if not difference.is_known:
        return f"{difference.mean:+.{digits}f} (too few prompts to say)"
    return with_interval(difference.mean, difference.low, difference.high, digits, sign="+")


def overview_text(runs: Sequence[RunOverview]) -> str:
    """The runs of a store as a table."""
    columns = ["run", "status", "bits", "held out", "in search", "created", "evaluations", "model", "share", "step"]
    rows = [_overview_cells(run) for run in runs]
    if any(run.failed is not None for run in runs):
        columns.insert(2, "what failed")
        for run, row in zip(runs, rows, strict=True):
            row.insert(2, run.failed)
    return table(columns, rows)


def _overview_cells(run: RunOverview) -> list[object]:
    return [
        run.run,
        "interrupted" if run.interrupted else run.status,
        None if run.bits_per_weight is None else f"{run.bits_per_weight:.2f}",
        None if run.held_out is None else metric_value(run.rank_by, run.held_out),
        None if run.score is None else metric_value(run.rank_by, run.score),
        _local_time(run.created_at),
        run.num_evaluations,
        run.model,
        None if run.share is None else f"{run.share:.1%}",
        run.last_step,
    ]


def _local_time(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
    except (OverflowError, ValueError, OSError):  # no time that a calendar has
        return str(seconds)


def measurement_text(measurement: PlanMeasurement) -> str:
    """One plan's size and metrics, or why there are none."""
    size = measurement.size
    lines = [
        f"{measurement.label} on {counted(measurement.num_prompts, 'prompt')}",
        _line("plan", measurement.plan.id),
        _line("size", f"{_size_of(size)}, {size.size_mb:.1f} MB"),
        _line("schemes", _schemes(measurement.plan)),
        "",
    ]
    if measurement.summary is None:
        return "\n".join([*lines, f"it could not be measured: {measurement.failure}"])
    summary = measurement.summary
    columns = [*_METRIC_COLUMNS, "FDT p25", "p50", "p75"]
    cells = [*_metric_cells(summary), summary.fdt_p25, summary.fdt_p50, summary.fdt_p75]
    return "\n".join([*lines, table(columns, [cells])])


def recovered_text(recovered: RecoveredModel) -> str:
    """A plan's model before and after training."""
    rows = [
        [label, *(_metric_cells(summary) if summary is not None else ["not measured"])]
        for label, summary in (("before", recovered.before), ("after", recovered.after))
    ]
    head = f"the plan of {recovered.run}, trained under its masks: {recovered.weights_file}"
    export = f"to export it: dtmsearch export {recovered.run} --to dense --out DIR --weights {recovered.weights_id}"
    return f"{head}\n\n{table(['training', *_METRIC_COLUMNS], rows)}\n{export}"


def _tokens(number: int) -> str:
    return f"{number / 1e6:,.1f} million tokens" if number >= 10**6 else f"{number:,} tokens"


def _operations(number: float) -> str:
    return f"{number / 1e12:,.1f} TFLOP" if number >= 1e12 else f"{number / 1e9:,.2g} GFLOP"


def estimate_text(estimate: Estimate) -> str:
    """What a search will cost."""
    nodes = f" on {estimate.nodes_per_replica} nodes" if estimate.nodes_per_replica > 1 else ""
    return "\n".join(
        [
            _line("search", f"about {estimate.evaluations:,} evaluations, {_tokens(estimate.tokens)}"),
            _line("work", f"{_operations(estimate.operations)} in matrix products, shared prefixes left out"),
            _line(
                "memory",
                f"{estimate.memory_bytes / 2**30:.2f} GiB a replica{nodes}, {counted(estimate.replicas, 'replica')}",
            ),
            _line("prefixes", _STATES_KEPT[estimate.states_kept]),
            _line("rate", f"{estimate.evaluation_seconds:.3g} s an evaluation, as timed here, by all replicas at once"),
            _line("time", f"{duration(estimate.search_seconds)} of search"),
            _line("", f"{duration(estimate.other_seconds)} for the reference and the validation"),
            *([_line("", f"{duration(estimate.training_seconds)} of training")] if estimate.training_seconds else []),
            _line("", f"{duration(estimate.start_seconds)} until replicas answer, on this machine"),
        ]
    )


def measurement_values(measurement: PlanMeasurement) -> dict[str, Any]:
    """A measurement for JSON: its plan as component -> scheme, its size with what follows from it."""
    size = measurement.size
    derived = {"share": size.share, "bits_per_weight": size.bits_per_weight, "size_mb": size.size_mb}
    derived |= {"active_bits_per_weight": size.active_bits_per_weight} if size.is_of_mixture else {}
    values: dict[str, Any] = plain(measurement)
    return values | {"plan_id": measurement.plan.id, "plan": measurement.plan.schemes, "size": values["size"] | derived}


def exported_text(result: Exported) -> str:
    """What an export wrote, how large it is, and what its check measured."""
    from dtmsearch.workflows.export_summary import engine_lines, size_account

    size, check = result.size, result.check
    lines = [
        f"{result.format} in {result.folder}",
        _line("plan", result.plan.id),
        _line("size", _size_of(size)),
        _line("files", f"{len(result.files)} with {sum(result.files.values()):,} bytes"),
    ]
    lines += [_line("weights", f"trained, {result.weights_id}")] if result.weights_id else []
    account = size_account(result)
    lines += [] if account is None else [_line("tensors", account)]
    if result.engine is not None:
        lines += [_line("note", note) for note in result.notes]
        return "\n".join([*lines, *(_line("check", said) for said in engine_lines(result.engine))])
    if check is None:
        return "\n".join([*lines, *(_line("note", note) for note in result.notes), _line("check", "not measured")])
    verdict = "as recorded" if check.equal else f"{check.differing} prompts differ"
    on = counted(check.num_prompts, "prompt")
    figures = f"FDT {check.fdt_measured:.4f}, SDT {check.sdt_measured:.4f} on {on}: {verdict}"
    said = [*lines, *(_line("note", note) for note in result.notes), _line("check", figures)]
    if check.repacked is not None:
        other = check.repacked
        figures = f"FDT {other.fdt:.4f}, SDT {other.sdt:.4f}: {other.differing} prompts differ"
        said.append(_line("this CPU", f"{other.error or figures} when bitsandbytes packs the weights anew"))
    return "\n".join(said)


def exported_values(result: Exported) -> dict[str, Any]:
    """An export for JSON: its plan as component -> scheme."""
    values: dict[str, Any] = plain(result)
    return values | {"plan_id": result.plan.id, "plan": result.plan.schemes}


def sweep_text(outcome: SweepOutcome) -> str:
    """How each search of a sweep stands."""
    rows = [[run, status, outcome.messages.get(run)] for run, status in outcome.statuses.items()]
    return table(["run", "status", "message"], rows)


def front_text(candidates: Sequence[Candidate]) -> str:
    """Plans from small to large, those of each model and set of held-out prompts together."""
    columns = ["model", "run", "plan", "bits", "share", *_METRIC_COLUMNS, "unbeaten in"]
    return table(columns, [_front_cells(candidate) for candidate in candidates])


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


def cache_text(kept: KeptModels) -> str:
    """The unquantized models that this machine keeps, as lines."""
    rows = [
        [m.source, f"{m.num_bytes / 1e9:.2f}", "in use" if m.in_use else f"{m.unused_days:.0f} days ago"]
        for m in kept.models
    ]
    total = sum(model.num_bytes for model in kept.models) / 1e9
    listed = [table(["unquantized from", "GB", "used"], rows)] if rows else []
    return "\n".join([*listed, f"{total:.2f} GB in {kept.folder}"])


def findings_text(findings: Sequence[Finding]) -> str:
    """What `doctor` has found, as lines."""
    return table(["check", "status", "found", "what to do"], [[f.name, f.status, f.found, f.remedy] for f in findings])
