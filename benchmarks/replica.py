"""How near a replica comes to what the machine forces: a probe of every component, against a plain loop and a floor.

    python benchmarks/replica.py MODEL --text TEXT [--prompts 16] [--scheme int8-channel] [--every 1]
    PYTHONPATH=benchmarks python benchmarks/replica.py llama2-7b --prompts 128 --plain-every 45

MODEL is a folder, or a shape of `shapes.py` with random weights (and random text). The plain loop compresses a
component, runs the whole model as transformers gives it, compares the logits of all positions that matter with the
reference, and puts the component back. The floor is the matrix products alone, of the layers from the changed one
upward and of the head where continuations are predicted, at the rate of a large matrix product; on a GPU at the rate
that it keeps up for seconds before and after the probe, for what a cool one does in a burst of ten (printed too) its
power does not bear for longer. On a CPU the
three take turns, a layer each (the replica gets its components together, as in a search), so that what else the
machine does falls on all alike; on a GPU the replica gets the probe whole, and of the plain loop a sample is
extrapolated. Continuations are the text's own: the same work as with the model's, without generating them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import (
    EvalRequest,
    EvalResult,
    ModelSpec,
    PromptTokens,
    Reference,
    ReplicaSettings,
    reference_id,
)
from dtmsearch.core.metrics import share_of_divergent_tokens
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.model.replica.replica import Replica

Array = NDArray[Any]
_MATRIX = {"cpu": 2_048, "cuda": 8_192}
_SUSTAINED_SECONDS, _BURST, _TOGETHER, _PAUSE = 5.0, 10, 100, 0.3


@dataclass
class Times:
    """Seconds and matrix-product operations of a probe so far; `differing` counts choices on which the two differ,
    `burst` are the operations a second of a few large products after a pause."""

    plain: float = 0.0
    ours: float = 0.0
    operations: float = 0.0
    matrix_seconds: float = 0.0
    matrix_operations: float = 0.0
    burst: float = 0.0
    differing: int = 0
    compressing: float = 0.0

    @property
    def rate(self) -> float:
        """Operations a second of a large matrix product."""
        return self.matrix_operations / self.matrix_seconds

    @property
    def floor(self) -> float:
        return self.operations / self.rate


class Probe:
    """A replica, its reference, and the two ways to measure its components."""

    def __init__(self, replica: Replica, reference: Reference, scheme: str) -> None:
        self.replica, self.reference, self.scheme = replica, reference, scheme
        self.device = replica._body.input_device
        greedy = np.concatenate([reference.text[:, : reference.prompt_tokens], reference.continuation], axis=1)
        self.tokens = torch.from_numpy(greedy).long().to(self.device)

    def timed(self, work: Callable[[], Array]) -> tuple[float, Array]:
        self._wait()
        started_at = time.perf_counter()
        found = work()
        self._wait()
        return time.perf_counter() - started_at, found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def plain(self, component: Component) -> Array:
        """Divergent tokens of each prompt, by the plain loop."""
        batches = self.tokens.split(self.replica._batches.rows(self.tokens.shape[1]))
        plan = Plan().with_(Perturbation(component.name, self.scheme))
        with self.replica._weights.perturbed(plan), self.replica._standing.eagerly():
            diverged = torch.cat([self._compare(batch) for batch in batches]).cpu().numpy()
        return share_of_divergent_tokens(diverged)

    @torch.inference_mode()
    def compress(self, component: Component) -> Array:
        """Compress and restore, no more."""
        with self.replica._weights.perturbed(Plan().with_(Perturbation(component.name, self.scheme))):
            return np.empty(0)

    def _compare(self, batch: Tensor) -> Tensor:
        start = self.reference.prompt_tokens
        logits = self.replica.model(batch, use_cache=False).logits[:, start - 1 : -1].float()
        targets = batch[:, start:]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        logits[..., list(self.reference.suppressed)] = -torch.inf
        return logits.argmax(dim=-1) != targets

    def ours(self, component: Component) -> Array:
        """Divergent tokens of each prompt, by the replica."""
        return self.ours_together([component])

    def ours_together(self, components: Sequence[Component]) -> Array:
        """Divergent tokens of each component and prompt, one after the other, by the replica in one call."""
        plans = [Plan().with_(Perturbation(component.name, self.scheme)) for component in components]
        requests = [EvalRequest(plan, self.reference.id, (0, self.reference.num_prompts)) for plan in plans]
        outcomes = self.replica.evaluate(requests)
        assert all(isinstance(outcome, EvalResult) for outcome in outcomes), outcomes
        return np.concatenate([outcome.sdt for outcome in outcomes if isinstance(outcome, EvalResult)])

    def operations(self, component: Component) -> float:
        """Matrix-product operations of an evaluation whose lowest changed component this is."""
        above = sum(c.num_weights for c in self.replica.manifest().components if c.layer >= component.layer)
        head = self.replica.model.get_output_embeddings().weight.numel()
        return 2.0 * (above * self.tokens.numel() + head * self.reference.continuation.size)

    def matrix_products(self, count: int = 1, least_seconds: float = 0.0) -> tuple[float, float]:
        """(operations, seconds) of large matrix products, `count` of them at a time for at least so long."""
        size = _MATRIX[self.device.type]
        a, b = (torch.randn(size, size, device=self.device, dtype=self.replica.model.dtype) for _ in range(2))
        a @ b

        def work() -> Array:
            for _ in range(count):
                a @ b
            return np.empty(0)

        self._wait()
        time.sleep(_PAUSE if count > 1 else 0.0)
        operations = seconds = 0.0
        while not operations or seconds < least_seconds:
            seconds += self.timed(work)[0]
            operations += 2.0 * size**3 * count
        return operations, seconds


def take_turns(probe: Probe, components: Sequence[Component]) -> Times:
    """A probe of components, which are in order of their layers."""
    times = Times()
    probe.ours(components[-1])
    probe.plain(components[0])
    for _, of_a_layer in groupby(components, key=lambda component: component.layer):
        layer = list(of_a_layer)
        expected = []
        for component in layer:
            operations, seconds = probe.matrix_products()
            times.matrix_operations += operations
            times.matrix_seconds += seconds
            seconds, values = probe.timed(partial(probe.plain, component))
            times.plain += seconds
            expected.append(values)
            times.compressing += probe.timed(partial(probe.compress, component))[0]
            times.operations += probe.operations(component)
        seconds, found = probe.timed(partial(probe.ours_together, layer))
        times.ours += seconds
        times.differing += int(np.abs(np.concatenate(expected) - found).sum())
    return times


def one_after_the_other(probe: Probe, components: Sequence[Component], plain_every: int) -> Times:
    """The same on a GPU; the plain loop over every `plain_every`th component stands for all."""
    times = Times()
    probe.ours(components[-1])
    sample = list(range(0, len(components), plain_every))
    probe.plain(components[0])
    operations, seconds = probe.matrix_products(_BURST)
    times.burst = operations / seconds
    expected = {}
    for index in sample:
        seconds, expected[index] = probe.timed(partial(probe.plain, components[index]))
        times.plain += seconds * len(components) / len(sample)
    products = [probe.matrix_products(_TOGETHER, _SUSTAINED_SECONDS)]
    times.ours, found = probe.timed(partial(probe.ours_together, components))
    products.append(probe.matrix_products(_TOGETHER, _SUSTAINED_SECONDS))
    times.matrix_operations, times.matrix_seconds = np.sum(products, axis=0).tolist()
    times.compressing = sum(probe.timed(partial(probe.compress, component))[0] for component in components)
    times.operations = sum(probe.operations(component) for component in components)
    by_component = found.reshape(len(components), -1)
    times.differing = sum(int(np.abs(values - by_component[index]).sum()) for index, values in expected.items())
    return times


@click.command()
@click.argument("model")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Random tokens without it.")
@click.option("--prompts", default=16, show_default=True)
@click.option("--prompt-tokens", default=100, show_default=True)
@click.option("--continuation-tokens", default=100, show_default=True)
@click.option("--scheme", "schemes", multiple=True, default=("int8-channel",), show_default=True)
@click.option("--dtype", help="float32 on a CPU, bfloat16 on a GPU unless given.")
@click.option("--batch-tokens", default=0, show_default=True, help="0: the replica's choice.")
@click.option("--every", default=1, show_default=True, help="Take every Nth component.")
@click.option("--plain-every", default=1, show_default=True, help="On a GPU: the plain loop takes every Nth of these.")
def main(
    model: str,
    text: Path | None,
    prompts: int,
    prompt_tokens: int,
    continuation_tokens: int,
    schemes: tuple[str, ...],
    dtype: str | None,
    batch_tokens: int,
    every: int,
    plain_every: int,
) -> None:
    on_gpu = torch.cuda.is_available()
    replica = make_replica(model, dtype or ("bfloat16" if on_gpu else "float32"), batch_tokens)
    reference = make_reference(replica, text, prompts, prompt_tokens, continuation_tokens)
    components = replica.manifest().components[::every]
    for scheme in schemes:
        probe = Probe(replica, reference, scheme)
        times = one_after_the_other(probe, components, plain_every) if on_gpu else take_turns(probe, components)
        report(probe, times, len(components), len(components[::plain_every]) if on_gpu else len(components))


def report(probe: Probe, times: Times, num_components: int, num_compared: int) -> None:
    reference, replica = probe.reference, probe.replica
    choices = num_compared * reference.continuation.size
    device = torch.cuda.get_device_name() if probe.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    click.echo(
        f"{num_components} components, {reference.num_prompts} prompts x ({reference.prompt_tokens} + "
        f"{reference.continuation_tokens}), {probe.scheme}, {replica.mode}, {device}, {times.rate / 1e12:.3g} TFLOP/s; "
        f"parent's states kept: {replica.states_kept}"
    )
    click.echo(f"{'':10s} {'seconds':>9s} {'of the floor':>13s} {'of the plain loop':>18s} {'TFLOP/s':>9s}")
    for name, seconds in (("plain loop", times.plain), ("ours", times.ours), ("floor", times.floor)):
        rate = times.operations / seconds / 1e12
        click.echo(f"{name:10s} {seconds:9.1f} {seconds / times.floor:13.3f} {seconds / times.plain:18.3f} {rate:9.3g}")
    click.echo(
        f"{times.plain / times.ours:.2f} x faster; {times.differing} of {choices} choices differ; "
        f"compressing and restoring takes {times.compressing / times.ours:.2%} of ours"
    )
    if probe.device.type == "cuda":
        click.echo(
            f"a burst of {_BURST} products: {times.burst / 1e12:.3g} TFLOP/s, at which ours is "
            f"{times.ours / (times.operations / times.burst):.3f} of the floor"
        )
        click.echo(f"most memory used: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def make_replica(model: str, dtype: str, batch_tokens: int) -> Replica:
    settings = ReplicaSettings(batch_tokens=batch_tokens)
    if Path(model).is_dir():
        return Replica(ModelSpec(model, dtype=dtype), settings)
    from shapes import ShapedReplica

    return ShapedReplica(ModelSpec(model, dtype=dtype), settings)


def make_reference(replica: Replica, text: Path | None, count: int, prompt: int, continuation: int) -> Reference:
    """A reference in use by the replica, whose continuations are the text's own."""
    length = prompt + continuation
    if text is None:
        tokens = np.random.default_rng(0).integers(3, replica._body.vocabulary_size, (count, length))
        cut = PromptTokens(tokens.astype(np.int32), prompt)
    else:
        cut, _ = replica.cut_prompts([text.read_text(encoding="utf-8")], count, prompt, continuation, 0)
    targets = cut.tokens[:, prompt:]
    agrees = np.ones(targets.shape, np.bool_)
    manifest_id = replica.manifest().id
    identity = reference_id(manifest_id, replica.mode, cut, replica.conditions()[1])
    made = Reference(
        identity, manifest_id, replica.mode, cut.tokens, targets, agrees, replica.conditions()[1].suppressed
    )
    replica.use(made)
    return made


if __name__ == "__main__":
    main()
