"""A model over several GPUs of one process: where it is cut, and what crosses how often."""

from __future__ import annotations

import gc
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from dtmsearch.model.forward.gpu_hops import Hops, connect, moved
from dtmsearch.model.replica.spread_model import cut, head_in_layers

ELSEWHERE = torch.device("meta")
PLENTY = 1 << 40


def tree(config: PretrainedConfig) -> nn.Module:
    with ELSEWHERE:
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def llama(layers: int, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        tie_word_embeddings=tied,
    )  # fmt: skip


def layers_on(found: dict[str, int] | None, device: int) -> int:
    assert found is not None
    return sum(at == device and ".layers." in name for name, at in found.items())


@pytest.mark.parametrize(("gpus", "wanted"), [(2, [34, 14]), (4, [24, 10, 8, 6])])
def test_every_gpu_has_as_much_to_do_of_candidates_that_begin_at_each_layer(gpus: int, wanted: list[int]) -> None:
    found = cut(tree(llama(48)), torch.bfloat16, [PLENTY] * gpus)
    assert [layers_on(found, device) for device in range(gpus)] == wanted
    begins = [0, *torch.tensor(wanted).cumsum(0).tolist()]
    # A layer runs for every candidate that begins at or below it.
    work = [sum(layer + 1 for layer in range(*ends)) for ends in pairwise(begins)]
    assert max(work) < 1.15 * min(work)


def test_a_large_head_leaves_its_gpu_fewer_layers() -> None:
    large = llama(32)
    large.vocab_size = 800
    assert head_in_layers(tree(large)) == 2.5
    assert [layers_on(cut(tree(large), torch.bfloat16, [PLENTY] * 2), device) for device in (0, 1)] == [24, 8]
    assert [layers_on(cut(tree(llama(32)), torch.bfloat16, [PLENTY] * 2), device) for device in (0, 1)] == [23, 9]
    huge = llama(3)
    huge.vocab_size = 8_000
    assert [layers_on(cut(tree(huge), torch.bfloat16, [PLENTY] * 3), device) for device in range(3)] == [1, 1, 1]


def test_what_precedes_the_layers_is_on_the_first_gpu_and_what_follows_on_the_last() -> None:
    found = cut(tree(llama(4)), torch.float32, [PLENTY] * 2)
    assert found is not None
    assert found["model.embed_tokens"] == 0
    assert found["model.norm"] == found["lm_head"] == 1


def test_every_weight_lies_somewhere() -> None:
    model = tree(llama(5))
    found = cut(model, torch.float32, [PLENTY] * 3)
    assert found is not None
    assert all(any(name.startswith(f"{own}.") for own in found) for name, _ in model.named_parameters())


def test_a_head_that_is_the_embedding_lies_where_passes_begin() -> None:
    found = cut(tree(llama(4, tied=True)), torch.float32, [PLENTY] * 2)
    assert found is not None
    assert found["model.embed_tokens"] == found["lm_head"] == 0
    assert found["model.norm"] == 1
    assert [layers_on(found, device) for device in range(2)] == [3, 1]


def test_layers_of_any_family_are_cut() -> None:
    found = cut(tree(GPT2Config(n_layer=4, n_embd=32, n_head=4, vocab_size=64)), torch.float32, [PLENTY] * 2)
    assert found is not None
    assert [found[f"transformer.h.{layer}"] for layer in range(4)] == [0, 0, 0, 1]
    assert found["transformer.wpe"] == found["transformer.wte"] == found["lm_head"] == 0


def test_models_that_do_not_fit_so_are_left_to_be_balanced() -> None:
    layer_bytes = (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) * 4
    assert cut(tree(llama(4)), torch.float32, [3 * layer_bytes, PLENTY]) is None  # three layers, and the embedding
    assert cut(tree(llama(4)), torch.float32, [5 * layer_bytes, PLENTY]) is not None


def test_a_tensor_crosses_once_in_a_pass() -> None:
    hops, mask = Hops(), torch.ones(3)
    first = hops.moved(mask, ELSEWHERE)
    assert first.device == ELSEWHERE
    assert hops.moved(mask, ELSEWHERE) is first
    hops.begin()
    assert hops.moved(mask, ELSEWHERE) is not first


def test_a_tensor_that_is_gone_is_not_taken_for_another() -> None:
    hops = Hops()
    for value in range(50):
        state = torch.full((2, value + 1), 1.0)
        assert hops.moved(state, ELSEWHERE).shape == state.shape
    del state
    gc.collect()
    assert not hops._there


def test_layers_of_a_list_that_lies_on_one_gpu_as_a_whole_are_connected_one_by_one() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2, 2)
            self.layers = nn.ModuleList([nn.Linear(2, 2, device=ELSEWHERE) for _ in range(2)])

        def forward(self, state: torch.Tensor) -> torch.Tensor:
            state = self.embed(state)
            for layer in self.layers:
                state = layer(state)
            return state

    model = Model()
    connect(model, model, {"embed": torch.device("cpu"), "layers": ELSEWHERE})
    assert model(torch.ones(1, 2)).device == ELSEWHERE


def test_what_is_there_is_not_moved() -> None:
    values = torch.ones(2)
    assert moved(values, values.device) is values
    assert Hops().moved(values, values.device) is values


def test_all_that_a_module_is_called_with_is_moved() -> None:
    class Reads(nn.Module):
        def forward(self, state: torch.Tensor, positions: tuple[torch.Tensor, ...], mask: torch.Tensor) -> list[str]:
            return [values.device.type for values in (state, *positions, mask)]

    module = Reads()
    Hops().before(module, ELSEWHERE)
    here = torch.ones(1)
    assert module(here, (here, torch.zeros(1)), mask=torch.ones(2)) == ["meta"] * 4
