"""Compiled layers: pure like eager ones, and deaf to what is swapped into them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config
from tiny import llama_config, replica, result, values, with_reference, write_model

from dtmsearch.core.evaluation import EvalRequest, ModelSpec, Reference, ReplicaSettings
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.model.replica.replica import Replica

ALL = ("kl", "ppl")
pytestmark = [
    pytest.mark.process,  # compilers
    pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Replica, Reference]]:
    folder = write_model(tmp_path_factory.mktemp("model"), llama_config(num_hidden_layers=3))
    # What the CPU says that it can do is not tried by compiling programs, each of which takes seconds.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        model = Replica(ModelSpec(str(folder), dtype="float32", compile="always"), ReplicaSettings(num_threads=1))
        yield model, with_reference(model)
    torch._dynamo.reset()


def requests_of(model: Replica, reference: Reference, parent: Plan) -> list[EvalRequest]:
    schemes = ("int4-g16", "nf4", "w8a8")
    plans = [parent.with_(Perturbation(c.name, s)) for c in model.manifest().components[::3] for s in schemes]
    return [EvalRequest(plan, reference.id, (0, 6), ALL, parent) for plan in plans]


def test_the_mode_says_compiled(compiled: tuple[Replica, Reference]) -> None:
    assert str(compiled[0].mode) == "float32/cpu/sdpa/compiled"


def test_the_dense_plan_has_no_divergent_token(compiled: tuple[Replica, Reference]) -> None:
    model, reference = compiled
    assert model.canary(reference.id) == 0.0


def test_shared_prefixes_change_no_bit(compiled: tuple[Replica, Reference]) -> None:
    model, reference = compiled
    shared = model.evaluate(requests_of(model, reference, Plan()))
    whole = [model.evaluate([replace(r, parent=r.plan)])[0] for r in requests_of(model, reference, Plan())]
    assert [values(o) for o in shared] == [values(o) for o in whole]


def test_swapping_schemes_compiles_nothing_anew(compiled: tuple[Replica, Reference]) -> None:
    model, reference = compiled
    model.evaluate(requests_of(model, reference, Plan())[:1])
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.evaluate(requests_of(model, reference, Plan.uniform(model.manifest().components, "nf4")))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_compiled_and_eager_differ_by_rounding_alone(compiled: tuple[Replica, Reference]) -> None:
    model, reference = compiled
    eager = replica(Path(model._spec.path))
    eager.use(replace(reference, mode=eager.mode))
    request = requests_of(model, reference, Plan())[0]
    one, other = (result(m.evaluate([request])[0]) for m in (model, eager))
    np.testing.assert_allclose(one.dppl, other.dppl, rtol=1e-4)


def test_generation_leaves_the_layers_compiled(compiled: tuple[Replica, Reference]) -> None:
    model, reference = compiled
    before = values(model.evaluate(requests_of(model, reference, Plan())[:1])[0])
    prompts, _ = model.cut_prompts(["x" * 400], 2, 8, 4, 0)
    model.generate(Plan.of({model.manifest().components[0].name: "nf4"}), prompts)
    assert values(model.evaluate(requests_of(model, reference, Plan())[:1])[0]) == before


def test_weights_that_pass_through_the_device_run_by_the_same_graphs(compiled: tuple[Replica, Reference]) -> None:
    model, reference = compiled
    requests = requests_of(model, reference, Plan())
    expected = [values(outcome) for outcome in model.evaluate(requests)]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    settings = ReplicaSettings(num_threads=1, weights="streamed")
    streamed = Replica(model._spec, settings)
    assert streamed.mode == model.mode
    assert with_reference(streamed).id == reference.id
    for _ in range(2):
        assert [values(outcome) for outcome in streamed.evaluate(requests)] == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= before + 2  # of the shapes of its batches
    assert streamed.canary(reference.id) == 0.0
