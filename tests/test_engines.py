"""Search files for an engine: what they choose among is what the export for that engine holds."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from exports import in_process, measured_plan
from tiny import llama_config, write_model

from dtmsearch.config import parse
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.model.modules.discovery import read_manifest
from dtmsearch.workflows.build import space_of
from dtmsearch.workflows.engines import WANTED, EngineName, menu
from dtmsearch.workflows.init_config import Machine, NamedText, propose, read_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), llama_config(hidden_size=64, intermediate_size=128))


@pytest.mark.parametrize("engine", WANTED)
def test_plans_of_a_template_export_to_its_engine(
    engine: EngineName, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    texts = NamedText("calibration.txt"), NamedText("validation.txt")
    proposal = propose(read_model(str(model)), Machine((), 1 << 34, 2), *texts, engine)
    file = parse(proposal.text, "search.yaml", tmp_path)
    space = space_of(file, read_manifest(file.model_spec))
    every_scheme = itertools.cycle(space.schemes)
    plan = Plan.of({c.name: scheme for unit in space.units for scheme in [next(every_scheme)] for c in unit.components})
    assert len(set(plan.schemes.values())) == len(file.search.schemes)
    recorded = measured_plan(model, tmp_path / "store", plan.schemes, scale_dtype=file.model.scale_dtype)
    options: dict[str, Any] = {"runtime": "vllm"} if engine == "vllm" else {}
    to = WANTED[engine].export.split()[1]
    assert recorded.export(to, tmp_path / "out", **options).files


@pytest.mark.parametrize("engine", WANTED)
@pytest.mark.parametrize("bits", [None, 2, 3, 4, 5, 6.5, 8])
@pytest.mark.parametrize("largest_group", [0, 32, 64, 128, 256])
def test_a_budget_always_leaves_a_choice(engine: EngineName, bits: float | None, largest_group: int) -> None:
    found = menu(engine, bits, largest_group)
    stored = [parse_scheme(scheme).stored_bits((256, 256), 16) / 256**2 for scheme in found.schemes]
    assert min(stored) < found.bits_per_weight - 0.1 and found.bits_per_weight < max(stored) + 0.5
    assert stored == sorted(stored, reverse=True)
    assert bits is None or found.bits_per_weight == bits or f"{bits:g} bits per weight leave" in found.note


def test_vllm_gets_what_its_kernels_read() -> None:
    assert menu("vllm", None, 256).schemes == ("int8-g128", "int4-g128")
    assert menu("vllm", None, 64).schemes == ("int8-g64", "int4-g64")


def test_llama_cpp_gets_few_bits_only_where_its_types_of_them_fit() -> None:
    assert menu("llama.cpp", 3.6, 256).schemes == ("int8-g32", "int4-g32", "int3-g32", "int2-g32")
    assert menu("llama.cpp", 3.6, 128).schemes == ("int8-g32", "int5-g32", "int4-g32")
