"""What a terminal shows before a search: a model's components, schemes, times, a search's cost, this machine."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtmsearch.analysis.format import counted, duration
from dtmsearch.console.terminal_tables import labelled, table
from dtmsearch.core.schemes import DENSE

if TYPE_CHECKING:
    from dtmsearch.core.holders import SchemeFacts
    from dtmsearch.workflows.doctor import Finding
    from dtmsearch.workflows.estimate import Estimate
    from dtmsearch.workflows.kept_models import KeptModels
    from dtmsearch.workflows.list_components import Cost, ModelComponents
    from dtmsearch.workflows.profile import Profile


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
        f"At {cost.tflops:g} x 10^12 operations a second (--tflops), {cost.forward_tflops:g} in forward passes, "
        "loading, reference and validation aside:",
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


def _held_larger(facts: SchemeFacts) -> str:
    larger = [held for held in facts.held if held.bits_per_weight is not None and not held.at_size]
    return ", ".join(f"{held.holder}: {held.bits_per_weight:.2f}" for held in larger) or "-"


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


# What a replica does with the hidden states of parent plans, by where it keeps them.
_STATES_KEPT = {
    "auto": "chosen by the memory there is",
    "device": "hidden states of the parent are kept at every layer, beside the model",
    "host": "hidden states of the parent are kept at every layer, in the host's memory",
    "together": "weights pass through the device, all candidates go up the layers together",
    "sweep": "hidden states of the parent are kept at one layer, carried upward as candidates come",
}


def estimate_text(estimate: Estimate) -> str:
    """What a search will cost."""
    nodes = f" on {estimate.nodes_per_replica} nodes" if estimate.nodes_per_replica > 1 else ""
    rate = f"{estimate.evaluation_seconds:.3g} s an evaluation, as timed here, by all replicas at once"
    training = f"{duration(estimate.training_seconds)} of training"
    return "\n".join(
        [
            labelled("search", f"about {estimate.evaluations:,} evaluations, {_tokens(estimate.tokens)}"),
            labelled("work", f"{_operations(estimate.operations)} in matrix products, shared prefixes left out"),
            labelled(
                "memory",
                f"{estimate.memory_bytes / 2**30:.2f} GiB a replica{nodes}, {counted(estimate.replicas, 'replica')}",
            ),
            labelled("prefixes", _STATES_KEPT[estimate.states_kept]),
            labelled("rate", rate),
            labelled("time", f"{duration(estimate.search_seconds)} of search"),
            labelled("", f"{duration(estimate.other_seconds)} for the reference and the validation"),
            *([labelled("", training)] if estimate.training_seconds else []),
            labelled("", f"{duration(estimate.start_seconds)} until replicas answer, on this machine"),
        ]
    )


def _tokens(number: int) -> str:
    return f"{number / 1e6:,.1f} million tokens" if number >= 10**6 else f"{number:,} tokens"


def _operations(number: float) -> str:
    return f"{number / 1e12:,.1f} TFLOP" if number >= 1e12 else f"{number / 1e9:,.2g} GFLOP"


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
