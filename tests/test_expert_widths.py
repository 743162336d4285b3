"""Mixtures of fewer experts: what is measured, which experts go, how large it is, what searches come to, exports."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.integrations.moe
from exports import in_process, measured_plan
from fakes import FakeEvaluator, run_search
from families_of_models import tiny_model
from inprocess import here, run_here
from processes import tiny_search
from safetensors.torch import load_file
from test_widths import logits
from tiny import TEXT, values, with_reference, write_model, write_tokenizer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig

from dtmsearch.config import parse
from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, ReplicaSettings
from dtmsearch.core.holders import size_sentence
from dtmsearch.core.plan import Budget, Plan, plan_size
from dtmsearch.core.plan_file import plan_from_json, plan_to_json
from dtmsearch.core.plan_widths import ONE_WIDTH, is_even, widths_left
from dtmsearch.core.schemes import DROP, parse_scheme
from dtmsearch.core.variant import Variant
from dtmsearch.core.widths import width_of
from dtmsearch.errors import UserError
from dtmsearch.export.smaller_code import CODE_FILE
from dtmsearch.model.forward.expert_routing import routed_tokens
from dtmsearch.model.replica.replica import Replica
from dtmsearch.search.baselines import evened, shape_rivals
from dtmsearch.search.solver.choices import Choices
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.strategy_registry import SolverSettings, make_strategy
from dtmsearch.workflows.evaluate import recover
from dtmsearch.workflows.export import export

MLP = "model.layers.1.mlp"
QUARTER, HALF = "experts-0.25-reap", "experts-0.5-reap"


def mixtral(**settings: Any) -> MixtralConfig:
    return MixtralConfig(
        **{"vocab_size": 258, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 3,
           "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "num_local_experts": 4,
           "num_experts_per_tok": 2, "eos_token_id": 257, "bos_token_id": 256, "initializer_range": 0.2} | settings
    )  # fmt: skip


@pytest.fixture(autouse=True)
def experts_in_any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of grouped products knows no float64: plain products, one expert after the other."""
    own = transformers.integrations.moe._grouped_mm

    def grouped(inputs: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        if inputs.dtype != torch.float64 or inputs.is_meta:
            return own(inputs, weight, offs)
        ends = [0, *offs.tolist()]
        parts = [inputs[a:b] @ each for a, b, each in zip(ends, ends[1:], weight, strict=False)]
        return torch.cat([*parts, inputs.new_zeros(len(inputs) - ends[-1], weight.shape[-1])])

    monkeypatch.setattr(transformers.integrations.moe, "_grouped_mm", grouped)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Replica, str, str]:
    folder = write_model(tmp_path_factory.mktemp("mixture"), mixtral())
    model = Replica(ModelSpec(str(folder), dtype="float32"), ReplicaSettings(num_threads=1))
    reference = with_reference(model)
    calibration = model.cut_calibration([TEXT], 8, 32, 0)
    model.use_calibration(calibration)
    return model, reference.id, calibration.id


class Without(TorchFunctionMode):
    """Within, a router, told by its weights' values, gives some experts minus infinity."""

    def __init__(self, router: Tensor, gone: list[int]) -> None:
        super().__init__()
        self._router, self._gone, self.times = router.float(), gone, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        is_linear = func is torch.nn.functional.linear and args[1].shape == self._router.shape
        if is_linear and torch.equal(args[1].float(), self._router):
            self.times += 1
            made = made.clone()
            made[..., self._gone] = -torch.inf
        return made


@contextmanager
def minus_infinity(module: torch.nn.Module, gone: list[int]) -> Iterator[Without]:
    """A mixture's router gives some experts minus infinity, its correction as well."""
    router = getattr(module, "gate", None) or module.router
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    for buffer in router.buffers():
        buffer[gone] = -torch.inf
    with Without(router.weight.data, gone) as mode:
        yield mode
    for name, buffer in router.named_buffers():
        buffer.copy_(before[name])


@pytest.mark.parametrize("scheme", ["experts-0.25-reap", "experts-0.5-magnitude", "experts-0.25-random"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_mixture_of_fewer_experts_is_the_one_whose_router_gives_the_others_minus_infinity(
    tmp_path: Path, family: str, scheme: str
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    replica = Replica(ModelSpec(str(tmp_path), dtype="float64", attention="eager"), ReplicaSettings(num_threads=1))
    calibration = replica.cut_calibration([TEXT], 8, 32, 0)
    replica.use_calibration(calibration)
    module = replica._bench.standing.body.model.get_submodule(MLP)
    whole = logits(replica, Plan())
    fewer = logits(replica, Plan.of({MLP: scheme}), calibration.id)
    kept = replica._weights.compressor.cut(MLP, parse_scheme(scheme), 4, torch.device("cpu")).kept.tolist()
    assert len(kept) == (2 if "0.5" in scheme else 3)
    with minus_infinity(module, sorted({0, 1, 2, 3} - set(kept))) as mode:
        masked = logits(replica, Plan())
    assert mode.times == 1
    # DeepSeek's router chooses in no order and adds 32-bit numbers in that: alike to their last bits.
    exact = family != "deepseek_v3"
    assert torch.equal(fewer, masked) if exact else torch.allclose(fewer, masked, rtol=0.0, atol=1e-5)
    assert not torch.equal(fewer.float(), whole.float())
    assert torch.equal(logits(replica, Plan()), whole)


def test_a_mixture_runs_with_a_smaller_router_and_fewer_experts(mixture: tuple[Replica, str, str]) -> None:
    replica, _, calibration = mixture
    module = replica._bench.standing.body.model.get_submodule(MLP)
    shapes: list[tuple[int, ...]] = []

    def note(router: Any, *_: Any) -> None:
        shapes.extend(
            [tuple(p.shape) for p in module.parameters()] + [(router.num_experts, module.experts.num_experts)]
        )

    handle = module.gate.register_forward_hook(note)
    logits(replica, Plan.of({MLP: QUARTER}), calibration)
    handle.remove()
    assert shapes[-4:] == [(3, 32), (3, 32, 32), (3, 32, 16), (3, 3)]  # after passes to choose by
    assert [tuple(p.shape) for p in module.parameters()] == [(4, 32), (4, 32, 32), (4, 32, 16)]


def measured(model: tuple[Replica, str, str], schemes: dict[str, str], parent: Plan = Plan()) -> list[list[float]]:
    replica, reference, calibration = model
    request = EvalRequest(Plan.of(schemes), reference, (0, 6), ("kl", "ppl"), parent, calibration)
    return values(replica.evaluate([request])[0])


def test_a_model_is_what_it_was_after_experts_were_taken(mixture: tuple[Replica, str, str]) -> None:
    experts = [c.name for c in mixture[0].manifest().components if c.block == MLP]
    rounded = dict.fromkeys(experts, "int4-g16")
    before = measured(mixture, rounded, Plan.of(rounded))
    both = measured(mixture, {MLP: QUARTER} | rounded, Plan.of(rounded))
    dropped = measured(mixture, {MLP: DROP}, Plan.of({MLP: HALF}))
    assert measured(mixture, rounded, Plan.of({MLP: HALF})) == measured(mixture, rounded, Plan.of(rounded)) == before
    assert measured(mixture, {MLP: QUARTER} | rounded, Plan.of({MLP: DROP})) == both != before
    assert measured(mixture, {MLP: DROP}) == dropped


def test_sizes_are_those_of_the_experts_that_stay_and_a_token_is_multiplied_with_as_many(
    mixture: tuple[Replica, str, str],
) -> None:
    components = mixture[0].manifest().components
    rounded = {c.name: "int4-g16" for c in components if c.block == MLP and c.kind == "down"}
    size = plan_size(Plan.of({MLP: QUARTER} | rounded), components, 32)
    of_expert = 2 * 16 * 32 + 32 * 16
    others = sum(c.num_weights for c in components if c.block != MLP)
    down = parse_scheme("int4-g16").stored_bits((32, 16), 32)
    assert size.stored_bits == 32 * others + 3 * (32 * 2 * 16 * 32 + down)
    assert (size.removed_weights, size.pruned_weights) == (of_expert, of_expert)
    assert (size.parameters, size.flops) == (1.0 - of_expert / size.num_weights, 1.0)
    # Of three experts a token reads two, as of four.
    read = sum(c.num_weights * c.read_share for c in components if c.block != MLP)
    assert size.active_bits == 32 * read + 2 * (32 * 2 * 16 * 32 + down)
    assert size.active_weights == read + 2 * of_expert
    whole = plan_size(Plan.of(rounded), components, 32)
    assert whole.active_bits == size.active_bits and whole.read_bits is not None
    assert plan_size(Plan.of({MLP: "experts-0.5-random"}), components, 32).removed_weights == 2 * of_expert


def by_plain_code(replica: Replica, block: str) -> tuple[Tensor, Tensor]:
    """Tokens of each expert over the calibration's text, and the sums of weight times norm, by Mixtral's equations."""
    module: Any = replica._bench.standing.body.model.get_submodule(block)
    texts = replica._calibrator.texts  # type: ignore[attr-defined]
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 32)))
    for batch in texts.gatherer(texts.in_use).batches:
        replica._bench.standing.body.model(input_ids=batch, use_cache=False)
    handle.remove()
    states = torch.cat(seen)
    probabilities = torch.softmax(states @ module.gate.weight.T, dim=-1)
    tokens, norms = torch.zeros(2, 4, dtype=torch.float64)
    for state, probability in zip(states, probabilities, strict=True):
        best = probability.topk(2)
        for weight, expert in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
            gate, up = (module.experts.gate_up_proj[expert] @ state).chunk(2)
            given = module.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            tokens[expert] += 1
            norms[expert] += float(weight * given.norm())
    return tokens, norms


@torch.inference_mode()
def test_experts_go_by_tokens_by_mean_or_by_summed_contribution(mixture: tuple[Replica, str, str]) -> None:
    replica, _, calibration = mixture
    replica._bench.become(Variant(Plan()))
    tokens, norms = by_plain_code(replica, MLP)
    wanted = {"frequency": tokens, "reap": norms / tokens, "routed": norms}
    for rule, worth in wanted.items():
        scheme = parse_scheme(f"experts-0.5-{rule}")
        replica.solve(calibration, [(MLP, scheme.name)])
        kept = replica._weights.compressor.cut(MLP, scheme, 4, torch.device("cpu")).kept
        assert kept.tolist() == worth.argsort()[2:].sort().values.tolist(), rule
    solver = replica._calibrator.widths  # type: ignore[attr-defined]
    assert solver._routed[MLP].tokens.tolist() == tokens.tolist()
    assert solver._routed[MLP].norms.tolist() == pytest.approx(norms.tolist(), rel=1e-4)
    texts = replica._calibrator.texts  # type: ignore[attr-defined]
    counted = routed_tokens(replica._bench.standing.body, texts.gatherer(texts.in_use).batches)
    assert [counted[f"{MLP}.experts.{expert}.down_proj"] for expert in range(4)] == tokens.tolist()


@pytest.mark.parametrize("rule", ["magnitude", "reap", "routed"])
def test_a_rule_takes_the_expert_that_says_nothing(tmp_path: Path, rule: str) -> None:
    replica, _, calibration = calibrated_in_32(tmp_path)
    experts: Any = replica._bench.standing.body.model.get_submodule(f"{MLP}.experts")
    experts.down_proj.data[2] = 0.0
    experts.gate_up_proj.data[2] *= 0.01
    scheme = parse_scheme(f"experts-0.25-{rule}")
    logits(replica, Plan.of({MLP: scheme.name}), calibration)
    assert replica._weights.compressor.cut(MLP, scheme, 4, torch.device("cpu")).kept.tolist() == [0, 1, 3]


def calibrated_in_32(folder: Path, config: Any = None) -> tuple[Replica, str, str]:
    spec = ModelSpec(str(write_model(folder, config or mixtral())), dtype="float32")
    model = Replica(spec, ReplicaSettings(num_threads=1))
    reference = with_reference(model)
    calibration = model.cut_calibration([TEXT], 8, 32, 0)
    model.use_calibration(calibration)
    return model, reference.id, calibration.id


@pytest.mark.parametrize(
    ("number", "scheme", "left"),
    [(4, QUARTER, 3), (64, QUARTER, 48), (60, "experts-0.1-random", 54), (5, "experts-0.01-random", 5),
     (4, "experts-0.9-random", 1)],
)  # fmt: skip
def test_the_nearest_number_of_experts_is_left(number: int, scheme: str, left: int) -> None:
    width = width_of(scheme)
    assert width is not None and width.left(number) == left


@pytest.mark.parametrize("name", ["experts-0.25", "experts-0.25-wanda", "experts-0.25-reap-repair", "experts-1:2-reap"])
def test_a_width_of_experts_has_one_name(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown scheme .* the nearest is 'experts-0\."):
        parse_scheme(name)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("experts-0.75-random", f"experts of {MLP.replace('1', '0')}: 1 would be left, and a token is given to 2"),
        ("experts-0.05-random", "all of its 4 would stay"),
        ("channels-0.25-wanda", "cuts nothing of any mlp"),
    ],
)
def test_a_share_that_cannot_be_is_refused_by_name(
    mixture: tuple[Replica, str, str], scheme: str, message: str
) -> None:
    manifest = mixture[0].manifest()
    with pytest.raises(UserError, match=f"{scheme} .*{message}"):
        manifest.cuttable([scheme], manifest.components)


def test_experts_are_not_taken_of_what_is_not_searched_whole(mixture: tuple[Replica, str, str]) -> None:
    manifest = mixture[0].manifest()
    part = [c for c in manifest.components if c.name != "model.layers.0.mlp.experts.3.down_proj"]
    found = manifest.cuttable([QUARTER], part)
    assert [block.name for block in found] == [MLP, "model.layers.2.mlp"]
    routers = manifest.select(("*", "*.gate"))
    with pytest.raises(UserError, match=r"its router model\.layers\.0\.mlp\.gate is searched"):
        manifest.cuttable([QUARTER], routers)
    with pytest.raises(UserError, match=r"no MLP of .* that is searched is a mixture"):
        replace(manifest, components=tuple(c for c in part if not c.mixture)).cuttable([QUARTER], part)


def test_a_router_that_chooses_groups_first_is_refused(tmp_path: Path) -> None:
    """Without one of eight experts the groups of two would be others."""
    config = DeepseekV3Config(
        vocab_size=258, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, n_routed_experts=8, n_group=4,
        topk_group=2, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    replica, _, calibration = calibrated_in_32(tmp_path, config)
    for scheme in ("experts-0.25-random", "experts-0.5-random"):
        with pytest.raises(UserError, match=f"{MLP} cannot be cut by {scheme}: DeepseekV3MoE"):
            replica.solve(calibration, [(MLP, scheme)])


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("deepseek_v4", r"chooses experts by a table of its own"),
        ("dbrx", r"is not told by its arguments which experts a token is given to\. Take the rule magnitude or random"),
    ],
)
def test_families_that_choose_in_a_way_of_their_own_are_refused(tmp_path: Path, family: str, message: str) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    replica = Replica(ModelSpec(str(tmp_path), dtype="float32", attention="eager"), ReplicaSettings(num_threads=1))
    calibration = replica.cut_calibration([TEXT], 8, 32, 0)
    replica.use_calibration(calibration)
    manifest = replica.manifest()
    block = manifest.cuttable([QUARTER], manifest.components)[0].name
    with pytest.raises(UserError, match=f"{block} cannot be cut.*{message}"):
        replica.solve(calibration.id, [(block, QUARTER)])


def test_experts_with_schemes_of_their_own_are_refused_where_some_go(mixture: tuple[Replica, str, str]) -> None:
    manifest = mixture[0].manifest()
    schemes = {MLP: QUARTER, f"{MLP}.experts.1.down_proj": "int4-g16"}
    with pytest.raises(UserError, match="give all of its experts one"):
        plan_from_json(plan_to_json(Plan.of(schemes), manifest), manifest, "plan.json")
    section = "{strategy: auto, experts: expert, schemes: [int4-g16], cut: [experts-0.5-reap], stop: {size_mb: 1}}"
    with pytest.raises(UserError, match=r"set search\.experts: layer"):
        parse(f"run: a\nmodel: {{path: m}}\nprompts: {{files: [a.txt]}}\nsearch: {section}", "search.yaml", Path())


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ({MLP: QUARTER, f"{MLP}.gate": "int4-g16"}, "gives the router .*gate a scheme, int4-g16, and takes experts"),
        ({MLP: "experts-0.75-random"}, "1 of 4 experts would be left, and a token is given to 2"),
        ({MLP: "experts-0.05-random"}, "all 4 experts would stay"),
    ],
)
def test_a_plan_file_that_takes_experts_as_no_search_may_is_refused(
    mixture: tuple[Replica, str, str], schemes: dict[str, str], message: str
) -> None:
    manifest = mixture[0].manifest()
    with pytest.raises(UserError, match=message):
        plan_from_json(plan_to_json(Plan.of(schemes), manifest), manifest, "plan.json")


@pytest.mark.parametrize(
    ("name", "near"), [("expert-0.25-reap", "experts-0.25-reap"), ("channel-0.25-wanda", "channels-0.25-wanda")]
)
def test_a_kind_of_width_that_is_misspelled_is_near_to_that_kind(name: str, near: str) -> None:
    with pytest.raises(UserError, match=near):
        parse_scheme(name)


def space(
    mixture: tuple[Replica, str, str], budget: Budget, schemes: tuple[str, ...] = (), cuts: tuple[str, ...] = ()
) -> SearchSpace:
    manifest = mixture[0].manifest()
    cuts = cuts or (QUARTER, HALF)
    cut = manifest.cuttable(cuts, manifest.components)
    return SearchSpace(
        manifest.components, schemes, dense_bits=32, budget=budget, manifest=manifest, cut=cut, cuts=cuts
    )


@pytest.mark.parametrize("budget", [Budget(bits_per_weight=14.0), Budget(active_bits_per_weight=20.0)])
def test_the_solver_is_exact_over_experts_and_schemes_of_those_that_stay(
    mixture: tuple[Replica, str, str], budget: Budget
) -> None:
    manifest = mixture[0].manifest()
    held = tuple(c for c in manifest.components if c.block in (MLP, "model.layers.2.mlp"))
    part = replace(manifest, components=held)
    cuts = (QUARTER, HALF)
    within = SearchSpace(
        *(held, ("int4-g16", "int8-channel")), dense_bits=32, budget=budget, manifest=part,
        cut=part.cuttable(cuts, held), cuts=cuts,
    )  # fmt: skip
    choices, random = Choices(within), np.random.default_rng(0)
    losses = [np.concatenate([[0.0], np.sort(random.random(len(s) - 1))]) for s in choices.schemes]
    best = np.inf
    (rule,) = choices.rules
    for options in itertools.product(*(range(len(loss)) for loss in losses)):
        size = within.size(choices.plan(options))
        counted = size.stored_bits if budget.stores_less else size.active_bits * choices._parts
        assert choices.cost(rule.costs, options) == counted
        if within.budget.reached(size):
            best = min(best, sum(loss[k] for loss, k in zip(losses, options, strict=True)))
    assert choices.solve(losses).loss == pytest.approx(best)


def harm(plan: Plan) -> float:
    shares = {QUARTER: 0.25, HALF: 0.5}
    return sum((1 + int(name.split(".")[2])) * shares[scheme] ** 2 for name, scheme in plan.entries)


def answered(request: EvalRequest) -> EvalResult:
    count = request.prompts[1] - request.prompts[0]
    loss, none = np.full(count, harm(request.plan), np.float32), np.zeros(count, np.int32)
    return EvalResult(request.id, none, none, np.exp(loss), kl=loss, ppl=np.exp(loss))


@pytest.mark.parametrize("name", ["floating", "greedy", "auto", "knapsack"])
def test_a_search_takes_of_each_layer_a_number_of_its_own(mixture: tuple[Replica, str, str], name: str) -> None:
    within = space(mixture, Budget(parameters=0.8))

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, "r", (0, 32), ("kl",), parent, "c")

    strategy = make_strategy(name, within, request_for, "kl", solver=SolverSettings(errors={}))
    found = run_search(strategy, FakeEvaluator(answered))
    assert found is not None and within.budget.reached(within.size(found))
    rival = shape_rivals(within, found)[ONE_WIDTH]
    assert len({scheme for _, scheme in rival.entries}) == 1 and len(rival) == 3
    assert within.size(rival).removed_weights >= within.size(found).removed_weights
    assert harm(found) == pytest.approx(0.25 + 2 * 0.0625 + 3 * 0.0625)  # four of twelve, of the first layer two


def test_several_numbers_of_experts_are_rounded_to_one(mixture: tuple[Replica, str, str]) -> None:
    within = space(mixture, Budget(parameters=0.8))
    plan = Plan.of({MLP: HALF, "model.layers.0.mlp": QUARTER})
    assert widths_left(plan, within.components) == {"experts": {0: (3, 4), 1: (2, 4), 2: (4, 4)}}
    found = evened(within, plan)
    assert found is not None and is_even(found, within.components)
    assert within.size(found).removed_weights == within.size(plan).removed_weights
    said = [size_sentence(each, within.components, 32, 32) for each in (found, plan)]
    assert "compressed-tensors (vllm" in said[0] and "vllm" not in said[1]


def test_flops_are_not_less_of_fewer_experts(mixture: tuple[Replica, str, str]) -> None:
    with pytest.raises(UserError, match=r"stop\.flops: 0\.9 is out of reach .* come to is 1\.0"):
        space(mixture, Budget(flops=0.9))


EVEN = {f"model.layers.{layer}.mlp": QUARTER for layer in range(3)}
UNEVEN = {MLP: HALF, "model.layers.2.mlp": QUARTER}


def model_of(folder: Path, family: str) -> Path:
    """Of a family whose files hold each expert, or all in one tensor, or whose files name router, stacks or biases
    otherwise."""
    if family == "mixtral":
        return write_model(folder, mixtral())
    tiny_model(family).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "number"),
    [("mixtral", "num_local_experts"), ("qwen2_moe", "num_experts"), ("deepseek_v3", "n_routed_experts"),
     ("gpt_oss", "num_local_experts"), ("qwen3_5_moe_text", "num_experts"), ("granitemoe", "num_local_experts"),
     ("ernie4_5_moe", "moe_num_experts")],
)  # fmt: skip
def test_as_many_experts_in_all_layers_are_said_by_an_ordinary_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, number: str
) -> None:
    in_process(monkeypatch)
    folder = model_of(tmp_path / "model", family)
    described = Replica(ModelSpec(str(folder), dtype="float32", attention="eager"), ReplicaSettings(num_threads=1))
    manifest = described.manifest()
    plan = {
        block.name: "experts-0.25-random" for block in manifest.cuttable(["experts-0.25-random"], manifest.components)
    }
    plan |= {c.name: "int4-g16" for c in manifest.components if c.mixture and c.kind == "down"}
    made = measured_plan(folder, tmp_path / "store", plan, attention="eager").export("dense", tmp_path / "out")
    assert made.check is not None and made.check.equal
    assert json.loads((tmp_path / "out" / "config.json").read_text())[number] == 3
    assert not (tmp_path / "out" / CODE_FILE).exists()


def test_several_numbers_of_experts_bring_the_code_that_builds_them_and_load_in_a_fresh_process(
    tmp_path: Path,
) -> None:
    folder = model_of(tmp_path / "model", "mixtral")
    made = measured_plan(folder, tmp_path / "store", UNEVEN | {"model.layers.0": DROP}).export(
        "dense", tmp_path / "out"
    )
    assert made.check is not None and made.check.equal
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert [len(layer.mlp.gate.weight) for layer in model.model.layers] == [2, 3]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["fewer_experts"]["model.layers.0.mlp"]["tensors"]["gate.weight"] == [2, 32]


def test_a_search_ends_in_an_export_and_training_of_its_plan_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    search = {"strategy": "floating", "rank_by": "kl", "cut": ["experts-0.25-reap"], "stop": {"parameters": 0.88}}
    file, store = tiny_search(tmp_path, search=search, prompts__count=16), tmp_path / "store"
    write_model(tmp_path / "model", mixtral())
    run_here(file, store)
    made = export("tiny", "dense", tmp_path / "out", str(store))
    assert made.check is not None and made.check.equal
    assert made.plan.widths and made.size.parameters <= 0.88
    before, after = (
        sum(tensor.numel() for tensor in load_file(tmp_path / part / "model.safetensors").values())
        for part in ("model", "out")
    )
    assert before - after == made.size.removed_weights + 32 * len(made.plan.widths)  # and a row of each router
    with pytest.raises(UserError, match=r"has fewer experts in the plan: training holds at zero"):
        recover("tiny", str(store), ["files=[train.txt]", "masked_steps=3", "unmasked_steps=0"], evaluator=here)


def test_experts_that_stay_are_in_the_files_as_they_were_by_another_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    folder = model_of(tmp_path / "model", "mixtral")
    stored = measured_plan(folder, tmp_path / "store", EVEN)
    stored.export("dense", tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert sum(".experts." in name for name in after) == 3 * 3 * 3
    for layer in range(3):
        router = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        kept = [int(torch.where((before[router] == row).all(1))[0]) for row in after[router]]
        assert kept == sorted(kept) and len(kept) == 3
        for now, then in enumerate(kept):
            for part in ("w1", "w2", "w3"):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{{}}.{part}.weight"
                assert torch.equal(after[name.format(now)], before[name.format(then)])
