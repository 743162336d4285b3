"""MLPs of fewer channels and attentions of fewer heads: what is measured, how large it is, and which plans a search
comes to."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeEvaluator, run_search
from tiny import TEXT, llama_config, values, with_reference, write_model
from torch import Tensor
from transformers import GPT2Config, Olmo2Config, OPTConfig, PretrainedConfig

from dtmsearch.config import parse
from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, ReplicaSettings
from dtmsearch.core.holders import size_sentence
from dtmsearch.core.plan import Budget, Plan, cut_by, plan_size
from dtmsearch.core.plan_file import plan_from_json, plan_to_json
from dtmsearch.core.plan_widths import EVENED, ONE_WIDTH, is_even, widths_left
from dtmsearch.core.schemes import DENSE, DROP, parse_scheme
from dtmsearch.core.times import Times
from dtmsearch.core.variant import Variant
from dtmsearch.core.widths import width_of
from dtmsearch.errors import UserError
from dtmsearch.model.compress.width import first_by_inverse, leverages, refitted
from dtmsearch.model.replica.replica import Replica
from dtmsearch.search.baselines import evened, shape_rivals
from dtmsearch.search.solver.choices import Choices
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.strategy_registry import make_strategy
from dtmsearch.store.codecs.plans import PlanRows
from dtmsearch.workflows.validate import validation_plans

MLP, ATTENTION = "model.layers.1.mlp", "model.layers.1.self_attn"
QUARTER, HALF = "channels-0.25-wanda", "channels-0.5-wanda"
ONE_HEAD = "heads-1:2-wanda"


def calibrated(folder: Path, config: PretrainedConfig | None = None) -> tuple[Replica, str, str]:
    """A replica in float64 with a reference and a calibration."""
    spec = ModelSpec(str(write_model(folder, config)), dtype="float64")
    model = Replica(spec, ReplicaSettings(num_threads=1))
    reference = with_reference(model)
    calibration = model.cut_calibration([TEXT], 8, 32, 0)
    model.use_calibration(calibration)
    return model, reference.id, calibration.id


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Replica, str, str]:
    return calibrated(tmp_path_factory.mktemp("model"))


def measured(model: tuple[Replica, str, str], schemes: dict[str, str], parent: Plan = Plan()) -> list[list[float]]:
    replica, reference, calibration = model
    request = EvalRequest(Plan.of(schemes), reference, (0, 6), ("kl", "ppl"), parent, calibration)
    return values(replica.evaluate([request])[0])


def logits(replica: Replica, plan: Plan, calibration: str = "", change: Callable[[], None] | None = None) -> Tensor:
    """What the model predicts under a plan, with a change made to its modules; the model is unquantized after it."""
    body = replica._bench.standing.body
    with torch.inference_mode():
        replica._bench.become(Variant(plan, "", calibration))
        if change is not None:
            change()
        found: Tensor = body.model(torch.arange(3, 40).unsqueeze(0)).logits.clone()
        replica._bench.become(Variant(Plan()))
    return found


OPT = OPTConfig(vocab_size=258, max_position_embeddings=128, hidden_size=32, ffn_dim=48, num_hidden_layers=3,
                num_attention_heads=4, word_embed_proj_dim=32, init_std=0.2, do_layer_norm_before=True)  # fmt: skip
OLMO2 = Olmo2Config(vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2)  # fmt: skip
GPT2 = GPT2Config(vocab_size=258, n_positions=128, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2)


@pytest.mark.parametrize(
    ("config", "block", "scheme"),
    [
        (llama_config(), MLP, QUARTER),
        (llama_config(), ATTENTION, ONE_HEAD),
        (llama_config(mlp_bias=True, attention_bias=True), MLP, QUARTER),
        (llama_config(mlp_bias=True, attention_bias=True), ATTENTION, ONE_HEAD),
        (GPT2, "transformer.h.1.mlp", QUARTER),
    ],
    ids=["channels", "heads", "channels with biases", "heads with biases", "transposed, with biases"],
)
def test_a_cut_block_is_the_block_with_what_goes_at_zero(
    tmp_path: Path, config: PretrainedConfig, block: str, scheme: str
) -> None:
    replica, _, calibration = calibrated(tmp_path, config)
    model = replica._bench.standing.body.model
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.linspace(-1, 1, len(parameter), dtype=parameter.dtype)
    manifest = replica.manifest()
    last = [c for c in manifest.components if c.block == block][-1]
    cut = logits(replica, Plan.of({block: scheme}), calibration)
    width = parse_scheme(scheme).width
    assert width is not None
    units = width.units(last)
    stays = replica._weights.compressor.cut(block, parse_scheme(scheme), units, torch.device("cpu")).kept
    assert len(stays) == width.left(units) < units
    gone = sorted(set(range(units)) - set(stays.tolist()))
    each = last.shape[1] // units
    columns = (torch.tensor(gone)[:, None] * each + torch.arange(each)).reshape(-1)
    weight = model.get_submodule(last.name).weight
    before = weight.data.clone()
    whole = logits(replica, Plan())
    weight.data[(columns,) if last.transposed else (slice(None), columns)] = 0.0
    zeroed = logits(replica, Plan())
    weight.data = before
    # A product of fewer columns adds in another order: alike to the last bits of 64, and in 32 bits the same.
    assert torch.equal(cut.float(), zeroed.float())
    assert not torch.equal(cut.float(), whole.float())
    assert torch.equal(logits(replica, Plan()), whole)


@pytest.mark.parametrize(
    ("config", "block", "scheme"),
    [
        (llama_config(), ATTENTION, "heads-2:4-magnitude"),
        (llama_config(), ATTENTION, "heads-3:4-magnitude"),
        (OPT, "model.decoder.layers.1.self_attn", "heads-1:2-magnitude"),
        (OPT, "model.decoder.layers.1.self_attn", "heads-3:4-magnitude"),
        (OLMO2, ATTENTION, "heads-1:2-magnitude"),
    ],
    ids=["halves of heads", "parts of heads", "opt, halves", "opt", "norms over all heads"],
)
def test_heads_that_a_family_takes_apart_in_its_own_way_are_not_cut(
    tmp_path: Path, config: PretrainedConfig, block: str, scheme: str
) -> None:
    replica, _, calibration = calibrated(tmp_path, config)
    with pytest.raises(UserError, match=f"{block} cannot be cut by {scheme}"):
        replica.solve(calibration, [(block, scheme)])


def test_a_cut_block_has_smaller_matrices(llama: tuple[Replica, str, str]) -> None:
    shapes: list[tuple[int, ...]] = []

    def note() -> None:
        inside = llama[0]._bench.standing.body.model.get_submodule(MLP)
        shapes.extend(tuple(module.weight.shape) for module in (inside.gate_proj, inside.up_proj, inside.down_proj))

    logits(llama[0], Plan.of({MLP: QUARTER}), llama[2], note)
    assert shapes == [(36, 32), (36, 32), (32, 36)]


def test_what_stays_of_a_cut_block_is_rounded_as_it_is(llama: tuple[Replica, str, str]) -> None:
    replica, _, calibration = llama
    made: list[Tensor] = []
    for schemes in ({MLP: QUARTER}, {MLP: QUARTER, f"{MLP}.down_proj": "int4-g16"}):
        module = replica._bench.standing.body.model.get_submodule(f"{MLP}.down_proj")
        logits(replica, Plan.of(schemes), calibration, lambda module=module: made.append(module.weight.clone()))  # type: ignore[misc]
    own = parse_scheme("int4-g16")
    assert torch.equal(replica._weights.compressor.compress("other", made[0], own), made[1])


def test_a_model_is_what_it_was_after_blocks_were_cut(llama: tuple[Replica, str, str]) -> None:
    rounded = {f"{ATTENTION}.q_proj": "int4-g16", f"{MLP}.up_proj": "int4-g16"}
    before = measured(llama, rounded, Plan.of(rounded))
    both = measured(llama, {MLP: QUARTER} | rounded, Plan.of(rounded))
    dropped = measured(llama, {MLP: DROP}, Plan.of({MLP: HALF}))
    assert measured(llama, rounded, Plan.of({MLP: HALF})) == measured(llama, rounded, Plan.of(rounded)) == before
    assert measured(llama, {MLP: QUARTER} | rounded, Plan.of({MLP: DROP})) == both != before
    assert measured(llama, {MLP: DROP}) == dropped


def test_sizes_of_cut_blocks_are_those_of_what_stays(llama: tuple[Replica, str, str]) -> None:
    manifest = llama[0].manifest()
    plan = Plan.of({MLP: QUARTER, f"{MLP}.down_proj": "int4-g16", ATTENTION: ONE_HEAD})
    size = plan_size(plan, manifest.components, 32)
    shapes = {"gate": (36, 32), "up": (36, 32), "q": (16, 32), "k": (8, 32), "v": (8, 32), "o": (32, 16)}
    dense = 32 * sum(rows * cols for rows, cols in shapes.values())
    others = sum(32 * c.num_weights for c in manifest.components if c.layer != 1)
    assert size.stored_bits == others + dense + parse_scheme("int4-g16").stored_bits((32, 36), 32)
    gone = 3 * 12 * 32 + (16 * 32 * 2 + 8 * 32 * 2)
    assert (size.removed_weights, size.pruned_weights, size.num_compressed) == (gone, gone, 7)
    assert (size.parameters, size.flops) == (1.0 - gone / size.num_weights,) * 2
    (found,) = PlanRows(manifest, manifest.components).figures([plan])
    assert (found.bits_per_weight, found.num_compressed) == (size.bits_per_weight, 7)


@pytest.mark.parametrize(("units", "left"), [(1536, 1152), (1024, 768), (172, 128), (48, 36), (5, 4), (1, 1)])
def test_many_channels_are_left_in_steps_that_kernels_like(units: int, left: int) -> None:
    width = width_of("channels-0.25-wanda")
    assert width is not None and width.left(units) == left


@pytest.mark.parametrize("name", ["channels-0.25", "channels-0-wanda", "channels-0.250-wanda", "heads-2:2-wanda"])
def test_a_width_has_one_name(name: str) -> None:
    with pytest.raises(UserError, match="unknown scheme"):
        parse_scheme(name)


def test_repair_is_the_least_squares_fit() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(200, 3) @ torch.randn(3, 8) + 0.3 * torch.randn(200, 8)
    last, columns = torch.randn(4, 8), torch.tensor([0, 2, 3, 6, 7])
    found = refitted(last, inputs.T @ inputs / 200, columns)
    wanted = torch.linalg.lstsq(inputs[:, columns], inputs @ last.T).solution.T
    assert torch.allclose(found, wanted, atol=0.02)


def test_repair_of_what_was_zero_changes_nothing() -> None:
    torch.manual_seed(0)
    inputs, last, columns = torch.randn(50, 6), torch.randn(4, 6), torch.tensor([0, 2, 5])
    last[:, [1, 3, 4]] = 0.0
    assert torch.allclose(refitted(last, inputs.T @ inputs / 50, columns), last[:, columns], atol=1e-6)


def test_ziplm_takes_first_what_others_make_up_for() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(200, 4)
    inputs = torch.cat([inputs, inputs[:, :1] + 1e-3 * torch.randn(200, 1)], dim=1)  # the last is the first again
    last = torch.ones(3, 5)
    order = first_by_inverse(last, inputs.T @ inputs / 200, 5)
    assert order[0] in (0, 4) and sorted(order.tolist()) == [0, 1, 2, 3, 4]


def test_spectral_keeps_what_alone_spans_a_direction() -> None:
    """Of rows of one length the one that stands alone has all of its direction's spectrum, two alike ones half each;
    what is lost agrees with the fall of the logarithms of the squared singular values."""
    up = Component(f"{MLP}.up_proj", 1, "up", (4, 3))
    rows = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.01, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = leverages([(up, rows)], 4)
    assert found.argsort().tolist()[:2] == [1, 0] or found.argsort().tolist()[:2] == [0, 1]
    assert found[2:].tolist() == pytest.approx([1.0, 1.0], abs=0.01)
    small = torch.cat([torch.randn(200, 3), 0.05 * torch.randn(1, 3)])
    whole, without = (torch.linalg.slogdet(each.double().T @ each.double())[1] for each in (small, small[:-1]))
    own = leverages([(replace(up, shape=(201, 3)), small)], 201)[-1]
    assert float(own) == pytest.approx(float(whole - without), rel=0.01)


@pytest.mark.parametrize("rule", ["magnitude", "spectral", "wanda", "gradient", "ziplm", "random"])
def test_a_rule_takes_the_channel_that_says_nothing(tmp_path: Path, rule: str) -> None:
    replica, _, calibration = calibrated(tmp_path)
    down = replica._bench.standing.body.model.get_submodule(f"{MLP}.down_proj")
    down.weight.data[:, 7] = 0.0
    scheme = parse_scheme(f"channels-0.05-{rule}")
    logits(replica, Plan.of({MLP: scheme.name}), calibration)
    kept = replica._weights.compressor.cut(MLP, scheme, 48, torch.device("cpu")).kept
    assert set(range(48)) - set(kept.tolist()) >= {7}


def space(
    llama: tuple[Replica, str, str], cuts: tuple[str, ...], budget: Budget, schemes: tuple[str, ...] = ()
) -> SearchSpace:
    manifest = llama[0].manifest()
    cut = manifest.cuttable(cuts, manifest.components)
    blocks = manifest.droppable(["mlp"], manifest.components)
    return SearchSpace(
        manifest.components, schemes, dense_bits=32, budget=budget, manifest=manifest, cut=cut, cuts=cuts, blocks=blocks
    )


def test_a_block_that_is_cut_may_be_cut_further(llama: tuple[Replica, str, str]) -> None:
    found = space(llama, (QUARTER, HALF, ONE_HEAD), Budget(parameters=0.5))
    legal = [edge.scheme for edge in found.perturbations(Plan.of({MLP: QUARTER})) if edge.component == MLP]
    assert legal == [HALF, DROP]
    heads = [edge.scheme for edge in found.perturbations(Plan()) if edge.component == ATTENTION]
    assert heads == [ONE_HEAD]


def test_the_solver_is_exact_over_widths_and_schemes_of_what_stays(llama: tuple[Replica, str, str]) -> None:
    manifest = llama[0].manifest()
    held = tuple(c for c in manifest.components if c.block in (MLP, "model.layers.2.mlp"))
    part = replace(manifest, components=held)
    cuts = (QUARTER, HALF)
    within = SearchSpace(
        *(held, ("int4-g16",)), dense_bits=32, budget=Budget(bits_per_weight=9.0), manifest=part,
        cut=part.cuttable(cuts, held), cuts=cuts, blocks=part.droppable(["mlp"], held),
    )  # fmt: skip
    choices, random = Choices(within), np.random.default_rng(0)
    losses = [np.concatenate([[0.0], np.sort(random.random(len(s) - 1))]) for s in choices.schemes]
    best = np.inf
    for options in itertools.product(*(range(len(loss)) for loss in losses)):
        if choices.canonical(options) == options:
            size = within.size(choices.plan(options))
            assert choices.cost(choices.bits, options) == size.stored_bits
            if within.budget.reached(size):
                best = min(best, sum(loss[k] for loss, k in zip(losses, options, strict=True)))
    assert choices.solve(losses).loss == pytest.approx(best)


def timed(shapes: set[tuple[int, int]], schemes: tuple[str, ...]) -> Times:
    """A picosecond for each output and two for each input, of unquantized ones twice as much."""
    return Times({(s, r, c): ((r + 2 * c) * (1 + (s == DENSE)), 9) for s in (DENSE, *schemes) for r, c in shapes}, 8)


def test_the_solver_keeps_to_milliseconds_of_what_stays(llama: tuple[Replica, str, str]) -> None:
    manifest, cuts, schemes = llama[0].manifest(), (QUARTER, HALF), ("int8-channel",)
    held = tuple(c for c in manifest.components if c.block in (MLP, "model.layers.2.mlp"))
    part = replace(manifest, components=held)
    cut = part.cuttable(cuts, held)
    shapes = {c.shape for c in held} | {cut_by(Plan.of({c.block: w}), c).shape for c in held for w in cuts}
    taken = plan_size(Plan(), held, 32, timed(shapes, schemes)).decode_ms
    assert taken is not None
    within = SearchSpace(
        *(held, schemes), dense_bits=32, budget=Budget(decode_ms=0.4 * taken), manifest=part, cut=cut, cuts=cuts,
        times=timed(shapes, schemes),
    )  # fmt: skip
    choices, random = Choices(within), np.random.default_rng(0)
    losses = [np.concatenate([[0.0], np.sort(random.random(len(s) - 1))]) for s in choices.schemes]
    (rule,), best = choices.rules, np.inf
    for options in itertools.product(*(range(len(loss)) for loss in losses)):
        size = within.size(choices.plan(options))
        assert size.picoseconds is not None and choices.cost(rule.costs, options) == size.picoseconds[0]
        if within.budget.reached(size):
            best = min(best, sum(loss[k] for loss, k in zip(losses, options, strict=True)))
    assert choices.solve(losses).loss == pytest.approx(best)


def test_widths_are_rounded_to_what_takes_no_longer(llama: tuple[Replica, str, str]) -> None:
    """The table has rows for a quarter and a half of the channels, and of these alone times are known."""
    manifest, cuts = llama[0].manifest(), (QUARTER, HALF)
    shapes = {c.shape for c in manifest.components}
    shapes |= {cut_by(Plan.of({c.block: w}), c).shape for c in manifest.components for w in cuts if ".mlp." in c.name}
    cut = manifest.cuttable(cuts, manifest.components)
    within = SearchSpace(manifest.components, (), budget=Budget(decode_ms=1.0), manifest=manifest, cut=cut, cuts=cuts,
                         times=timed(shapes, ()))  # fmt: skip
    found = evened(within, Plan.of({MLP: HALF, "model.layers.0.mlp": QUARTER}))
    assert found is not None
    assert widths_left(found, manifest.components)["channels"] == dict.fromkeys(range(3), (36, 48))


def test_a_table_without_the_shapes_of_cut_blocks_is_refused(llama: tuple[Replica, str, str]) -> None:
    manifest = llama[0].manifest()
    whole = timed({c.shape for c in manifest.components}, ())
    cut = manifest.cuttable((QUARTER,), manifest.components)
    with pytest.raises(UserError, match=r"no row for dense of 32 x 36, dense of 36 x 32: .*of widths with --cut"):
        SearchSpace(manifest.components, (), budget=Budget(decode_ms=1.0), manifest=manifest, cut=cut, cuts=(QUARTER,),
                    times=whole)  # fmt: skip


def test_what_is_known_of_inputs_follows_the_columns_that_stay(tmp_path: Path) -> None:
    replica, _, calibration = calibrated(tmp_path)
    compressor = replica._weights.compressor
    logits(replica, Plan.of({MLP: QUARTER}), calibration)
    own = compressor.mean_squares(f"{MLP}.down_proj")
    for columns in (torch.arange(0, 36), torch.arange(12, 48)):  # of other weights others stay
        name = compressor.as_cut(f"{MLP}.down_proj", QUARTER, columns)
        assert torch.equal(compressor.mean_squares(name), own[columns])


def test_a_width_of_a_matrix_is_refused_as_one_for_blocks(llama: tuple[Replica, str, str]) -> None:
    manifest = llama[0].manifest()
    text = plan_to_json(Plan.of({MLP: QUARTER}), manifest).replace(MLP, f"{MLP}.down_proj")
    with pytest.raises(UserError, match="a width: these are for whole blocks"):
        plan_from_json(text, manifest, "plan.json")


@pytest.mark.parametrize("scheme", ["gptq-int4-channel", "awq-int4-channel", "smooth-w8a8-channel"])
def test_a_plan_file_with_what_takes_whole_matrices_in_a_cut_block_is_refused(
    llama: tuple[Replica, str, str], scheme: str
) -> None:
    manifest = llama[0].manifest()
    text = plan_to_json(Plan.of({MLP: QUARTER, f"{MLP}.down_proj": scheme}), manifest)
    with pytest.raises(UserError, match="solved or scaled for whole matrices, and cuts"):
        plan_from_json(text, manifest, "plan.json")


def test_a_width_that_cuts_nothing_is_refused(llama: tuple[Replica, str, str]) -> None:
    with pytest.raises(UserError, match=r"search\.cut: channels-0\.01-wanda cuts nothing of any mlp"):
        space(llama, ("channels-0.01-wanda",), Budget(parameters=0.9))


@pytest.mark.parametrize(
    ("name", "near"), [("channels-0.25-wand", "channels-0.25-wanda"), ("heads-2:3-wnda", "heads-2:3-wanda")]
)
def test_a_name_that_begins_as_a_width_is_taken_for_one(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"the nearest is '{near}'"):
        parse_scheme(name)


def harm(plan: Plan) -> float:
    """Losses that grow with the square of what is cut, in some layers more than in others."""
    shares = {QUARTER: 0.25, HALF: 0.5, DROP: 1.0}
    return sum((1 + int(name.split(".")[2])) * shares[scheme] ** 2 for name, scheme in plan.entries)


def answered(request: EvalRequest) -> EvalResult:
    count = request.prompts[1] - request.prompts[0]
    loss, none = np.full(count, harm(request.plan), np.float32), np.zeros(count, np.int32)
    return EvalResult(request.id, none, none, np.exp(loss), kl=loss, ppl=np.exp(loss))


def test_floating_goes_on_where_two_widths_leave_as_much(llama: tuple[Replica, str, str]) -> None:
    within = space(llama, (QUARTER, "channels-0.25-magnitude", HALF), Budget(parameters=0.6))

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, "r", (0, 32), ("kl",), parent, "c")

    found = run_search(make_strategy("floating", within, request_for, "kl"), FakeEvaluator(answered))
    assert found is not None and within.budget.reached(within.size(found))


def test_several_widths_are_rounded_to_one_by_which_as_much_goes(llama: tuple[Replica, str, str]) -> None:
    """Of 3 x 48 channels 12 + 24 are gone; of heads one group of one layer. What is dropped stays so."""
    within = space(llama, (QUARTER, HALF, ONE_HEAD), Budget(parameters=0.6), ("int8-channel",))
    first, last, kept = "model.layers.0.mlp", "model.layers.2.mlp", {f"{MLP}.up_proj": "int8-channel"}
    found = evened(within, Plan.of({first: QUARTER, MLP: HALF, ATTENTION: ONE_HEAD} | kept))
    assert found is not None
    widths, heads = ({found.scheme_of(f"model.layers.{at}.{part}") for at in range(3)} for part in ("mlp", "self_attn"))
    assert (widths, heads) == ({"channels-0.23-wanda"}, {ONE_HEAD}) and is_even(found, within.components)
    assert found.scheme_of(f"{MLP}.up_proj") == "int8-channel"
    without = evened(within, Plan.of({first: QUARTER, MLP: HALF, "model.layers.2": DROP}))
    assert (
        without is not None and without.scheme_of(last) == DROP and without.scheme_of(first) == without.scheme_of(MLP)
    )
    assert evened(within, Plan.of({first: QUARTER, MLP: HALF, last: DROP})) is None  # no configuration says it
    assert evened(within, found) is None and evened(within, Plan()) is None
    labels = validation_plans(within, Plan.of({first: QUARTER}))
    assert is_even(labels[EVENED], within.components) and EVENED not in validation_plans(within, found)


@pytest.mark.parametrize("name", ["floating", "greedy", "auto", "knapsack"])
def test_a_search_gives_each_layer_a_width_of_its_own(llama: tuple[Replica, str, str], name: str) -> None:
    from dtmsearch.search.strategies.strategy_registry import SolverSettings

    within = space(llama, (QUARTER, HALF), Budget(parameters=0.85))

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, "r", (0, 32), ("kl",), parent, "c")

    strategy = make_strategy(name, within, request_for, "kl", solver=SolverSettings(errors={}))
    found = run_search(strategy, FakeEvaluator(answered))
    assert found is not None and within.budget.reached(within.size(found))
    rival = shape_rivals(within, found)[ONE_WIDTH]
    assert len({scheme for _, scheme in rival.entries}) == 1
    assert within.size(rival).removed_weights >= within.size(found).removed_weights
    assert harm(found) == pytest.approx(0.25 + 2 * 0.0625)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{strategy: auto, cut: [wanda-0.5], stop: {parameters: 0.8}}", "wanda-0.5 is no width"),
        ("{strategy: spdy, cut: [channels-0.5-wanda], stop: {parameters: 0.8}}", "spdy does not cut blocks"),
        ("{strategy: auto, schemes: [channels-0.5-wanda]}", "belongs into search.cut"),
        ("{strategy: auto, schemes: [gptq-int4-g128], cut: [channels-0.5-wanda]}", "is solved for whole matrices"),
        ("{strategy: auto, schemes: [nvfp4a16], cut: [channels-0.5-wanda]}", "shares a scale among whole matrices"),
        ("{strategy: floating, cut: [channels-0.5-wanda], stop: {blocks: 2}}", "counts what is dropped whole"),
    ],
)
def test_a_file_that_cuts_what_cannot_be_is_refused(section: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(f"run: a\nmodel: {{path: m}}\nprompts: {{files: [a.txt]}}\nsearch: {section}", "search.yaml", Path())


@pytest.mark.parametrize("kinds", [("fc", "out"), ("up", "down", "extra")])
def test_blocks_of_other_matrices_are_not_cut(llama: tuple[Replica, str, str], kinds: tuple[str, ...]) -> None:
    parts = tuple(Component(f"model.layers.0.mlp.{kind}", 0, kind, (8, 8)) for kind in kinds)
    manifest = replace(llama[0].manifest(), components=parts)
    with pytest.raises(UserError, match=r"search\.cut: channels-0\.25-wanda cuts nothing of any mlp"):
        manifest.cuttable([QUARTER], parts)


def test_an_uneven_plan_is_written_for_transformers_alone(llama: tuple[Replica, str, str]) -> None:
    components = llama[0].manifest().components
    uneven = Plan.of({MLP: QUARTER})
    even = Plan.of({f"model.layers.{layer}.mlp": QUARTER for layer in range(3)})
    assert widths_left(uneven, components) == {"channels": {0: (48, 48), 1: (36, 48), 2: (48, 48)}}
    said = [size_sentence(plan, components, 32, 32) for plan in (even, uneven)]
    assert "compressed-tensors (vllm" in said[0] and "vllm" not in said[1]
    assert DENSE not in even.schemes.values()
