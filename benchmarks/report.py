"""The report of a run with 100,000 evaluations: seconds to write, megabytes of the page.

    python benchmarks/report.py

The run is that of benchmarks/store.py: plans that differ from their parents by one component, values random.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import click
from store import record_all

from dtmsearch.core.records import RunRecord
from dtmsearch.report.writing import write_report
from dtmsearch.store.store import ResultStore

_RECORD = RunRecord("benchmark", "running", "", "/", None, "benchmark", None, None, 1.7e9, None, "0.1.0")


@click.command(help=__doc__)
@click.option("--evaluations", default=100_000)
@click.option("--prompts", default=100)
@click.option("--components", default=224)
@click.option("--store", type=click.Path(path_type=Path), help="A folder that keeps the store, or has it already.")
def main(evaluations: int, prompts: int, components: int, store: Path | None) -> None:
    folder = store or Path(tempfile.mkdtemp(prefix="dtmsearch-benchmark-"))
    try:
        results = ResultStore(folder)
        if results.run("benchmark") is None:
            record_all(results, evaluations, prompts, components)
            manifest_id = results.table("components", ["manifest_id"])["manifest_id"][0].as_py()
            with results.writer("benchmark") as writer:
                writer.put_run(RunRecord(**{**_RECORD.__dict__, "manifest_id": manifest_id}))
        page = folder.with_suffix(".html")
        start, cpu = time.perf_counter(), time.process_time()
        write_report(ResultStore(folder), "benchmark", page)
        seconds, busy = time.perf_counter() - start, time.process_time() - cpu
        print(f"{evaluations:,} evaluations of {components} components: {seconds:.1f} s ({busy:.1f} s of CPU time)")
        print(f"page of {page.stat().st_size / 1e6:.2f} MB")
        page.unlink()
    finally:
        if store is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
