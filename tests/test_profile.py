"""What products take on this machine, as the table that searches read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import llama_config, write_model
from transformers import GPT2Config

from dtmsearch import config
from dtmsearch.cli import main
from dtmsearch.config.stop_section import TimesSection
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.model.compress.serving_kernels import served
from dtmsearch.model.modules import block_times
from dtmsearch.model.modules.discovery import components_of
from dtmsearch.model.modules.loading import described_model
from dtmsearch.workflows import profile as profiling

SHAPE = (64, 128)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = llama_config(hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    return write_model(tmp_path_factory.mktemp("model"), settings)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_LEAST_SECONDS", 0.001)
    monkeypatch.setattr(profiling, "_MOST_COPIES", 2)
    monkeypatch.setattr(block_times, "_ROUNDS", 1)


@pytest.mark.parametrize(
    "scheme", ["dense", "int8-channel", "gptq-int8-channel", "int4-g32", "int4-g64-asym", "nf4", "magnitude-0.5"]
)
def test_a_scheme_with_a_kernel_multiplies(scheme: str) -> None:
    product = served(parse_scheme(scheme), SHAPE, torch.bfloat16, torch.device("cpu"))
    assert product is not None
    found = product(torch.zeros(1, 3, SHAPE[1], dtype=torch.bfloat16))
    assert isinstance(found, torch.Tensor) and found.shape[-2:] == (3, SHAPE[0])


def test_what_is_dropped_multiplies_nothing() -> None:
    product = served(parse_scheme("drop"), SHAPE, torch.bfloat16, torch.device("cpu"))
    assert product is not None and product(torch.zeros(1, 1, SHAPE[1])) is None


@pytest.mark.parametrize("scheme", ["int3-g32", "int4-g16", "int8-g32", "int4-channel"])
def test_a_scheme_without_a_kernel_has_no_product(scheme: str) -> None:
    assert served(parse_scheme(scheme), SHAPE, torch.bfloat16, torch.device("cpu")) is None


def test_what_is_written_is_what_a_search_reads(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "times.json"
    command = ["profile", str(model), "--schemes", "int8-channel,int3-g32", "--device", "cpu", "--out", str(out)]
    assert main([*command, "--prefill-tokens", "8"]) == 0
    said = capsys.readouterr().out
    assert "left out, for no kernel here runs them: int3-g32 of" in said and "int8-channel" in said
    content = json.loads(out.read_text())
    times = TimesSection.model_validate(content).table
    assert {scheme for scheme, *_ in times.rows} == {"dense", "int8-channel"}
    search = {"strategy": "auto", "schemes": ["int8-channel"], "times": str(out), "stop": {"decode_ms": 1.0}}
    file = {"run": "r", "model": {"path": str(model)}, "prompts": {"files": ["t"]}, "search": search}
    read = config.from_mapping(file, "file", tmp_path).search.times
    assert read is not None and read.table == times
    assert all(taken > 0 for pair in times.rows.values() for taken in pair)


def test_shapes_of_cut_blocks_and_what_blocks_take_are_timed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "times.json"
    cuts = "channels-0.25-wanda,heads-1:2-wanda"
    command = ["profile", str(model), "--schemes", "dense", "--cut", cuts, "--device", "cpu", "--out", str(out)]
    assert main([*command, "--prefill-tokens", "8"]) == 0
    table = TimesSection.model_validate(json.loads(out.read_text())).table
    whole = {c.shape for c in components_of(described_model(str(model), False))}
    assert {(rows, cols) for _, rows, cols in table.rows} - whole >= {(96, 64), (64, 96), (16, 64), (64, 32)}
    assert table.rows.keys() >= {("dense", left, 64) for left in (112, 104, 88, 80, 64, 48, 40, 24, 16)}
    assert table.blocks.keys() == {"attention", "mlp"}


def test_a_block_takes_what_the_model_is_faster_by_without_it_beyond_its_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two layers; each of four matrices of an attention, and three of an MLP, takes 0.1 and 1 ms."""
    tree = described_model(str(write_model(tmp_path, llama_config(num_hidden_layers=2))), False)
    products = {c.shape: (0.1, 1.0) for c in components_of(tree)}
    monkeypatch.setattr(
        block_times, "_without_each", lambda *_: {"": (10.0, 100.0), "attention": (6.0, 80.0), "mlp": (9.5, 60.0)}
    )
    found = block_times.block_times(tree, products, 8, torch.float32, torch.device("cpu"))
    assert found["attention"] == pytest.approx(((4.0 - 0.8) / 2, (20.0 - 8.0) / 2))
    assert found["mlp"] == pytest.approx((0.0, (40.0 - 6.0) / 2))  # noise is no time gained


def test_blocks_of_a_model_of_few_positions_are_timed(tmp_path: Path) -> None:
    config_ = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=16, vocab_size=64)
    found = profiling.profile(str(write_model(tmp_path, config_)), ["dense"], "cpu", "float32", 24)
    assert {block.kind for block in found.blocks} == {"attention", "mlp"}


def test_a_scheme_that_one_cut_shape_has_no_kernel_for_keeps_its_other_rows(model: Path) -> None:
    found = profiling.profile(str(model), ["int4-g32"], "cpu", "bfloat16", 8, cuts=["channels-0.15-wanda"])
    named = {(row.outputs, row.inputs) for row in found.rows if row.scheme == "int4-g32"}
    assert {c.shape for c in components_of(described_model(str(model), False))} <= named
    assert any(said.startswith("int4-g32 of 64 x ") for said in found.left_out)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--device", "no-such"), "--device no-such: "),
        (("--schemes", "int4-x"), "int4-x"),
        (("--cut", "int8-channel"), "--cut 'int8-channel' is no width"),
    ],
)
def test_a_mistake_is_one_line(
    model: Path, tmp_path: Path, option: tuple[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--schemes": "int8-channel", "--out": str(tmp_path / "t.json")} | dict([option])
    assert main(["profile", str(model), *(part for pair in given.items() for part in pair)]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "t.json").exists()
