"""`dense`: an ordinary checkpoint whose weights are what the plan makes of them."""

from __future__ import annotations

from pathlib import Path

from dtmsearch.core.holders import dense_obstacle
from dtmsearch.export.component_weights import component_dense
from dtmsearch.export.job import Job, Written, refuse
from dtmsearch.export.loaded import dense_tensors
from dtmsearch.export.writer import ShardWriter, copy_other_files


def write_dense(job: Job, folder: Path) -> Written:
    """Raises `UserError` for schemes that are more than weights."""
    shapes = {name: job.manifest.by_name[name].shape for name in job.plan.schemes}
    reasons = {name: dense_obstacle(s, shapes[name]) for name, s in job.plan.parsed.items()}
    more = [f"{name}: {job.plan.scheme_of(name)}" for name, reason in reasons.items() if reason]
    if more:
        raise refuse("dense", next(reason for reason in reasons.values() if reason), more)
    writer = ShardWriter(folder, job)
    tensors = dense_tensors(job) if job.unplaced else job.rewritten(lambda c, weight: component_dense(job, c, weight))
    for name, tensor in tensors:
        writer.add(name, tensor)
    files = writer.close()
    copy_other_files(job, folder)
    extra = 8 * writer.tensor_bytes - job.plan_bits
    return Written(files, writer.tensor_bytes, {"compressed components written dense": extra} if extra else {})
