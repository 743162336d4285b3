"""The verb `export`: a plan of the store or of a file, written in a format, loaded again in a fresh process, measured
against what is recorded of it, and described.

Knows where plans and their measurements lie; what a format looks like is the business of `dtmsearch.export`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from dtmsearch.errors import ExportFailed, UserError
from dtmsearch.export.formats.compressed_tensors import NAME as PACKED
from dtmsearch.export.formats.format_registry import find_format
from dtmsearch.export.job import Job, refuse
from dtmsearch.model.compress.compressor import Compressor
from dtmsearch.model.modules.loading import checkpoint_folder
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.export_check import check_bytes, measured
from dtmsearch.workflows.export_repair import require_tied
from dtmsearch.workflows.export_source import Source, find
from dtmsearch.workflows.export_summary import Exported, card_of, described, size_account

__all__ = ["ExportFailed", "Exported", "export", "size_account"]


def export(
    source: str,
    to: str,
    out: str | Path,
    store: str,
    *,
    check: bool = True,
    model: str | None = None,
    weights: str | None = None,
    runtime: str = "transformers",
    batch_tokens: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write the plan of a run, or of a plan file, to the new folder `out`.

    `model` is where the base model lies now, if not where the search found it. `weights` names trained weights of the
    store to take the plan over, if not those that the search ended with. Raises `UserError` for a plan that
    cannot be found or that the format cannot hold, `ExportFailed` when the written folder does not measure as the
    store says; it is left beside `out` then.
    """
    form = find_format(to)
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--out {target} is there already: give a folder that is new or empty")
    results = ResultStore(store)
    found = find(source, results, model, weights)
    wants_check = check and form.is_model
    if wants_check and found.recorded is None:
        raise UserError(
            f"the store {store} holds no measurement of this plan{_over(found)} to hold the export against. "
            f"Measure it first (dtmsearch evaluate FILE --plan {source} --store {store}), or give --no-check"
        )
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        job = _job(found, runtime, results)
        if form.is_model:
            _check_solved(found, to)
        if runtime == "vllm" and to == PACKED:
            require_tied(found, target, job)
        say(f"writing {to} of {found.manifest.model}: {len(found.plan)} compressed components")
        written = form.write(job, partial)
    except UserError:  # a refusal leaves nothing behind; a faulty export stays, to be looked at
        shutil.rmtree(partial, ignore_errors=True)
        raise
    check_bytes(job, written)
    result = described(form, target, partial, found, job, written)
    if wants_check:
        assert found.recorded is not None
        say("measuring it in a fresh process")
        result = replace(result, check=measured(partial, found, found.recorded, batch_tokens))
    (partial / "README.md").write_text(card_of(result, form, found, source, store), encoding="utf-8")
    _raise_unless_equal(result, partial)
    if target.exists():
        target.rmdir()
    partial.rename(target)
    return result


def _job(found: Source, runtime: str, results: ResultStore) -> Job:
    mode = None if found.recorded is None else found.recorded.reference.mode
    dtype = getattr(torch, found.spec.dtype)
    on_gpu = torch.cuda.is_available() and (mode is None or mode.device == "cuda")
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
        trained=found.trained,
        weights_id=found.weights_id,
    )


def _over(found: Source) -> str:
    return f" over the weights {found.weights_id}" if found.weights_id else ""


def _compressor(found: Source, results: ResultStore, scale_dtype: torch.dtype, device: torch.device) -> Compressor:
    """What makes components' weights, with the statistics and the solved matrices that the store holds."""
    compressor = Compressor(scale_dtype)
    calibration_id = "" if found.recorded is None else found.recorded.calibration_id
    statistics = results.statistics(calibration_id) if calibration_id else None
    if statistics is not None:
        compressor.calibrate(calibration_id, statistics.mean_squares, device)
        if found.trained is None:  # matrices are kept of the model's own weights only
            compressor.fetch_from(
                lambda component, scheme: results.matrices(calibration_id, [component]).get((component, scheme))
            )
    return compressor


def _check_solved(found: Source, to: str) -> None:
    """Raises `UserError` where trained weights would have to be solved for once more."""
    offending = [f"{name}: {scheme.name}" for name, scheme in found.plan.parsed.items() if scheme.solved is not None]
    if found.trained is not None and offending:
        raise refuse(to, f"the store keeps no matrices solved for the trained weights {found.weights_id}", offending)


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
