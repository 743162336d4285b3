"""The verb `export`: a plan of the store or of a file, written in a format, loaded again in a fresh process, measured
against what is recorded of it, and described.

Knows where plans and their measurements lie; what a format looks like is the business of `dtmsearch.export`.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

import dtmsearch
from dtmsearch import config
from dtmsearch.config import SearchFile
from dtmsearch.export.card import Card, card_text
from dtmsearch.export.evopress import is_configuration, read_configuration
from dtmsearch.export.folder import header_bytes
from dtmsearch.export.formats import FORMATS, Format
from dtmsearch.export.job import Job, Written, refuse
from dtmsearch.export.packed import NAME as PACKED
from dtmsearch.model.compressor import Compressor
from dtmsearch.model.discovery import read_manifest
from dtmsearch.model.loading import checkpoint_folder
from dtmsearch.model.replica import Replica
from dtmsearch.model.served import write_job
from dtmsearch.plans.components import ModelManifest
from dtmsearch.plans.evaluation import (
    EXTRA_METRICS,
    EvalRequest,
    EvalResult,
    IntArray,
    ModelSpec,
    Reference,
    ReplicaSettings,
)
from dtmsearch.plans.fused import tied_plan, untied_groups
from dtmsearch.plans.plan import Plan, PlanSize, plan_from_json, plan_size, plan_to_json
from dtmsearch.results.store import ResultStore

_COLUMNS = ["run", "evaluation_id", "reference_id", "num_prompts", "fdt", "sdt"]


class ExportFailed(RuntimeError):
    """What was written is not what was measured."""


@dataclass(frozen=True)
class Recorded:
    """A measurement of a plan in the store: of which run, against which reference, per prompt; calibrated by what."""

    run: str
    reference: Reference
    fdt: IntArray
    sdt: IntArray
    calibration_id: str


@dataclass(frozen=True)
class Check:
    """The exported folder, measured by a fresh process, beside what the store holds of the plan. Means over prompts, in
    tokens; `differing` prompts have another FDT or SDT."""

    run: str
    reference_id: str
    num_prompts: int
    fdt_recorded: float
    fdt_measured: float
    sdt_recorded: float
    sdt_measured: float
    differing: int

    @property
    def equal(self) -> bool:
        return self.differing == 0


@dataclass(frozen=True)
class Exported:
    """What an export made. `files`: name -> bytes. `tensor_bytes` are those of the files without headers, `plan_bits`
    what the plan's arithmetic gives, `extra_bits` what the format stores beyond it, by what it is; None where no
    weights are written. `check` is None where nothing was measured."""

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


@dataclass(frozen=True)
class _Source:
    """A plan, the model that it is for, and what the store holds of it."""

    plan: Plan
    spec: ModelSpec
    manifest: ModelManifest
    recorded: Recorded | None
    file: SearchFile | None


def export(
    source: str,
    to: str,
    out: str | Path,
    store: str,
    *,
    check: bool = True,
    model: str | None = None,
    runtime: str = "transformers",
    batch_tokens: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write the plan of a run, or of a plan file, to the new folder `out`.

    `model` is where the base model lies now, if not where the search found it. Raises `ValueError` for a plan that
    cannot be found or that the format cannot hold, `ExportFailed` when the written folder does not measure as the
    store says; it is left beside `out` then.
    """
    form = FORMATS[to]
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--out {target} is there already: give a folder that is new or empty")
    results = ResultStore(store)
    found = _find(source, results, model)
    wants_check = check and form.is_model
    if wants_check and found.recorded is None:
        raise ValueError(
            f"the store {store} holds no measurement of this plan to hold the export against. Measure it first "
            f"(dtmsearch evaluate FILE --plan {source} --store {store}), or give --no-check"
        )
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    job = _job(found, runtime, results)
    if runtime == "vllm" and to == PACKED:
        _require_tied(found, target, job)
    say(f"writing {to} of {found.manifest.model}: {len(found.plan)} compressed components")
    written = form.write(job, partial)
    _check_bytes(job, written)
    result = _exported(form, target, partial, found, job, written)
    if wants_check:
        assert found.recorded is not None
        say("measuring it in a fresh process")
        result = replace(result, check=_measured(partial, found, found.recorded, batch_tokens))
    (partial / "README.md").write_text(_card(result, form, found, source, store), encoding="utf-8")
    _raise_unless_equal(result, partial)
    if target.exists():
        target.rmdir()
    partial.rename(target)
    return result


def _job(found: _Source, runtime: str, results: ResultStore) -> Job:
    mode = None if found.recorded is None else found.recorded.reference.mode
    dtype = getattr(torch, found.spec.dtype)
    on_gpu = torch.cuda.is_available() and (mode is None or "/cuda/" in mode)
    device = torch.device("cuda" if on_gpu else "cpu")
    # vLLM keeps scales in a model's 16 bits, whatever the file says.
    half = runtime == "vllm" and dtype.itemsize == 2
    scale_dtype = dtype if half else getattr(torch, found.spec.scale_dtype)
    return Job(
        folder=checkpoint_folder(found.spec),
        manifest=found.manifest,
        plan=found.plan,
        dtype=dtype,
        device=device,
        scale_dtype=scale_dtype,
        runtime=runtime,
        compressor=_compressor(found, results, scale_dtype, device),
        schemes=() if found.file is None else found.file.search.schemes,
    )


def _compressor(found: _Source, results: ResultStore, scale_dtype: torch.dtype, device: torch.device) -> Compressor:
    """What makes components' weights, with the statistics and the solved matrices that the store holds."""
    compressor = Compressor(scale_dtype)
    calibration_id = "" if found.recorded is None else found.recorded.calibration_id
    statistics = results.statistics(calibration_id) if calibration_id else None
    if statistics is not None:
        compressor.calibrate(calibration_id, statistics.mean_squares, device)
        compressor.fetch_from(
            lambda component, scheme: results.matrices(calibration_id, [component]).get((component, scheme))
        )
    return compressor


def _require_tied(found: _Source, target: Path, job: Job) -> None:
    """Raises `ValueError` for a plan that splits what vLLM fuses, with the repairs there are and what each costs."""
    components, bits = found.manifest.components, job.dtype.itemsize * 8
    groups = untied_groups(found.plan, components)
    if not groups:
        return
    lines = [", ".join(f"{c.name}: {found.plan.scheme_of(c.name)}" for c in group) for group in groups]
    repairs = {word: tied_plan(found.plan, groups, bits, word == "widest") for word in ("widest", "narrowest")}
    fdt = _fdt_of(found, repairs)
    before = plan_size(found.plan, components, bits).stored_bits
    for word, plan in repairs.items():
        change = (plan_size(plan, components, bits).stored_bits - before) / 8
        lines.append(f"repair: each to its {word} scheme: {change:+,.0f} bytes, {fdt[word][1]}")
    # The narrower one costs nothing if it says the same.
    cheapest = "narrowest" if fdt["narrowest"][0] >= fdt["unrepaired"][0] else "widest"
    path = target.with_name(target.name + ".repaired.json")
    path.write_text(plan_to_json(repairs[cheapest], found.manifest), encoding="utf-8")
    lines.append(f"the cheapest repair ({cheapest}) is in {path}; measure it with `dtmsearch evaluate`, then export it")
    lines.append("or search with `fused: true`, which ties them from the start; or --runtime transformers")
    raise refuse(PACKED, "vLLM runs q, k, v and gate, up as one matrix each, of one scheme", lines)


def _fdt_of(found: _Source, plans: Mapping[str, Plan]) -> dict[str, tuple[float, str]]:
    """Mean FDT of plans, and of the found one as `unrepaired`, with words for it."""
    if found.recorded is None:
        return dict.fromkeys((*plans, "unrepaired"), (0.0, "FDT not measured: the store has no reference for it"))
    reference = found.recorded.reference
    replica = Replica(found.spec, ReplicaSettings())
    replica.use(reference)
    if any(plan.needs_calibration for plan in plans.values()):
        return dict.fromkeys((*plans, "unrepaired"), (0.0, "FDT not measured: it needs the search's calibration"))
    requests = [EvalRequest(plan, reference.id, (0, reference.num_prompts)) for plan in plans.values()]
    before = float(found.recorded.fdt.mean())
    fdt = {"unrepaired": (before, f"FDT {before:.2f}")}
    for word, outcome in zip(plans, replica.evaluate(requests), strict=True):
        assert isinstance(outcome, EvalResult), outcome
        mean = float(outcome.fdt.mean())
        fdt[word] = (mean, f"FDT {mean:.2f} ({mean - before:+.2f})")
    return fdt


def _find(source: str, results: ResultStore, model: str | None) -> _Source:
    path = Path(source)
    if path.is_file():
        return _find_file(path, results, model)
    record = results.run(source)
    if record is None:
        names = ", ".join(r.run for r in results.runs()) or "none"
        raise ValueError(f"{source!r} is no file and no run of the store {results.url}; it holds: {names}")
    if record.final_plan_id is None:
        raise ValueError(f"run {source!r} has no final plan (it is {record.status})")
    if results.weights_id(source):
        raise ValueError(
            f"the plan of run {source!r} prunes weights that were trained between its rounds, and only plans of the "
            f"base model's own can be exported; the trained ones are weights/{results.weights_id(source)}.safetensors "
            "in the store, by parameter name"
        )
    plan = results.plan(record.final_plan_id, source)
    if plan is None:
        raise ValueError(f"the final plan of run {source!r} is not in the store")
    file = config.parse(record.config, f"the search file of run {source}", Path(record.config_folder))
    spec = _spec(file, model)
    manifest = read_manifest(spec)
    if manifest.id != record.manifest_id:
        raise ValueError(
            f"run {source!r} searched the model with manifest {record.manifest_id}; the one at {spec.path} has "
            f"{manifest.id}. If the model lies elsewhere now, say where with --model"
        )
    preferred = [i for i in (record.validation_reference_id, record.reference_id) if i is not None]
    return _Source(plan, spec, manifest, _recorded(results, plan, source, preferred), file)


def _find_file(path: Path, results: ResultStore, model: str | None) -> _Source:
    text = path.read_text(encoding="utf-8")
    if is_configuration(text):
        if model is None:
            raise ValueError(f"{path} is a configuration of modules and levels: say with --model what it is for")
        manifest = read_manifest(ModelSpec(model))
        text = plan_to_json(read_configuration(path), manifest)
    try:
        content = json.loads(text)
        where = str(content["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no plan file (JSON with model, manifest_id and schemes): {error}") from None
    manifest = read_manifest(ModelSpec(model or where))
    plan = plan_from_json(text, manifest, str(path))
    recorded = _recorded(results, plan, None, [])
    if recorded is None:
        return _Source(plan, ModelSpec(model or where, dtype=manifest.dtype), manifest, None, None)
    record = results.run(recorded.run)
    if record is None:  # measured by `evaluate`, which keeps no record of its file
        return _Source(plan, _spec_of_mode(model or where, recorded.reference.mode), manifest, recorded, None)
    file = config.parse(record.config, f"the search file of run {recorded.run}", Path(record.config_folder))
    return _Source(plan, _spec(file, model or where), manifest, recorded, file)


def _spec(file: SearchFile, model: str | None) -> ModelSpec:
    return file.model_spec if model is None else replace(file.model_spec, path=model)


def _spec_of_mode(path: str, mode: str) -> ModelSpec:
    dtype, _, attention, _, *scales = mode.split("/")
    return ModelSpec(
        path, None, dtype, attention, scale_dtype=scales[0].removesuffix("-scales") if scales else "float32"
    )


def _recorded(results: ResultStore, plan: Plan, run: str | None, preferred: Sequence[str]) -> Recorded | None:
    """The measurement of a plan over most prompts; one against a preferred reference first."""
    fits = (pc.field("plan_id") == plan.id) & (pc.field("status") == "ok")
    rows = results.table("evaluations", _COLUMNS, run, fits).to_pylist()

    def rank(row: Mapping[str, object]) -> tuple[int, int]:
        place = preferred.index(str(row["reference_id"])) if row["reference_id"] in preferred else len(preferred)
        return place, -int(str(row["num_prompts"]))

    calibrations = [""]
    if plan.needs_calibration:
        calibrations = sorted(set(results.table("statistics", ["calibration_id"])["calibration_id"].to_pylist()))
    for row in sorted(rows, key=rank):
        reference = results.reference(row["reference_id"])
        calibration_id = _calibration_of(plan, row, calibrations)
        if reference is not None and reference.num_prompts == row["num_prompts"] and calibration_id is not None:
            fdt, sdt = np.array(row["fdt"], np.int32), np.array(row["sdt"], np.int32)
            return Recorded(row["run"], reference, fdt, sdt, calibration_id)
    return None


def _calibration_of(plan: Plan, row: Mapping[str, Any], calibrations: Sequence[str]) -> str | None:
    """By which calibration a plan was measured: the one that gives the row its identity. None if none does: the weights
    had been trained, or the row is another version's."""
    prompts = (0, int(row["num_prompts"]))
    for calibration_id in calibrations:
        for count in range(len(EXTRA_METRICS) + 1):
            for extra in combinations(EXTRA_METRICS, count):
                request = EvalRequest(plan, row["reference_id"], prompts, extra, calibration_id=calibration_id)
                if request.id == row["evaluation_id"]:
                    return calibration_id
    return None


def _check_bytes(job: Job, written: Written) -> None:
    """The files hold what the plan's arithmetic and the format's own account for, to the byte."""
    if not written.tensor_bytes:
        return
    on_disk = sum(path.stat().st_size - header_bytes(path) for path in written.files)
    accounted = job.plan_bits + sum(written.extra_bits.values())
    assert 8 * on_disk == 8 * written.tensor_bytes == accounted, (on_disk, written, accounted)


def _exported(form: Format, target: Path, partial: Path, found: _Source, job: Job, written: Written) -> Exported:
    return Exported(
        format=form.name,
        folder=str(target.absolute()),
        plan=found.plan,
        size=plan_size(found.plan, found.manifest.components, job.dtype.itemsize * 8),
        files={
            str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()
        },
        tensor_bytes=written.tensor_bytes or None,
        plan_bits=job.plan_bits if written.tensor_bytes else None,
        extra_bits=written.extra_bits,
        notes=tuple(written.notes),
        check=None,
    )


def _measured(folder: Path, found: _Source, recorded: Recorded, batch_tokens: int) -> Check:
    """The folder as a fresh process finds it, in the numeric mode of what is recorded."""
    mode = recorded.reference.mode
    spec = replace(found.spec, path=str(folder.absolute()), revision=None)
    spec = replace(spec, compile="always" if "compiled" in mode.split("/") else "never")
    answer = measure_apart(spec, ReplicaSettings(batch_tokens=batch_tokens), recorded.reference)
    fdt, sdt = np.array(answer["fdt"]), np.array(answer["sdt"])
    return Check(
        run=recorded.run,
        reference_id=recorded.reference.id,
        num_prompts=len(fdt),
        fdt_recorded=float(recorded.fdt.mean()),
        fdt_measured=float(fdt.mean()),
        sdt_recorded=float(recorded.sdt.mean()),
        sdt_measured=float(sdt.mean()),
        differing=int(((fdt != recorded.fdt) | (sdt != recorded.sdt)).sum()),
    )


def measure_apart(spec: ModelSpec, settings: ReplicaSettings, reference: Reference) -> dict[str, list[float]]:
    """The folder at `spec.path` against a reference, by a fresh process: metric -> value of each prompt.

    Raises `ExportFailed` when it cannot be loaded or measured.
    """
    with tempfile.TemporaryDirectory(prefix="dtmsearch-check-") as scratch:
        job = write_job(Path(scratch), spec, settings, reference)
        command = [sys.executable, "-m", "dtmsearch.model.served", str(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own module
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ExportFailed(f"the folder {spec.path} cannot be loaded and measured: {last}")
    answer: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _raise_unless_equal(result: Exported, folder: Path) -> None:
    check = result.check
    if check is not None and not check.equal:
        raise ExportFailed(
            f"the {result.format} folder does not say what the plan said when it was measured: "
            f"FDT {check.fdt_measured:.4f} instead of {check.fdt_recorded:.4f} "
            f"({check.fdt_measured - check.fdt_recorded:+.4f}), SDT {check.sdt_measured:.4f} instead of "
            f"{check.sdt_recorded:.4f} ({check.sdt_measured - check.sdt_recorded:+.4f}); {check.differing} of "
            f"{check.num_prompts} prompts differ. It was left in {folder}"
        )


def _card(result: Exported, form: Format, found: _Source, source: str, store: str) -> str:
    check = result.check
    if check is None:
        measured = [
            "not measured: " + ("checked by nobody (`--no-check`)" if form.is_model else "it is no model to load")
        ]
    else:
        measured = [
            f"FDT {check.fdt_measured:.4f} and SDT {check.sdt_measured:.4f} on {check.num_prompts} prompts of run "
            f"`{check.run}` (reference `{check.reference_id}`), loaded by a fresh process with "
            "`AutoModelForCausalLM.from_pretrained`",
            f"recorded by the search: FDT {check.fdt_recorded:.4f} and SDT {check.sdt_recorded:.4f}; "
            f"{check.differing} prompts differ",
        ]
    parts = ["dtmsearch", "export", source, "--to", form.name, "--out", Path(result.folder).name, "--store", store]
    return card_text(
        Card(
            base_model=found.manifest.model,
            format_name=form.name,
            loads=form.loads,
            plan=found.plan,
            size=result.size,
            files=result.files,
            measured=measured,
            notes=[*_size_notes(result), *result.notes],
            command=shlex.join(parts),
            version=dtmsearch.__version__,
        )
    )


def _size_notes(result: Exported) -> list[str]:
    account = size_account(result)
    return [] if account is None else [f"Tensors take {account} (file headers apart)."]


def size_account(result: Exported) -> str | None:
    """How the bytes of the tensors come about; None where no weights were written."""
    if result.tensor_bytes is None or result.plan_bits is None:
        return None
    extra = "".join(f", {bits / 8:+,.0f} for {what}" for what, bits in result.extra_bits.items())
    return f"{result.tensor_bytes:,} bytes: {result.plan_bits / 8:,.0f} by the plan's arithmetic{extra}"
