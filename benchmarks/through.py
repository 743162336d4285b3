"""What GPTQ gains behind layers that are compressed already (`calibration.through`), for uniform and mixed plans.

    python benchmarks/through.py MODEL TEXT CALIBRATION gptq-int4-g128 gptq-int3-g128 gptq-int2-g128

Every plan is measured under both calibrations on the same prompts of TEXT, in this process; KL in nats per token, and
the paired difference of the two with its 95% interval.
"""

from __future__ import annotations

import argparse
import random
import time
from itertools import chain
from pathlib import Path

from dtmsearch.core.calibration import PackedMatrix, Through
from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalRequest, EvalResult, IntArray, ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.core.statistics import paired_difference
from dtmsearch.model.replica.replica import Replica

CALIBRATION_ROWS = 64


def plans(components: tuple[Component, ...], wide: str, middle: str, narrow: str) -> dict[str, Plan]:
    """A uniform plan, and mixed ones of two or three schemes."""
    names, layers = [c.name for c in components], 1 + max(c.layer for c in components)

    def drawn(seed: int) -> Plan:
        generator = random.Random(seed)  # noqa: S311 (nothing secret)
        return Plan.of({name: generator.choice((middle, wide)) for name in names})

    def by(choose: dict[str, str]) -> Plan:
        return Plan.of({c.name: choose.get(c.kind, middle) for c in components})

    return {
        f"{middle} everywhere": Plan.uniform(components, middle),
        f"{middle} or {wide}, drawn (0)": drawn(0),
        f"{middle} or {wide}, drawn (1)": drawn(1),
        f"v, o, down {wide}, the rest {middle}": by(dict.fromkeys(("v", "o", "down"), wide)),
        f"q, k {narrow}, v, down {wide}, the rest {middle}": by({"q": narrow, "k": narrow, "v": wide, "down": wide}),
        f"lower half {wide}, upper half {middle}": Plan.of(
            {c.name: wide if c.layer < layers // 2 else middle for c in components}
        ),
    }


def solve(model: Replica, text: str, tokens: int, through: Through, wanted: dict[str, Plan]) -> str:
    """Gather and solve what the plans hold; the calibration's id."""
    calibration = model.cut_calibration([text], CALIBRATION_ROWS, tokens, 0, through)
    started = time.perf_counter()
    model.use_calibration(calibration, model.gather_statistics(calibration))
    by_scheme: dict[str, list[tuple[str, str]]] = {}
    for name, scheme in sorted({entry for plan in wanted.values() for entry in plan.entries}):
        by_scheme.setdefault(scheme, []).append((name, scheme))
    parts = [list(chain.from_iterable(by_scheme.values()))] if through == "base" else list(by_scheme.values())
    solved: dict[tuple[str, str], PackedMatrix] = {}
    for part in parts:
        solved |= {(m.component, m.scheme): m for m in model.solve(calibration.id, part)}
    model.use_solved(calibration.id, lambda component, scheme: solved.get((component, scheme)))
    print(f"{through}: {len(solved)} matrices solved in {time.perf_counter() - started:.1f} s", flush=True)
    return calibration.id


def kl_of(model: Replica, reference_id: str, prompts: IntArray, plan: Plan, calibration_id: str) -> EvalResult:
    request = EvalRequest(plan, reference_id, (0, len(prompts)), ("kl",), calibration_id=calibration_id)
    (outcome,) = model.evaluate([request])
    assert isinstance(outcome, EvalResult), outcome
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("schemes", nargs=3, help="from the widest to the narrowest")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    model = Replica(ModelSpec(given.model, dtype=given.dtype), ReplicaSettings())
    settings = given.prompts, given.tokens, given.tokens, 0
    prompts, _ = model.cut_prompts([given.text.read_text(encoding="utf-8")], *settings)
    reference = model.make_reference(prompts)
    model.use(reference)
    wanted = plans(model.manifest().components, *given.schemes)
    text = given.calibration.read_text(encoding="utf-8")
    found: dict[str, list[EvalResult]] = {label: [] for label in wanted}
    modes: tuple[Through, ...] = ("base", "compressed")
    for through in modes:
        calibration_id = solve(model, text, 2 * given.tokens, through, wanted)
        for label, plan in wanted.items():
            found[label].append(kl_of(model, reference.id, prompts.tokens, plan, calibration_id))
    print("| plan | base | compressed | difference |\n|---|---|---|---|")
    for label, (base, compressed) in found.items():
        assert base.kl is not None and compressed.kl is not None
        d = paired_difference(compressed.kl, base.kl, 0)
        kls = f"{base.kl.mean():.4f} | {compressed.kl.mean():.4f}"
        print(f"| {label} | {kls} | {d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f}) |")


if __name__ == "__main__":
    main()
