"""Rules by which other tools divide bits, beside ours at each rule's size, on identical weights, text and rounding.

    python benchmarks/peers_rules.py MODEL TEXT HELD_OUT --out FOLDER [--rules mixed_3_6,Q3_K_M] [--ours auto,fisher]

A rule of widths knows a matrix's place alone (mlx-lm's mixtures, llama.cpp's), mlx-lm's `dynamic_quant` one score of
each. They are written anew from what the tools' sources say; every plan is rounded as `intN-g64-asym`, which is
mlx-lm's own format, and judged on the same held-out prompts. A rule has one size, so ours are asked for that size:
`auto` and `fisher` from the same prices, which are taken once and counted for each. Writes FOLDER/peers_rules.json and,
last, one table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import click
import torch
from peers import Row, compared, judged
from search_quality import CONTINUATION, Bench, Case, Counter, space_of

from dtmsearch.core.gguf_presets import PRESETS, in_more_bits
from dtmsearch.core.gguf_types import TYPES
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import DENSE
from dtmsearch.search.space import SearchSpace

# A matrix's kind, its layer of so many, queries to a value -> its bits.
Rule = Callable[[str, int, int, float], int]

MLX, LLAMA_CPP = "mlx-lm 0.32.2", "llama.cpp 007dbbf"
SCHEME = "int{}-g64-asym"
SPACE = Case("rules", tuple(SCHEME.format(bits) for bits in range(2, 7)), SCHEME.format(4))
# `dynamic_quant`: its widths, and how far its target lies from the lower to the higher (5.0 of 4.5 and 5.5 bits).
LOW, HIGH, BETWEEN = SCHEME.format(4), SCHEME.format(5), 0.5
DYNAMIC = "dynamic_quant"
UNIFORM = "uniform"


def mixed(low: int, high: int) -> Rule:
    """mlx-lm's `mixed_LOW_HIGH`: values and the second matrix of the MLP in more bits in some layers."""

    def bits(kind: str, layer: int, layers: int, grouped: float) -> int:
        return high if kind in ("v", "down") and in_more_bits(layer, layers) else low

    return bits


def mixture(name: str) -> Rule:
    """llama.cpp's mixture, each type by the bits of its code."""
    usual, rule = PRESETS[name]

    def bits(kind: str, layer: int, layers: int, grouped: float) -> int:
        return TYPES[rule(kind, layer, layers, grouped) or usual].bits

    return bits


# Rule -> whose it is, and its widths. `mixed_4_6` and Q4_K_M are the same plan where q, k and v are apart.
RULES: dict[str, tuple[str, Rule]] = {
    **{f"mixed_{low}_{high}": (MLX, mixed(low, high)) for low, high in ((2, 6), (3, 4), (3, 6), (4, 6))},
    **{name: (LLAMA_CPP, mixture(name)) for name in ("Q2_K", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_M")},
}


def by_rule(space: SearchSpace, rule: Rule) -> Plan:
    """The plan of a rule of widths."""
    layers = 1 + max(component.layer for component in space.components)
    rows = {(c.layer, c.kind): c.shape[0] for c in space.components}
    return Plan.of({
        c.name: SCHEME.format(rule(c.kind, c.layer, layers, rows.get((c.layer, "q"), 0) / rows.get((c.layer, "v"), 1)))
        for c in space.components
    })  # fmt: skip


def dynamic_quant(bench: Bench, space: SearchSpace, samples: int) -> tuple[Plan, float]:
    """mlx-lm's `dynamic_quant`, and the million tokens that it took.

    With every matrix in few bits, the slope of KL(base || model) along each matrix's way back to more bits, over its
    weights: from the steepest on matrices get them, as long as the plan is within the target.
    """
    case = Case(DYNAMIC, (LOW, HIGH), LOW)
    counter = Counter(bench.replica, 2 * bench.continuation)
    low, high = space.uniform(LOW), space.uniform(HIGH)
    products = bench.taking(case, bench.reference(0), counter, 0)("slope", low, (0, samples))
    gains = -products.mean(axis=0)[:, (DENSE, LOW, HIGH).index(HIGH)]
    weights = [component.shape[0] * component.shape[1] for component in space.components]
    order = sorted(range(len(weights)), key=lambda at: -gains[at] / weights[at])
    sizes = [space.size(plan).bits_per_weight for plan in (low, high)]
    target = sizes[0] + BETWEEN * (sizes[1] - sizes[0])
    schemes = dict(low.schemes)
    for at in order:
        more = schemes | {space.components[at].name: HIGH}
        if space.size(Plan.of(more)).bits_per_weight > target:
            break
        schemes = more
    return Plan.of(schemes), counter.tokens / 1e6


def beside(bench: Bench, name: str, source: str, plan: Plan, megatokens: float, ours: list[str]) -> list[Row]:
    """A rule's plan, and what ours find at its size."""
    case = replace(SPACE, name=name, bits=space_of(bench, SPACE).size(plan).bits_per_weight)
    space = space_of(bench, case)
    rows = [replace(judged(bench, space, case, name, source, 0.0, plan), megatokens=megatokens)]
    plans = [plan]
    for strategy in ours:
        started_at = time.perf_counter()
        found = bench.run(case, strategy, 0, space, {}, points=0)
        plans.append(Plan.of(found.plan))
        row = judged(bench, space, case, strategy, "", time.perf_counter() - started_at, plans[-1])
        rows.append(replace(row, megatokens=found.megatokens))
    best = bench.best_uniform(space)
    rows.append(judged(bench, space, case, UNIFORM, next(iter(best.schemes.values())), 0.0, best))
    for row, other in zip(rows, [*plans, best], strict=True):
        row.ours_less_this = compared(bench, plans[1], other) if other != plans[1] else None
    return rows


def line(row: Row) -> str:
    less = "" if row.ours_less_this is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row.ours_less_this)
    return (
        f"| {row.case} | {row.by} | {row.version} | {row.bits_per_weight:.3f} | {row.kl:.4f} | {row.kl_vs_uniform:.3f}"
        f" | {row.megatokens:.3f} | {less} |"
    )


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("held_out", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--rules", default=f"{','.join(RULES)},{DYNAMIC}", show_default=True)
@click.option("--ours", default="auto,fisher", show_default=True, help="The first is held against all others.")
@click.option("--samples", default=128, show_default=True, help=f"Prompts of the slope of {DYNAMIC}.")
@click.option("--prompts", default=256, show_default=True)
@click.option("--held-out-prompts", default=128, show_default=True)
@click.option("--tokens", default=CONTINUATION, show_default=True, help="Of a prompt, and of its continuation.")
@click.option("--dtype", default="float32", show_default=True)
def main(
    model: Path, text: Path, held_out: Path, out: Path, rules: str, ours: str, samples: int, prompts: int,
    held_out_prompts: int, tokens: int, dtype: str,
) -> None:  # fmt: skip
    torch.set_float32_matmul_precision("high")
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(model, text, held_out, prompts, held_out_prompts, dtype, tokens)
    space = space_of(bench, SPACE)
    rows: list[Row] = []
    for name in rules.split(","):
        if name == DYNAMIC:
            source, (plan, megatokens) = MLX, dynamic_quant(bench, space, samples)
        else:
            (source, rule), megatokens = RULES[name], 0.0
            plan = by_rule(space, rule)
        rows += beside(bench, name, source, plan, megatokens, ours.split(","))
        (out / "peers_rules.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
        print(*map(line, rows[-2 - len(ours.split(",")) :]), sep="\n", flush=True)
    first = ours.split(",")[0]
    print(f"\n| at the size of | plan by | version | bits | KL | over uniform's | Mtokens | {first}'s KL less its |")
    print("|---|---|---|---|---|---|---|---|", *map(line, rows), sep="\n")


if __name__ == "__main__":
    main()
