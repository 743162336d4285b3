"""Racing on real values: how often it finds what measuring everything finds, and what it saves.

    python benchmarks/racing.py measure MODEL TEXT OUT.npz [--prompts 1000] [--scheme int4-g32] [--around 20]
    python benchmarks/racing.py race OUT.npz [--confidence 0.99] [--repetitions 100]

`measure` evaluates a round of a search on all prompts: every component alone, or with `--around N` every child of the
plan of the N least harmful ones. `race` repeats such a round from these values, each time with the prompts in another
random order, which is how the search draws them; every share is of the prompts (and so of the tokens) that measuring
all candidates on all prompts takes.
"""

from __future__ import annotations

from typing import Any

import click
import numpy as np
from inprocess import load, reference, result

from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalRequest, EvalResult
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.search.strategies.racing import Racing

METRICS = ("fdt", "sdt", "kl")
TOKENS = 100
Values = dict[str, np.ndarray[Any, np.dtype[Any]]]


@click.group()
def main() -> None: ...


@main.command()
@click.argument("model")
@click.argument("text")
@click.argument("out")
@click.option("--prompts", default=1_000)
@click.option("--scheme", default="int4-g32")
@click.option("--around", default=0)
@click.option("--dtype", default="float32")
def measure(model: str, text: str, out: str, prompts: int, scheme: str, around: int, dtype: str) -> None:
    replica = load(model, dtype)
    made = reference(replica, text, prompts, TOKENS, TOKENS)
    components = replica.manifest().components

    def values(plans: list[Plan], parent: Plan, count: int) -> Values:
        requests = [EvalRequest(plan, made.id, (0, count), ("kl",), parent) for plan in plans]
        results = [result(outcome) for outcome in replica.evaluate(requests)]
        return {metric: np.stack([getattr(r, metric) for r in results]) for metric in METRICS}

    def children(parent: Plan) -> list[Plan]:
        free = [c for c in components if c.name not in parent.schemes]
        return [parent.with_(Perturbation(c.name, scheme)) for c in free]

    parent = Plan()
    if around:
        alone = values(children(parent), parent, min(prompts, 128))["kl"].mean(axis=1)
        chosen: list[Component] = [components[i] for i in np.argsort(alone)[:around]]
        parent = Plan.of({c.name: scheme for c in chosen})
    of_parent = values([parent], Plan(), prompts)
    np.savez_compressed(
        out,
        **{f"parent_{metric}": rows[0] for metric, rows in of_parent.items()},
        **values(children(parent), parent, prompts),
    )


@main.command()
@click.argument("files", nargs=-1)
@click.option("--confidence", default=0.99)
@click.option("--repetitions", default=100)
@click.option("--width", default=1)
@click.option("--prompts", default=0, help="of those measured, in another choice each time; 0: all")
@click.option("--indifference", default=0.0, help="in units of the metric")
@click.option("--resampled", is_flag=True, help="draw prompts with replacement, more than there are")
def race(
    files: list[str],
    confidence: float,
    repetitions: int,
    width: int,
    prompts: int,
    indifference: float,
    resampled: bool,
) -> None:
    click.echo(f"confidence {confidence}, width {width}, {repetitions} repetitions")
    click.echo(
        "values                       metric  candidates  prompts  same best  share of prompts: mean, least, most"
    )
    for file in files:
        loaded = dict(np.load(file))
        for metric in [m for m in METRICS if m in loaded]:
            rows, parent = loaded[metric], loaded[f"parent_{metric}"]
            same, shares = 0, []
            for repetition in range(repetitions):
                generator = np.random.default_rng(repetition)
                number = prompts or rows.shape[1]
                order = generator.choice(rows.shape[1], number, replace=resampled)
                found, share = race_once(rows[:, order], parent[order], metric, confidence, width, indifference)
                best = np.argsort(loss(rows[:, order], metric).mean(axis=1), kind="stable")[:width]
                same += set(found) == set(best.tolist())
                shares.append(share)
            name = file.rpartition("/")[2].removesuffix(".npz")
            click.echo(
                f"{name:<28} {metric:<6} {len(rows):>11} {number:>8} {same:>6}/{repetitions:<4}"
                f" {np.mean(shares):.3f}, {min(shares):.3f}, {max(shares):.3f}"
            )


def loss(values: np.ndarray[Any, Any], metric: str) -> np.ndarray[Any, Any]:
    return TOKENS - values if metric == "fdt" else values


def race_once(
    rows: np.ndarray[Any, Any],
    parent: np.ndarray[Any, Any],
    metric: str,
    confidence: float,
    width: int,
    indifference: float = 0.0,
) -> tuple[list[int], float]:
    """The best candidates by a race over these values [candidates, prompts], and the share of them that it read."""
    number = rows.shape[1]
    root = Plan.of({"parent": "nf4"})
    places = {root.with_(Perturbation(f"c{i}", "nf4")).id: i for i in range(len(rows))} | {root.id: -1}
    read = 0

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, "values", (0, number))

    def answer(request: EvalRequest) -> EvalResult:
        nonlocal read
        place, part = places[request.plan.id], slice(*request.prompts)
        values = (parent if place < 0 else rows[place])[part]
        read += len(values) if place >= 0 else 0
        none = np.zeros(len(values), np.int32)
        fdt, sdt = (values if metric == m else none for m in ("fdt", "sdt"))
        return EvalResult(request.id, fdt, sdt, none + np.float32(1), values if metric == "kl" else None)

    racing = Racing(metric, width, confidence, TOKENS, indifference=indifference)
    for edges in (
        [(Plan(), Perturbation("parent", "nf4"))],
        [(root, Perturbation(f"c{i}", "nf4")) for i in range(len(rows))],
    ):
        running = racing.round(0, edges, request_for)
        while not running.complete:
            for ask in running.ask():
                running.tell(ask.request.id, ask.answer or answer(ask.request))
    return [places[c.plan.id] for c, _ in running.ranked(metric)[:width]], read / rows.size


if __name__ == "__main__":
    main()
