"""What is measured of a sequence does not depend on which others are in its batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TEXT, llama_config, replica, values, write_model
from torch import nn

from dtmsearch.core.evaluation import EvalRequest
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import UserError
from dtmsearch.model.compress.bitsandbytes_layers import compressed_module
from dtmsearch.model.forward.batch_size import Batches
from dtmsearch.model.replica.replica import Replica

# Tokens of a batch: a sequence of 14 at a time, two (so that the last batch is smaller), all five.
BATCHES = (14, 28, 1_000)


def with_outliers(folder: Path) -> Path:
    """A model whose norms let some features of some tokens pass the threshold of LLM.int8()."""
    write_model(folder, llama_config(num_hidden_layers=2))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensors[name] = 2.5 * tensor
    save_file(tensors, file, {"format": "pt"})
    return folder


def measured(folder: Path, scheme: str) -> list[Any]:
    """Per batch size: everything that is measured of the uniform plan, and what it writes."""
    found = []
    reference = None
    for batch_tokens in BATCHES:
        model = replica(folder, batch_tokens=batch_tokens)
        prompts, _ = model.cut_prompts([TEXT], 5, 8, 6, 0)
        reference = reference or model.make_reference(prompts)
        model.use(reference)
        plan = Plan.uniform(model.manifest().components, scheme)
        outcome = model.evaluate([EvalRequest(plan, reference.id, (0, 5), ("kl", "ppl"))])[0]
        fdt, sdt, *likelihoods = values(outcome)
        found.append((fdt, sdt, likelihoods, model.generate(plan, prompts).tolist()))
    return found


@pytest.mark.parametrize("scheme", ["llm-int8", "w8a8"])
def test_rounded_activations_have_one_value_for_every_batch_size(scheme: str, tmp_path: Path) -> None:
    first, *others = measured(with_outliers(tmp_path), scheme)
    for other in others:
        assert other[:2] == first[:2]
        np.testing.assert_allclose(other[2], first[2], rtol=1e-5, atol=1e-6)
        assert other[3] == first[3]


def one_of_each(scheme: str) -> tuple[nn.Module, torch.Tensor]:
    """A module under a scheme, and two sequences [2, 3, 16] of which the second alone has an outlier."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(16, 8, bias=False)
    module = compressed_module(linear, torch.randn(8, 16, generator=generator), parse_scheme(scheme))
    inputs = torch.randn(2, 3, 16, generator=generator)
    inputs[1, 2, 5] = 60.0
    return module, inputs


def test_an_outlier_of_another_sequence_changes_nothing() -> None:
    module, inputs = one_of_each("llm-int8")
    with torch.inference_mode():
        assert torch.equal(module(inputs), torch.cat([module(inputs[:1]), module(inputs[1:])]))


def test_sequences_that_cannot_be_told_apart_are_refused() -> None:
    module, inputs = one_of_each("llm-int8")
    with pytest.raises(UserError, match="several sequences as one list"):
        module(inputs.reshape(6, 16))


def test_a_component_whose_sequences_cannot_be_told_apart_is_invalid_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def flat(self: Any, values: torch.Tensor) -> torch.Tensor:
        rows = values.reshape(-1, values.shape[-1])
        result: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(rows)) * self.up_proj(rows))
        return result.reshape(values.shape)

    monkeypatch.setattr(LlamaMLP, "forward", flat)
    model = replica(write_model(tmp_path))
    outcomes = _probe(model, ["mlp.up_proj", "self_attn.q_proj"])
    assert [getattr(outcome, "kind", "ok") for outcome in outcomes] == ["invalid", "ok"]


def _probe(model: Replica, names: list[str]) -> list[Any]:
    prompts, _ = model.cut_prompts([TEXT], 2, 10, 12, 0)
    reference = model.make_reference(prompts)
    model.use(reference)
    plans = [Plan.of({f"model.layers.1.{name}": "llm-int8"}) for name in names]
    return list(model.evaluate([EvalRequest(plan, reference.id, (0, 2)) for plan in plans]))


@pytest.mark.parametrize(
    ("tokens", "device", "token_bytes", "rows"),
    [
        (0, "cpu", 1_000, 32),  # four times the 1,600 tokens of a pass
        (0, "cpu", 512 << 10, 10),  # caches of no more than a GiB
        (0, "cpu", 4 << 20, 8),  # nor fewer than in a pass
        (800, "cpu", 1_000, 4),  # as was asked
        (0, "cuda", 1_000, 128),
    ],
)
def test_more_rows_are_continued_together_on_a_cpu(tokens: int, device: str, token_bytes: int, rows: int) -> None:
    batches = Batches(tokens, torch.device(device), lambda: None, lambda: 1)
    assert batches.rows_continued(200, token_bytes) == rows


def test_prompts_are_continued_in_batches_of_their_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replica(write_model(tmp_path, llama_config(num_hidden_layers=2)), batch_tokens=0)
    prompts, _ = model.cut_prompts([TEXT], 4, 8, 6, 0)
    batch_sizes: list[int] = []
    generate = model._body.generate

    def noting(rows: torch.Tensor, *args: Any) -> torch.Tensor:
        batch_sizes.append(len(rows))
        return generate(rows, *args)

    monkeypatch.setattr(model._body, "generate", noting)
    monkeypatch.setattr(model._batches, "tokens", 14)  # a row in a pass
    model.make_reference(prompts)
    assert batch_sizes == [4]


def test_memory_that_suffices_without_what_others_kept_costs_no_room_and_no_batch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = ["states of an evaluation"]
    batches = Batches(800, torch.device("cpu"), kept.clear, lambda: 100)

    def beside() -> str:
        if kept:
            raise torch.OutOfMemoryError("no room")
        return "done"

    assert batches.halving(beside) == "done" and batches.roomy and batches.tokens == 800
    tries: list[tuple[bool, int]] = []

    def large() -> str:
        tries.append((batches.roomy, batches.tokens))
        if batches.tokens > 400:
            raise torch.OutOfMemoryError("no room")
        return "done"

    assert batches.halving(large) == "done"
    assert tries == [(True, 800), (True, 800), (False, 800), (False, 400)]
    assert "outputs of layers are not kept" in caplog.text and "batches of 400 tokens" in caplog.text
