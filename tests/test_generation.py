"""FDT of the single teacher-forced pass is the FDT of really generating with the compressed model.

Up to its first divergence the compressed model's own text is the reference, so both see the same context. Activations
that are rounded per token (`w8a8`) turn the last bits in which cached generation differs into other codes, and
`llm-int8` chooses its outlier columns over the tokens of a sequence that one pass sees: there the two may part where
the compressed model itself hesitates, and only there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import DEMO_MODEL, replica, result

from dtmsearch.core.evaluation import EvalRequest, PromptTokens, Reference
from dtmsearch.core.metrics import first_divergent_token
from dtmsearch.core.plan import Plan
from dtmsearch.model.replica.replica import Replica

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories-260k"
SOURCE = (Path(__file__).parents[1] / "dtmsearch" / "workflows" / "run.py").read_text(encoding="utf-8")
STORY = "Once upon a time there was a little girl named Lily. She loved to play outside in the park with her dog. " * 60

MODELS = [
    pytest.param(DEMO_MODEL, SOURCE, id="llama-demo"),
    pytest.param(
        STORIES, STORY, id="stories-260k", marks=pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES.name}")
    ),
]
WEIGHT_ONLY = ["int8-channel", "int8-tensor", "int4-g32", "int4-channel-asym", "int3-g32", "nf4", "fp4"]


@cache
def prepare(folder: Path, text: str) -> tuple[Replica, PromptTokens, Reference]:
    model = replica(folder)
    prompts, _ = model.cut_prompts([text], 12, 24, 40, 0)
    reference = model.make_reference(prompts)
    model.use(reference)
    return model, prompts, reference


def both_fdts(
    model: Replica, prompts: PromptTokens, reference: Reference, plan: Plan, count: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    single = result(model.evaluate([EvalRequest(plan, reference.id, (0, count))])[0]).fdt
    generated = model.generate(plan, PromptTokens(prompts.tokens[:count], prompts.prompt_tokens))
    return single, first_divergent_token((generated != reference.continuation[:count]) & reference.agrees[:count])


def of_covering(folder: Path, number: int) -> bool:
    """Every scheme with one of the models, and each model with every other scheme."""
    return not STORIES.is_dir() or number % 2 == (folder == STORIES)


@pytest.mark.covering(lambda folder, text, scheme: of_covering(folder, WEIGHT_ONLY.index(scheme)))
@pytest.mark.parametrize(("folder", "text"), MODELS)
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_single_pass_fdt_is_that_of_free_generation(folder: Path, text: str, scheme: str) -> None:
    model, prompts, reference = prepare(folder, text)
    plan = Plan.uniform(model.manifest().components, scheme)
    single, free = both_fdts(model, prompts, reference, plan)
    assert single.tolist() == free.tolist()


@pytest.mark.covering(lambda folder, text, scheme: of_covering(folder, scheme == "w8a8"))
@pytest.mark.parametrize(("folder", "text"), MODELS)
@pytest.mark.parametrize("scheme", ["w8a8", "llm-int8"])
def test_with_rounded_activations_they_part_only_where_the_model_hesitates(
    folder: Path, text: str, scheme: str
) -> None:
    model, prompts, reference = prepare(folder, text)
    plan = Plan.uniform(model.manifest().components, scheme)
    single, free = both_fdts(model, prompts, reference, plan, count=5)  # rounded row by row, which is slow
    margins = [
        top2_margin(model, plan, reference, prompt, min(int(single[prompt]), int(free[prompt])))
        for prompt in np.flatnonzero(single != free)
    ]
    assert max(margins, default=0.0) < 0.5  # nats; a choice taken without hesitation has several


def top2_margin(model: Replica, plan: Plan, reference: Reference, prompt: int, position: int) -> float:
    """How far, in logits, the compressed model prefers its choice to the next one after the reference so far."""
    tokens = np.concatenate([reference.text[prompt, : reference.prompt_tokens], reference.continuation[prompt]])
    with torch.inference_mode(), model._weights.perturbed(plan):
        logits = model._body.model(torch.from_numpy(tokens[None]).long()).logits[0].float()
        logits[:, list(reference.suppressed)] = -torch.inf
    best = logits[reference.prompt_tokens - 1 + position].topk(2).values
    return float(best[0] - best[1])


def test_a_model_that_is_ruined_diverges_at_once_both_ways() -> None:
    model, prompts, reference = prepare(DEMO_MODEL, SOURCE)
    plan = Plan.uniform(model.manifest().components, "int2-tensor")
    single, free = both_fdts(model, prompts, reference, plan)
    assert single.mean() == free.mean() < 5
