"""Products of gradients with what options change: right numbers, the same wherever and however often they are taken."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from families_of_models import matrix_of, tiny_model
from inprocess import run_here
from processes import tiny_search
from solving import BY_PRICES
from tiny import TEXT, in_stages, replica, with_reference, write_model, write_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig
from transformers.integrations import moe

from dtmsearch.core.evaluation import EvalRequest, ModelSpec, Reference, ReplicaSettings
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.core.prices import PASSES, TAKEN, PriceBlock, PriceKind, PriceRequest
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import SearchStopped, UserError
from dtmsearch.model.compress.rounding import round_weight
from dtmsearch.model.replica.replica import Replica
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.search.protocols import Silent
from dtmsearch.search.space import SearchSpace
from dtmsearch.store.store import ResultStore, RunWriter
from dtmsearch.workflows.session import Session
from dtmsearch.workflows.solve_budgets import _ratio_at, predicted_front, solve_budgets
from dtmsearch.workflows.take_prices import TakingPrices

UP, Q, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"
SCHEMES = ("int3-g16-asym", "int2-channel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def in_64_bits(folder: Path) -> Replica:
    return Replica(ModelSpec(str(folder), dtype="float64"), ReplicaSettings(num_threads=1, batch_tokens=44))


def slope_by_differences(folder: Path, reference: Reference, prompt: int, component: str, scheme: str) -> float:
    """d/dt of the summed KL(base || model + t D) at t = 1, by central differences."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    moved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    weight = moved.get_submodule(component).weight.detach().clone()
    change = round_weight(weight, parse_scheme(scheme)) - weight
    tokens = torch.tensor(
        np.concatenate([reference.text[prompt, : reference.prompt_tokens], reference.continuation[prompt]])
    ).long()[None]
    at = slice(reference.prompt_tokens - 1, -1)

    def kl(t: float) -> float:
        with torch.no_grad():
            moved.get_submodule(component).weight.copy_(weight + t * change)
            p = base(tokens).logits[0, at].log_softmax(-1)
            q = moved(tokens).logits[0, at].log_softmax(-1)
        return float((p.exp() * (p - q)).sum())

    step = 3e-3
    return (kl(1.0 + step) - kl(1.0 - step)) / (2 * step)


@pytest.mark.parametrize("component", [UP, Q, DOWN])
def test_slopes_around_a_plan_are_finite_differences(folder: Path, component: str) -> None:
    model = in_64_bits(folder)
    reference = with_reference(model)
    plan = Plan.of({component: SCHEMES[0]})
    # What the component's own scheme changes there is nothing; what going back to half of the way would, is known.
    found = model.price(PriceRequest(reference.id, (0, 3), (component,), SCHEMES, kind="slope", around=plan)).products
    assert found[:, 0, 0] == pytest.approx(0.0, abs=1e-12)
    dense = model.price(PriceRequest(reference.id, (0, 3), (component,), ("dense",), kind="slope", around=plan))
    wanted = [-slope_by_differences(folder, reference, prompt, component, SCHEMES[0]) for prompt in range(3)]
    assert dense.products[:, 0, 0] == pytest.approx(wanted, rel=1e-3)  # norms are in 32 bits


def drawn_loss(model: Any, tokens: torch.Tensor, at: slice, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(tokens).logits[0, at], labels, reduction="sum"))


@pytest.mark.parametrize("component", [UP, Q, DOWN])
def test_prices_are_finite_differences_of_the_loss_of_drawn_labels(folder: Path, component: str) -> None:
    model = in_64_bits(folder)
    reference = with_reference(model)
    found = model.price(PriceRequest(reference.id, (0, 2), (component,), SCHEMES, seed=5)).products[:, 0]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    weight = plain.get_submodule(component).weight
    own, step, at = weight.detach().clone(), 1e-2, slice(reference.prompt_tokens - 1, -1)
    for sample in range(2):
        rows = [reference.text[sample, : reference.prompt_tokens], reference.continuation[sample]]
        tokens = torch.from_numpy(np.concatenate(rows)).long()[None]
        # A label is where the sample's own number lies among the cumulative probabilities.
        with torch.no_grad():
            weight.copy_(own)
            sums = plain(tokens).logits[0, at].softmax(-1).cumsum(-1)
        numbers = torch.from_numpy(np.random.default_rng((5, sample)).random(len(sums)))
        labels = (sums <= numbers[:, None]).sum(1)
        for column, scheme in enumerate(SCHEMES):
            change = round_weight(own, parse_scheme(scheme)) - own
            losses = []
            for t in (step, -step):
                with torch.no_grad():
                    weight.copy_(own + t * change)
                losses.append(drawn_loss(plain, tokens, at, labels))
            assert found[sample, column] == pytest.approx(
                (losses[0] - losses[1]) / (2 * step), rel=1e-3
            )  # norms are in 32 bits


def test_the_mean_square_of_a_product_is_twice_the_kl_of_a_small_change(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model, count=4)
    samples = 1_200
    request = PriceRequest(reference.id, (0, samples), (UP, DOWN), ("int6-channel", "w8a8"))
    products = model.price(request).products.astype(np.float64)
    squares = np.square(products) / (2 * reference.continuation_tokens)
    error = squares.std(axis=0) / np.sqrt(samples)
    for at, component in enumerate((UP, DOWN)):
        for column, scheme in enumerate(request.schemes):
            plan = Plan().with_(Perturbation(component, scheme))
            (outcome,) = model.evaluate([EvalRequest(plan, reference.id, (0, 4), ("kl",))])
            measured = float(np.mean(outcome.kl))  # type: ignore[union-attr, arg-type]
            assert measured == pytest.approx(squares.mean(axis=0)[at, column], abs=4 * error[at, column])


def score_by_autograd(folder: Path, reference: Reference, component: str, around: str, scheme: str) -> float:
    """The score of the first prompt, from a plain model's own gradients: `squared` of `scheme` around the base model,
    `changes` of what `around` has changed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    module = model.get_submodule(component)
    weight = module.weight.detach().clone()
    change = round_weight(weight, parse_scheme(around or scheme)) - weight
    if around:
        module.weight.data.add_(change)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    module.register_forward_hook(lambda _, args, output: seen.append((args[0].detach(), output)))
    tokens = torch.tensor(np.concatenate([reference.text[0, : reference.prompt_tokens], reference.continuation[0]]))
    logits = model(tokens.long()[None]).logits[0, reference.prompt_tokens - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, tokens[reference.prompt_tokens :].long(), reduction="sum")
    ((inputs, output),) = seen
    of_output, of_weight = torch.autograd.grad(loss, (output, module.weight))
    if around:
        return float((of_weight * change).abs().sum())
    return float((of_output * torch.nn.functional.linear(inputs, change)).square().sum())


@pytest.mark.parametrize("component", [UP, Q, DOWN])
def test_scores_of_the_research_group_are_those_of_plain_gradients(folder: Path, component: str) -> None:
    model = in_64_bits(folder)
    reference = with_reference(model)
    squared = model.price(PriceRequest(reference.id, (0, 3), (component,), SCHEMES, kind="squared")).products
    wanted = [score_by_autograd(folder, reference, component, "", scheme) for scheme in SCHEMES]
    assert squared[0, 0] == pytest.approx(wanted, rel=1e-5)
    plan = Plan.of({component: SCHEMES[1]})
    request = PriceRequest(reference.id, (0, 3), (component,), ("dense",), kind="changes", around=plan)
    assert model.price(request).products[0, 0] == pytest.approx(
        score_by_autograd(folder, reference, component, SCHEMES[1], ""), rel=1e-5
    )


def test_every_kind_of_price_has_its_cost_and_its_words() -> None:
    assert set(TAKEN) == set(PASSES) == set(get_args(PriceKind))


def test_a_price_is_the_same_whatever_was_measured_before(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model)
    request = PriceRequest(reference.id, (0, 4), (UP, Q), SCHEMES)
    first = model.price(request).products
    plan = Plan.of({UP: "int3-channel", Q: "w8a8"})
    model.evaluate([EvalRequest(plan, reference.id, (0, 6), ("kl",), plan)])
    assert np.array_equal(model.price(request).products, first)


def test_blocks_of_samples_make_the_whole(folder: Path) -> None:
    model = replica(folder, batch_tokens=22)
    reference = with_reference(model)
    whole = model.price(PriceRequest(reference.id, (0, 9), (UP, Q), SCHEMES)).products
    parts = [model.price(PriceRequest(reference.id, part, (UP, Q), SCHEMES)).products for part in ((0, 4), (4, 9))]
    assert np.array_equal(np.concatenate(parts), whole)


def test_later_samples_of_a_prompt_have_labels_of_their_own(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model, count=2)
    found = model.price(PriceRequest(reference.id, (0, 4), (UP,), SCHEMES)).products
    assert not np.allclose(found[:2], found[2:])


def test_slopes_go_through_components_that_round_what_they_read(folder: Path) -> None:
    """As if nothing were rounded there: rounding has no slope of its own."""
    model = replica(folder)
    reference = with_reference(model, 3)
    at_top, below = (f"model.layers.{layer}.mlp.up_proj" for layer in (1, 0))
    request = PriceRequest(reference.id, (0, 2), (below,), ("int3-channel",), kind="slope")
    around = {scheme: Plan.of({at_top: scheme, below: scheme}) for scheme in ("int8-channel", "w8a8-channel")}
    assert model.unpriceable((below, at_top)) == ""
    by_weights, rounded = (model.price(replace(request, around=plan)).products for plan in around.values())
    assert np.all(np.sign(rounded) == np.sign(by_weights))
    np.testing.assert_allclose(rounded, by_weights, rtol=0.5)


def test_a_component_that_is_a_module_that_rounds_activations_is_priced_around(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model)
    plan = Plan.of({UP: "w8a8"})
    request = PriceRequest(reference.id, (0, 2), (UP,), ("w8a8", "int3-channel"), kind="slope", around=plan)
    found = model.price(request).products
    assert found[:, 0, 0] == pytest.approx(0.0, abs=1e-6)
    assert np.abs(found[:, 0, 1]).min() > 1e-4


def test_transposed_matrices_are_priced(tmp_path: Path) -> None:
    config: PretrainedConfig = GPT2Config(
        vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=256, eos_token_id=257
    )
    model = replica(write_model(tmp_path, config))
    reference = with_reference(model)
    names = tuple(component.name for component in model.manifest().components)
    assert np.isfinite(model.price(PriceRequest(reference.id, (0, 2), names, SCHEMES)).products).all()


class Pool:
    """Several replicas in this process, each block on the next of them; `taken` lists the samples of blocks, and after
    `until` of them the driver is killed."""

    def __init__(self, replicas: list[Replica], until: int = 1_000) -> None:
        self.replicas, self.until = replicas, until
        self.taken: list[tuple[int, int]] = []

    def price_blocks(self, requests: Sequence[PriceRequest]) -> Iterator[PriceBlock]:
        for at, request in reversed(list(enumerate(requests))):  # in any order
            if len(self.taken) == self.until:
                raise KeyboardInterrupt
            self.taken.append(request.samples)
            yield self.replicas[at % len(self.replicas)].price(request)


def session_of(pool: Pool, writer: RunWriter) -> Session:
    unread: Any = SimpleNamespace(seed=0)
    return Session(unread, unread, writer, cast(ModelEvaluator, pool), pool.replicas[0].manifest(), Silent())


def taking(pool: Pool, writer: RunWriter, reference: Reference) -> TakingPrices:
    manifest = pool.replicas[0].manifest()
    space = SearchSpace(manifest.components[:5], SCHEMES)
    writer.put_components(manifest, space.components)
    return TakingPrices(session_of(pool, writer), space, reference, "")


def test_prices_are_the_same_for_any_number_of_replicas(folder: Path, tmp_path: Path) -> None:
    found = []
    for number in (1, 2, 3):
        replicas = [replica(folder) for _ in range(number)]
        references = [with_reference(model) for model in replicas]
        with ResultStore(tmp_path / str(number)).writer("run") as writer:
            found.append(taking(Pool(replicas), writer, references[0])("fisher", Plan(), (0, 80)))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_after_a_kill_only_blocks_that_are_not_recorded_are_taken(folder: Path, tmp_path: Path) -> None:
    model = replica(folder)
    reference, store = with_reference(model), ResultStore(tmp_path)
    around = Plan.of({UP: SCHEMES[0]})
    with pytest.raises(KeyboardInterrupt), store.writer("run") as writer:
        taking(Pool([model], until=2), writer, reference)("slope", around, (0, 80))
    with store.writer("run") as writer:
        rest = Pool([model])
        found = taking(rest, writer, reference)("slope", around, (0, 80))
    with ResultStore(tmp_path / "other").writer("run") as writer:
        whole = taking(Pool([model]), writer, reference)("slope", around, (0, 80))
    assert rest.taken == [(0, 32)]
    assert np.array_equal(found, whole)


def test_prices_of_other_options_are_taken_anew(folder: Path, tmp_path: Path) -> None:
    model = replica(folder)
    reference = with_reference(model)
    with ResultStore(tmp_path).writer("run") as writer:
        first = Pool([model])
        taking(first, writer, reference)("fisher", Plan(), (0, 8))
        other = Pool([model])
        space = SearchSpace(model.manifest().components[:5], (*SCHEMES, "drop"))
        take = TakingPrices(session_of(other, writer), space, reference, "")
        assert take("fisher", Plan(), (0, 8)).shape == (8, 5, 3)
    assert other.taken == [(0, 8)]


def slopes_by_autograd(
    family: str, folder: Path, attention: str, reference: Reference, names: Sequence[str], around: str, scheme: str
) -> np.ndarray[Any, Any]:
    """Slopes of KL(base || plan) [prompts, components, dense and `scheme`] at the plan that has every component under
    `around`, from the gradients of a plain model's parameters."""
    auto: Any = type(tiny_model(family))
    base, moved = (
        auto.from_pretrained(folder, dtype=torch.float64, attn_implementation=attention).eval() for _ in range(2)
    )
    changes = []
    for name in names:
        place = matrix_of(moved, name)
        own = place.clone()
        place.copy_(round_weight(own, parse_scheme(around)))
        changes.append((own - place, round_weight(own, parse_scheme(scheme)) - place))
    at, found = slice(reference.prompt_tokens - 1, -1), []
    tokens = torch.from_numpy(np.concatenate([reference.text[:, : reference.prompt_tokens], reference.continuation], 1))
    parameters = [parameter for parameter in moved.parameters() if parameter.requires_grad]
    for prompt in tokens.long().unsqueeze(1):
        with torch.no_grad():
            p = base(input_ids=prompt, use_cache=False).logits[0, at].log_softmax(-1)
        q = moved(input_ids=prompt, use_cache=False).logits[0, at].log_softmax(-1)
        own_gradients = torch.autograd.grad((p.exp() * (p - q)).sum(), parameters, allow_unused=True)
        values = [parameter.data for parameter in parameters]
        for parameter, value, gradient in zip(parameters, values, own_gradients, strict=True):
            parameter.data = torch.zeros_like(value) if gradient is None else gradient
        found.append(
            [[float((matrix_of(moved, n) * c).sum()) for c in own] for n, own in zip(names, changes, strict=True)]
        )
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
    return np.array(found)


def write_family(family: str, folder: Path) -> Path:
    tiny_model(family).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


# Experts one after the other, in one product grouped by tokens, all over all tokens, in a stack of two sides; shared
# ones beside them that read all prompts' tokens in one row.
@pytest.mark.parametrize(
    ("family", "attention"),
    [("gpt_oss", "eager"), ("llama4_text", "sdpa"), ("dbrx", "sdpa"), ("jetmoe", "sdpa"), ("qwen2_moe", "sdpa")],
)
def test_slopes_of_experts_in_stacks_are_those_of_plain_gradients(
    family: str, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_, **__: False)  # which has no 64 bits
    folder = write_family(family, tmp_path)
    spec = ModelSpec(str(folder), dtype="float64", attention=attention)
    model = Replica(spec, ReplicaSettings(num_threads=1, batch_tokens=66))
    components = model.manifest().components
    names = tuple(component.name for component in components)
    reference = with_reference(model, count=3)
    plan = Plan.uniform(components, "int3-channel")
    schemes = ("dense", "int2-channel")
    found = model.price(PriceRequest(reference.id, (0, 3), names, schemes, kind="slope", around=plan)).products
    wanted = slopes_by_autograd(family, folder, attention, reference, names, "int3-channel", "int2-channel")
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6 * np.abs(wanted).max())
    experts = [at for at, component in enumerate(components) if component.stacked]
    assert np.abs(wanted[:, experts]).max() > 0.01 * np.abs(wanted).max()


def test_the_slope_of_tied_experts_is_the_finite_difference_of_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_, **__: False)
    folder = write_family("mixtral", tmp_path)
    model = in_64_bits(folder)
    reference = with_reference(model, count=2)
    tied = [c for c in model.manifest().components if c.stacked and c.layer == 0]
    plan = Plan.uniform(tied, "int4-channel")
    names = tuple(component.name for component in tied)
    request = PriceRequest(reference.id, (0, 2), names, ("dense",), kind="slope", around=plan)
    found = model.price(request).products.sum(axis=1)[:, 0]
    base, moved = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for _ in range(2))
    own = {name: matrix_of(base, name).clone() for name in names}
    changes = {name: round_weight(weight, parse_scheme("int4-channel")) - weight for name, weight in own.items()}

    def kl(prompt: int, t: float) -> float:
        text = np.concatenate([reference.text[prompt, : reference.prompt_tokens], reference.continuation[prompt]])
        tokens, at = torch.tensor(text).long()[None], slice(reference.prompt_tokens - 1, -1)
        with torch.no_grad():
            for name in names:
                matrix_of(moved, name).copy_(own[name] + t * changes[name])
            p, q = (each(tokens).logits[0, at].log_softmax(-1) for each in (base, moved))
        return float((p.exp() * (p - q)).sum())

    step = 1e-3
    wanted = [-(kl(prompt, 1.0 + step) - kl(prompt, 1.0 - step)) / (2 * step) for prompt in range(2)]
    assert found == pytest.approx(wanted, rel=1e-3)


def test_products_that_are_grouped_by_the_device_give_the_same_prices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_family("mixtral", tmp_path)
    found = []
    for grouped in (True, False):
        if not grouped:
            monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_, **__: False)
        model = replica(folder)
        names = tuple(component.name for component in model.manifest().components)
        reference = with_reference(model, count=2)
        found.append(model.price(PriceRequest(reference.id, (0, 4), names, SCHEMES)).products)
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4 * float(np.abs(found[1]).max()))


@pytest.mark.parametrize(
    ("strategy", "effort"), [("fisher", {"samples": 40}), ("auto", {"slopes": 4, "prompts": 2, "probe_prompts": 2})]
)
def test_of_a_mixture_fisher_takes_prices_and_auto_probes(
    tmp_path: Path, strategy: str, effort: dict[str, int]
) -> None:
    write_family("mixtral", tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    search = {"strategy": strategy, "rank_by": "kl", "schemes": ["int3-channel", "int4-channel"], strategy: effort}
    run_here(tiny_search(tmp_path, search=search | {"stop": {"bits_per_weight": 3.6}}), tmp_path / "store")
    results = ResultStore(tmp_path / "store")
    assert [run.status for run in results.runs()] == ["finished"]
    priced = {name for name in results.table("prices")["component"].to_pylist() if ".experts." in name}
    assert len(priced) == (2 * 4 * 2 if strategy == "fisher" else 0)


def test_a_replica_in_stages_takes_the_prices_of_experts_that_one_process_takes(tmp_path: Path) -> None:
    path = write_family("mixtral", tmp_path)
    found = []
    for model in (replica(path), in_stages(path, 2)):
        names = tuple(component.name for component in model.manifest().components)
        assert model.unpriceable(names) == ""
        reference = with_reference(model, count=2)
        found.append(model.price(PriceRequest(reference.id, (0, 3), names, SCHEMES)).products)
    assert np.array_equal(*found)
    assert any(".experts." in name for name in names)


_BY_FISHER: dict[str, Any] = {
    "strategy": "fisher",
    "schemes": ["int3-channel", "int4-channel"],
    "fisher": {"samples": 40},
}


def searched_by(strategy: str, folder: Path) -> Path:
    search = _BY_FISHER | {"strategy": strategy, "stop": {"bits_per_weight": 4.5}}
    run_here(tiny_search(folder, search=search), folder / "store")
    return folder


@pytest.fixture(scope="module")
def by_fisher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished search, and its store."""
    return searched_by("fisher", tmp_path_factory.mktemp("fisher"))


@pytest.mark.parametrize("strategy", BY_PRICES)
def test_a_search_by_prices_alone_ends_with_a_plan(strategy: str, by_fisher: Path, tmp_path: Path) -> None:
    folder = by_fisher if strategy == "fisher" else searched_by(strategy, tmp_path)
    results = ResultStore(folder / "store")
    (run,) = results.runs()
    assert run.status == "finished"
    assert results.table("prices").num_rows == len(results.table("components")) * 2 * 2


# (predicted, measured KL) of plans that SmolLM2's prices by 128 and 256 samples led to, measured on other text:
# docs/search-quality.md.
SOLVED = [
    (0.00127, 0.00136), (0.00131, 0.00133), (0.0787, 0.0926), (0.0825, 0.0907), (0.1115, 0.1436), (0.1160, 0.1373),
    (0.1457, 0.1669), (0.1475, 0.1746), (0.3763, 0.6573), (0.3884, 0.6200), (0.5376, 1.0849), (0.5621, 0.9831),
]  # fmt: skip


def test_intervals_before_anything_is_measured_hold_plans_that_were() -> None:
    off = []
    for predicted, measured in SOLVED:
        ratio, spread = _ratio_at([], predicted)
        off.append((math.log(measured / predicted) - ratio) / spread)
    assert max(map(abs, off)) < 1.96
    assert abs(float(np.mean(off))) < 0.5


def test_another_run_takes_no_price_again(by_fisher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(by_fisher, tmp_path, dirs_exist_ok=True)

    def never(model: Replica, request: PriceRequest) -> PriceBlock:
        raise AssertionError("these are priced")

    monkeypatch.setattr(Replica, "price", never)
    # Another budget, and of the schemes one: what is recorded are products of single options.
    search = _BY_FISHER | {"schemes": ["int4-channel"], "stop": {"bits_per_weight": 5.0}}
    run_here(tiny_search(tmp_path, run="other", search=search), tmp_path / "store")
    results = ResultStore(tmp_path / "store")
    own, taken = results.table("prices", run="other"), results.table("prices", run="tiny")
    assert set(own["block_tokens"].to_pylist()) == {0} and own.num_rows == taken.num_rows / 2
    assert {run.status for run in results.runs()} == {"finished"}


def test_further_budgets_are_solved_from_a_runs_prices(by_fisher: Path) -> None:
    results = ResultStore(by_fisher / "store")
    (again, small) = solve_budgets(results, "tiny", [4.5, 4.0])
    # What the search found; a uniform plan may have been better on held-out prompts, and be the run's.
    found = results.table("steps", run="tiny")["plan_id"].to_pylist()[0]
    assert again.plan_id == found
    assert small.bits_per_weight <= 4.0
    assert small.kl_low < small.kl < small.kl_high
    assert small.kl >= again.kl
    front = predicted_front(results, "tiny")
    sizes, values = [plan.bits_per_weight for plan in front.front], [plan.kl for plan in front.front]
    assert sizes == sorted(sizes) and values == sorted(values, reverse=True)
    ends = front.uniform["int3-channel"], front.uniform["int4-channel"]
    assert front.front[0] == ends[0]
    # Where a component alone is priced higher under more bits, the last plan of the front has fewer of them.
    assert ends[0].bits_per_weight < front.front[-1].bits_per_weight <= ends[1].bits_per_weight
    # What `solve` finds at one of its sizes is that plan.
    (solved,) = solve_budgets(results, "tiny", [sizes[1]])
    assert solved.kl == pytest.approx(values[1])


@pytest.mark.parametrize("bits", [float("nan"), float("inf"), 0.0, -1.0])
def test_what_is_no_budget_is_refused_in_words(bits: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a positive number is wanted"):
        solve_budgets(ResultStore(tmp_path / "store"), "tiny", [4.0, bits])


def test_auto_killed_while_it_takes_prices_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    effort = {"samples": 40, "slopes": 4, "prompts": 2, "swap_prompts": 80}
    search = {"strategy": "auto", "rank_by": "kl", "schemes": ["int2-channel", "int3-channel", "int4-channel"]}
    path = tiny_search(tmp_path, search=search | {"auto": effort, "stop": {"bits_per_weight": 3.6}})
    run_here(path, tmp_path / "whole")
    own, calls = Replica.price, iter(range(1, 100))

    def killed(model: Replica, request: PriceRequest) -> PriceBlock:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return own(model, request)

    with monkeypatch.context() as patch, pytest.raises(SearchStopped):
        patch.setattr(Replica, "price", killed)
        run_here(path, tmp_path / "killed")
    run_here(path, tmp_path / "killed")
    (whole,), (again,) = ResultStore(tmp_path / "whole").runs(), ResultStore(tmp_path / "killed").runs()
    assert whole.status == again.status == "finished"
    assert whole.final_plan_id == again.final_plan_id


def stopped_auto(folder: Path, monkeypatch: pytest.MonkeyPatch, after: int, priced: bool) -> Path:
    """A search by `auto` that was stopped after so many calls of its replica, with prices or without."""
    effort = {"samples": 40, "slopes": 4, "prompts": 2}
    search = {"strategy": "auto", "rank_by": "kl", "schemes": ["int3-channel", "int4-channel"], "auto": effort}
    path = tiny_search(folder, search=search | {"stop": {"bits_per_weight": 3.6}})
    name = "price" if priced else "evaluate"
    own, calls = getattr(Replica, name), iter(range(1, 1000))

    def stopping(model: Replica, *arguments: Any, **options: Any) -> Any:
        if next(calls) == after:
            raise KeyboardInterrupt
        return own(model, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(SearchStopped):
        patch.setattr(Replica, name, stopping)
        if not priced:
            patch.setattr(Replica, "unpriceable", in_processes)
        run_here(path, folder / "store")
    return path


def in_processes(model: Replica, components: Sequence[str]) -> str:
    return "its layers lie in several processes"


def test_a_run_begun_with_prices_is_not_continued_by_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stopped_auto(tmp_path, monkeypatch, after=2, priced=True)
    monkeypatch.setattr(Replica, "unpriceable", in_processes)
    with pytest.raises(UserError, match="'tiny' was begun with prices, which cannot be had now: its layers lie"):
        run_here(path, tmp_path / "store")


def test_a_run_begun_by_probes_is_continued_by_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stopped_auto(tmp_path, monkeypatch, after=3, priced=False)
    run_here(path, tmp_path / "store")
    results = ResultStore(tmp_path / "store")
    assert [run.status for run in results.runs()] == ["finished"]
    assert results.table("prices").num_rows == 0


def test_a_run_that_was_stopped_before_it_probed_takes_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stopped_auto(tmp_path, monkeypatch, after=1, priced=False)
    run_here(path, tmp_path / "store")
    assert ResultStore(tmp_path / "store").table("prices").num_rows > 0
