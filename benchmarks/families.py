"""Every family of the installed transformers: what a search finds in it, and whether what it measures is right.

    python benchmarks/families.py [--only gemma3,dbrx] [--exports] [--out TABLE.md] [--seconds 120]

Each family is a model of random weights, two layers wide as a tiny one is, in a folder of its own. Columns:

| column | holds where |
|---|---|
| components | the components are those that an independent count of matrix products finds |
| cuts | "all": every boundary is a cut; a number: so many; "whole": runs uncut |
| ok | every plan could be measured |
| right | every FDT and SDT, and the reference, equal those of plain code: a fresh model, its own rounding, whole |
| dense, packed | the export loads in a fresh process and measures as recorded |

Families run in a process of their own, one after the other, so that none takes others with it.
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


def _worker(families: list[str], exports: bool, answers: Any) -> None:
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for family in families:
        started = time.perf_counter()
        try:
            found = check(family, exports)
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
        process = spawn.Process(target=_worker, args=(left, exports, answers), daemon=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of configurations, separated by commas")
    parser.add_argument("--exports", action="store_true", help="also export, load and measure again")
    parser.add_argument("--out", help="a file for the rows as JSON")
    parser.add_argument("--seconds", type=float, default=120, help="at most for a family")
    options = parser.parse_args()
    families = options.only.split(",") if options.only else FAMILIES
    passed, all_rows = 0, []
    for row in rows(families, options.exports, options.seconds):
        all_rows.append(row)
        good = "failed" not in row and all(
            row.get(key, True) in (True, "-") for key in ("ok", "right", "dense", "compressed-tensors")
        )
        passed += good
        said = row.get("failed") or " ".join(
            f"{key}={str(row.get(key))[:160]}"
            for key in ("cuts", "ok", "right", "dense", "compressed-tensors", "kinds")
        )
        print(
            "good" if good else "BAD ",
            row["family"],
            f"{row.get('seconds', 0):.1f}s",
            str(said).replace("\n", " ")[:420],
            flush=True,
        )
    print(f"{passed} of {len(families)} pass every column")
    if options.out:
        Path(options.out).write_text(json.dumps(all_rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
