"""Replicas near the hardware's limit: a probe of every component of a Llama-2-7B shape on one or several GPUs.

    PYTHONPATH=benchmarks python benchmarks/gpu.py                       one GPU, table of plain loop, floor and ours
    PYTHONPATH=benchmarks python benchmarks/gpu.py --pool 1,2            a search's pool with one and with two GPUs

Rates count matrix products alone: 2 x weights x tokens of the layers from the changed one upward, and of the head
where continuations are predicted. The floor is that work at the rate of a large matrix product measured here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from shapes import SHAPES, ShapedReplica

import dtmsearch
from dtmsearch.model.compress.rounding import round_weight
from dtmsearch.model.replica import Replica
from dtmsearch.plans.components import Component, ModelManifest
from dtmsearch.plans.evaluation import EvalRequest, ModelSpec, PromptTokens, Reference, ReplicaSettings
from dtmsearch.plans.plan import Perturbation, Plan
from dtmsearch.plans.schemes import parse_scheme

PROMPT, CONTINUATION = 100, 100


def matmul_rate(size: int, dtype: torch.dtype, device: str, repeats: int = 10) -> float:
    """Operations a second of a large square matrix product on random data."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    started_at = time.perf_counter()
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - started_at)


def operations(component: Component, manifest: ModelManifest, shape: dict[str, int], count: int) -> float:
    """Matrix-product operations of an evaluation whose lowest changed component this is."""
    above = sum(c.num_weights for c in manifest.components if c.layer >= component.layer)
    head = shape["hidden_size"] * shape["vocab_size"] * count * CONTINUATION
    return 2.0 * (above * count * (PROMPT + CONTINUATION) + head)


def random_prompts(count: int, vocabulary: int) -> PromptTokens:
    tokens = np.random.default_rng(0).integers(3, vocabulary, (count, PROMPT + CONTINUATION))
    return PromptTokens(tokens.astype(np.int32), PROMPT)


def random_reference(replica: ShapedReplica, count: int, vocabulary: int) -> Reference:
    """A reference of random continuations: the same work, without generating them."""
    prompts = random_prompts(count, vocabulary)
    continuation = prompts.tokens[:, PROMPT:]
    agrees = np.ones(continuation.shape, np.bool_)
    return Reference(f"random-{count}", replica.manifest().id, replica.mode, prompts.tokens, continuation, agrees, (2,))


def timed(work: object) -> float:
    torch.cuda.synchronize()
    started_at = time.perf_counter()
    work()  # type: ignore[operator]
    torch.cuda.synchronize()
    return time.perf_counter() - started_at


def plain_seconds(replica: ShapedReplica, reference: Reference, components: Sequence[Component]) -> float:
    """Seconds a component of the plain loop: round, run the whole model, compare, restore."""
    model, tokens = replica._body.model, torch.from_numpy(reference.text).long().cuda()

    def loop() -> None:
        for component in components:
            module = replica._weights._module(component.name)
            original = module.weight.data
            module.weight.data = round_weight(original, parse_scheme("int8-channel"))
            for batch in tokens.split(128):
                chosen = model(batch, use_cache=False).logits[:, PROMPT - 1 : -1].float().argmax(-1)
                (chosen != batch[:, PROMPT:]).cpu()
            module.weight.data = original

    with torch.inference_mode(), replica._generating():
        return timed(loop) / len(components)


def ours_seconds(
    replica: ShapedReplica,
    reference: Reference,
    components: Sequence[Component],
    scheme: str,
    extra: tuple[str, ...] = (),
) -> float:
    replica.use(reference)
    plans = [Plan().with_(Perturbation(c.name, scheme)) for c in components]
    requests = [EvalRequest(plan, reference.id, (0, reference.num_prompts), extra) for plan in plans]
    return timed(lambda: replica.evaluate(requests))


def one_gpu(shape_name: str, count: int, many: int, every: int) -> None:
    shape = SHAPES[shape_name]
    rate = matmul_rate(8_192, torch.bfloat16, "cuda")
    started_at = time.perf_counter()
    replica = ShapedReplica(ModelSpec(shape_name, dtype="bfloat16", compile="always"), ReplicaSettings())
    manifest = replica.manifest()
    print(
        f"{torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s; loaded in {time.perf_counter() - started_at:.1f} s"
    )
    reference = random_reference(replica, count, shape["vocab_size"])
    replica.use(reference)
    generated = timed(lambda: replica.generate(Plan(), random_prompts(count, shape["vocab_size"])))
    static = static_generation_seconds(replica, count, shape["vocab_size"])
    warm_up = timed(lambda: replica.canary(reference.id))
    again = timed(lambda: replica.canary(reference.id))
    print(f"generating the reference {generated:.1f} s, with transformers' static cache {static:.1f} s")
    print(f"compiling {warm_up - again:.1f} s; a dense pass {again:.2f} s")
    print(f"compiled and eager choose differently on {disagreement():.2%} of a trained model's tokens", flush=True)
    plain = plain_seconds(replica, reference, manifest.components[:: len(manifest.components) // 5])
    print(f"{'what':42s} {'seconds':>8s} {'floor':>8s} {'ratio':>6s} {'TFLOP/s':>8s}")
    for scheme in ("int8-channel", "w8a8"):
        floor = sum(operations(c, manifest, shape, count) for c in manifest.components) / rate
        if scheme == "int8-channel":
            report(f"plain loop, {count} prompts", plain * len(manifest.components), floor, rate)
        report(f"{scheme}, {count} prompts", ours_seconds(replica, reference, manifest.components, scheme), floor, rate)
    larger = random_reference(replica, many, shape["vocab_size"])
    sample = manifest.components[::every]
    floor = sum(operations(c, manifest, shape, many) for c in sample) / rate
    replica.use(larger)
    replica.evaluate([EvalRequest(Plan(), larger.id, (0, many))])  # its last, smaller batch has a graph of its own
    seconds = ours_seconds(replica, larger, sample, "int8-channel")
    sweep = operations(manifest.components[0], manifest, shape, many) / rate
    report(f"int8-channel, {many} prompts, every {every}th component", seconds, floor, rate)
    print(f"(of those {seconds:.1f} s, about {sweep:.1f} s carry the parent's states, once a probe)")
    print(f"most memory used: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def static_generation_seconds(replica: ShapedReplica, count: int, vocabulary: int) -> float:
    """Seconds in which transformers generates the same with its static cache, not compiled."""
    from transformers import GenerationConfig

    tokens = torch.from_numpy(random_prompts(count, vocabulary).tokens[:, :PROMPT]).long().cuda()
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=CONTINUATION, suppress_tokens=[2], eos_token_id=None, pad_token_id=0,
        cache_implementation="static", disable_compile=True,
    )  # fmt: skip
    with torch.inference_mode(), replica._generating():
        return timed(lambda: replica._body.model.generate(tokens, generation_config=settings))


def disagreement() -> float:
    """Share of tokens on which the packaged trained model, compiled, leaves what it chose in eager mode."""
    spec = ModelSpec(str(Path(dtmsearch.__file__).parent / "demo" / "model"), dtype="bfloat16", compile="never")
    text = (Path(dtmsearch.__file__).parent / "run.py").read_text(encoding="utf-8")
    eager = Replica(spec, ReplicaSettings())
    prompts, _ = eager.cut_prompts([text], 16, PROMPT, CONTINUATION, 0)
    compiled = Replica(replace(spec, compile="always"), ReplicaSettings())
    compiled.use(replace(eager.make_reference(prompts), mode=compiled.mode))
    return compiled.canary(next(iter(compiled._references)))


def report(what: str, seconds: float, floor: float, rate: float) -> None:
    print(
        f"{what:42s} {seconds:8.1f} {floor:8.1f} {seconds / floor:6.2f} {floor * rate / seconds / 1e12:8.0f}",
        flush=True,
    )


def pools(shape_name: str, count: int, sizes: Sequence[int]) -> None:
    """A probe through the pool of a search, with each number of GPUs."""
    from dtmsearch.cluster.pool import PoolSettings, ReplicaPool

    spec = ModelSpec(shape_name, dtype="bfloat16", compile="always")
    seconds: dict[int, float] = {}
    for size in sizes:
        settings = PoolSettings(replicas=size, gpus_per_replica=1.0)
        with ReplicaPool(spec, settings, print, replica_class="shapes:ShapedReplica") as pool:
            manifest = pool.manifest()
            reference = pool.make_reference(random_prompts(count, SHAPES[shape_name]["vocab_size"]))
            pool.use(reference)
            while not all(member.ready for member in pool._members):
                pool.poll(1.0)
            requests = [
                EvalRequest(Plan().with_(Perturbation(c.name, "int8-channel")), reference.id, (0, count))
                for c in manifest.components
            ]
            started_at = time.perf_counter()
            pool.submit(requests)
            arrived = []
            while len(arrived) < len(requests):
                arrived += pool.poll(1.0)
            seconds[size] = time.perf_counter() - started_at
            busy = sum(o.provenance.wall_seconds for o in arrived) / (size * seconds[size])
            first = seconds[sizes[0]] * sizes[0]
            print(
                f"{size} GPUs: {seconds[size]:.1f} s, {first / seconds[size]:.2f} x one, {busy:.1%} evaluating",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama2-7b", choices=SHAPES)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--many", type=int, default=1_000)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--pool", help="numbers of GPUs, such as 1,2")
    arguments = parser.parse_args()
    if arguments.pool:
        pools(arguments.shape, arguments.prompts, [int(size) for size in arguments.pool.split(",")])
    else:
        one_gpu(arguments.shape, arguments.prompts, arguments.many, arguments.every)


if __name__ == "__main__":
    main()
