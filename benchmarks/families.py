"""Every family of the installed transformers: what a search finds in it, and whether what it measures is right.

    python benchmarks/families.py [--only gemma3,dbrx] [--exports] [--out ROWS.json] [--seconds 120]
    python benchmarks/families.py --table ROWS.json

Each family is a model of random weights, two layers wide as a tiny one is, in a folder of its own. Columns:

| column | holds where |
|---|---|
| components | each is a factor of a product as the model runs, found apart from the package; none routes |
| missed | linear layers that are such factors and are neither components nor said to route |
| cuts | "all": every boundary is a cut; a number: so many; "whole": runs uncut |
| ok | every plan could be measured |
| right | every FDT and SDT, and the reference, equal those of plain code: a fresh model, its own rounding, whole |
| dense, packed | the export loads in a fresh process and measures as recorded; "refused" in words before it is written;
"-": nothing in it for the format |

Families run in a process of their own, one after the other, so that none takes others with it. Exports are measured by
processes that have the libraries and nothing else: forked from one that has imported them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import sys
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from families_of_models import FAMILIES, check

_PRELOADED = ["torch", "transformers", "compressed_tensors", "dtmsearch.model.replica.exported"]


def _measured(answers: Any, arguments: tuple[Any, ...]) -> None:
    from dtmsearch.model.replica.exported import measure

    try:
        outcome = measure(*arguments)
    except BaseException as error:
        answers.put(f"{type(error).__name__}: {error}")
    else:
        answers.put({"fdt": outcome.fdt.tolist(), "sdt": outcome.sdt.tolist(), "dppl": outcome.dppl.tolist()})


def measure_apart(*arguments: Any) -> dict[str, list[float]]:
    """As `dtmsearch.workflows.export_check.measure_apart`, by a process forked from one that has only imported."""
    from dtmsearch.errors import ExportFailed

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_PRELOADED)
    answers: Any = server.Queue()
    process = server.Process(target=_measured, args=(answers, arguments))
    process.start()
    found: dict[str, list[float]] | str = answers.get(timeout=100)
    process.join()
    if isinstance(found, str):
        raise ExportFailed(f"the folder cannot be loaded and measured: {found}")
    return found


def _worker(families: list[str], exports: bool, answers: Any) -> None:
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for family in families:
        started = time.perf_counter()
        try:
            found = check(family, measure_apart if exports else None)
        except Exception as error:
            found = {"family": family, "failed": f"{type(error).__name__}: {error}"}
            found["trace"] = traceback.format_exc()
        found["seconds"] = time.perf_counter() - started
        answers.put(found)


def rows(families: list[str], exports: bool, seconds: float) -> Any:
    """What is found of each family, in order; a process that dies or hangs costs its family alone."""
    spawn = multiprocessing.get_context("spawn")
    left = list(families)
    while left:
        answers: Any = spawn.Queue()
        process = spawn.Process(target=_worker, args=(left, exports, answers))
        process.start()
        while left:
            waited = time.perf_counter()
            found = None
            while found is None and process.is_alive() and time.perf_counter() - waited < seconds:
                with suppress(queue.Empty):
                    found = answers.get(timeout=0.5)
            if found is None:
                found = {"family": left[0], "failed": "died or hung"}
            left.pop(0)
            yield found
            if found.get("failed") == "died or hung":
                process.kill()
                break


def is_good(row: dict[str, Any]) -> bool:
    """Whether a family passes every column that its formats can hold."""
    held = [str(row.get(key, "-")).partition(":")[0] for key in ("dense", "compressed-tensors")]
    return "failed" not in row and all(row.get(key) is True for key in ("ok", "right", "components")) and all(
        value in ("True", "-", "refused") for value in held
    )  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> str:
    """How many families passed what."""
    measured = [row for row in rows if "failed" not in row]
    wrong = [row["family"] for row in measured if row.get("right") is not True]
    phantoms = [row["family"] for row in measured if row.get("components") is not True]
    refused = [row["family"] for row in rows if str(row.get("compressed-tensors")).startswith("refused")]
    before = [row["family"] for row in rows if str(row.get("failed")).startswith("UserError")]
    return (
        f"{sum(map(is_good, rows))} of {len(rows)} pass every column that their formats can hold; {len(measured)} are "
        f"measured, {len(wrong)} wrongly ({', '.join(wrong) or '-'}), {len(phantoms)} with phantom components "
        f"({', '.join(phantoms) or '-'}); {len(before)} are refused before a search ({', '.join(before) or '-'}); "
        f"packed exports are refused of {len(refused)} ({', '.join(refused) or '-'})"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/families.md."""

    def mark(value: Any) -> str:
        return {"True": "yes", "-": "-", "refused": "refused"}.get(str(value).partition(":")[0], "no")

    lines = [
        "| family | components | passes start at | evaluated | right | dense | packed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            reason = row["failed"].removeprefix("UserError: ").partition(", where")[0].partition(". ")[0]
            lines.append(f"| {row['family']} | - | - | refused: {reason} | - | - | - |")
            continue
        kinds = row["kinds"]
        exports = " | ".join(mark(row.get(key, "-")) for key in ("dense", "compressed-tensors"))
        lines.append(
            f"| {row['family']} | {sum(kinds.values())} in {len(kinds)} kinds | {row['cuts']} | {mark(row['ok'])} | "
            f"{mark(row['right'])} | {exports} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of configurations, separated by commas")
    parser.add_argument("--exports", action="store_true", help="also export, load and measure again")
    parser.add_argument("--out", help="a file for the rows as JSON")
    parser.add_argument("--seconds", type=float, default=120, help="at most for a family")
    parser.add_argument("--table", help="print the table of docs/families.md from such a file, and run nothing")
    options = parser.parse_args()
    if options.table:
        found = json.loads(Path(options.table).read_text())
        print(f"{table(found)}\n\n{summary(found)}")
        return
    families = options.only.split(",") if options.only else FAMILIES
    all_rows = []
    for row in rows(families, options.exports, options.seconds):
        all_rows.append(row)
        said = row.get("failed") or " ".join(
            f"{key}={str(row.get(key))[:160]}"
            for key in ("cuts", "ok", "right", "components", "missed", "dense", "compressed-tensors", "kinds")
        )
        print(
            "good" if is_good(row) else "BAD ",
            row["family"],
            f"{row.get('seconds', 0):.1f}s",
            str(said).replace("\n", " ")[:420],
            flush=True,
        )
        if options.out:
            Path(options.out).write_text(json.dumps(all_rows, indent=1) + "\n")
    print(summary(all_rows))


if __name__ == "__main__":
    main()
