"""What is to be exported: a plan by its run's name or file, its model, and what the store measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from dtmsearch import config
from dtmsearch.config import SearchFile
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import FloatArray, IntArray, ModelSpec, Reference
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Plan
from dtmsearch.core.plan_file import (
    kv_cache_from_json,
    model_from_json,
    plan_from_json,
    plan_to_json,
    weights_id_from_json,
)
from dtmsearch.core.plan_widths import EVENED, ONE_WIDTH, is_even
from dtmsearch.core.user_files import is_file, read_text
from dtmsearch.errors import UserError
from dtmsearch.export.formats.evopress import is_configuration, read_configuration
from dtmsearch.model.modules.discovery import read_manifest
from dtmsearch.model.weights.trained import trained_file
from dtmsearch.store.store import ResultStore

_COLUMNS = [
    *("run", "reference_id", "weights_id", "calibration_id", "extra_metrics", "num_prompts"),
    *("fdt", "sdt", "kl_list"),
]


@dataclass(frozen=True)
class Recorded:
    """A measurement of a plan in the store: of which run, against which reference, per prompt; calibrated by what."""

    run: str
    reference: Reference
    fdt: IntArray
    sdt: IntArray
    calibration_id: str
    kl: FloatArray | None = None


@dataclass(frozen=True)
class Source:
    """A plan, the model that it is for, and what the store holds of it. `weights_id` names the trained weights that the
    plan is over, which lie in the file `trained`; it is empty for the model's own. `rounded` says what it costs that
    its widths were made even."""

    plan: Plan
    spec: ModelSpec
    manifest: ModelManifest
    recorded: Recorded | None
    file: SearchFile | None
    weights_id: str = ""
    trained: Path | None = None
    rounded: str = ""


def find(
    source: str, results: ResultStore, model: str | None, weights_id: str | None = None, even: bool = False
) -> Source:
    """What a run's name or a plan's file stands for, over the weights that these name or, if given, over others of the
    store; with `even` of a run's plan what its widths were rounded to. Raises `UserError` for a plan that cannot be
    exported."""
    if is_file(Path(source)):
        if even:
            raise UserError(f"--even rounds the plan of a run, by what was measured there; {source} is a file")
        found = _find_file(source, results, model, weights_id)
    else:
        found = _find_run(source, results, model, weights_id, even)
    return replace(found, trained=trained_file(results.weights_folder, found.weights_id) if found.weights_id else None)


def _find_run(source: str, results: ResultStore, model: str | None, weights_id: str | None, even: bool) -> Source:
    record = results.run(source)
    if record is None:
        names = ", ".join(r.run for r in results.runs()) or "none"
        raise UserError(f"{source!r} is no file and no run of the store {results.url}; it holds: {names}")
    if record.final_plan_id is None:
        raise UserError(f"run {source!r} has no final plan (it is {record.status})")
    plan = results.plan(record.final_plan_id, source)
    if plan is None:
        raise UserError(f"the final plan of run {source!r} is not in the store")
    file = config.recorded(record)
    spec = _spec(file, model)
    manifest = read_manifest(spec)
    if manifest.id != record.manifest_id:
        raise UserError(
            f"run {source!r} searched the model with manifest {record.manifest_id}; the one at {spec.path} has "
            f"{manifest.id}. If the model lies elsewhere now, say where with --model"
        )
    over = results.weights_id(source) if weights_id is None else weights_id
    if even and over:
        raise UserError(
            f"--even rounds a plan over the base model's weights; those of run {source!r}, {over}, were trained for "
            "its plan as it is"
        )
    plan, price = _evened(source, plan, manifest, results) if even else (plan, "")
    preferred = [i for i in (record.validation_reference_id, record.reference_id) if i is not None]
    return Source(plan, spec, manifest, _recorded(results, plan, over, source, preferred), file, over, rounded=price)


def _evened(run: str, plan: Plan, manifest: ModelManifest, results: ResultStore) -> tuple[Plan, str]:
    """The plan with one width of each kind that a run measured beside its own on held-out prompts, and what that costs
    by the same prompts. The rival of one width for all is it where the plan differs from it in its widths alone."""
    fits = (pc.field("purpose") == "validation") & (pc.field("status") == "ok")
    columns = ["label", "plan_id", "reference_id", "fdt_mean", "kl", "num_prompts"]
    rows = results.table("evaluations", columns, run, fits).to_pylist()
    own = next((row for row in rows if row["plan_id"] == plan.id), None)
    beside = [] if own is None else [row for row in rows if row["reference_id"] == own["reference_id"]]
    for label in () if is_even(plan, manifest.components) else (EVENED, ONE_WIDTH):
        other = next((row for row in beside if row["label"] == label), None)
        found = None if other is None else results.plan(other["plan_id"], run)
        if own is None or other is None or found is None or (label == ONE_WIDTH and not _only_widths(plan, found)):
            continue
        values = [
            f"{name} {other[key]:.4g} instead of {own[key]:.4g}"
            for name, key in (("KL", "kl"), ("FDT", "fdt_mean"))
            if own[key] is not None and other[key] is not None
        ]
        said = f"one width of each kind instead of the plan's several: {', '.join(values)}"
        return found, f"{said}, on {own['num_prompts']} held-out prompts"
    raise UserError(
        f"run {run!r} measured no plan of even widths beside its own: its plan cuts nothing or all alike, drops single "
        "blocks, some blocks may not be cut, or there were no held-out prompts. Export it without --even"
    )


def _only_widths(plan: Plan, other: Plan) -> bool:
    """Whether plans are the same but for the widths of MLPs, and cut no attention."""
    rest = [[entry for entry in each.entries if entry[0] not in each.widths] for each in (plan, other)]
    widths = [scheme.width for each in (plan, other) for scheme in each.widths.values()]
    return rest[0] == rest[1] and all(width is not None and width.block_kind == "mlp" for width in widths)


def _find_file(source: str, results: ResultStore, model: str | None, weights_id: str | None) -> Source:
    path = Path(source)
    text = read_text(path, "plan file")
    if is_configuration(text):
        if model is None:
            raise UserError(f"{path} is a configuration of modules and levels: say with --model what it is for")
        manifest = read_manifest(ModelSpec(model))
        text = plan_to_json(read_configuration(path), manifest)
    where = model_from_json(text, str(path))
    if model is None and where is None:
        raise UserError(f"{path} does not name its model: say with --model where it lies")
    context, batch = kv_cache_from_json(text, str(path))
    spec = ModelSpec(str(model or where), kv_context=context, kv_batch=batch)
    manifest = read_manifest(spec)
    plan = plan_from_json(text, manifest, str(path))
    over = weights_id_from_json(text, str(path)) if weights_id is None else weights_id
    recorded = _recorded(results, plan, over, None, [])
    if recorded is None:
        return Source(plan, replace(spec, dtype=manifest.dtype), manifest, None, None, over)
    record = results.run(recorded.run)
    if record is None:  # measured by `evaluate`, which keeps no record of its file
        own = replace(_spec_of_mode(spec.path, recorded.reference.mode), kv_context=context, kv_batch=batch)
        return Source(plan, own, manifest, recorded, None, over)
    file = config.recorded(record)
    return Source(plan, _spec(file, spec.path), manifest, recorded, file, over)


def _spec(file: SearchFile, model: str | None) -> ModelSpec:
    return file.model_spec if model is None else replace(file.model_spec, path=model)


def _spec_of_mode(path: str, mode: NumericMode) -> ModelSpec:
    return ModelSpec(path, None, mode.dtype, mode.attention, scale_dtype=mode.scale_dtype)


def _recorded(
    results: ResultStore, plan: Plan, weights_id: str, run: str | None, preferred: Sequence[str]
) -> Recorded | None:
    """The measurement of a plan over some weights on most prompts; one against a preferred reference first. Raises
    `UserError` when nothing but rows of an older store are left, which do not say by what they were calibrated."""
    fits = (pc.field("plan_id") == plan.id) & (pc.field("status") == "ok")
    rows = results.table("evaluations", _COLUMNS, run, fits).to_pylist()

    def rank(row: Mapping[str, object]) -> tuple[int, int]:
        place = preferred.index(str(row["reference_id"])) if row["reference_id"] in preferred else len(preferred)
        return place, -int(str(row["num_prompts"]))

    silent: list[str] = []
    for row in sorted((row for row in rows if (row["weights_id"] or "") == weights_id), key=rank):
        reference = results.reference(row["reference_id"])
        if reference is None or reference.num_prompts != row["num_prompts"]:
            continue
        if plan.needs_calibration and row["extra_metrics"] is None:
            silent.append(row["run"])
            continue
        fdt, sdt = np.array(row["fdt"], np.int32), np.array(row["sdt"], np.int32)
        kl = None if row["kl_list"] is None else np.array(row["kl_list"], np.float32)
        return Recorded(row["run"], reference, fdt, sdt, row["calibration_id"] or "", kl)
    if silent:
        raise UserError(
            f"the plan has calibrated schemes, and its measurement in run {silent[0]!r} of {results.url} was recorded "
            "by an older dtmsearch, which did not note by which text it was calibrated. Measure the plan once more "
            "(dtmsearch evaluate FILE --plan PLAN), then export it"
        )
    return None
