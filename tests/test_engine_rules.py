"""What engines take of a folder of compressed-tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
from exports import in_process, measured_plan
from tiny import write_model

from dtmsearch.core.engine_rules import ENGINES, where_note
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import UserError

SHAPE = (256, 256)


def obstacle(engine: str, scheme: str, shape: tuple[int, int] = SHAPE) -> str | None:
    return ENGINES[engine].obstacle(parse_scheme(scheme), shape)


@pytest.mark.parametrize("scheme", ["int2-channel", "int3-g48", "int5-g256-asym", "w8a8-channel", "nvfp4", "mxfp8"])
def test_vllm_takes_it_on_gpus(scheme: str) -> None:
    assert obstacle("vllm", scheme) is None


@pytest.mark.parametrize(
    ("engine", "scheme", "said"),
    [
        ("vllm", "int4-g24", "groups of 16, 32, 48, 64, 128 and 256"),
        ("vllm", "mxfp6", "vLLM 0.32 has no kernel for it on NVIDIA GPUs"),
        ("vllm-cpu", "int8-channel", "its kernel for CPUs reads 4 bits"),
        ("vllm-cpu", "nvfp4", "vLLM 0.32 has no kernel for it on CPUs"),
        ("vllm-cpu", "fp8-channel", "by its reference implementation (matmul,ref:any): tens of seconds"),
        ("sglang", "int4-g128-asym", "without zero points"),
        ("tensorrt-llm", "fp8-channel", "hf_quant_config.json"),
        ("llama.cpp", "int4-g32", "gguf-recipe"),
    ],
)
def test_what_an_engine_does_not_take_is_said_in_its_words(engine: str, scheme: str, said: str) -> None:
    assert said in str(obstacle(engine, scheme))


def test_fused_blocks_want_whole_rows() -> None:
    assert obstacle("vllm", "fp8-block128", (192, 256)) is not None
    assert obstacle("transformers", "fp8-block128", (192, 256)) is None


@pytest.mark.parametrize(
    ("engine", "scheme", "other"),
    [("vllm", "mxfp6", "fp8-tensor"), ("vllm-cpu", "int3-g64", "int4-channel"), ("sglang", "nvfp4", "fp8-tensor")],
)
def test_the_repair_is_the_smallest_scheme_of_its_kind_that_is_taken(engine: str, scheme: str, other: str) -> None:
    assert ENGINES[engine].repair(parse_scheme(scheme), SHAPE, 16) == other


def test_what_a_scheme_needs_of_a_device_is_noted() -> None:
    assert "fp8-channel needs compute capability 8.9" in str(where_note("vllm", frozenset({"fp8-channel"})))
    assert where_note("vllm", frozenset({"int4-g128"})) is None


def test_an_engine_of_one_format_is_not_given_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    layer = "model.layers.0.self_attn"
    plan = {f"{layer}.o_proj": "fp8-channel", "model.layers.0.mlp.down_proj": "int8-channel"}
    measured = measured_plan(write_model(tmp_path / "model"), tmp_path / "store", plan)
    with pytest.raises(UserError, match="SGLang takes one format in a model"):
        measured.export("compressed-tensors", tmp_path / "out", runtime="sglang", check=False)
    assert not list(tmp_path.rglob("*.partial"))
