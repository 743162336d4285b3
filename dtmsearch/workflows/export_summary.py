"""What an export made: for the caller, and as its folder's model card."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import dtmsearch
from dtmsearch.analysis.format import counted
from dtmsearch.core.plan import Plan, PlanSize, plan_size
from dtmsearch.export.card import Card, card_text
from dtmsearch.export.formats.format_registry import Format
from dtmsearch.export.job import Job, Written
from dtmsearch.export.smaller_code import CODE_FILE
from dtmsearch.workflows.export_check import Check, EngineCheck
from dtmsearch.workflows.export_source import Source


@dataclass(frozen=True)
class Exported:
    """What an export made. `files`: name -> bytes. `tensor_bytes` are those of the files without headers, `plan_bits`
    what the plan's arithmetic gives, `extra_bits` what the format stores beyond it, by what it is; None where no
    weights are written. `check` is None where nothing was measured, `engine` where llama.cpp has measured nothing.
    `weights_id` names the trained weights that the plan is over, if it is."""

    format: str
    folder: str
    plan: Plan
    size: PlanSize
    files: Mapping[str, int]
    tensor_bytes: int | None
    plan_bits: int | None
    extra_bits: Mapping[str, int]
    notes: Sequence[str]
    check: Check | None
    weights_id: str = ""
    engine: EngineCheck | None = None


def described(form: Format, target: Path, partial: Path, found: Source, job: Job, written: Written) -> Exported:
    """What was exported, and how large it is."""
    # A recipe writes no weights: what it leaves dense stays as the checkpoint has it.
    dense_bits = job.dtype.itemsize * 8 if written.tensor_bytes else found.manifest.dense_bits
    return Exported(
        format=form.name,
        folder=str(target.absolute()),
        plan=found.plan,
        size=plan_size(found.plan, found.manifest.in_plans(found.plan.schemes), dense_bits),
        files={
            str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()
        },
        tensor_bytes=written.tensor_bytes or None,
        plan_bits=job.plan_bits if written.tensor_bytes else None,
        extra_bits=written.extra_bits,
        notes=(*([found.rounded] if found.rounded else []), *written.notes),
        check=None,
        weights_id=found.weights_id,
    )


def card_of(result: Exported, form: Format, found: Source, source: str, store: str) -> str:
    """The exported folder's README."""
    check = result.check
    if result.engine is not None:
        measured = engine_lines(result.engine)
    elif check is None:
        measured = [
            "not measured: " + ("checked by nobody (`--no-check`)" if form.is_checked else "it is no model to load")
        ]
    else:
        on = counted(check.num_prompts, "prompt")
        measured = [
            f"FDT {check.fdt_measured:.4f} and SDT {check.sdt_measured:.4f} on {on} of run "
            f"`{check.run}` (reference `{check.reference_id}`), loaded by a fresh process with "
            "`AutoModelForCausalLM.from_pretrained`",
            f"recorded by the search: FDT {check.fdt_recorded:.4f} and SDT {check.sdt_recorded:.4f}; "
            f"{check.differing} prompts differ",
            *_repacked_lines(check),
        ]
    parts = ["dtmsearch", "export", source, "--to", form.name, "--out", Path(result.folder).name, "--store", store]
    parts += ["--weights", found.weights_id] if found.weights_id else []
    parts += ["--even"] if found.rounded else []
    return card_text(
        Card(
            base_model=found.manifest.model,
            format_name=form.name,
            loads=_CODE if CODE_FILE in result.files else form.loads,
            plan=found.plan,
            size=result.size,
            files=result.files,
            measured=measured,
            notes=[*_weights_notes(found), *_size_notes(result), *result.notes],
            command=shlex.join(parts),
            version=dtmsearch.__version__,
            recorded=_recorded(found),
        )
    )


# Of a folder that brings the code of its model.
_CODE = (
    f"transformers alone, told `trust_remote_code=True`: `{CODE_FILE}` builds the model without the blocks that "
    "`config.json` names under `left_out`, and with matrices and mixtures as small as it says under `cut` and "
    "`fewer_experts`; nothing else loads it"
)


def engine_lines(check: EngineCheck) -> list[str]:
    """What llama.cpp has measured, in words."""
    on = counted(check.num_prompts, "prompt")
    lines = [
        f"FDT {check.fdt_measured:.2f} on {on} of run `{check.run}` (reference `{check.reference_id}`) by llama.cpp's "
        f"own logits, in a fresh process; the base model's own file has {check.fdt_base:.2f}",
        f"recorded by the search: FDT {check.fdt_recorded:.2f}",
    ]
    if check.kl_recorded is None:
        return [*lines, f"KL {check.kl_measured:.4f} nats per token by llama.cpp; the search recorded none"]
    part = check.kl_measured / check.kl_recorded - 1.0 if check.kl_recorded else 0.0
    return [
        *lines,
        f"KL {check.kl_measured:.4f} nats per token by llama.cpp, {check.kl_recorded:.4f} recorded ({part:+.1%})",
    ]


def _recorded(found: Source) -> dict[str, str]:
    if found.recorded is None:
        return {}
    named = {"run": found.recorded.run, "reference": found.recorded.reference.id, "weights": found.weights_id}
    named |= {"calibration": found.recorded.calibration_id}
    return {name: value for name, value in named.items() if value}


def _repacked_lines(check: Check) -> list[str]:
    repacked = check.repacked
    if repacked is None:
        return []
    where = "on the CPU of that machine, which has AVX512-BF16, where bitsandbytes packs 4-bit weights anew (see Notes)"
    if repacked.error:
        return [f"{where}, it does not run: {repacked.error}"]
    return [
        f"{where}: FDT {repacked.fdt:.4f} and SDT {repacked.sdt:.4f}; {repacked.differing} of {check.num_prompts} "
        "prompts differ from what was recorded"
    ]


def _weights_notes(found: Source) -> list[str]:
    if not found.weights_id:
        return []
    return [f"The weights were trained: `{found.weights_id}` of the store. Embeddings and head are the base model's."]


def _size_notes(result: Exported) -> list[str]:
    account = size_account(result)
    return [] if account is None else [f"Tensors take {account} (file headers apart)."]


def size_account(result: Exported) -> str | None:
    """How the bytes of the tensors come about; None where no weights were written."""
    if result.tensor_bytes is None or result.plan_bits is None:
        return None
    extra = "".join(f", {bits / 8:+,.0f} for {what}" for what, bits in result.extra_bits.items())
    return f"{result.tensor_bytes:,} bytes: {result.plan_bits / 8:,.0f} by the plan's arithmetic{extra}"
