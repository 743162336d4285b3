"""A model whose weights pass through the device has the bits of one that lies there, whatever is asked of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_expert_widths import mixtral
from tiny import llama_config, values, with_reference, write_model
from torch import nn
from transformers import MixtralConfig

from dtmsearch.core.evaluation import EvalFailure, EvalRequest, ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import PriceRequest
from dtmsearch.core.variant import Variant
from dtmsearch.model.forward.streamed_body import StreamedBody
from dtmsearch.model.modules.streamed_layers import StreamedLayers
from dtmsearch.model.modules.weight_reading import Span, WeightReader, bytes_of, spans
from dtmsearch.model.replica.local_replicas import LocalReplicas
from dtmsearch.model.replica.replica import Replica
from dtmsearch.model.replica.streamed_evaluator import StreamedEvaluator

CPU = torch.device("cpu")
ALL = ("kl", "ppl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), llama_config(num_hidden_layers=4))


def made(folder: Path, weights: Literal["device", "streamed"]) -> Replica:
    settings = ReplicaSettings(num_threads=1, batch_tokens=70, weights=weights)
    return Replica(ModelSpec(str(folder), dtype="float32", compile="never"), settings)


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Replica, Replica]:
    return made(folder, "device"), made(folder, "streamed")


def plans(model: Replica) -> list[Plan]:
    """Alone, low and high; several that share what is below; all of the model; the model as it is."""
    names = [component.name for component in model.manifest().components]
    below = {names[1]: "int4-channel", names[8]: "int3-g8"}
    return [
        *(Plan.of({name: "int3-g8"}) for name in names[::9]),
        *(Plan.of(below | {name: "magnitude-0.5"}) for name in names[10::9]),
        Plan.of(dict.fromkeys(names, "w8a8-channel")),
        Plan.of({names[3]: "w8a8", names[-1]: "nf4"}),
        Plan(),
    ]


def test_every_value_is_that_of_a_model_that_lies_on_the_device(both: tuple[Replica, Replica]) -> None:
    found = []
    for model in both:
        reference = with_reference(model)
        requests = [EvalRequest(plan, reference.id, (0, 6), ALL) for plan in plans(model)]
        found.append((reference.id, [values(outcome) for outcome in model.evaluate(requests)]))
    assert found[0] == found[1]


def test_blocks_of_prompts_change_no_bit(both: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = both
    reference = with_reference(model)
    requests = [EvalRequest(plan, reference.id, (0, 6), ALL) for plan in plans(model)]
    together = [values(outcome) for outcome in model.evaluate(requests)]
    model.release_memory()
    monkeypatch.setattr("dtmsearch.model.replica.streamed_evaluator.free_bytes", lambda device: 0.0)
    assert [values(outcome) for outcome in model.evaluate(requests)] == together


def test_each_layer_is_brought_once_for_all_candidates(
    both: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = both
    reference = with_reference(model)
    requests = [EvalRequest(plan, reference.id, (0, 6), ALL) for plan in plans(model)]
    model.evaluate(requests)
    brought: list[int] = []
    begin = StreamedLayers._begin
    monkeypatch.setattr(
        StreamedLayers, "_begin", lambda self, index, place: brought.append(index) or begin(self, index, place)
    )
    model.evaluate(requests)
    # The first two were fetched ahead when the pass before ended, and are again.
    assert sorted(brought) == [0, 1, 2, 3]


def test_all_weights_of_layers_pass_through_places_and_stay_nowhere_else(folder: Path) -> None:
    model = made(folder, "streamed")
    evaluator = model._evaluator
    assert isinstance(evaluator, StreamedEvaluator)
    streamed = evaluator._streamed
    reference = with_reference(model)
    model.evaluate([EvalRequest(plan, reference.id, (0, 6), ALL) for plan in plans(model)])
    places = [(place.memory.data_ptr(), place.memory.data_ptr() + len(place.memory)) for place in streamed._in_turn]
    arrived = [place.layer for place in streamed._in_turn if place.fetched is None]
    assert arrived
    for index, layer in enumerate(streamed._layers):
        inside = {any(start <= parameter.data_ptr() < end for start, end in places) for parameter in layer.parameters()}
        assert inside == {index in arrived}


def test_calibrated_schemes_and_what_is_said_of_plans_that_cannot_be(both: tuple[Replica, Replica]) -> None:
    found = []
    for model in both:
        reference = with_reference(model)
        text = model.cut_calibration(["abc def ghi " * 200], 4, 16, 0)
        model.use_calibration(text)
        names = [component.name for component in model.manifest().components]
        some = [
            Plan.of({names[2]: "gptq-int3-g16"}),
            Plan.of({names[2]: "gptq-int3-g16", names[12]: "wanda-0.5"}),
            Plan.of({names[20]: "sparsegpt-0.5"}),
        ]
        requests = [EvalRequest(plan, reference.id, (0, 6), ALL, Plan(), text.id) for plan in some]
        found.append([values(outcome) for outcome in model.evaluate(requests)])
        sdt, _ = model.check(some[0], reference.id, 3)
        found[-1].append([sdt.tolist()])
        (refused,) = model.evaluate([EvalRequest(some[0], reference.id, (0, 6), ALL)])
        assert isinstance(refused, EvalFailure)
        assert refused.kind == "invalid"
        (fine,) = model.evaluate([EvalRequest(Plan(), reference.id, (0, 6), ALL)])
        assert not isinstance(fine, EvalFailure)
    assert found[0] == found[1]


def test_embeddings_and_head_are_compared_with_the_base_models_own(both: tuple[Replica, Replica]) -> None:
    found = []
    for model in both:
        reference = with_reference(model)
        others = {component.name: "int3-channel" for component in model.manifest().others if component.kind != "norm"}
        others = {name: scheme for name, scheme in others.items() if name.endswith(("lm_head", "embed_tokens"))}
        assert others
        names = [component.name for component in model.manifest().components]
        some = [Plan.of(others), *(Plan.of({name: scheme}) for name, scheme in others.items()), Plan()]
        some.append(Plan.of(others | {names[5]: "int3-g8"}))
        requests = [EvalRequest(plan, reference.id, (0, 6), ALL) for plan in some]
        found.append([values(outcome) for outcome in model.evaluate(requests)])
    assert found[0] == found[1]


def test_prices_are_those_of_a_model_that_lies_on_the_device(both: tuple[Replica, Replica]) -> None:
    found = []
    for model in both:
        reference = with_reference(model)
        names = tuple(component.name for component in model.manifest().components)
        request = PriceRequest(reference.id, (0, 6), names, ("int4-g8", "w8a8-channel", "magnitude-0.5"))
        found.append(model.price(request).products)
    np.testing.assert_array_equal(found[0], found[1])


def test_prices_of_several_batches_read_each_layer_once_up_and_once_down(
    both: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    brought: list[int] = []
    begin = StreamedLayers._begin
    monkeypatch.setattr(
        StreamedLayers, "_begin", lambda self, index, place: brought.append(index) or begin(self, index, place)
    )
    for model in both:
        reference = with_reference(model)
        assert model._batches.rows(reference.text.shape[1]) < 6  # several batches
        names = tuple(component.name for component in model.manifest().components)
        brought.clear()
        request = PriceRequest(
            reference.id, (0, 6), names, ("int4-g8",), kind="slope", around=Plan.of({names[9]: "int3-g8"})
        )
        found.append(model.price(request).products)
        # The base model's head inputs, the plan that stands, up and down: whatever the number of batches.
        assert len(brought) <= 5 * 4
    np.testing.assert_array_equal(found[0], found[1])


def test_texts_under_a_plan_and_its_check(both: tuple[Replica, Replica]) -> None:
    found = []
    for model in both:
        reference = with_reference(model)
        names = [component.name for component in model.manifest().components]
        plan = Plan.of({names[0]: "int3-g8", names[9]: "w8a8-channel", names[-1]: "int4-channel"})
        said = model.continuations(Variant(plan), reference.id, [0, 1])
        sdt, _ = model.check(plan, reference.id, 3)
        after = values(model.evaluate([EvalRequest(Plan(), reference.id, (0, 6), ALL)])[0])
        found.append(([one.variant for one in said] if hasattr(said[0], "variant") else said, sdt.tolist(), after))
    assert found[0] == found[1]


def test_memory_of_the_host_that_is_short_amid_a_pass_changes_no_bit(folder: Path) -> None:
    model = made(folder, "streamed")
    reference = with_reference(model)
    requests = [EvalRequest(plan, reference.id, (0, 6), ALL) for plan in plans(model)[::3]]
    expected = [values(outcome) for outcome in model.evaluate(requests)]
    short = iter([True])

    def allocate(*_: object) -> None:
        if next(short, False):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    hook = model._body._real[2].register_forward_pre_hook(allocate)
    assert [values(outcome) for outcome in model.evaluate(requests)] == expected
    hook.remove()
    assert next(short, None) is None


def test_a_file_that_is_gone_is_said_and_read_again_when_it_is_back(tmp_path: Path) -> None:
    model = made(write_model(tmp_path, llama_config(num_hidden_layers=4)), "streamed")
    reference = with_reference(model, count=2)
    request = EvalRequest(Plan(), reference.id, (0, 2), ALL)
    before = values(model.evaluate([request])[0])
    weights = tmp_path / "model.safetensors"
    weights.rename(tmp_path / "gone")
    for _ in range(2):
        with pytest.raises(OSError, match=r"weights of layer \d cannot be read: .*model\.safetensors"):
            model.evaluate([request])
    (tmp_path / "gone").rename(weights)
    assert values(model.evaluate([request])[0]) == before


KEYS = "model.layers.{}.self_attn.kv_cache.keys"


def test_caches_of_keys_and_values_are_rounded_in_their_own_layers(folder: Path) -> None:
    found = []
    for weights in ("device", "streamed"):
        settings = ReplicaSettings(num_threads=1, weights=weights)  # type: ignore[arg-type]
        model = Replica(ModelSpec(str(folder), dtype="float32", compile="never", kv_context=100), settings)
        reference = with_reference(model)
        some = [Plan.of({KEYS.format(layer): "kv-int4"}) for layer in range(4)]
        requests = [EvalRequest(plan, reference.id, (0, 6), ALL) for plan in some]
        found.append([values(outcome) for outcome in model.evaluate(requests)])
    assert found[0] == found[1]
    assert all(max(measured[3]) > 0 for measured in found[0])


def test_a_plan_over_trained_weights_is_compared_with_the_base_model(folder: Path, tmp_path: Path) -> None:
    moved = "model.layers.1.mlp.up_proj.weight"
    trained = load_file(folder / "model.safetensors")[moved] * 1.5
    save_file({moved: trained}, tmp_path / "0123456789abcdef.safetensors")
    found = []
    for weights in ("device", "streamed"):
        settings = ReplicaSettings(num_threads=1, weights=weights, weights_folder=str(tmp_path))  # type: ignore[arg-type]
        model = Replica(ModelSpec(str(folder), dtype="float32", compile="never"), settings)
        reference = with_reference(model)
        plan = Plan.of({"model.layers.2.mlp.up_proj": "int4-g8"})
        over = [
            model.evaluate([EvalRequest(plan, reference.id, (0, 6), ALL, Plan(), "", weights_id)])[0]
            for weights_id in ("0123456789abcdef", "")
        ]
        found.append([values(outcome) for outcome in over])
    assert found[0] == found[1]


def test_experts_and_routers_of_a_mixture_and_texts_under_plans_of_them(tmp_path: Path) -> None:
    shape = {
        name: getattr(llama_config(), name) for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    }
    config = MixtralConfig(
        vocab_size=258, num_key_value_heads=2, num_local_experts=4, num_hidden_layers=4, initializer_range=0.5, **shape
    )
    write_model(tmp_path, config)
    found = []
    for weights in ("device", "streamed"):
        model = made(tmp_path, weights)  # type: ignore[arg-type]
        reference = with_reference(model)
        manifest = model.manifest()
        experts = [component.name for component in manifest.components if component.stacked]
        whole = Plan.of(dict.fromkeys(experts, "int2-g8"))
        some = [whole, Plan.of({manifest.routers[2]: "int3-channel"}), Plan.of({experts[5]: "int3-g8"}), Plan()]
        requests = [EvalRequest(plan, reference.id, (0, 6), ALL) for plan in some]
        before = [values(outcome) for outcome in model.evaluate(requests)]
        said = str(model.continuations(Variant(whole), reference.id, [0, 1]))
        after = [values(outcome) for outcome in model.evaluate(requests)]
        assert before == after
        found.append((said, before))
    assert found[0] == found[1]


def test_plans_of_several_layers_do_not_stand_for_a_while(both: tuple[Replica, Replica]) -> None:
    resident, streamed = both
    names = [component.name for component in streamed.manifest().components]
    plan = Plan.of({names[0]: "int4-g8", names[-1]: "int4-g8"})
    with torch.inference_mode(), resident._weights.perturbed(plan):
        pass
    with torch.inference_mode(), pytest.raises(AssertionError, match="one layer at a time"):
        streamed._weights.perturbed(plan).__enter__()


# --- the layers ---


def layers(count: int = 5) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(3, 3) for _ in range(count)]


def test_weights_are_there_while_a_layer_is_needed_and_back_afterwards() -> None:
    stack = layers()
    before = [layer.weight.data.clone() for layer in stack]
    streamed = StreamedLayers(stack, CPU, {}, 0.0)
    here = [layer.weight.data_ptr() for layer in stack]
    for index in (0, 1, 2, 3, 4, 3, 2, 1, 0, 4, 2, 2, 0):
        streamed.need(index)
        assert stack[index].weight.data_ptr() != here[index]
        torch.testing.assert_close(stack[index].weight.data, before[index], rtol=0, atol=0)
    assert sum(layer.weight.data_ptr() != own for layer, own in zip(stack, here, strict=True)) <= 2


def test_weights_that_are_replaced_stay_replaced_wherever_the_layer_was() -> None:
    stack = layers()
    streamed = StreamedLayers(stack, CPU, {}, 0.0)
    streamed.need(1)
    stack[1].weight.data = torch.full((3, 3), 7.0)  # while it is there
    stack[4].weight.data = torch.full((3, 3), 9.0)  # while it is not
    for index in range(5):
        streamed.need(index)
    for index, value in ((1, 7.0), (4, 9.0)):
        streamed.need(index)
        assert (stack[index].weight == value).all()


def test_a_rehearsal_reads_one_layer_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = [*layers(), nn.Linear(3, 3, bias=False), *layers(2)]
    before = [layer.weight.data.clone() for layer in stack]
    streamed = StreamedLayers(stack, CPU, {}, 0.0)
    here = [layer.weight.data_ptr() for layer in stack]
    begun: list[int] = []
    begin = StreamedLayers._begin
    monkeypatch.setattr(
        StreamedLayers, "_begin", lambda self, index, place: begun.append(index) or begin(self, index, place)
    )
    with streamed.rehearsing():
        for index in (*range(8), 3, 5, 0):
            stack[index](torch.ones(3))
            assert torch.equal(stack[index].weight, before[5 if index == 5 else 0])
    assert begun == [0, 5]
    assert [layer.weight.data_ptr() for layer in stack[1:5]] == here[1:5]
    for index in range(8):
        stack[index](torch.ones(3))
        assert torch.equal(stack[index].weight, before[index])


def test_weights_of_one_layer_that_overflow_do_not_refuse_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path, llama_config(num_hidden_layers=16))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"] *= 3000  # of which 16 times as much is no float16
    save_file(tensors, file, {"format": "pt"})
    tried: list[bool] = []
    find_out = StreamedBody._prove
    monkeypatch.setattr(StreamedBody, "_prove", lambda body: tried.append(True) or find_out(body))
    settings = ReplicaSettings(num_threads=1, weights="streamed")
    model = Replica(ModelSpec(str(folder), dtype="float16", compile="never"), settings)
    assert len(tried) == 2
    reference = with_reference(model, count=2, continuation=3)  # a token is a pass through 16 layers
    outcome = model.evaluate([EvalRequest(Plan(), reference.id, (0, 2))])[0]
    assert not isinstance(outcome, EvalFailure) and not outcome.sdt.any()


def test_the_first_layers_stay_as_far_as_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = layers()
    streamed = StreamedLayers(stack, CPU, {}, 4 * 512.0)
    assert streamed.num_resident == 2
    for index in range(5):
        streamed.need(index)
    begun: list[int] = []
    begin = StreamedLayers._begin
    monkeypatch.setattr(
        StreamedLayers, "_begin", lambda self, index, place: begun.append(index) or begin(self, index, place)
    )
    for index in range(5):
        streamed.need(index)
    assert not {0, 1} & set(begun)


# --- what reads weights ---


def test_bytes_come_from_files_and_from_memory(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(1_000.0), "b": torch.arange(64, dtype=torch.int16).reshape(8, 8)}
    save_file(tensors, tmp_path / "weights.safetensors")
    places = spans(tmp_path / "weights.safetensors")
    reader = WeightReader(CPU)
    for name, tensor in tensors.items():
        from_file, from_memory = (torch.zeros(tensor.nbytes, dtype=torch.uint8) for _ in range(2))
        reader.begin([(places[name], from_file), (tensor, from_memory)]).wait()
        assert torch.equal(from_file, bytes_of(tensor))
        assert torch.equal(from_memory, bytes_of(tensor))


def test_layers_that_share_weights_are_refused() -> None:
    stack = layers()
    stack[3].weight = stack[1].weight
    with pytest.raises(ValueError, match=r"several layers share"):
        StreamedLayers(stack, CPU, {}, 0.0)


def test_a_search_in_one_process_takes_a_round_up_the_layers_together(folder: Path) -> None:
    spec = ModelSpec(str(folder), dtype="float32", compile="never")
    pool = LocalReplicas(spec, ReplicaSettings(num_threads=1, weights="streamed"))
    reference = with_reference(pool._replica, count=2)
    names = [component.name for component in pool.manifest().components[:20]]
    pool.submit([EvalRequest(Plan.of({name: "int3-g8"}), reference.id, (0, 2)) for name in names])
    assert len(pool.poll(0.0)) == 20


def test_a_file_that_was_cut_meanwhile_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(b"0123")
    fetched = WeightReader(CPU).begin([(Span(path, 0, 8), torch.zeros(8, dtype=torch.uint8))])
    with pytest.raises(OSError, match=r"cut\.safetensors ended before"):
        fetched.wait()


def shapes(model: Replica) -> list[Plan]:
    """Blocks dropped and cut, beside each other and beside other schemes."""
    blocks = [block.name for block in model.manifest().blocks]
    attention, mlp = blocks[0], blocks[4]
    first = model.manifest().components[0].name
    return [
        *(Plan.of({block: "drop"}) for block in (*blocks[:3], *blocks[-3:])),
        Plan.of({attention: "drop", mlp: "drop", first.replace("layers.0", "layers.3"): "int4-channel"}),
        *(Plan.of({mlp: f"channels-0.5-{rule}"}) for rule in ("wanda", "wanda-repair", "ziplm-repair", "magnitude")),
        Plan.of({attention: "heads-1:2-wanda-repair", first: "int4-channel", mlp: "channels-0.25-wanda"}),
        Plan.of({attention: "heads-1:2-random", mlp: "drop"}),
        Plan(),
    ]


def test_blocks_of_weights_that_pass_through_are_dropped_and_cut(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = llama_config(num_hidden_layers=4, mlp_bias=True, attention_bias=True, **heads)
    path = write_model(tmp_path, config)
    weights = load_file(path / "model.safetensors")
    for name in (name for name in weights if name.endswith("bias")):
        weights[name] = torch.linspace(-0.5, 0.5, len(weights[name])) * (1 + int(name.split(".")[2]))
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    found = []
    for kept in ("device", "streamed"):
        model = made(path, kept)
        reference = with_reference(model)
        text = model.cut_calibration(["abc def ghi " * 200], 4, 16, 0)
        model.use_calibration(text)
        requests = [EvalRequest(plan, reference.id, (0, 6), ALL, Plan(), text.id) for plan in shapes(model)]
        values_of = [values(outcome) for outcome in model.evaluate(requests)]
        for plan in (*shapes(model)[::3], Plan()):  # standing, and all of the model again
            model._bench.become(Variant(plan, "", text.id))
            again = requests[1], requests[-1]
            values_of += [values(outcome) for outcome in model.evaluate(again)]
        found.append(values_of)
    assert found[0] == found[1]


def test_a_layer_that_every_candidate_drops_is_not_fetched(
    both: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = with_reference(both[0])
    gone = {"model.layers.2": "drop"}
    some = [Plan.of(gone), Plan.of(gone | {"model.layers.0.mlp.up_proj": "int4-channel"})]
    requests = [EvalRequest(plan, reference.id, (0, 6), ALL) for plan in some]
    found = []
    for model in both:
        with_reference(model)
        found.append([values(outcome) for outcome in model.evaluate(requests)])
    assert found[0] == found[1]
    brought: list[int] = []
    begin = StreamedLayers._begin
    monkeypatch.setattr(
        StreamedLayers, "_begin", lambda self, index, place: brought.append(index) or begin(self, index, place)
    )
    again = [values(outcome) for outcome in both[1].evaluate(requests)]
    assert again == found[1] and sorted(set(brought)) == [0, 1, 3]
    brought.clear()
    both[1]._bench.become(Variant(some[0]))  # standing
    assert [values(outcome) for outcome in both[1].evaluate(requests)] == found[1]
    assert 2 not in brought
    both[1]._bench.become(Variant(Plan()))
    whole = EvalRequest(Plan(), reference.id, (0, 6), ALL)
    assert values(both[1].evaluate([whole])[0]) == values(both[0].evaluate([whole])[0]) and 2 in brought


def test_mixtures_of_weights_that_pass_through_lose_experts(tmp_path: Path) -> None:
    write_model(tmp_path, mixtral(num_hidden_layers=4))
    first, last = "model.layers.0.mlp", "model.layers.3.mlp"
    some = [
        Plan.of({first: "experts-0.25-reap"}), Plan.of({last: "experts-0.5-routed", first: "drop"}),
        Plan.of({first: "experts-0.5-magnitude", last: "experts-0.25-random"}), Plan(),
    ]  # fmt: skip
    found = []
    for kept in ("device", "streamed"):
        model = made(tmp_path, kept)  # type: ignore[arg-type]
        reference = with_reference(model)
        text = model.cut_calibration(["abc def ghi " * 200], 4, 16, 0)
        model.use_calibration(text)
        requests = [EvalRequest(plan, reference.id, (0, 6), ALL, Plan(), text.id) for plan in some]
        found.append([values(outcome) for outcome in model.evaluate(requests)])
    assert found[0] == found[1] and found[0][0] != found[0][3]


def test_widths_by_gradients_need_weights_that_stay(both: tuple[Replica, Replica]) -> None:
    _, model = both
    reference = with_reference(model)
    text = model.cut_calibration(["abc def ghi " * 200], 4, 16, 0)
    model.use_calibration(text)
    plan = Plan.of({"model.layers.1.mlp": "channels-0.5-gradient"})
    (outcome,) = model.evaluate([EvalRequest(plan, reference.id, (0, 2), (), Plan(), text.id)])
    assert isinstance(outcome, EvalFailure) and "pass through the GPU" in outcome.message
