"""A GGUF file as llama.cpp itself runs it, measured against a reference and the base model's own GGUF file.

`python -m dtmsearch.model.replica.by_llama_cpp JOB` runs it: a process of its own, which llama.cpp may end. JOB is an
archive of arrays written by `write_job`; the answer, per prompt, is JSON on stdout.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.evaluation import Reference
from dtmsearch.core.llama_library import loaded
from dtmsearch.core.metric_registry import first_divergent_token, share_of_divergent_tokens
from dtmsearch.errors import UserError

_Logits = NDArray[np.float32]


def write_job(folder: Path, base: Path, other: Path, reference: Reference) -> Path:
    """A job for this module's process, its file in `folder`."""
    job = folder / "job.npz"
    np.savez(
        job,
        text=reference.text,
        continuation=reference.continuation,
        agrees=reference.agrees,
        suppressed=np.array(reference.suppressed, np.int64),
        files=np.array([str(base), str(other)]),
    )
    return job


def measured(
    base: Path, other: Path, prompts: NDArray[np.int32], continuation: NDArray[np.int32], suppressed: NDArray[np.int64]
) -> dict[str, NDArray[np.generic]]:
    """`diverged` and `base_diverged` [prompts, tokens]: whether each file's model, greedy but for `suppressed` tokens,
    chooses another token than the continuation's; `kl` [prompts]: KL(base || other) in nats per token. Raises
    `UserError` for files of which the vocabularies differ."""
    own, theirs = _all_logits(base, prompts, continuation), _all_logits(other, prompts, continuation)
    diverged, base_diverged, kl = [], [], []
    for tokens, first, second in zip(continuation, own, theirs, strict=True):
        if first.shape != second.shape:
            raise UserError(f"{base} has {first.shape[1]} tokens in its vocabulary, {other} {second.shape[1]}")
        p, q = _log_probabilities(first), _log_probabilities(second)
        kl.append(float((np.exp(p) * (p - q)).sum(axis=1).clip(min=0.0).mean()))
        first[:, suppressed] = second[:, suppressed] = -np.inf
        base_diverged.append(first.argmax(axis=1) != tokens)
        diverged.append(second.argmax(axis=1) != tokens)
    return {"diverged": np.array(diverged), "base_diverged": np.array(base_diverged), "kl": np.array(kl)}


def _all_logits(path: Path, prompts: NDArray[np.int32], continuation: NDArray[np.int32]) -> Iterator[_Logits]:
    """Of each prompt the logits [tokens, vocabulary] that its continuation's tokens are chosen by."""
    length = prompts.shape[1] + continuation.shape[1]
    with loaded(path, length, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4) as model:
        for prompt, tokens in zip(prompts, continuation, strict=True):
            yield model.logits(np.concatenate([prompt, tokens[:-1]]), len(prompt) - 1)


def _log_probabilities(logits: _Logits) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return found


def main(path: str) -> None:
    """Measure as a job says, and print FDT, SDT and KL by prompt as JSON; FDT of the base model's file beside."""
    with np.load(path) as job:
        base, other = (Path(str(name)) for name in job["files"])
        continuation, agrees = job["continuation"], job["agrees"]
        prompts = job["text"][:, : job["text"].shape[1] - continuation.shape[1]]
        found = measured(base, other, prompts, continuation, job["suppressed"])
    diverged, own = (found[name].astype(bool) & agrees for name in ("diverged", "base_diverged"))
    values = {
        "fdt": first_divergent_token(diverged).tolist(),
        "sdt": share_of_divergent_tokens(diverged).tolist(),
        "kl": found["kl"].tolist(),
        "base_fdt": first_divergent_token(own).tolist(),
    }
    sys.stdout.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
