"""Schemes that AutoRound rounds by: what its process gives is what is measured, stored and exported. The library itself
is no dependency of tests: a stand-in has its interface, and its grids, whose scales may be negative."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from exports import in_process, measured_plan
from safetensors.torch import load_file
from tiny import LONG_TEXT as TEXT
from tiny import llama_config, write_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import dtmsearch as dtm
from dtmsearch.core import autoround_library
from dtmsearch.core.evaluation import ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import check_libraries, parse_scheme
from dtmsearch.errors import LibraryMissing, UserError
from dtmsearch.model.compress import autoround
from dtmsearch.model.compress.packing import unpack
from dtmsearch.model.replica.replica import Replica


class StandIn:
    """AutoRound as far as it is called: rounds to the nearest, every second row with a negative scale."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        self.asked.append(settings)
        self.model, self.settings = model, settings

    def quantize(self) -> tuple[Any, dict[str, Any]]:
        bits, group, symmetric = (self.settings[key] for key in ("bits", "group_size", "sym"))
        for name, module in self.model.named_modules():
            if not isinstance(module, nn.Linear) or name in self.settings["layer_config"]:
                continue
            rows, cols = module.weight.shape
            groups = module.weight.detach().reshape(rows, -1, cols if group < 0 else group)
            if symmetric:
                scale, zero = groups.abs().amax(2) / 2 ** (bits - 1), torch.zeros(())
                scale[::2] *= -1
                least = -(2 ** (bits - 1))
            else:
                scale = (groups.amax(2) - groups.amin(2)) / (2**bits - 1)
                zero, least = (-groups.amin(2) / scale.half().float()).round(), 0
                module.zp = zero
            scale = scale.half().float()
            codes = (groups / scale[..., None]).round() + (zero if symmetric else zero[..., None])
            codes = codes.clamp(least, least + 2**bits - 1) - (zero if symmetric else zero[..., None])
            module.weight.data = (codes * scale[..., None]).reshape(rows, cols)
            module.scale, module.group_size = scale, group
        return self.model, {}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The stand-in, in this process; what it is asked for."""
    fake = ModuleType("auto_round")
    fake.AutoRound = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "auto_round", fake)
    monkeypatch.setattr(autoround_library, "_release", lambda named: "AutoRound 9.9")
    monkeypatch.setattr(StandIn, "asked", [])

    def run(program: str, request: Path, scratch: str) -> None:
        from dtmsearch.model.compress.autoround_process import main

        main(str(request))

    monkeypatch.setattr(autoround, "_run", run)
    return StandIn.asked


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = llama_config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    return write_model(tmp_path / "model", config)


def rounded(model: Path, bits: int, group: int, symmetric: bool) -> dict[str, Tensor]:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    settings = {"bits": bits, "group_size": group, "sym": symmetric, "layer_config": {"lm_head": {}}}
    StandIn(loaded, None, **settings).quantize()
    return {name: module.weight for name, module in loaded.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(
    ("name", "bits", "group"),
    [("autoround-int4-g32", 4, 32), ("autoround-int3-channel", 3, -1), ("autoround-int4-g32-asym", 4, 32)],
)
def test_what_it_makes_is_what_a_matrix_is(
    model: Path, library: list[dict[str, Any]], name: str, bits: int, group: int
) -> None:
    replica = Replica(ModelSpec(str(model), dtype="float32"), ReplicaSettings(num_threads=1))
    calibration = replica.cut_calibration([TEXT], 8, 16, 0)
    replica.use_calibration(calibration)
    components = replica.manifest().components
    few = Plan.of({component.name: name for component in components[3:5]})
    expected = rounded(model, bits, group, not name.endswith("asym"))
    library.clear()
    for packed in replica.solve(calibration.id, few.entries):
        found = unpack(packed, torch.float32, torch.device("cpu"))
        assert torch.equal(found, expected[packed.component])
    (asked,) = library
    # The whole model is tuned, whatever of it is wanted: a matrix follows from its scheme alone.
    assert set(asked["layer_config"]) == {"lm_head"} and asked["scale_dtype"] == "fp16"
    assert asked["iters"] == 200 and torch.equal(torch.cat(asked["dataset"]), torch.from_numpy(calibration.tokens))


def test_an_export_holds_what_was_measured_with_negative_scales_too(
    model: Path, library: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    measured = measured_plan(model, tmp_path / "store", "autoround-int4-g32")
    library.clear()
    measured.export("compressed-tensors", tmp_path / "out")  # which measures it again, by what the folder holds
    assert library == []  # by the recorded matrices
    state = load_file(tmp_path / "out" / "model.safetensors")
    scales = state["model.layers.0.mlp.up_proj.weight_scale"]
    assert (scales[::2] < 0).all() and (scales[1::2] > 0).all()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(model)(TEXT[:60], return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained(model)
    for name, weight in rounded(model, 4, 32, True).items():
        plain.get_submodule(name).weight.data = weight.data
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, plain(tokens).logits, rtol=1e-5, atol=1e-5)


def test_without_the_library_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DTMSEARCH_AUTOROUND", raising=False)
    monkeypatch.setattr(autoround_library, "_release", lambda named: "")
    with pytest.raises(LibraryMissing, match=r"by AutoRound, and it is not installed here: pip install auto-round"):
        check_libraries(["autoround-int4-g128"])


def test_a_python_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTMSEARCH_AUTOROUND", "/bin/true")
    with pytest.raises(LibraryMissing, match=r"DTMSEARCH_AUTOROUND: /bin/true has none"):
        check_libraries(["autoround-int4-g128"])
    monkeypatch.setenv("DTMSEARCH_AUTOROUND", "nowhere/python")
    with pytest.raises(UserError, match=r"nowhere/python cannot be run"):
        check_libraries(["autoround-int4-g128"])


def test_a_python_is_named_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho release: 9.9\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTMSEARCH_AUTOROUND", "bin/python")
    assert autoround_library.python() == str(program) and autoround_library.build() == "AutoRound 9.9"


def test_names_and_shapes() -> None:
    scheme = parse_scheme("autoround-int3-g32-asym")
    assert (scheme.bits, scheme.group_size, scheme.asymmetric, scheme.is_tuned) == (3, 32, True, True)
    assert scheme.solved == scheme and scheme.stored_bits((64, 64), 16) == parse_scheme("int3-g32-asym").stored_bits(
        (64, 64), 16
    )
    assert scheme.misfit((64, 64)) is None and "no multiples of 32" in str(scheme.misfit((64, 176)))
    for name in ("autoround-int4-tensor", "autoround-int4-g128+wanda-0.5", "autoround-gptq-int4-g128"):
        with pytest.raises(UserError, match="unknown scheme"):
            parse_scheme(name)


def test_a_process_that_fails_is_said_by_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho loading >&2\necho ValueError: no such scheme >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(UserError, match=r"^AutoRound failed: ValueError: no such scheme$"):
        autoround._run(str(program), tmp_path / "request.json", str(tmp_path))


def test_a_model_object_has_no_folder_to_tune(model: Path, library: list[dict[str, Any]]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    plan = {"model.layers.0.mlp.up_proj": "autoround-int4-g32"}
    with pytest.raises(UserError, match=r"no model object in memory"):
        dtm.measure(loaded, AutoTokenizer.from_pretrained(model), [TEXT], plan, count=4, prompt_tokens=8)
    assert library == []
