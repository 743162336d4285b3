"""What one pass says that a base model accepts of drafts, beside what transformers' assisted generation accepts.

    python benchmarks/assisted_generation.py MODEL TEXT.txt [--schemes int4-g64,int3-g64] [--drafts 3,5] [--count 16]

Of each uniform plan: passes of the base model for a continuation, foreseen from where the single pass diverges, and
counted while transformers generates with the compressed model as `assistant_model`, prompt by prompt. Then the same of
samples at a temperature of 1, foreseen from the overlap of the two distributions. Needs memory for the model twice.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import dtmsearch as dtm
from dtmsearch.core.decoding import GREEDY, Decoding
from dtmsearch.core.drafting import accepted_tokens, expected_passes
from dtmsearch.core.evaluation import EvalRequest, ModelSpec, Reference, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.core.statistics import mean_interval
from dtmsearch.model.replica.replica import Replica


def foreseen(replica: Replica, reference: Reference, plan: Plan) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The overlap at every position [prompts, tokens]: of greedy choices 1 where they are the same, else 0."""
    request = EvalRequest(plan, reference.id, (0, reference.num_prompts), ("overlap",))
    with torch.inference_mode():
        found = replica._evaluator.positions(request)["continuation"]
    return (~found.diverged).astype(np.float32) if found.overlap is None else found.overlap


def counted(
    base: Any, draft: Any, reference: Reference, draft_tokens: int, sample: bool
) -> tuple[list[int], list[bool]]:
    """Passes of the base model for each prompt, and whether its text is the reference's."""
    draft.generation_config = GenerationConfig(
        num_assistant_tokens=draft_tokens, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    how: dict[str, Any] = (
        {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    )
    never = reference.suppressed[0] if reference.suppressed else 0  # what the draft would not attend to
    settings = GenerationConfig(
        max_new_tokens=reference.continuation_tokens,
        suppress_tokens=list(reference.suppressed) or None,
        pad_token_id=never,
        **how,
    )
    passes, same, calls = [], [], []
    hook = base.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for row in range(reference.num_prompts):
            calls.clear()
            torch.manual_seed(row)
            prompt = torch.from_numpy(reference.text[row : row + 1, : reference.prompt_tokens]).long().to(base.device)
            made = base.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, assistant_model=draft
            )
            passes.append(len(calls))
            same.append(made[0, prompt.shape[1] :].tolist() == reference.continuation[row].tolist())
    finally:
        hook.remove()
    return passes, same


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--schemes", default="int5-g64,int4-g64,int3-g64")
    parser.add_argument("--drafts", default="3,5")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--greedy-only", action="store_true")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, draft = (
        AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).to(device).eval() for _ in "12"
    )
    for decoding in (GREEDY,) if given.greedy_only else (GREEDY, Decoding(1.0)):
        replica = Replica(
            ModelSpec(given.model, dtype="float32", compile="never", decoding=decoding), ReplicaSettings()
        )
        text = given.text.read_text(encoding="utf-8")
        prompts, _ = replica.cut_prompts([text], given.count, given.prompt_tokens, given.tokens, 0)
        reference = replica.make_reference(prompts)
        replica.use(reference)
        print(
            f"{'greedy' if decoding.is_greedy else 'temperature 1'}: scheme, draft, accepted a step foreseen, "
            "passes foreseen and counted (means over prompts), of how many prompts the same text and passes, seconds"
        )
        for scheme in given.schemes.split(","):
            plan = Plan.uniform(replica.manifest().components, scheme)
            overlap = foreseen(replica, replace(reference), plan)
            with torch.inference_mode():
                for own, theirs in zip(base.parameters(), draft.parameters(), strict=True):
                    theirs.copy_(own)
                dtm.apply(plan, draft)
            for length in map(int, given.drafts.split(",")):
                began = time.perf_counter()
                with torch.inference_mode():
                    passes, same = counted(base, draft, reference, length, not decoding.is_greedy)
                wanted = expected_passes(overlap, length)
                off = np.array(passes) - wanted
                over = mean_interval(off, 0, (-given.tokens, given.tokens))
                span = f" [{over.low:+.2f}, {over.high:+.2f}]" if off.any() else ""
                alike = sum(a == b for a, b in zip(passes, wanted.tolist(), strict=True))
                print(
                    f"  {scheme:12} {length:3} {accepted_tokens(overlap, length).mean():7.3f} {wanted.mean():8.2f} "
                    f"{np.mean(passes):8.2f}  difference {over.mean:+.2f}{span}  "
                    f"{sum(same)}, {alike} of {len(same)}  {time.perf_counter() - began:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
