"""Lazy and racing greedy against full greedy: what they measure, and the plans' values on held-out prompts, paired.

    python benchmarks/lazy.py MODEL TEXT HELD_OUT [--rank-by kl] [--scheme int4-g32] [--components 42] [--prompts 128]

Evaluations are all that a search asks for, its first round over all components included (a race's blocks count one
each); `prompts` is the share of full greedy's prompts, and so of its tokens.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from inprocess import Forgetful, Measuring, load, reference, result

from dtmsearch.core.evaluation import EvalRequest, EvalResult
from dtmsearch.core.metrics import summarize
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.statistics import paired_difference
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.search.loop import search
from dtmsearch.search.protocols import remarks_of
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.strategy_registry import make_strategy

# label -> strategy and its settings
SEARCHES: dict[str, tuple[str, TreeSettings]] = {
    "greedy": ("greedy", TreeSettings()),
    "greedy, racing at 0.99": ("greedy", TreeSettings(confidence=0.99)),
    "lazy, one a step": ("lazy_greedy", TreeSettings(expand=1, audit=0.0)),
    "lazy, 0.2% audited": ("lazy_greedy", TreeSettings(expand=1, audit=0.002)),
    "lazy until it holds": ("lazy_greedy", TreeSettings(audit=0.0)),
    "the same, 5% audited": ("lazy_greedy", TreeSettings(audit=0.05)),
}


@click.command()
@click.argument("model")
@click.argument("text")
@click.argument("held_out")
@click.option("--rank-by", default="kl")
@click.option("--scheme", default="int4-g32")
@click.option("--components", default=42)
@click.option("--prompts", default=128)
@click.option("--validation", default=512)
@click.option("--dtype", default="float32")
@click.option("--out", default=None, help="a JSON file for the figures")
def main(
    model: str,
    text: str,
    held_out: str,
    rank_by: str,
    scheme: str,
    components: int,
    prompts: int,
    validation: int,
    dtype: str,
    out: str | None,
) -> None:
    replica = load(model, dtype)
    searched, unseen = reference(replica, text, prompts, 100, 100), reference(replica, held_out, validation, 100, 100)
    space = SearchSpace(replica.manifest().components, (scheme,), budget=Budget(components=components))
    extra = ("kl",) if rank_by == "kl" else ("ppl",) if rank_by == "ppl" else ()

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, searched.id, (0, prompts), extra, parent)

    rows: list[dict[str, Any]] = []
    full: EvalResult | None = None
    all_prompts = 0
    for label, (name, settings) in SEARCHES.items():
        strategy = make_strategy(name, space, request_for, rank_by, continuation_tokens=100, tree=settings)
        evaluator, quiet = Measuring(replica), Forgetful()
        started_at = time.perf_counter()
        plan = search(strategy, evaluator, quiet, quiet)
        seconds = time.perf_counter() - started_at
        assert plan is not None
        request = EvalRequest(plan, unseen.id, (0, validation), ("kl",))
        measured = result(replica.evaluate([request])[0])
        full = full or measured
        all_prompts = all_prompts or evaluator.prompts
        ahead = paired_difference(measured.fdt, full.fdt, 0)
        rows.append(
            {
                "search": label,
                "evaluations": evaluator.evaluations,
                "prompts": round(evaluator.prompts / all_prompts, 4),
                "seconds": round(seconds, 1),
                "on its prompts": round(strategy.decisions[-1].score, 5),
                "fdt": round(summarize(measured).fdt_mean, 2),
                "ahead of greedy": f"{ahead.mean:+.2f} [{ahead.low:+.2f}, {ahead.high:+.2f}]",
                "sdt": round(summarize(measured).sdt_mean, 3),
                "kl": round(summarize(measured).kl or 0.0, 5),
                "remarks": "; ".join(remarks_of(strategy)),
            }
        )
    click.echo(f"{model}, {scheme}, {components} components by {rank_by}, {prompts} prompts, {validation} held out")
    for row in rows:
        click.echo("  ".join(f"{key} {value}" for key, value in row.items()))
    if out:
        Path(out).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
