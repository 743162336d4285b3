"""Other tools' allocators beside ours, on identical weights, text and rounding.

    python -m venv PEERS && PEERS/bin/pip install torch transformers nvidia-modelopt==0.47.0 auto-round==0.16.1
    python benchmarks/peers.py MODEL TEXT HELD_OUT --python PEERS/bin/python --out FOLDER [--cases bits-4-g128]

Each tool chooses with its own score and solver, in its own environment; every plan is then rounded by this package and
judged on the same held-out prompts. Tools that allocate by a fixed rule (mlx-lm, llama.cpp) have no environment: their
rules stand here, and since a rule has one size, ours is asked for that size. Writes FOLDER/peers.json and, last, one
table; seconds of the tools hold scoring and solving, of ours the search and its reference.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
from search_quality import CASES, Bench, Case, space_of

from dtmsearch.core.gguf_presets import in_more_bits
from dtmsearch.core.metrics import summarize
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.core.statistics import paired_difference
from dtmsearch.search.space import SearchSpace

PEERS = ("modelopt", "modelopt-groups", "auto-round")


def mixed(low: int, high: int) -> Callable[[str, int, int], int]:
    """mlx-lm's `mixed_LOW_HIGH`: values and the second matrix of the MLP in more bits in some layers. `mixed_4_6` is
    what llama.cpp's Q4_K_M does."""

    def width(kind: str, layer: int, layers: int) -> int:
        return high if kind in ("v", "down") and in_more_bits(layer, layers) else low

    return width


# Case -> the rules that go with its schemes.
RULES: dict[str, dict[str, Callable[[str, int, int], int]]] = {
    "bits-4-g128": {"mlx 4_6, Q4_K_M": mixed(4, 6)},
    "bits-3-g128": {"mlx 3_4": mixed(3, 4), "mlx 3_6": mixed(3, 6)},
}


@dataclass
class Row:
    """A plan: `less_than_auto` is auto's KL less the plan's, paired over prompts, with its 95% interval."""

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
    auto_less_this: tuple[float, float, float] | None = None


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


def by_rule(space: SearchSpace, width: Callable[[str, int, int], int]) -> Plan:
    """The plan of a rule of widths, in groups of 128."""
    layers = 1 + max(component.layer for component in space.components)
    return Plan.of({c.name: f"int{width(c.kind, c.layer, layers)}-g128" for c in space.components})


def judged(bench: Bench, space: SearchSpace, case: Case, by: str, version: str, seconds: float, plan: Plan) -> Row:
    found, uniform = summarize(bench.measure(plan)), summarize(bench.measure(bench.best_uniform(space)))
    assert found.kl is not None and uniform.kl is not None and found.ppl is not None
    bits = space.size(plan).bits_per_weight
    return Row(
        *(case.name, by, version, seconds, bits, found.kl, found.kl / uniform.kl),
        *(found.fdt_mean, found.sdt_mean, found.ppl),
    )


def beside_rule(bench: Bench, case: Case, name: str, plan: Plan) -> list[Row]:
    """A rule's plan, and what `auto` finds at that size."""
    bits = space_of(bench, case).size(plan).bits_per_weight
    same_size = replace(case, bits=bits)
    space = space_of(bench, same_size)
    started_at = time.perf_counter()
    ours = Plan.of(bench.run(same_size, "auto", 0, space, {}).plan)
    row = judged(bench, space, case, name, "", 0.0, plan)
    row.auto_less_this = compared(bench, ours, plan)
    seconds = time.perf_counter() - started_at
    return [row, judged(bench, space, case, f"auto at {name}", "", seconds, ours)]


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
@click.option("--tools", default=",".join(PEERS), show_default=True, help="Empty: rules alone.")
@click.option("--rules/--no-rules", default=True, show_default=True, help="Fixed rules, and ours at their sizes.")
@click.option("--prompts", default=256, show_default=True)
@click.option("--held-out-prompts", default=128, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of ours: which prompts it draws.")
@click.option("--dtype", default="float32", show_default=True)
def main(
    model: Path, text: Path, held_out: Path, python: Path, out: Path, cases: str, ours: str, tools: str, rules: bool,
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
            plans[name] = Plan.of(bench.run(case, name, seed, space, {}).plan)
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
            row.auto_less_this = compared(bench, plans["auto"], plans[row.by])
        for name, width in RULES.get(case.name, {}).items() if rules else ():
            rows += beside_rule(bench, case, name, by_rule(space, width))
        (out / "peers.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(
        f"{'case':12s} {'by':21s} {'version':9s} {'seconds':>8s} {'bits':>7s} {'KL':>8s} {'ratio':>6s} {'FDT':>6s}",
        end="",
    )
    print(f" {'SDT':>6s} {'PPL':>8s}  auto's KL less its")
    for row in rows:
        less = "" if row.auto_less_this is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row.auto_less_this)
        print(
            f"{row.case:12s} {row.by:21s} {row.version:9s} {row.seconds:8.1f} {row.bits_per_weight:7.4f} {row.kl:8.4f}"
            f" {row.kl_vs_uniform:6.3f} {row.fdt:6.2f} {row.sdt:6.2f} {row.ppl:8.3f}  {less}"
        )


if __name__ == "__main__":
    main()
