"""The base model against itself, and int8 plans beside it, like for like: FDT and SDT with no position left out.

    python benchmarks/noise_floor.py MODEL CALIBRATION.txt VALIDATION.txt [--components 63] [--dtype bfloat16]

The floor is measured twice: the base model's single pass against its own cached generation, and its single pass in
another batch shape against the same. The plan is that of a greedy search by KL over int8-channel
(`--components 0`: none).
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from inprocess import Forgetful, Measuring, load

from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, Reference, ReplicaSettings
from dtmsearch.core.metrics import difference_limits
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.statistics import paired_difference
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.model.replica.replica import Replica
from dtmsearch.search.loop import search
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.task import Task


def reference(replica: Replica, path: str, count: int, tokens: int) -> Reference:
    windows = replica.cut_prompts([Path(path).read_text(encoding="utf-8")], count, tokens, tokens, 0)
    made = replica.make_reference(windows[0] if isinstance(windows, tuple) else windows)
    replica.use(made)
    return made


def measured(replica: Replica, plan: Plan, on: Reference) -> EvalResult:
    (outcome,) = replica.evaluate([EvalRequest(plan, on.id, (0, on.num_prompts), ("kl",))])
    assert isinstance(outcome, EvalResult), outcome
    return outcome


def line(label: str, found: EvalResult, floor: EvalResult, length: int) -> str:
    assert found.sdt_unmasked is not None and found.fdt_unmasked is not None and found.kl is not None
    assert floor.sdt_unmasked is not None and floor.fdt_unmasked is not None
    parts = [
        f"{label:34} FDT {found.fdt.mean():7.2f} SDT {found.sdt.mean():7.3f} KL {found.kl.mean():.5f}",
        f"unmasked: FDT {found.fdt_unmasked.mean():7.2f} SDT {found.sdt_unmasked.mean():7.3f}",
    ]
    for name, a, b in (
        ("FDT", found.fdt_unmasked, floor.fdt_unmasked),
        ("SDT", found.sdt_unmasked, floor.sdt_unmasked),
    ):
        d = paired_difference(a, b, 0, limits=difference_limits(name.lower(), length))
        parts.append(f"{name} - floor {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]")
    return " | ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("validation")
    parser.add_argument("--components", type=int, default=63)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=100)
    given = parser.parse_args()

    replica = load(given.model, given.dtype)
    on = reference(replica, given.validation, given.held_out, given.tokens)
    floor = measured(replica, Plan(), on)
    print(line("base, single pass against cached", floor, floor, given.tokens), flush=True)
    for rows in (1, 7):
        shaped = Replica(
            ModelSpec(given.model, dtype=given.dtype), ReplicaSettings(batch_tokens=rows * 2 * given.tokens)
        )
        shaped.use(on)
        print(line(f"base, {rows} rows a batch", measured(shaped, Plan(), on), floor, given.tokens), flush=True)
        del shaped

    components = replica.manifest().components
    uniform = measured(replica, Plan.uniform(components, "int8-channel"), on)
    print(line(f"int8-channel, all {len(components)}", uniform, floor, given.tokens), flush=True)

    if not given.components:
        return
    calibration = reference(replica, given.calibration, given.prompts, given.tokens)
    space = SearchSpace(components, ("int8-channel",), budget=Budget(components=given.components))
    make = partial(
        EvalRequest, reference_id=calibration.id, prompts=(0, calibration.num_prompts), extra_metrics=("kl",)
    )
    greedy = Beam(Task(space, lambda plan, parent: make(plan, parent=parent), "kl"), TreeSettings(width=1))
    evaluator = Measuring(replica)
    plan = search(greedy, evaluator, Forgetful(), Forgetful(), guess_share=0.0)
    assert plan is not None
    label = f"int8-channel, {len(plan)} by KL ({space.size(plan).share:.1%})"
    print(line(label, measured(replica, plan, on), floor, given.tokens), f"| {evaluator.evaluations} evaluations")


if __name__ == "__main__":
    main()
