"""Peak memory of a GPU over what model and reference hold, for each set of metrics on the same prompts.

python benchmarks/metric_memory.py MODEL TEXT --count 64
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dtmsearch.core.evaluation import EvalRequest, ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.model.replica.replica import Replica
from dtmsearch.search.strategies.measuring import METRIC_SETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--continuation-tokens", type=int, default=100)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("memory is counted on a GPU, and there is none here")
    text = given.text.read_text(encoding="utf-8", errors="replace")
    for metrics in METRIC_SETS:
        replica = Replica(ModelSpec(given.model, dtype="float32", compile="never"), ReplicaSettings())
        prompts, _ = replica.cut_prompts([text], given.count, given.prompt_tokens, given.continuation_tokens, 0)
        reference = replica.make_reference(prompts)
        replica.use(reference)
        plan = Plan.of({replica.manifest().components[0].name: "int8-channel"})
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        replica.evaluate([EvalRequest(plan, reference.id, (0, given.count), metrics)])
        peak = torch.cuda.max_memory_allocated() - before
        print(f"{' '.join(('fdt', 'sdt', 'dppl', *metrics)):24} {peak / 1e6:8.0f} MB")


if __name__ == "__main__":
    main()
