"""How many channels each MLP of a model keeps: the search against LLM-Pruner's rule, rules and repair, on one model.

    python benchmarks/widths.py MODEL --search TEXT --judge TEXT --channels 0.2,0.4 --seeds 3 --out widths.json

LLM-Pruner (arXiv 2305.11627) is made anew from its description: its first-order importance of elements, |weight x
gradient| summed over all weights of a channel, of the loss of next tokens; the same share in every layer but the first
four and the last two of 32, which stay whole, as many of other depths in proportion; no repair. `LLM-Pruner,
everywhere` takes no layer out. Both by the same calibration text as ours. `one width` are rules and repair with the
same share in every layer; `floating` and `auto` give every layer a width of its own, of at most as many weights. KL on
held-out prompts, against the base model's own continuations; tokens forwarded to search, calibration apart.

With `--heads`: the same of groups of query heads with their key and value head, of which each layer but the spared ones
loses one. With `--joint BITS`: at so many bits per weight, all of the model in 4 bits, fewer channels in 8, and what
`auto` finds among both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from structured import CONTINUATION, PROMPT, Measuring, kl_of, searched, take_share

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import EvalRequest, ModelSpec, Reference, ReplicaSettings
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.statistics import paired_difference
from dtmsearch.core.strategy_settings import AutoSettings, FloatingSettings
from dtmsearch.model.replica.replica import Replica
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.strategy_registry import SolverSettings, make_strategy

# LLM-Pruner's first and last layers that stay whole, of a model of 32.
FIRST, LAST, DEPTH = 4, 2, 32
RULES = ("random", "magnitude", "spectral", "gradient", "wanda", "ziplm")
WIDTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
# Of joint searches, whose options multiply.
JOINT_WIDTHS = (0.1, 0.2, 0.35, 0.5)
# KL by prompt of a plan, by seed and by what goes.
Values = dict[tuple[int, float | str, str], np.ndarray]
JOINT_SCHEMES = ("int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64")


def mlps(manifest: ModelManifest) -> list[str]:
    return [block.name for block in manifest.blocks if block.kind == "mlp"]


def one_width(manifest: ModelManifest, share: float, rule: str) -> Plan:
    return Plan.of(dict.fromkeys(mlps(manifest), named(share, rule)))


def inner(blocks: Sequence[str]) -> Sequence[str]:
    """The blocks of one kind without those of the first and last layers that LLM-Pruner spares."""
    first, last = round(FIRST * len(blocks) / DEPTH), round(LAST * len(blocks) / DEPTH)
    return blocks[first : len(blocks) - last]


def llm_pruner(manifest: ModelManifest, share: float) -> Plan:
    """Its rule: the first and last layers whole, the others by as much more."""
    every = mlps(manifest)
    more = round(share * len(every) / len(inner(every)), 4)
    return Plan.of(dict.fromkeys(inner(every), f"channels-{more:g}-gradient"))


def heads_of(manifest: ModelManifest, kept: int, groups: int, rule: str, spared: bool) -> Plan:
    """So many groups of heads left in every attention, or in those that LLM-Pruner does not spare."""
    every = [block.name for block in manifest.blocks if block.kind == "attention"]
    return Plan.of(dict.fromkeys(inner(every) if spared else every, f"heads-{kept}:{groups}-{rule}"))


def found_by(
    strategy_name: str, measuring: Measuring, space: SearchSpace, reference: Reference, prompts: int, few: int,
    calibration: str, errors: dict[tuple[str, str], float],
) -> tuple[Plan, int]:  # fmt: skip
    """The plan of a search, and the tokens that it forwarded."""

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, reference.id, (0, prompts), ("kl",), parent, calibration)

    effort = SolverSettings(AutoSettings(probe_prompts=few), floating=FloatingSettings(prompts=few), errors=errors)
    strategy = make_strategy(strategy_name, space, request_for, "kl", continuation_tokens=CONTINUATION, solver=effort)
    return searched(strategy, measuring)


def named(share: float, rule: str) -> str:
    return f"channels-{share:g}-{rule}"


def space_of(
    manifest: ModelManifest, budget: Budget, shares: Sequence[float], rule: str, schemes: Sequence[str] = ()
) -> SearchSpace:
    return space_of_cuts(
        manifest, budget, [named(share, each) for share in shares for each in rule.split(",")], schemes
    )


def space_of_cuts(
    manifest: ModelManifest, budget: Budget, cuts: Sequence[str], schemes: Sequence[str] = ()
) -> SearchSpace:
    cuts = tuple(cuts)
    cut = manifest.cuttable(cuts, manifest.components) if cuts else ()
    return SearchSpace(
        manifest.components,
        tuple(schemes),
        dense_bits=manifest.dense_bits,
        budget=budget,
        manifest=manifest,
        cut=cut,
        cuts=cuts,
    )


def joint_plans(
    measuring: Measuring, manifest: ModelManifest, reference: Reference, bits: float, rule: str, prompts: int, few: int,
    calibration: str,
) -> dict[str, tuple[Plan, int]]:  # fmt: skip
    """At so many bits per weight: 4 bits everywhere, fewer channels in 8, and what `auto` finds, with widths and
    without."""
    components = manifest.components
    size = SearchSpace(components, JOINT_SCHEMES, dense_bits=manifest.dense_bits, manifest=manifest).size
    whole = Plan.uniform(components, "int4-g64")
    eight = Plan.uniform(components, "int8-g64").schemes
    one_rule = rule.split(",")[0]
    smaller = (Plan.of(eight | one_width(manifest, hundredths / 100, one_rule).schemes) for hundredths in range(1, 100))
    found: dict[str, tuple[Plan, int]] = {"whole, 4 bits": (whole, 0)}
    fitting = next((plan for plan in smaller if size(plan).bits_per_weight <= bits), None)
    if fitting is not None:
        found["smaller, 8 bits"] = fitting, 0
    names = [component.name for component in components]
    errors = {(e.component, e.scheme): e.plain for e in measuring.replica.weight_errors(names, JOINT_SCHEMES)}
    for label, shares in (("auto, bits alone", ()), ("auto, bits and widths", JOINT_WIDTHS)):
        space = space_of(manifest, Budget(bits_per_weight=bits), shares, rule, JOINT_SCHEMES)
        found[label] = found_by("auto", measuring, space, reference, prompts, few, calibration, errors)
    return found


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.option("--search", "search_text", required=True, type=click.Path(exists=True))
@click.option("--judge", "judge_text", required=True, type=click.Path(exists=True))
@click.option("--channels", default="0.2,0.4", help="shares of all MLPs' channels that go")
@click.option("--strategies", default="floating,auto", help="of the first seed; of others the last one")
@click.option("--rule", default="ziplm-repair", help="of the searches, or several that they choose from")
@click.option("--widths", "of_search", default="", help="shares that the searches choose from, if not eight")
@click.option("--heads", is_flag=True, help="groups of heads, too")
@click.option("--one-width", "of_one", default="", help="rules of one width; every one where nothing is said")
@click.option("--seeds", default=3)
@click.option("--first-seed", default=0)
@click.option("--prompts", default=64, help="that our search compares its last plans on")
@click.option("--few", default=16, help="by which it chooses widths")
@click.option("--rows", default=128, help="of calibration text, as long as prompts and continuations")
@click.option("--held-out", default=512)
@click.option("--joint", default=0.0, help="bits per weight of a comparison with quantization; 0: none")
@click.option("--seconds", default=1e9, help="after which nothing more is begun")
@click.option("--out", type=click.Path(), default="")
def main(
    model: str, search_text: str, judge_text: str, channels: str, strategies: str, rule: str, of_search: str,
    heads: bool, of_one: str, seeds: int, first_seed: int, prompts: int, few: int, rows: int, held_out: int,
    joint: float, seconds: float, out: str,
) -> None:  # fmt: skip
    """Compare what is cut of MODEL."""
    take_share()
    began = time.perf_counter()
    replica = Replica(ModelSpec(model, dtype="float32", compile="never"), ReplicaSettings())
    manifest, found = replica.manifest(), list[dict[str, Any]]()
    shares = [float(part) for part in of_search.split(",") if part]
    values: Values = {}
    texts = {name: [Path(path).read_text()] for name, path in (("search", search_text), ("judge", judge_text))}

    def note(text: str) -> None:
        click.echo(f"{time.perf_counter() - began:7.1f} s  {text}", err=True)

    held, _ = replica.cut_prompts(texts["judge"], held_out, PROMPT, CONTINUATION, 0)
    judge = replica.make_reference(held)
    replica.use(judge)
    judging = Measuring(replica)
    size = SearchSpace(manifest.components, JOINT_SCHEMES, dense_bits=manifest.dense_bits, manifest=manifest).size

    def judged(seed: int, share: float | str, label: str, plan: Plan, tokens: int, calibration: str) -> None:
        kl = values[seed, share, label] = kl_of(judging, plan, judge, calibration)
        row = {"seed": seed, "share": share, "plan": label, "kl": float(kl.mean()), "tokens": tokens}
        row |= {"parameters": size(plan).parameters, "bits": size(plan).bits_per_weight, "cut": dict(plan.entries)}
        found.append(row)
        left = f"{row['parameters']:.2%} left, {row['bits']:.2f} bits"
        note(f"seed {seed}, {share}: {label:<28} KL {row['kl']:.4f}, {left}")
        if out:
            Path(out).write_text(json.dumps({"model": model, "held_out": held_out, "rows": found}, indent=1))
            np.savez_compressed(f"{out}.npz", **{"|".join(map(str, key)): kls for key, kls in values.items()})

    for seed in range(first_seed, first_seed + seeds):
        if time.perf_counter() - began > seconds:
            break
        cut, _ = replica.cut_prompts(texts["search"], prompts, PROMPT, CONTINUATION, seed)
        reference = replica.make_reference(cut)
        replica.use(reference)
        text = replica.cut_calibration(texts["search"], rows, PROMPT + CONTINUATION, seed + 1000)
        replica.use_calibration(text)
        for share in map(float, filter(None, channels.split(","))):
            judged(seed, share, "LLM-Pruner", llm_pruner(manifest, share), 0, text.id)
            everywhere = one_width(manifest, share, "gradient")
            judged(seed, share, "LLM-Pruner, everywhere", everywhere, 0, text.id)
            rules = [rule + ending for rule in RULES for ending in ("", "-repair")]
            for name in of_one.split(",") if of_one else ("wanda-repair", "ziplm-repair") if seed else rules:
                if name != "gradient":  # LLM-Pruner's, everywhere
                    judged(seed, share, f"one width, {name}", one_width(manifest, share, name), 0, text.id)
            sizes = [size(plan).parameters for plan in (llm_pruner(manifest, share), everywhere)]
            asked = [(name, min(sizes), name) for name in strategies.split(",") if name]
            asked = asked[-1:] if seed else asked
            if asked and sizes[1] > sizes[0]:  # the other rival has more weights
                asked.append((f"{asked[-1][0]}, everywhere's size", sizes[1], asked[-1][2]))
            for label, parameters, name in asked:
                if time.perf_counter() - began > seconds:
                    break
                space = space_of(manifest, Budget(parameters=parameters), shares or WIDTHS, rule)
                plan, tokens = found_by(name, Measuring(replica), space, reference, prompts, few, text.id, {})
                judged(seed, share, label, plan, tokens, text.id)
        if heads and time.perf_counter() - began < seconds:
            groups = replica.model.config.num_key_value_heads
            what = f"heads {groups - 1}:{groups}"
            rival = heads_of(manifest, groups - 1, groups, "gradient", spared=True)
            judged(seed, what, "LLM-Pruner", rival, 0, text.id)
            for name in of_one.split(",") if of_one else [rule_ + end for rule_ in RULES for end in ("", "-repair")]:
                plan = heads_of(manifest, groups - 1, groups, name, spared=True)
                if name != "gradient":
                    judged(seed, what, f"its layers, {name}", plan, 0, text.id)
            cuts = [f"heads-{kept}:{groups}-{each}" for kept in range(groups - 1, 0, -1) for each in rule.split(",")]
            space = space_of_cuts(manifest, Budget(parameters=size(rival).parameters), cuts)
            plan, tokens = found_by("auto", Measuring(replica), space, reference, prompts, few, text.id, {})
            judged(seed, what, "auto", plan, tokens, text.id)
        if joint and time.perf_counter() - began < seconds:
            plans = joint_plans(Measuring(replica), manifest, reference, joint, rule, prompts, few, text.id)
            for label, (plan, tokens) in plans.items():
                judged(seed, joint, label, plan, tokens, text.id)
        replica.leave(reference.id)
    show(found, values)


def show(rows: Sequence[dict[str, Any]], values: Values) -> None:
    """A line for each share and plan: KL (mean over seeds) and, for each search, its ratio to both of LLM-Pruner
    with its 95% interval; of joint ones to each plan without a search."""
    click.echo(f"{'share':>9}  {'plan':<28} {'seeds':>5} {'KL':>8} {'left':>7} {'bits':>6} {'Mtokens':>8}  against")
    for share in dict.fromkeys(row["share"] for row in rows):
        every = [row for row in rows if row["share"] == share]
        mean = {p: float(np.mean([r["kl"] for r in every if r["plan"] == p])) for p in {r["plan"] for r in every}}
        rivals = [p for p in mean if p.startswith("LLM-Pruner")]
        for plan in dict.fromkeys(row["plan"] for row in every):
            own = [row for row in every if row["plan"] == plan]
            others = rivals or list(mean)
            seeds = [r["seed"] for r in own]
            said = "; ".join(_against(values, seeds, share, plan, other) for other in others if other != plan)
            left, bits, tokens = (float(np.mean([r[key] for r in own])) for key in ("parameters", "bits", "tokens"))
            click.echo(
                f"{share:>9}  {plan:<28} {len(own):>5} {mean[plan]:8.4f} {left:7.2%} {bits:6.2f} {tokens / 1e6:8.3f}  "
                f"{said}"
            )


def _against(values: Values, seeds: Sequence[int], share: float | str, plan: str, other: str) -> str:
    both = [s for s in seeds if (s, share, other) in values]
    one, two = (np.concatenate([values[s, share, name] for s in both]) for name in (plan, other))
    gap = paired_difference(one, two, seed=0)
    return f"x {one.mean() / two.mean():.2f} of {other} ({gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}])"


if __name__ == "__main__":
    main()
