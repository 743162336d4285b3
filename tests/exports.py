"""A store that holds a plan and its measurement, made in process, for tests of what is exported from it."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import TEXT, result, with_reference

from dtmsearch.config import parse
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import EvalRequest, ModelSpec, Reference, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import EvaluationRecord, RunRecord, StatisticsRecord
from dtmsearch.errors import ExportFailed
from dtmsearch.model.replica.exported import measure
from dtmsearch.model.replica.replica import Replica
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows import export_check as check
from dtmsearch.workflows.export import Exported, export

RUN = "mine"


@dataclass(frozen=True)
class Measured:
    """A run with a final plan in a store, over a tiny model."""

    store: Path
    manifest: ModelManifest
    plan: Plan

    def export(self, to: str, out: Path, **options: Any) -> Exported:
        return export(RUN, to, out, str(self.store), **options)


def measured_plan(
    model: Path,
    store: Path,
    schemes: dict[str, str] | str,
    dtype: str = "float32",
    scale_dtype: str = "float32",
    attention: str = "sdpa",
    kv_context: int = 0,
    count: int = 6,
    metrics: tuple[str, ...] = (),
    weights: Path | None = None,
) -> Measured:
    """Measure a plan (component -> scheme, or one scheme for all) and record it as the outcome of a run; over trained
    `weights`, a file, which become the store's own."""
    spec = ModelSpec(str(model), dtype=dtype, scale_dtype=scale_dtype, attention=attention, kv_context=kv_context)
    trained, folder = ("", "") if weights is None else (weights.stem, str(weights.parent))
    base = Replica(spec, ReplicaSettings(num_threads=1, weights_folder=folder))
    manifest = base.manifest()
    plan = Plan.uniform(manifest.components, schemes) if isinstance(schemes, str) else Plan.of(schemes)
    reference = with_reference(base, count)
    calibration = base.cut_calibration([TEXT], 8, 16, 0) if plan.needs_calibration else None
    if calibration is not None:
        base.use_calibration(calibration)
    known = "" if calibration is None else calibration.id
    request = EvalRequest(plan, reference.id, (0, count), metrics, weights_id=trained, calibration_id=known)
    outcome = result(base.evaluate([request])[0])
    text = store.parent / "text.txt"
    text.write_text(TEXT)
    caches = f", kv_cache: {{context: {kv_context}}}" if kv_context else ""
    file = f"""
run: {RUN}
model: {{path: {model}, dtype: {dtype}, scale_dtype: {scale_dtype}, attention: {attention}{caches}}}
prompts: {{files: [{text}], count: 6, prompt_tokens: 10, continuation_tokens: 12}}
search: {{schemes: [int8-channel, int4-g16]}}
"""
    parsed = parse(file, "search.yaml", store.parent)
    record = RunRecord(
        run=RUN,
        status="finished",
        config=parsed.to_yaml(),
        config_folder=str(store.parent),
        manifest_id=manifest.id,
        reference_id=reference.id,
        validation_reference_id=None,
        final_plan_id=plan.id,
        created_at=time.time(),
        finished_at=time.time(),
        version="0",
    )
    with ResultStore(store).writer(RUN) as writer:
        writer.put_components(manifest, manifest.components)
        writer.share(reference)
        writer.append([EvaluationRecord(request, outcome, "search")])
        if calibration is not None:
            writer.share(StatisticsRecord(calibration.manifest_id, base.gather_statistics(calibration)))
            writer.share_parts(calibration.id, base.solve(calibration.id, plan.entries))
        writer.put_run(record)
    if weights is not None:
        kept = Path(ResultStore(store).weights_folder)
        kept.mkdir(exist_ok=True)
        shutil.copyfile(weights, kept / weights.name)
    return Measured(store, manifest, plan)


def measure_here(
    spec: ModelSpec, settings: ReplicaSettings, reference: Reference, repacked: bool = False
) -> dict[str, list[float]]:
    """As `export_check.measure_apart`, in this process: quick, and as good where nothing else is tested."""
    try:
        outcome = measure(spec, settings, reference, repacked)
    except (AssertionError, RuntimeError) as error:
        raise ExportFailed(f"the folder cannot be loaded and measured: {type(error).__name__}: {error}") from error
    return {"fdt": outcome.fdt.tolist(), "sdt": outcome.sdt.tolist(), "dppl": outcome.dppl.tolist()}


def in_process(monkeypatch: Any) -> None:
    monkeypatch.setattr(check, "measure_apart", measure_here)
