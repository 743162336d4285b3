"""What a model says on a GPU is the same every time. Runs where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import DEMO_MODEL, LONG_TEXT
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dtmsearch.core.evaluation import EvalRequest, ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.model.replica.replica import Replica

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 128 features, which all kernels of attention take."""
    made = tmp_path_factory.mktemp("wide")
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=2_048, intermediate_size=4_096, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=16, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def test_continuations_and_what_is_measured_of_them_repeat_bit_by_bit(folder: Path) -> None:
    replica = Replica(ModelSpec(str(folder), dtype="bfloat16", compile="never"), ReplicaSettings())
    prompts, _ = replica.cut_prompts([LONG_TEXT], 32, 64, 64, 0)
    first = replica.make_reference(prompts)
    replica.use(first)
    component = replica.manifest().components[3].name
    requests = [EvalRequest(Plan.of({component: "int4-g32"}), first.id, (0, 32), ("kl",))]
    measured = replica.evaluate(requests)[0]
    for _ in range(10):
        again = replica.make_reference(prompts)
        np.testing.assert_array_equal(again.continuation, first.continuation)
        np.testing.assert_array_equal(again.agrees, first.agrees)
        np.testing.assert_array_equal(replica.evaluate(requests)[0].kl, measured.kl)
