"""Memory of a replica: its peak while it measures, against the model's weights and the activations of one batch.

    python benchmarks/memory.py [--dtypes float32,bfloat16] [--layers 16] [--hidden 1024] [--batch-tokens 1600]

Each row is a fresh process with a model of random weights. What is counted is the process's proportional set size
beyond what the imported libraries take: all that is in memory for it, pages of the checkpoint's files included, and a
page that is mapped twice once. Activations are what one dense pass over one batch adds at its peak.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import click
import numpy as np
import psutil

PROMPT, CONTINUATION = 100, 100
CASES = ("one component, int4-g128", "every component, int4-g128", "every component, nf4", "every component, w8a8")
_SAMPLE_SECONDS = 0.003
_MEGABYTE = 1e6


@dataclass(frozen=True)
class Memory:
    """All in bytes."""

    weights: int
    activations: int
    peak: int

    @property
    def ratio(self) -> float:
        return self.peak / (self.weights + self.activations)


class Peak:
    """The most memory of this process, sampled by a thread, within a `with` statement."""

    def __enter__(self) -> Peak:
        self.before = self.bytes = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self.bytes = max(self.bytes, resident_bytes())


def resident_bytes() -> int:
    return int(psutil.Process().memory_full_info().pss)


def measure(folder: Path, dtype: str, case: str, batch_tokens: int) -> Memory:
    """In this process, which must be a fresh one."""
    from transformers import LlamaForCausalLM  # noqa: F401 - imported late by transformers itself

    from dtmsearch.core.evaluation import EvalFailure, EvalRequest, ModelSpec, ReplicaSettings
    from dtmsearch.core.plan import Plan
    from dtmsearch.model.replica.replica import Replica

    libraries = resident_bytes()
    replica = Replica(ModelSpec(str(folder), dtype=dtype), ReplicaSettings(batch_tokens=batch_tokens))
    reference = random_reference(replica, batch_tokens // (PROMPT + CONTINUATION))
    replica.use(reference)
    prompts = (0, reference.num_prompts)
    weights = sum(touched(parameter) for parameter in replica.model.parameters())
    with Peak() as dense:
        replica.evaluate([EvalRequest(Plan(), reference.id, prompts)])
    requests = [EvalRequest(plan, reference.id, prompts) for plan in plans_of(case, replica.manifest().components)]
    with Peak() as peak:
        outcomes = [outcome for request in requests for outcome in replica.evaluate([request])]
    assert not any(isinstance(outcome, EvalFailure) for outcome in outcomes), outcomes
    return Memory(weights, dense.bytes - dense.before, max(peak.bytes, dense.bytes) - libraries)


def touched(parameter: Any) -> int:
    """Bytes of a weight, which is in memory from now on."""
    parameter.sum()
    return int(parameter.nbytes)


def plans_of(case: str, components: Sequence[Any]) -> list[Any]:
    """Plans to measure one after another: single perturbations, or the whole plan, the dense one, the whole one."""
    from dtmsearch.core.plan import Perturbation, Plan

    which, _, scheme = case.partition(" component, ")
    if which == "one":
        step = max(1, len(components) // 5)
        return [Plan().with_(Perturbation(c.name, scheme)) for c in components[::step]]
    return [Plan.uniform(components, scheme), Plan(), Plan.uniform(components, scheme)]


def random_reference(replica: Any, count: int) -> Any:
    """A reference of random tokens: the same work, without generating them."""
    from dtmsearch.core.evaluation import Reference

    size = replica._body.vocabulary_size
    tokens = np.random.default_rng(0).integers(3, size, (count, PROMPT + CONTINUATION), dtype=np.int32)
    agrees = np.ones((count, CONTINUATION), np.bool_)
    return Reference("random", replica.manifest().id, replica.mode, tokens, tokens[:, PROMPT:], agrees, (2,))


def write_model(folder: Path, dtype: str, layers: int, hidden: int) -> None:
    """A checkpoint of random weights with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
    from transformers.utils import logging as transformers_logging

    config = LlamaConfig(
        vocab_size=8_192,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1_024,
    )
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[]))).save_pretrained(folder)


def in_fresh_process(*arguments: Any) -> Memory:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


@click.command()
@click.option("--dtypes", default="float32,bfloat16", show_default=True)
@click.option("--layers", default=16, show_default=True)
@click.option("--hidden", default=1_024, show_default=True)
@click.option("--batch-tokens", default=1_600, show_default=True)
@click.option("--case", "cases", multiple=True, type=click.Choice(CASES), default=CASES, help="All, unless given.")
def main(dtypes: str, layers: int, hidden: int, batch_tokens: int, cases: tuple[str, ...]) -> None:
    click.echo(f"{'dtype':9s} {'measuring':27s} {'weights':>10s} {'activations':>12s} {'peak':>10s} {'ratio':>6s}")
    for dtype in dtypes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), dtype, layers, hidden)
            for case in cases:
                memory = in_fresh_process(Path(folder), dtype, case, batch_tokens)
                sizes = [f"{n / _MEGABYTE:.0f} MB" for n in (memory.weights, memory.activations, memory.peak)]
                click.echo(f"{dtype:9s} {case:27s} {sizes[0]:>10s} {sizes[1]:>12s} {sizes[2]:>10s} {memory.ratio:6.2f}")


if __name__ == "__main__":
    main()
