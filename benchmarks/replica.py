"""How near a replica comes to what the machine forces: a probe of every component, against a plain loop and a floor.

    python benchmarks/replica.py MODEL TEXT [--prompts 16] [--prompt-tokens 100] [--continuation-tokens 100] [--every 1]

The plain loop rounds a component, runs the whole model as transformers gives it, compares the logits of all positions
that matter with the reference, and puts the component back. The floor is the matrix products alone, of the layers from
the changed one upward and of the head where continuations are predicted, at the rate of a large matrix product. The
three take turns, a component each, so that what else the machine does falls on all alike. Continuations are the text's
own: the same work as with the model's, without generating them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtmsearch.model.compress.rounding import round_weight
from dtmsearch.model.replica import Replica
from dtmsearch.plans.components import Component
from dtmsearch.plans.evaluation import EvalRequest, EvalResult, ModelSpec, Reference, ReplicaSettings
from dtmsearch.plans.metrics import share_of_divergent_tokens
from dtmsearch.plans.plan import Perturbation, Plan
from dtmsearch.plans.schemes import parse_scheme

Array = NDArray[Any]
_MATRIX = {"cpu": 2_048, "cuda": 8_192}


@dataclass
class Times:
    """Seconds and matrix-product operations of a probe so far; `differing` counts choices on which the two differ."""

    plain: float = 0.0
    ours: float = 0.0
    operations: float = 0.0
    matrix_seconds: float = 0.0
    matrix_operations: float = 0.0
    differing: int = 0

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
        module = self.replica._body.model.get_submodule(component.name)
        original = module.weight.data
        module.weight.data = round_weight(original, parse_scheme(self.scheme))
        batches = self.tokens.split(self.replica._rows_in_batch(self.tokens.shape[1]))
        diverged = torch.cat([self._compare(batch) for batch in batches]).cpu().numpy()
        module.weight.data = original
        return share_of_divergent_tokens(diverged)

    def _compare(self, batch: Tensor) -> Tensor:
        start = self.reference.prompt_tokens
        logits = self.replica._body.model(batch, use_cache=False).logits[:, start - 1 : -1].float()
        targets = batch[:, start:]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        logits[..., list(self.reference.suppressed)] = -torch.inf
        return logits.argmax(dim=-1) != targets

    def ours(self, component: Component) -> Array:
        """Divergent tokens of each prompt, by the replica."""
        plan = Plan().with_(Perturbation(component.name, self.scheme))
        (outcome,) = self.replica.evaluate([EvalRequest(plan, self.reference.id, (0, self.reference.num_prompts))])
        assert isinstance(outcome, EvalResult), outcome
        return outcome.sdt

    def operations(self, component: Component) -> float:
        """Matrix-product operations of an evaluation whose lowest changed component this is."""
        above = sum(c.num_weights for c in self.replica.manifest().components if c.layer >= component.layer)
        head = self.replica._body.model.get_output_embeddings().weight.numel()
        return 2.0 * (above * self.tokens.numel() + head * self.reference.continuation.size)

    def matrix_product(self) -> tuple[float, float]:
        """(operations, seconds) of a large matrix product."""
        size = _MATRIX[self.device.type]
        a, b = (torch.randn(size, size, device=self.device, dtype=self.replica._body.model.dtype) for _ in range(2))
        a @ b

        def work() -> Array:
            a @ b
            return np.empty(0)

        return 2.0 * size**3, self.timed(work)[0]


def measure(probe: Probe, components: Sequence[Component]) -> Times:
    """A probe of components, which are in order of their layers."""
    times = Times()
    probe.ours(components[-1])
    probe.plain(components[0])
    for component in components:
        operations, seconds = probe.matrix_product()
        times.matrix_operations += operations
        times.matrix_seconds += seconds
        seconds, expected = probe.timed(partial(probe.plain, component))
        times.plain += seconds
        seconds, found = probe.timed(partial(probe.ours, component))
        times.ours += seconds
        times.operations += probe.operations(component)
        times.differing += int(np.abs(expected - found).sum())
    return times


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--prompts", default=16, show_default=True)
@click.option("--prompt-tokens", default=100, show_default=True)
@click.option("--continuation-tokens", default=100, show_default=True)
@click.option("--scheme", default="int8-channel", show_default=True, help="A rounding scheme.")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--batch-tokens", default=0, show_default=True, help="0: the replica's choice.")
@click.option("--every", default=1, show_default=True, help="Take every Nth component of a layer.")
def main(
    model: Path,
    text: Path,
    prompts: int,
    prompt_tokens: int,
    continuation_tokens: int,
    scheme: str,
    dtype: str,
    batch_tokens: int,
    every: int,
) -> None:
    replica = Replica(ModelSpec(str(model), dtype=dtype), ReplicaSettings(batch_tokens=batch_tokens))
    reference = text_reference(replica, text, prompts, prompt_tokens, continuation_tokens)
    components = replica.manifest().components[::every]
    times = measure(Probe(replica, reference, scheme), components)
    choices = len(components) * reference.continuation.size
    click.echo(
        f"{len(components)} components, {prompts} prompts x ({prompt_tokens} + {continuation_tokens}), {scheme}, "
        f"{dtype}, {replica._body.input_device.type} with {torch.get_num_threads()} threads, "
        f"{times.rate / 1e9:.0f} GFLOP/s"
    )
    click.echo(f"{'':10s} {'seconds':>9s} {'of the floor':>13s} {'of the plain loop':>18s}")
    for name, seconds in (("plain loop", times.plain), ("ours", times.ours), ("floor", times.floor)):
        click.echo(f"{name:10s} {seconds:9.1f} {seconds / times.floor:13.2f} {seconds / times.plain:18.2f}")
    click.echo(f"{times.plain / times.ours:.2f} x faster; {times.differing} of {choices} choices differ")


def text_reference(replica: Replica, text: Path, count: int, prompt: int, continuation: int) -> Reference:
    """A reference in use by the replica, whose continuations are the text's own."""
    cut, reference_id = replica.cut_prompts([text.read_text(encoding="utf-8")], count, prompt, continuation, 0)
    targets = cut.tokens[:, prompt:]
    agrees = np.ones(targets.shape, np.bool_)
    manifest_id = replica.manifest().id
    made = Reference(reference_id, manifest_id, replica.mode, cut.tokens, targets, agrees, replica._suppressed)
    replica.use(made)
    return made


if __name__ == "__main__":
    main()
