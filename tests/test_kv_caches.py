"""KV caches as components: what a layer keeps of tokens, rounded as a cache would hold it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import in_process, measured_plan
from safetensors.torch import load_file, save_file
from tiny import TEXT, llama_config, result, values, with_reference, write_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

import dtmsearch as dtm
from dtmsearch.cluster.pool_settings import PoolSettings as Where
from dtmsearch.config import from_mapping
from dtmsearch.console.run_text import run_text
from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalRequest, ModelSpec, ReplicaSettings
from dtmsearch.core.holders import CACHED, CACHED_TOGETHER, holders_of, size_sentence
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.plan_file import plan_from_json, plan_to_json
from dtmsearch.core.prices import PriceRequest
from dtmsearch.core.schemes import DENSE, parse_scheme
from dtmsearch.errors import UserError
from dtmsearch.model.compress.quantization_arguments import CACHE_ARGUMENTS
from dtmsearch.model.modules.discovery import read_manifest
from dtmsearch.model.modules.kv_caches import round_cached
from dtmsearch.model.replica.compared_replica import ComparedReplica
from dtmsearch.model.replica.exported import rounds_caches
from dtmsearch.model.replica.plan_evaluator import PlanEvaluator
from dtmsearch.model.replica.replica import Replica
from dtmsearch.report.writing import write_report
from dtmsearch.search.baselines import may_take_its_place, rivals_of, uniform_rivals
from dtmsearch.search.space import SearchSpace
from dtmsearch.workflows.build import space_of
from dtmsearch.workflows.export import export
from dtmsearch.workflows.lookup import uniform_plan
from dtmsearch.workflows.take_prices import missing_prices

SCHEMES = ("kv-fp8", "kv-int8", "kv-int4")
KEYS, VALUES = "model.layers.{}.self_attn.kv_cache.keys", "model.layers.{}.self_attn.kv_cache.values"
MIXED = Plan.of({
    KEYS.format(0): "kv-int4",
    VALUES.format(1): "kv-fp8",
    KEYS.format(2): "kv-int8",
    "model.layers.1.mlp.down_proj": "int4-g16",
})  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def spec(folder: Path, **changes: Any) -> ModelSpec:
    return ModelSpec(str(folder), dtype="float32", **({"kv_context": 100} | changes))


def replica(folder: Path, batch_tokens: int = 0) -> Replica:
    return Replica(spec(folder), ReplicaSettings(batch_tokens, num_threads=1))


def caches(folder: Path) -> tuple[Component, ...]:
    return tuple(other for other in read_manifest(spec(folder)).others if other.is_cache)


class RoundedLayer(DynamicLayer):
    """A layer of a cache that holds nothing but what its format can hold."""

    def __init__(self, keys: str | None, values: str | None) -> None:
        super().__init__()
        self.formats = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held = [
            states if name is None else round_cached(states, states.shape[-1], parse_scheme(name))
            for name, states in zip(self.formats, (key_states, value_states), strict=True)
        ]
        return super().update(held[0], held[1], *args, **kwargs)


@pytest.mark.parametrize("scheme", [*SCHEMES, None])
def test_fdt_is_that_of_generation_with_such_a_cache(folder: Path, scheme: str | None) -> None:
    model = replica(folder)
    reference = with_reference(model)
    plan = Plan.uniform(caches(folder), scheme) if scheme else _only_caches()
    found = result(model.evaluate([EvalRequest(plan, reference.id, (0, 6))])[0])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    fdt = []
    for prompt, continuation in zip(reference.text[:, :10], reference.continuation, strict=True):
        cache = DynamicCache()
        cache.layers = [
            RoundedLayer(plan.schemes.get(KEYS.format(i)), plan.schemes.get(VALUES.format(i))) for i in range(3)
        ]
        row, written = torch.tensor(prompt[None].astype(np.int64)), []
        with torch.inference_mode():
            for _ in range(12):
                logits = plain(input_ids=row, past_key_values=cache, use_cache=True).logits[0, -1]
                logits[list(reference.suppressed)] = -torch.inf
                written.append(int(logits.argmax()))
                row = torch.tensor([[written[-1]]])
        fdt.append(next((at for at, (a, b) in enumerate(zip(written, continuation, strict=True)) if a != b), 12))
    assert reference.agrees.all() and found.fdt.tolist() == fdt


def _only_caches() -> Plan:
    return Plan.of({name: scheme for name, scheme in MIXED.entries if "kv_cache" in name})


def test_the_base_model_is_the_same_bit_by_bit(folder: Path) -> None:
    model, plain = replica(folder), Replica(spec(folder, kv_context=0), ReplicaSettings(num_threads=1))
    ours, theirs = with_reference(model), with_reference(plain)
    assert (ours.continuation == theirs.continuation).all()
    plan = Plan.of({"model.layers.1.mlp.down_proj": "int4-g16"})
    requests = [EvalRequest(plan, reference.id, (0, 6), ("kl", "ppl")) for reference in (ours, theirs)]
    assert values(model.evaluate([requests[0]])[0]) == values(plain.evaluate([requests[1]])[0])


@pytest.mark.parametrize("parent", [Plan(), _only_caches(), Plan.of({KEYS.format(0): "kv-int4"})])
def test_parents_and_what_came_before_change_no_bit(folder: Path, parent: Plan) -> None:
    model = replica(folder)
    reference = with_reference(model)
    alone = values(model.evaluate([EvalRequest(MIXED, reference.id, (0, 6), ("kl", "ppl"))])[0])
    others = [Plan.of({VALUES.format(2): "kv-int4"}), Plan.uniform(caches(folder), "kv-fp8"), parent]
    model.evaluate([EvalRequest(other, reference.id, (0, 6)) for other in others])
    again = EvalRequest(MIXED, reference.id, (0, 6), ("kl", "ppl"), parent)
    assert values(model.evaluate([again])[0]) == alone
    assert model.canary(reference.id) == 0.0


def test_plans_that_differ_in_caches_alone_share_what_lies_below(folder: Path) -> None:
    """However many numbers the caches have: rounded as they pass, they take no memory."""
    parent = Plan.of({"model.layers.0.mlp.up_proj": "int8-channel"})
    plan = Plan.of(parent.schemes | {VALUES.format(i): "kv-int4" for i in (1, 2)})
    request = EvalRequest(plan, "reference", (0, 6), parent=parent)
    evaluator = replica(folder)._evaluator
    assert isinstance(evaluator, PlanEvaluator) and evaluator._with_near_parent(request).parent == parent


def test_a_token_reads_the_same_of_a_cache_whatever_else_is_in_the_batch(folder: Path) -> None:
    rows = torch.randn(3, 5, 16) * 3
    for scheme in map(parse_scheme, SCHEMES):
        whole = round_cached(rows, 8, scheme)
        alone = round_cached(rows[1:2, 3:4], 8, scheme)
        assert torch.equal(whole[1:2, 3:4], alone) and not torch.equal(whole, rows)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_those_of_three_lines(scheme: str) -> None:
    rows = torch.randn(40, 8) * 2
    if scheme == "kv-fp8":
        expected = rows.to(torch.float8_e4m3fn).float()
    elif scheme == "kv-int8":
        scales = [float(row.abs().max()) / 127 for row in rows]
        expected = torch.stack([torch.round(row / s) * s for row, s in zip(rows, scales, strict=True)])
    else:
        expected = torch.stack([_in_16_codes(row) for row in rows])
    torch.testing.assert_close(round_cached(rows, 8, parse_scheme(scheme)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shift", [-6.0, 6.0])
def test_rows_of_one_sign_are_rounded_and_not_cut(scheme: str, shift: float) -> None:
    rows = torch.rand(20, 8) + shift
    assert float((round_cached(rows, 8, parse_scheme(scheme)) - rows).abs().max()) <= 0.55 * 7.0 / 15


def _in_16_codes(row: Tensor) -> Tensor:
    zeroed = torch.cat([row, torch.zeros(1)])
    scale = (zeroed.max() - zeroed.min()) / 15
    zero = torch.round(-zeroed.min() / scale).clamp(0, 15)
    return (torch.round(row / scale) + zero).clamp(0, 15).sub(zero) * scale


def test_sizes_are_those_of_the_tokens_that_are_kept(folder: Path) -> None:
    (keys, *others) = [c for c in read_manifest(spec(folder, kv_batch=3)).others if c.is_cache]
    assert len(others) == 5 and keys.name == KEYS.format(0)
    assert keys.shape == (3 * 100 * 2, 8)  # two heads of 8
    numbers, rows = keys.num_weights, keys.shape[0]
    bits = {scheme: parse_scheme(scheme).bits_of(keys, 16) for scheme in SCHEMES}
    assert bits == {"kv-fp8": numbers * 8 + 32, "kv-int8": numbers * 8 + rows * 32, "kv-int4": numbers * 4 + rows * 32}


def test_a_sliding_window_keeps_no_more_than_it_is_long(tmp_path: Path) -> None:
    from transformers import MistralConfig

    sizes = {name: getattr(llama_config(), name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    config = MistralConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=16
    )
    found = [c for c in read_manifest(spec(write_model(tmp_path, config))).others if c.is_cache]
    assert found[0].shape == (16 * 2, 8)


def test_tokens_that_are_kept_are_part_of_the_models_identity_and_of_nothing_else(folder: Path) -> None:
    plain = read_manifest(spec(folder, kv_context=0))
    assert not any(other.is_cache for other in plain.others)
    assert len({plain.id, read_manifest(spec(folder)).id, read_manifest(spec(folder, kv_batch=2)).id}) == 3


def test_schemes_are_for_caches_or_for_weights(folder: Path) -> None:
    manifest = read_manifest(spec(folder))
    components = (*manifest.components, *caches(folder))
    space = SearchSpace(components, ("int8-channel", "kv-fp8"), dense_bits=16, budget=Budget(bits_per_weight=9.0))
    offered = {edge.component: {e.scheme for e in unit.edges} for unit in space.units for edge in unit.edges}
    assert offered[KEYS.format(0)] == {"kv-fp8"} and offered["model.layers.0.mlp.up_proj"] == {"int8-channel"}
    assert set(space.uniform("kv-fp8").schemes) == {c.name for c in caches(folder)}
    with pytest.raises(UserError, match=r"search\.schemes has none for model\.layers\.0\.self_attn\.kv_cache\.keys"):
        SearchSpace(components, ("int8-channel",))
    with pytest.raises(UserError, match="kv-fp8 is for KV caches, and the search has none"):
        SearchSpace(manifest.components, ("int8-channel", "kv-fp8"))
    wrong = plan_to_json(Plan.of({KEYS.format(0): "int8-channel"}), manifest)
    with pytest.raises(UserError, match="are for caches, all others for weights"):
        plan_from_json(wrong, manifest, "plan.json")


def test_uniform_plans_are_of_one_scheme_of_weights_and_one_of_caches(folder: Path) -> None:
    manifest = read_manifest(spec(folder))
    components = (*manifest.components, *caches(folder))
    space = SearchSpace(components, ("int8-channel", "int4-g16", "kv-fp8"), budget=Budget(bits_per_weight=9.0))
    both = space.uniform("int8-channel+kv-fp8")
    assert len(both) == len(components) and both.scheme_of(KEYS.format(0)) == "kv-fp8"
    rivals = uniform_rivals(space, both)
    assert "int8-channel+kv-fp8" in rivals
    other = Plan.of(both.schemes | {KEYS.format(0): DENSE})
    assert rivals_of(space, {"plan": other, "uniform:int8-channel+kv-fp8": both}) == ["uniform:int8-channel+kv-fp8"]


def test_uniform_plans_that_leave_caches_as_they_are_are_rivals_too(folder: Path) -> None:
    components = (*read_manifest(spec(folder)).components, *caches(folder))
    space = SearchSpace(components, ("int8-channel", "int4-g16", "kv-fp8"), dense_bits=32, budget=Budget(size_mb=1.0))
    weights = space.uniform("int4-g16")
    plan = Plan.of(space.uniform("int8-channel").schemes | {KEYS.format(0): "kv-fp8"})
    assert rivals_of(space, {"plan": plan, "uniform:int4-g16": weights, "other": MIXED}) == ["uniform:int4-g16"]


def test_every_pair_of_a_family_and_a_scheme_of_caches_has_rivals(folder: Path) -> None:
    components = (*read_manifest(spec(folder)).components, *caches(folder))
    space = SearchSpace(components, ("int8-channel", "gptq-int4-g16", *SCHEMES), budget=Budget(bits_per_weight=7.0))
    rivals = uniform_rivals(space, space.uniform("int6-g16+kv-int8"))
    pairs = [(f, c) for f in ("int", "gptq-int") for c in SCHEMES]
    found = {(f, c): sum(r.startswith(f) and r.endswith(f"+{c}") for r in rivals) for f, c in pairs}
    assert min(found.values()) >= 3, found


def test_caches_alone_of_a_scheme_that_the_search_lacks_take_no_place(folder: Path) -> None:
    components = (*read_manifest(spec(folder)).components, *caches(folder))
    space = SearchSpace(components, ("int8-channel", "kv-fp8"), budget=Budget(bits_per_weight=9.0))
    assert may_take_its_place(space, space.uniform("int8-channel"), space.uniform("kv-fp8"))
    assert not may_take_its_place(space, space.uniform("int8-channel"), space.uniform("kv-int8"))


@pytest.mark.parametrize("strategy", ["sensitivity", "spdy"])
def test_strategies_by_errors_of_weights_take_no_caches(folder: Path, strategy: str) -> None:
    found = {
        "run": "one",
        "model": {"path": str(folder), "kv_cache": {"context": 100}},
        "prompts": {"files": ["text.txt"], "count": 4, "prompt_tokens": 10, "continuation_tokens": 10},
        "search": {
            "strategy": strategy,
            "schemes": ["int8-channel", "kv-fp8"],
            "components": {"include": ["*", "*.kv_cache.keys", "*.kv_cache.values"]},
            "stop": {"bits_per_weight": 9.0},
        },
    }
    file = from_mapping(found, "search.yaml", folder)
    with pytest.raises(UserError, match=f"{strategy} goes by errors of weights, and KV caches have none: use fisher"):
        space_of(file, read_manifest(spec(folder)))


def test_without_prices_auto_takes_no_caches(folder: Path) -> None:
    space = SearchSpace((*read_manifest(spec(folder)).components, *caches(folder)), ("int8-channel", "kv-fp8"))

    class Unpriced:
        def unpriceable(self, components: list[str]) -> str:
            return "its layers cannot be run backwards"

    with pytest.raises(UserError, match=r"prices cannot be had \(its layers .*\), and KV caches have none"):
        missing_prices("auto", space, Unpriced())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is a KV cache: it has no weights"):
        replica(folder).weight_errors([KEYS.format(1)], ["kv-int4"])


def test_a_uniform_plan_that_is_for_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="int8-channel is for weights, and all that is searched are KV caches"):
        uniform_plan("uniform:int8-channel", caches(folder))
    assert uniform_plan("uniform:kv-fp8", caches(folder)) == Plan.uniform(caches(folder), "kv-fp8")


def test_an_attention_that_does_not_tell_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="does not tell keys and values of attention 'eager'"):
        Replica(spec(folder, attention="eager"), ReplicaSettings(num_threads=1))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    return write_model(tmp_path_factory.mktemp("wide"), config)


@pytest.mark.parametrize("weights", [{}, {"model.layers.0.mlp.down_proj": "int4-g32"}])
def test_fp8_of_all_layers_is_exported_for_vllm_and_measures_as_recorded(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, str]
) -> None:
    in_process(monkeypatch)
    plan = weights | Plan.uniform(caches(wide), "kv-fp8").schemes
    made = measured_plan(wide, tmp_path / "store", plan, kv_context=100).export(
        "compressed-tensors", tmp_path / "out", runtime="vllm"
    )
    assert made.check is not None and made.check.equal and made.check.fdt_recorded < 12.0
    assert made.size.num_compressed == len(plan)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["kv_cache_scheme"]["num_bits"], settings["kv_cache_scheme"]["type"]) == (8, "float")
    assert len(settings["config_groups"]) == len(weights)


@pytest.mark.parametrize(
    ("schemes", "told"),
    [(("kv-fp8", "kv-fp8"), None), (("kv-fp8", "kv-int8"), CACHED_TOGETHER), (("kv-fp8", ""), CACHED_TOGETHER)],
)
def test_what_is_told_of_caches_before_an_export_is_what_it_does(
    wide: Path, schemes: tuple[str, str], told: str | None
) -> None:
    components = (*read_manifest(spec(wide)).components, *caches(wide))
    chosen = {c.name: scheme for c, scheme in zip(caches(wide), schemes, strict=True) if scheme}
    plan = Plan.of({"model.layers.0.mlp.down_proj": "int8-channel"} | chosen)
    held = {each.holder: each.obstacle for each in holders_of(plan, components, 16, 16)}
    assert held["compressed-tensors (vllm)"] == told
    assert held["compressed-tensors (transformers)"] == held["dense (any)"] == CACHED
    assert ("compressed-tensors (vllm)" in size_sentence(plan, components, 16, 16)) == (told is None)


def test_scales_of_caches_that_a_folder_has_of_its_own_are_left_to_engines_and_said(wide: Path, tmp_path: Path) -> None:
    """As published folders have them: run as transformers runs them."""
    plan = {"model.layers.0.mlp.down_proj": "int4-g32"} | Plan.uniform(caches(wide), "kv-fp8").schemes
    made = measured_plan(wide, tmp_path / "store", plan, kv_context=100)
    made.export("compressed-tensors", out := tmp_path / "out", runtime="vllm", check=False)
    own = ModelSpec(str(out), dtype="float32")
    assert rounds_caches(out) and ComparedReplica(own, ReplicaSettings(num_threads=1)).way == "as transformers runs it"
    tensors = load_file(out / "model.safetensors")
    scales = {f"model.layers.0.self_attn.{side}_scale": torch.tensor([0.5]) for side in "kv"}
    save_file(tensors | scales, out / "model.safetensors", {"format": "pt"})
    assert not rounds_caches(out)
    found = ComparedReplica(own, ReplicaSettings(num_threads=1))
    assert found.way == "as transformers runs it; its KV caches are not rounded, as they are where it is served"


@pytest.mark.parametrize("changes", [{"quant_method": "fp8", "kv_cache_scheme": "static"}, {"kv_cache_scheme": None}])
def test_what_other_formats_say_of_caches_is_not_ours(tmp_path: Path, changes: dict[str, Any]) -> None:
    own = {"quant_method": "compressed-tensors", "kv_cache_scheme": CACHE_ARGUMENTS}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": own | changes}))
    assert not rounds_caches(tmp_path)


def test_a_plan_file_says_of_how_many_tokens_its_caches_are(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    plan = Plan.uniform(caches(wide), "kv-fp8").schemes
    made = measured_plan(wide, tmp_path / "store", plan, kv_context=100)
    made.export("json", tmp_path / "plan.json")
    again = export(str(tmp_path / "plan.json"), "compressed-tensors", tmp_path / "out", str(made.store), runtime="vllm")
    assert again.check is not None and again.check.equal and again.plan == made.plan


@pytest.mark.parametrize(
    ("to", "runtime", "schemes", "said"),
    [
        ("dense", "transformers", ("kv-fp8", "kv-fp8"), "it says nothing of KV caches"),
        ("compressed-tensors", "transformers", ("kv-fp8", "kv-fp8"), "it says nothing of KV caches"),
        ("compressed-tensors", "vllm", ("kv-fp8", "kv-int8"), "one scheme for the keys and values of all layers"),
        ("compressed-tensors", "vllm", ("kv-fp8", ""), "values: as it is"),
    ],
)
def test_caches_that_no_folder_holds_are_refused(
    wide: Path, tmp_path: Path, to: str, runtime: str, schemes: tuple[str, str], said: str
) -> None:
    plan = {c.name: scheme for c, scheme in zip(caches(wide), schemes, strict=True) if scheme}
    made = measured_plan(wide, tmp_path / "store", plan, kv_context=100)
    with pytest.raises(UserError, match=said):
        made.export(to, tmp_path / "out", runtime=runtime)
    assert not list(tmp_path.glob("out*"))


def test_prices_foresee_what_caches_do(folder: Path) -> None:
    """Of every part alone under 4 bits, to second order."""
    model = replica(folder)
    reference = with_reference(model)
    names = [c.name for c in caches(folder)]
    assert model.unpriceable([*names, "model.layers.0.mlp.up_proj"]) == ""
    assert model.unpriceable(["lm_head"]) == "lm_head lies outside the layers"
    schemes = ("kv-int4", "int8-channel")
    products = model.price(PriceRequest(reference.id, (0, 192), tuple(names), schemes)).products.astype(np.float64)
    assert (products[:, :, 1] == 0.0).all()  # a scheme of weights leaves them as they are
    foreseen = (products[:, :, 0] ** 2).mean(axis=0) / (2 * reference.continuation_tokens)
    requests = [EvalRequest(Plan.of({name: "kv-int4"}), reference.id, (0, 6), ("kl",)) for name in names]
    measured = [np.mean(result(outcome).kl) for outcome in model.evaluate(requests)]  # type: ignore[arg-type]
    assert abs(np.log(foreseen / np.array(measured))).max() < 0.7


def test_a_search_tells_what_its_caches_take(wide: Path, tmp_path: Path) -> None:
    """A search among weights and caches, in one process; status says of how many tokens."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    file = f"""
run: cached
model: {{path: {wide}, dtype: float32, kv_cache: {{context: 1000, batch: 2}}}}
prompts: {{files: [{text}], count: 8, prompt_tokens: 10, continuation_tokens: 12}}
validation: {{files: [{text}], count: 8}}
search:
  strategy: fisher
  rank_by: kl
  schemes: [int8-channel, kv-fp8, kv-int4]
  components: {{include: ["*", "*.kv_cache.keys", "*.kv_cache.values"]}}
  stop: {{size_mb: 0.15}}
"""
    (tmp_path / "search.yaml").write_text(file)
    dtm.validate(tmp_path / "search.yaml")
    run = dtm.run(tmp_path / "search.yaml", tmp_path / "store", Where(in_process=True))
    schemes = run.plan.schemes
    assert {schemes.get(c.name, "") for c in caches(wide)} <= {"kv-fp8", "kv-int4"}
    # 2 x 2 x 1,000 x 2 heads of 16 numbers, in 32 bits; codes of 8 bits and of 4 with a scale a row.
    assert str(run.summary.kv_cache).startswith("2 texts of 1,000 tokens: 0.512 MB unquantized, ")
    assert "KV cache   2 texts of 1,000 tokens" in run_text(run.summary)
    assert run.summary.rival is not None and "+kv-" in run.summary.rival
    (page, *_) = write_report(run.store, "cached", tmp_path / "page.html")
    assert f"Beside {run.summary.rival.removeprefix('uniform:')} everywhere" in page.read_text()
