"""An export format for dtmsearch: `plan-csv`, the plan as a table of components, schemes and bits per weight."""

from __future__ import annotations

import csv
from pathlib import Path

from dtmsearch.core.schemes import parse_scheme
from dtmsearch.export.formats.format_registry import Format
from dtmsearch.export.job import Job, Written


def write(job: Job, folder: Path) -> Written:
    path = folder / "plan.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["component", "scheme", "bits_per_weight"])
        for name, scheme in job.plan.entries:
            component = job.manifest.by_name[name]
            bits = parse_scheme(scheme).stored_bits(component.shape, job.manifest.dense_bits)
            rows.writerow([name, scheme, bits / component.num_weights])
    return Written((path,))


FORMAT = Format("plan-csv", write, "anything that reads tables", is_model=False)
