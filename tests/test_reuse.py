"""What a candidate is spared: the parent's states and outputs below its change, and positions where nothing is
predicted. None of it changes a bit."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama_config, replica, values, with_reference, write_model

from dtmsearch.core.evaluation import EvalRequest, ModelSpec, ReplicaSettings, StatesKept
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.model.forward import activation_cache as stream_module
from dtmsearch.model.forward.activation_cache import CacheMemory
from dtmsearch.model.forward.layer_reuse import Reuse
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.replica.replica import Replica

ALL = ("kl", "ppl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def kept(folder: Path, states: StatesKept) -> Replica:
    return Replica(ModelSpec(str(folder), dtype="float32"), ReplicaSettings(states=states, batch_tokens=50))


def probe(model: Replica, reference_id: str, components: slice = slice(None, None, 2)) -> list[EvalRequest]:
    """Every second component: each kind, in the first layer, the last or one between."""
    plans = [Plan().with_(Perturbation(c.name, "int3-g8")) for c in model.manifest().components[components]]
    return [EvalRequest(plan, reference_id, (0, 6), ALL) for plan in plans]


@contextmanager
def counted(model: Replica) -> Iterator[Counter[str]]:
    """Positions over which each component really runs, within."""
    positions: Counter[str] = Counter()

    def note(name: str) -> Any:
        def hook(module: object, inputs: tuple[Any, ...]) -> None:
            positions[name] += inputs[0].shape[0] * inputs[0].shape[1]

        return hook

    names = [component.name for component in model.manifest().components]
    hooks = [model._body.model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    yield positions
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("states", ["device", "host", "sweep"])
def test_where_states_are_kept_changes_no_bit(folder: Path, states: StatesKept) -> None:
    model, other = kept(folder, states), kept(folder, "auto")
    reference = with_reference(model)
    other.use(reference)
    requests = probe(model, reference.id)
    assert [values(o) for o in model.evaluate(requests)] == [values(other.evaluate([r])[0]) for r in requests[::-1]][
        ::-1
    ]


def test_without_room_for_outputs_nothing_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kept(folder, "auto")
    reference = with_reference(model)
    requests = probe(model, reference.id)
    roomy = [values(o) for o in model.evaluate(requests)]
    monkeypatch.setattr(stream_module.CacheMemory, "on", lambda *_: CacheMemory.none())
    poor = kept(folder, "auto")
    poor.use(reference)
    assert [values(o) for o in poor.evaluate(requests)] == roomy


def test_room_for_one_batch_of_outputs_changes_no_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kept(folder, "auto")
    reference = with_reference(model)
    requests = probe(model, reference.id)
    roomy = [values(o) for o in model.evaluate(requests)]
    one_batch = model._reuse.bytes_of(0, 50, 4)
    monkeypatch.setattr(stream_module.CacheMemory, "on", lambda *_: CacheMemory(0.0, 0.0, one_batch))
    poor = kept(folder, "auto")
    poor.use(reference)
    assert [values(o) for o in poor.evaluate(requests)] == roomy


def test_a_change_in_the_mlp_leaves_attention_alone(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model)
    names = [c.name for c in model.manifest().components]
    mlp = [n for n in names if ".1.mlp" in n]
    requests = [EvalRequest(Plan.of({n: "int3-g8"}), reference.id, (0, 6)) for n in mlp]
    model.evaluate(requests[:2])  # the parent's outputs of that layer are there now
    with counted(model) as positions:
        model.evaluate(requests[2:])
    assert not any(positions[n] for n in names if ".1.self_attn" in n)


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models be taken for ones whose last layer lies on a second device."""
    monkeypatch.setattr(Body, "device_ends", property(lambda body: [body.num_layers - 1, body.num_layers]))


@pytest.mark.usefixtures("two_devices")
def test_over_several_devices_changes_in_the_mlps_of_all_layers_leave_attention_alone(folder: Path) -> None:
    model = kept(folder, "device")
    reference = with_reference(model)
    names = [c.name for c in model.manifest().components]
    mlps = [n for n in names if ".mlp" in n]
    requests = [EvalRequest(Plan.of({n: "int3-g8"}), reference.id, (0, 6)) for n in mlps]
    alone = kept(folder, "sweep")
    alone.use(reference)
    expected = [values(alone.evaluate([request])[0]) for request in requests]
    model.evaluate(requests)  # what all layers make in one pass of the parent is there now
    with counted(model) as positions:
        found = [values(o) for o in model.evaluate(requests)]
    assert found == expected
    assert not any(positions[n] for n in names if ".0.self_attn" in n)
    in_one = 6 * reference.text.shape[1]
    assert positions["model.layers.1.self_attn.q_proj"] == 3 * in_one  # for those below that layer alone


@pytest.mark.usefixtures("two_devices")
def test_over_several_devices_room_for_some_outputs_changes_no_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kept(folder, "device")
    reference = with_reference(model)
    requests = probe(model, reference.id)
    roomy = [values(o) for o in model.evaluate(requests)]
    three_batches = 3 * model._reuse.bytes_of(0, 50, 4)
    monkeypatch.setattr(stream_module.CacheMemory, "on", lambda *_: CacheMemory(0.0, 0.0, three_batches))
    poor = kept(folder, "device")
    poor.use(reference)
    assert [values(o) for o in poor.evaluate(requests)] == roomy
    (cache,) = [c for loaded in poor._evaluator.references.values() for c in loaded.caches.values()][:1]
    recorded = [outputs for of_layer in cache._outputs.values() for outputs in of_layer]
    assert len([outputs for outputs in recorded if outputs is not None]) == 3 < len(recorded)


def test_a_change_in_the_mlp_leaves_attention_itself_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replica(folder)
    reference = with_reference(model)
    requests = probe(model, reference.id, slice(None))
    mlp = [r for r in requests if ".1.mlp" in r.plan.entries[0][0]]
    model.evaluate([replace(r, extra_metrics=()) for r in mlp[:2]])
    attend, calls = torch.nn.functional.scaled_dot_product_attention, []

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    model.evaluate([replace(mlp[2], extra_metrics=())])
    assert len(calls) == model.manifest().num_layers - 2


def test_a_change_of_keys_leaves_queries_and_values_alone(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model)
    attention = "model.layers.1.self_attn"
    requests = [EvalRequest(Plan.of({f"{attention}.k_proj": s}), reference.id, (0, 6)) for s in ("int3-g8", "int4-g8")]
    model.evaluate(requests)
    with counted(model) as positions:
        model.evaluate([EvalRequest(Plan.of({f"{attention}.k_proj": "int2-g8"}), reference.id, (0, 6))])
    assert positions[f"{attention}.q_proj"] == positions[f"{attention}.v_proj"] == 0


def test_the_last_layer_runs_where_something_is_predicted(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model)
    last = f"model.layers.{model.manifest().num_layers - 1}"
    with counted(model) as positions:
        model.evaluate([EvalRequest(Plan(), reference.id, (0, 6))])
    predicted = reference.continuation.size
    assert (positions[f"{last}.mlp.down_proj"], positions[f"{last}.self_attn.q_proj"]) == (predicted, predicted)


def test_keys_and_values_of_the_last_layer_run_everywhere(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model)
    last = f"model.layers.{model.manifest().num_layers - 1}.self_attn"
    with counted(model) as positions:
        model.evaluate([EvalRequest(Plan(), reference.id, (0, 6))])
    assert positions[f"{last}.k_proj"] == positions[f"{last}.v_proj"] == reference.text.size


def test_a_parent_that_differs_above_keeps_the_states_below(folder: Path) -> None:
    model = kept(folder, "device")
    reference = with_reference(model)
    first, second = Plan(), Plan.of({"model.layers.2.mlp.up_proj": "int4-g8"})
    changed = Perturbation("model.layers.1.mlp.down_proj", "int3-g8")
    model.evaluate([EvalRequest(first.with_(changed), reference.id, (0, 6), parent=first)])
    with counted(model) as positions:
        model.evaluate([EvalRequest(second.with_(changed), reference.id, (0, 6), parent=second)])
    assert not any(positions[c.name] for c in model.manifest().components if c.layer == 0)


def test_a_norm_of_the_layer_leaves_nothing_to_reuse(tmp_path: Path) -> None:
    model = replica(write_model(tmp_path, llama_config(num_hidden_layers=2)))
    reference = with_reference(model)
    plan = Plan.of({"model.layers.0.input_layernorm": "int2-g8"})
    shared = model.evaluate([*probe(model, reference.id), EvalRequest(plan, reference.id, (0, 6), ALL)])[-1]
    alone = replica(tmp_path)
    alone.use(reference)
    assert values(alone.evaluate([EvalRequest(plan, reference.id, (0, 6), ALL, parent=plan)])[0]) == values(shared)


@pytest.mark.parametrize("of", ["a component", "a norm"])
def test_an_output_that_is_written_into_is_kept_apart(folder: Path, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def in_place(self: Any, values: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(values)
        up = self.up_proj(values.mul_(2.0) if of == "a norm" else values)
        product: torch.Tensor = self.down_proj(gate * up if of == "a norm" else gate.mul_(up))
        return product

    monkeypatch.setattr(LlamaMLP, "forward", in_place)
    model = replica(folder)
    reference = with_reference(model)
    requests = probe(model, reference.id)
    shared = [values(o) for o in model.evaluate(requests)]
    alone = replica(folder)
    alone.use(reference)
    assert [values(alone.evaluate([replace(r, parent=r.plan)])[0]) for r in requests] == shared


@pytest.mark.parametrize(("scheme", "whole"), [("llm-int8", True), ("w8a8", False)])
def test_what_looks_across_tokens_runs_on_all_of_them(folder: Path, scheme: str, whole: bool) -> None:
    model = replica(folder)
    last = f"model.layers.{model.manifest().num_layers - 1}.mlp.down_proj"
    with model._weights.perturbed(Plan.of({last: scheme})):
        module = model._body.model.get_submodule(last)
        with model._reuse.predicting(slice(3, 5)):
            assert (model._body.model.get_submodule(last) is module) == whole


def test_what_was_proved_of_a_model_is_not_proved_again_unless_its_code_is_another(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    first = replica(folder)
    shutil.copytree(folder, tmp_path / "copy")
    proofs: list[str] = []
    for proving in (Body, Reuse):
        own = proving._prove
        monkeypatch.setattr(proving, "_prove", lambda self, *given, own=own: proofs.append("") or own(self, *given))
    again = replica(tmp_path / "copy")
    assert (again._body.cuts, again._reuse._reusing, len(proofs)) == (first._body.cuts, first._reuse._reusing, 0)
    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, values: own(self, values))
    replica(folder)
    assert len(proofs) == 2


def test_a_model_that_was_proved_before_measures_the_same_bits(folder: Path) -> None:
    found = []
    for model in (replica(folder), replica(folder)):
        requests = probe(model, with_reference(model).id)
        found.append([values(outcome) for outcome in model.evaluate(requests)])
    assert found[0] == found[1]
