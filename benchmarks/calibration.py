"""What calibration and pruning cost on a model of a given shape with random weights: statistics, errors of all weights,
GPTQ of some layers, pruning inside the loop. And, of a real model, whether calibrated plans are measured purely here.

    python benchmarks/calibration.py SHAPE [--rows N] [--tokens N] [--layers N] [--model FOLDER --text FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from shapes import ShapedReplica

from dtmsearch.core.calibration import Calibration, calibration_id
from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, PromptTokens, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.model.calibration.calibrator import Calibrator
from dtmsearch.model.replica.replica import Replica

WIDTHS = (2, 3, 4, 5, 6)
PRUNING = ("magnitude-0.5", "magnitude-2:4", "wanda-0.5", "wanda-2:4", "random-0.001", "drop")
CALIBRATED = ("wanda-0.5", "wanda-2:4", "sparsegpt-0.5", "gptq-int3-g32", "gptq-int4-g128-asym", "int4-g32+wanda-0.5")


def seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started_at = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started_at


def say(what: str, value: str) -> None:
    print(f"{what:<78} {value}", flush=True)


def timings(shape: str, dtype: str, rows: int, tokens: int, num_layers: int) -> None:
    model = ShapedReplica(ModelSpec(shape, dtype=dtype, compile="never"), ReplicaSettings())
    components = model.manifest().components
    names = [c.name for c in components]
    text = np.random.default_rng(0).integers(0, 1000, (rows, tokens)).astype(np.int32)
    calibration = Calibration(calibration_id(model.manifest().id, model.mode, text), model.manifest().id, text)
    say("shape, components, calibration tokens", f"{shape} {dtype}, {len(names)}, {text.size:,}")
    say("statistics of all components", f"{seconds(lambda: model.gather_statistics(calibration)):.2f} s")
    widths = [f"int{bits}-g128" for bits in WIDTHS]
    plain = seconds(lambda: model.weight_errors(names, widths, calibration.id))
    say(f"errors of all components x {len(widths)} widths, plain and input-weighted", f"{plain:.2f} s")
    again = seconds(lambda: model.weight_errors(names, widths, calibration.id))
    say("the same again", f"{again:.4f} s")
    few = [c.name for c in components if c.layer < num_layers]
    weighted = seconds(lambda: model.weight_errors(few, widths, calibration.id, True))
    whole = model.manifest().num_layers / num_layers
    say(
        f"Hessian-weighted errors of {num_layers} layers, Hessians included",
        f"{weighted:.2f} s; all: {weighted * whole:.0f} s",
    )
    gptq(model, calibration, few, widths, whole)
    pruning(model, names, calibration.id)


def gptq(model: Replica, calibration: Calibration, few: list[str], widths: list[str], whole: float) -> None:
    calibrator = model._calibrator
    assert isinstance(calibrator, Calibrator)  # of a model in one process
    calibrator.forget()
    with torch.inference_mode():
        layers = sorted({model.manifest().by_name[name].layer for name in few})
        gathering = seconds(lambda: [calibrator.hessians.of_layer(layer) for layer in layers])
    say(f"Hessians of {len(layers)} layers", f"{gathering:.2f} s; all: {gathering * whole:.0f} s")
    for schemes in ([f"gptq-{widths[2]}"], [f"gptq-{name}" for name in widths if name != widths[2]], ["sparsegpt-0.5"]):
        taken = seconds(lambda schemes=schemes: model.solve(calibration.id, [(n, s) for n in few for s in schemes]))
        what = f"{schemes[0]}" + (f" and {len(schemes) - 1} other widths" if len(schemes) > 1 else "")
        say(f"{what}, {len(layers)} layers, with Hessians", f"{taken:.2f} s; all: {taken * whole:.0f} s")
    if torch.cuda.is_available():
        say("most memory held so far", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def pruning(model: Replica, names: list[str], calibrated: str) -> None:
    """What a scheme adds to an evaluation of one component, beside the evaluation itself."""
    limit = int(getattr(model.model.config, "max_position_embeddings", None) or 200)
    length = min(200, limit)
    text = np.random.default_rng(1).integers(0, 1000, (128, length)).astype(np.int32)
    reference = model.make_reference(PromptTokens(text, length - 8))
    model.use(reference)
    component = max((n for n in names), key=lambda n: model.manifest().by_name[n].num_weights)
    middle = [n for n in names if n.rpartition(".")[2] == component.rpartition(".")[2]]
    component = middle[len(middle) // 2]
    request = EvalRequest(Plan.of({component: "int8-channel"}), reference.id, (0, 128), calibration_id=calibrated)
    model.evaluate([request])
    whole = statistics.median(seconds(lambda: model.evaluate([request])) for _ in range(5))
    say(
        f"an evaluation of {component.rpartition('.')[2]}, middle layer, 128 x {length} tokens", f"{whole * 1e3:.1f} ms"
    )
    for name in ("int8-channel", *PRUNING, "gptq-int4-g128"):
        compressing(model, component, name, calibrated, whole)


@torch.inference_mode()
def compressing(model: Replica, component: str, name: str, calibrated: str, whole_seconds: float) -> None:
    weight, scheme = model._weights.original(component), parse_scheme(name)
    if scheme.needs_hessians:
        model.solve(calibrated, [(component, name)])

    def compress() -> object:
        return model._weights.compressor.compress(component, weight, scheme)

    first = seconds(compress)
    later = statistics.median(seconds(compress) for _ in range(9))
    parts = f"{first * 1e3:8.2f} ms {later * 1e3:8.2f} ms {later / whole_seconds:.1%}"
    say(f"  {name}: first, again, part of the evaluation", parts)


def values(outcome: object) -> list[list[float]]:
    assert isinstance(outcome, EvalResult), outcome
    return [np.asarray(a).tolist() for a in (outcome.fdt, outcome.sdt, outcome.dppl, outcome.kl) if a is not None]


def purity(folder: str, text: Path, dtype: str) -> None:
    """Plans alone on a fresh replica, and beside others on one that has done much: the same bits."""
    spec = ModelSpec(folder, dtype=dtype)
    texts = [text.read_text(encoding="utf-8", errors="replace")[:2_000_000]]
    model, fresh = Replica(spec, ReplicaSettings()), Replica(spec, ReplicaSettings())
    prompts, _ = model.cut_prompts(texts, 32, 50, 50, 0)
    reference = model.make_reference(prompts)
    calibration = model.cut_calibration(texts, 64, 100, 1)
    for replica in (model, fresh):
        replica.use(reference)
        replica.use_calibration(calibration)
    components = model.manifest().components
    parent = Plan.of({components[2].name: "gptq-int3-g32", components[9].name: "wanda-0.5"})
    for name in CALIBRATED:
        plans = [Plan.of(parent.schemes | {c.name: name}) for c in components[:: max(1, len(components) // 6)]]
        asked = [EvalRequest(p, reference.id, (0, 32), ("kl",), parent, calibration.id) for p in plans]
        model.evaluate(
            [EvalRequest(Plan.uniform(components, name), reference.id, (0, 32), ("kl",), Plan(), calibration.id)]
        )
        shared = [values(o) for o in model.evaluate(asked)]
        alone = [values(fresh.evaluate([r])[0]) for r in reversed(asked)][::-1]
        uniform = EvalRequest(Plan.uniform(components, name), reference.id, (0, 32), ("kl",), Plan(), calibration.id)
        kl = np.mean(values(model.evaluate([uniform])[0])[3])
        say(f"{folder} {dtype}, {name}: the same bits; KL of uniform", f"{shared == alone}; {kl:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path)
    arguments = parser.parse_args()
    if arguments.model:
        for dtype in ("float32", "bfloat16"):
            purity(arguments.model, arguments.text, dtype)
    timings(arguments.shape, arguments.dtype, arguments.rows, arguments.tokens, arguments.layers)
