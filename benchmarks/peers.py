"""Other tools' allocators beside ours, on identical weights, text and rounding.

    python -m venv PEERS && PEERS/bin/pip install torch transformers nvidia-modelopt==0.47.0 auto-round==0.16.1
    python benchmarks/peers.py MODEL TEXT HELD_OUT --python PEERS/bin/python --out FOLDER [--cases bits-4-g128]

Each tool chooses with its own score and solver, in its own environment; every plan is then rounded by this package and
judged on the same held-out prompts. Tools that allocate by a fixed rule (mlx-lm, llama.cpp) need no environment: see
peers_rules.py. Writes FOLDER/peers.json and, last, one table; seconds of the tools hold scoring and solving, of ours
the search and its reference.
"""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from search_quality import CASES, Bench, Case, space_of

from dtmsearch.core.metrics import summarize
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.core.statistics import paired_difference
from dtmsearch.search.space import SearchSpace

PEERS = ("modelopt", "modelopt-groups", "auto-round")


@dataclass
class Row:
    """A plan: `ours_less_this` is the KL of our first plan less its, paired over prompts, with the 95% interval;
    `megatokens` are those that were forwarded to find it, where they are counted."""

    case: str
    by: str
    version: str
    seconds: float
    bits_per_weight: float
    kl: float
    kl_vs_uniform: float
    fdt: float
    sdt: float
    ppl: float
    ours_less_this: tuple[float, float, float] | None = None
    megatokens: float = 0.0


def allocated(python: Path, peer: str, model: Path, text: Path, case: Case, out: Path) -> tuple[Plan, str, float]:
    """A tool's plan, its version, and the seconds that it took; of a run before, which left them in `out`, these.
    Raises `CalledProcessError` where the tool fails."""
    if out.exists():
        found = json.loads(out.read_text())
        return Plan.of(found["plan"]), found["version"], found["seconds"]
    widths = ",".join(str(parse_scheme(scheme).bits) for scheme in case.schemes)
    bits = str(parse_scheme(case.uniform).bits)
    script = Path(__file__).with_name("peers_allocate.py")
    command = [python, script, peer, model, text, "--widths", widths, "--bits", bits, "--out", out]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)  # noqa: S603
    found = json.loads(out.read_text())
    return Plan.of(found["plan"]), found["version"], found["seconds"]


def judged(bench: Bench, space: SearchSpace, case: Case, by: str, version: str, seconds: float, plan: Plan) -> Row:
    found, uniform = summarize(bench.measure(plan)), summarize(bench.measure(bench.best_uniform(space)))
    assert found.kl is not None and uniform.kl is not None and found.ppl is not None
    bits = space.size(plan).bits_per_weight
    return Row(
        *(case.name, by, version, seconds, bits, found.kl, found.kl / uniform.kl),
        *(found.fdt_mean, found.sdt_mean, found.ppl),
    )


def compared(bench: Bench, ours: Plan, other: Plan) -> tuple[float, float, float]:
    """The KL of our plan less another's over the held-out prompts, with its 95% interval."""
    a, b = bench.measure(ours).kl, bench.measure(other).kl
    assert a is not None and b is not None
    difference = paired_difference(a, b, 0)
    return difference.mean, difference.low, difference.high


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("held_out", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--python", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--cases", default="bits-3-g128,bits-4-g128", show_default=True)
@click.option("--ours", default="auto,fisher", show_default=True)
@click.option("--tools", default=",".join(PEERS), show_default=True)
@click.option("--prompts", default=256, show_default=True)
@click.option("--held-out-prompts", default=128, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of ours: which prompts it draws.")
@click.option("--dtype", default="float32", show_default=True)
def main(
    model: Path, text: Path, held_out: Path, python: Path, out: Path, cases: str, ours: str, tools: str,
    prompts: int, held_out_prompts: int, seed: int, dtype: str,
) -> None:  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(model, text, held_out, prompts, held_out_prompts, dtype)
    rows: list[Row] = []
    for case in (case for case in CASES if case.name in cases.split(",")):
        space = space_of(bench, case)
        rows.append(judged(bench, space, case, "uniform", "", 0.0, bench.best_uniform(space)))
        plans = {"uniform": bench.best_uniform(space)}
        for name in ours.split(","):
            started_at = time.perf_counter()
            plans[name] = Plan.of(bench.run(case, name, seed, space, {}, points=0).plan)
            rows.append(judged(bench, space, case, name, "", time.perf_counter() - started_at, plans[name]))
        for peer in filter(None, tools.split(",")):
            try:
                found = out / f"{case.name}-{peer}.json"
                plans[peer], version, seconds = allocated(python, peer, model, text, case, found)
            except subprocess.CalledProcessError as error:
                print(f"{peer} failed: {error.stderr.strip().splitlines()[-1:]}", flush=True)
                continue
            rows.append(judged(bench, space, case, peer, version, seconds, plans[peer]))
        for row in (row for row in rows if row.case == case.name and row.by != "auto" and "auto" in plans):
            row.ours_less_this = compared(bench, plans["auto"], plans[row.by])
        (out / "peers.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(
        f"{'case':12s} {'by':21s} {'version':9s} {'seconds':>8s} {'bits':>7s} {'KL':>8s} {'ratio':>6s} {'FDT':>6s}",
        end="",
    )
    print(f" {'SDT':>6s} {'PPL':>8s}  auto's KL less its")
    for row in rows:
        less = "" if row.ours_less_this is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row.ours_less_this)
        print(
            f"{row.case:12s} {row.by:21s} {row.version:9s} {row.seconds:8.1f} {row.bits_per_weight:7.4f} {row.kl:8.4f}"
            f" {row.kl_vs_uniform:6.3f} {row.fdt:6.2f} {row.sdt:6.2f} {row.ppl:8.3f}  {less}"
        )


if __name__ == "__main__":
    main()
