"""`dense`: an ordinary checkpoint whose weights are what the plan makes of them."""

from __future__ import annotations

from pathlib import Path

from dtmsearch.export.component_weights import component_dense
from dtmsearch.export.job import Job, Written, refuse
from dtmsearch.export.writer import ShardWriter, copy_other_files

# They round activations too, which no weights can tell.
_ROUNDS_ACTIVATIONS = ("w8a8", "llm-int8")


def write_dense(job: Job, folder: Path) -> Written:
    """Raises `UserError` for schemes that are more than weights."""
    more = [f"{name}: {scheme}" for name, scheme in job.plan.entries if scheme in _ROUNDS_ACTIVATIONS]
    if more:
        raise refuse("dense", "these schemes round activations as well; `bitsandbytes` holds them", more)
    writer = ShardWriter(folder, job)
    for name, tensor in job.rewritten(lambda component, weight: component_dense(job, component, weight)):
        writer.add(name, tensor)
    files = writer.close()
    copy_other_files(job, folder)
    extra = 8 * writer.tensor_bytes - job.plan_bits
    return Written(files, writer.tensor_bytes, {"compressed components written dense": extra} if extra else {})
