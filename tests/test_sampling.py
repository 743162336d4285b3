"""Divergence of sampled continuations: noise that all models share, so that one pass tells where their samples part."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inprocess import run_here
from processes import tiny_search
from tiny import TEXT, PeerHere, result, values, with_reference, write_model
from transformers import TopKLogitsWarper, TopPLogitsWarper

import dtmsearch as dtm
from dtmsearch.config import SearchFile, parse
from dtmsearch.core.decoding import GREEDY, Decoding
from dtmsearch.core.drafting import accepted_tokens, clear_runs, expected_passes
from dtmsearch.core.evaluation import EvalRequest, ModelSpec, Reference, ReplicaSettings
from dtmsearch.core.metric_registry import first_divergent_token
from dtmsearch.core.plan import Plan
from dtmsearch.core.variant import Variant
from dtmsearch.errors import UserError
from dtmsearch.model.forward import head_metrics
from dtmsearch.model.forward.shared_noise import Sampling, left_over
from dtmsearch.model.pipeline_parallel.pipelined_replica import make_stage
from dtmsearch.model.replica.replica import Replica
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.export_check import check_enough_prompts
from dtmsearch.workflows.export_source import Recorded
from dtmsearch.workflows.serve_check import _recorded

ALL = ("kl", "ppl", "accepted")
DECODINGS = [Decoding(0.8, 50, 0.95), Decoding(1.2), Decoding(0.8, top_p=0.9, seed=3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def spec(folder: Path, decoding: Decoding = DECODINGS[0]) -> ModelSpec:
    return ModelSpec(str(folder), dtype="float32", compile="never", decoding=decoding)


def made(folder: Path, decoding: Decoding = DECODINGS[0], **settings: Any) -> Replica:
    return Replica(spec(folder, decoding), ReplicaSettings(num_threads=1, **settings))


@cache
def usual(folder: Path, decoding: Decoding = DECODINGS[0]) -> Replica:
    """One that tests share: what it did before changes nothing of what it measures."""
    return made(folder, decoding)


def samples(decoding: Decoding, prompts: torch.Tensor, positions: int, logits: torch.Tensor) -> torch.Tensor:
    """Tokens [prompts, positions] that are sampled from the same logits everywhere."""
    sampling = Sampling.of(decoding, prompts)
    assert sampling is not None
    rows = torch.arange(len(prompts) * positions)
    never = torch.zeros(len(logits), dtype=torch.bool)
    never[-1] = True
    noisy = sampling.noisy(logits.expand(len(rows), -1), never, sampling.of_rows(rows, positions))
    return noisy.argmax(dim=1).reshape(len(prompts), positions)


def test_tokens_are_sampled_as_often_as_their_probabilities_say() -> None:
    torch.manual_seed(0)
    logits, prompts = torch.randn(12), torch.randint(99, (200, 7))
    chosen = samples(Decoding(0.7), prompts, 300, logits)
    wanted = (logits[:-1] / 0.7).softmax(dim=0)
    found = torch.bincount(chosen.flatten(), minlength=12)[:-1] / chosen.numel()
    assert (found - wanted).abs().max() < 4 * (0.25 / chosen.numel()) ** 0.5
    # One position's choice says nothing of the next one's, nor of another prompt's.
    same = float((wanted**2).sum())
    for one, other in ((chosen[:, :-1], chosen[:, 1:]), (chosen[:-1], chosen[1:])):
        assert float((one == other).float().mean()) == pytest.approx(same, abs=0.01)


def test_noise_follows_the_prompts_tokens_whatever_batch_they_are_in() -> None:
    torch.manual_seed(0)
    logits, prompts = torch.randn(50), torch.randint(99, (6, 7))
    chosen = samples(Decoding(1.0), prompts, 20, logits)
    assert torch.equal(samples(Decoding(1.0), prompts[[4, 1]], 9, logits), chosen[[4, 1], :9])
    assert len({tuple(row) for row in chosen.tolist()}) == 6
    assert not torch.equal(samples(Decoding(1.0, seed=1), prompts, 20, logits), chosen)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.8), (9, 0.6)])
def test_tokens_are_left_out_as_transformers_leaves_them_out(top_k: int, top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 30)
    wanted = logits / 0.8
    if top_k:
        wanted = TopKLogitsWarper(top_k)(torch.empty(0), wanted)
    if top_p < 1.0:
        wanted = TopPLogitsWarper(top_p)(torch.empty(0), wanted)
    assert torch.equal(left_over(logits, torch.zeros(30, dtype=torch.bool), Decoding(0.8, top_k, top_p)), wanted)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_the_unquantized_plan_never_diverges_from_samples(folder: Path, decoding: Decoding) -> None:
    model = usual(folder, decoding)
    reference = with_reference(model)
    found = result(model.evaluate([EvalRequest(Plan(), reference.id, (0, 6), ALL)])[0])
    assert found.fdt.tolist() == [12] * 6
    assert not found.sdt.any()
    assert reference.disagreement == model.canary(reference.id) == 0.0
    assert found.others["accepted"] == pytest.approx(5.0)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_the_single_pass_says_where_free_samples_of_the_compressed_model_part(folder: Path, decoding: Decoding) -> None:
    model = usual(folder, decoding)
    reference = with_reference(model, 10, 24, 40)
    for scheme in ("int8-channel", "int4-g32"):
        plan = Plan.uniform(model.manifest().components, scheme)
        single = result(model.evaluate([EvalRequest(plan, reference.id, (0, 10))])[0])
        generated = model.generate(plan, reference.prompts)
        free = first_divergent_token((generated != reference.continuation) & reference.agrees)
        assert single.fdt.tolist() == free.tolist()
        assert 0 < single.fdt.mean() < 40


def test_a_part_of_the_prompts_has_its_part_of_the_values(folder: Path) -> None:
    model = usual(folder)
    reference = with_reference(model)
    plan = Plan.uniform(model.manifest().components, "int4-g32")
    whole, part = (
        result(model.evaluate([EvalRequest(plan, reference.id, prompts)])[0]) for prompts in ((0, 6), (2, 5))
    )
    assert part.fdt.tolist() == whole.fdt[2:5].tolist()
    assert part.sdt.tolist() == whole.sdt[2:5].tolist()


def test_continuations_of_one_token_are_scored_by_targets_without_gaps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels read targets as a row; a column of one token each is a view with gaps."""
    handed: list[bool] = []
    plain = head_metrics._score

    def score(logits: torch.Tensor, targets: torch.Tensor, *rest: Any) -> Any:
        handed.append(targets.is_contiguous())
        return plain(logits, targets, *rest)

    monkeypatch.setattr(head_metrics, "_score", score)
    model = usual(folder, GREEDY)
    model.make_reference(model.cut_prompts([TEXT], 6, 10, 1, 0)[0])
    assert handed and all(handed)


def measured(model: Replica) -> tuple[list[list[int]], list[list[list[float]]], Any]:
    reference = with_reference(model)
    names = [component.name for component in model.manifest().components]
    plans = Plan(), Plan.of({names[-1]: "int3-g8"}), Plan.of(dict.fromkeys(names, "int4-g32"))
    outcomes = model.evaluate([EvalRequest(plan, reference.id, (0, 6), ALL) for plan in plans])
    found = [[*values(outcome), result(outcome).others["accepted"].tolist()] for outcome in outcomes]
    free = [piece.own.tokens for piece in model.continuations(Variant(plans[-1]), reference.id, [1, 4])]
    return reference.continuation.tolist(), found, free


def test_weights_that_pass_through_and_other_batches_sample_the_same(folder: Path) -> None:
    whole = measured(usual(folder))
    streamed = measured(made(folder, weights="streamed", batch_tokens=50))
    assert streamed[0] == whole[0]
    assert streamed[2] == whole[2]
    for found, wanted in zip(streamed[1], whole[1], strict=True):
        assert found[:2] == wanted[:2]  # FDT, SDT
        np.testing.assert_allclose(found[2:], wanted[2:], rtol=1e-4, atol=1e-6)


def test_a_model_in_stages_samples_the_same(folder: Path) -> None:
    first, second = (ReplicaSettings(num_threads=1, num_stages=2, stage=stage) for stage in (0, 1))
    staged = make_stage(spec(folder), first, peers=[PeerHere(make_stage(spec(folder), second))])
    assert isinstance(staged, Replica)
    assert measured(staged) == measured(usual(folder))


def test_decoding_belongs_to_a_references_identity(folder: Path) -> None:
    decodings = GREEDY, *DECODINGS, replace(DECODINGS[0], seed=1)
    assert len({usual(folder, each).cut_prompts([TEXT], 4, 10, 12, 0)[1] for each in decodings}) == 5


@pytest.mark.parametrize("decoding", [GREEDY, *DECODINGS])
def test_what_is_written_of_a_decoding_is_read_again(decoding: Decoding) -> None:
    assert Decoding.parse(str(decoding)) == decoding


CHANGES = {"search__rank_by": "accepted", "search__stop": {"components": 1}}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a search over samples, and its store."""
    found = tmp_path_factory.mktemp("search")
    file = tiny_search(found, search__decoding={"temperature": 0.8, "top_k": 50}, **CHANGES)
    run_here(file, found / "store")
    return found


def test_a_search_over_samples_is_recorded(searched: Path) -> None:
    store = ResultStore(searched / "store")
    (record,) = store.runs()
    assert store.reference(str(record.reference_id)).decoding == Decoding(0.8, 50)  # type: ignore[union-attr]
    assert str(record.search_text).endswith("; continuations are sampled, temperature 0.8, top-k 50")
    rows = store.table("evaluations", run="tiny").to_pylist()
    assert all("accepted" in row["other_metrics"] and 0.0 <= row["other_means"][0] <= 5.0 for row in rows)
    assert run_here(searched / "tiny.yaml", searched / "store").already_complete


def test_other_decoding_is_another_search(searched: Path) -> None:
    file = tiny_search(searched, run="tiny2", search__decoding={"temperature": 0.9}, **CHANGES)
    file.write_text(file.read_text().replace("run: tiny2", "run: tiny"))
    with pytest.raises(UserError, match=r"search\.decoding\.temperature: 0\.8 -> 0\.9"):
        run_here(file, searched / "store")


def test_no_engine_is_held_against_recorded_samples(searched: Path, tmp_path: Path) -> None:
    store = ResultStore(searched / "store")
    row = store.table("evaluations", run="tiny").to_pylist()[-1]
    card = {"dtmsearch": {"run": "tiny", "reference": row["reference_id"], "plan": row["plan_id"]}}
    with pytest.raises(UserError, match="sampled continuations, whose noise no engine adds: give --text"):
        _recorded(tmp_path, card, store, 0)


def test_a_notebook_measures_samples(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = [
        dtm.measure(
            model, tokenizer, TEXT, "uniform:int4-g32", count=4, prompt_tokens=10, continuation_tokens=12, decoding=each
        )
        for each in (dtm.Decoding(), dtm.Decoding(0.8))
    ]
    assert found[0].per_prompt["fdt"] != found[1].per_prompt["fdt"]


def search(text: str) -> SearchFile:
    sections = "model: {path: m}\nprompts: {files: [t.txt]}"
    return parse(f"run: a\n{sections}\nsearch: {{schemes: [int4-g32], {text}}}\n", "a.yaml", Path())


def test_decoding_is_a_key_of_every_strategy() -> None:
    for strategy in ("probe", "greedy", "lazy_beam", "auto", "fisher", "knapsack"):
        file = search(f"strategy: {strategy}, decoding: {{temperature: 0.8, top_k: 50, top_p: 0.95}}")
        assert file.model_spec.decoding == Decoding(0.8, 50, 0.95)
    assert search("strategy: beam").model_spec.decoding == GREEDY


def test_greedy_decoding_has_nothing_to_leave_out() -> None:
    with pytest.raises(UserError, match="top_k is for tokens that are sampled; give a temperature above 0"):
        search("decoding: {top_k: 50}")


def test_llama_cpps_check_of_a_file_is_of_greedy_continuations(folder: Path) -> None:
    model = usual(folder)
    reference = with_reference(model, count=8)
    nothing = np.zeros(8, np.int32)
    with pytest.raises(UserError, match="sampled continuations"):
        check_enough_prompts(Recorded("a", reference, nothing, nothing, ""))


# What speculative decoding accepts.


def by_drafting(agrees: list[bool], draft: int) -> float:
    """Tokens accepted a step, of greedy drafts, by doing it; steps that the end would cut short are left out."""
    at, accepted, steps = 0, 0, 0
    while at == 0 or at + draft < len(agrees):
        run = 0
        while run < draft and agrees[at + run]:
            run += 1
        accepted, steps, at = accepted + run, steps + 1, at + run + 1
    return accepted / steps


@pytest.mark.parametrize("draft", [1, 2, 5])
def test_greedy_drafts_accept_what_drafting_token_by_token_does(draft: int) -> None:
    agrees = np.random.default_rng(0).random((30, 40)) < 0.8
    agrees[0], agrees[1] = True, False
    wanted = [by_drafting(row.tolist(), draft) for row in agrees]
    assert accepted_tokens(agrees.astype(np.float32), draft) == pytest.approx(wanted)
    assert (wanted[0], wanted[1]) == (draft, 0.0)


def test_of_one_overlap_everywhere_the_accepted_are_a_geometric_sum() -> None:
    overlap = np.full((1, 50), 0.7, np.float32)
    assert accepted_tokens(overlap, 4) == pytest.approx([sum(0.7**n for n in range(1, 5))])


def test_continuations_shorter_than_a_draft_have_one_step() -> None:
    assert accepted_tokens(np.array([[1, 1, 0]], np.float32), 5).tolist() == [2.0]


def test_widths_between_divergences_are_counted_from_starts_with_room_for_them() -> None:
    diverged = np.array([[0, 0, 1, 0, 0, 0, 1, 0], [0] * 8, [1] * 8], np.bool_)
    # Starts at 0, 3 and 7; at 0 alone; at every position.
    found = {width: [values.tolist() for values in clear_runs(diverged, width)] for width in (1, 3, 9)}
    assert found == {1: [[3, 1, 8], [3, 1, 0]], 3: [[2, 1, 6], [1, 1, 0]], 9: [[0, 0, 0], [0, 0, 0]]}


def greedy_reference(folder: Path) -> tuple[Replica, Reference]:
    model = usual(folder, GREEDY)
    return model, with_reference(model, count=6, prompt=10, continuation=30)


def test_accepted_is_what_assisted_generation_accepts(folder: Path) -> None:
    """transformers runs the base model with the compressed one as its assistant: as many passes of the base model as
    the divergences of the single pass say."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model, reference = greedy_reference(folder)
    plan = Plan.uniform(model.manifest().components, "int5-g32")
    diverged = model._evaluator.positions(EvalRequest(plan, reference.id, (0, 6)))["continuation"].diverged
    base, draft = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    dtm.apply(plan, draft)
    draft.generation_config = GenerationConfig(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    passes: list[int] = []
    base.register_forward_pre_hook(lambda *_: passes.append(1))
    for row, leaves in enumerate(diverged):
        passes.clear()
        prompt = torch.from_numpy(reference.text[row : row + 1, :10]).long()
        ends = list(reference.suppressed)  # in no prompt, which the draft would not attend to where it is padding
        settings = GenerationConfig(max_new_tokens=30, do_sample=False, pad_token_id=ends[0], suppress_tokens=ends)
        base.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, assistant_model=draft)
        assert len(passes) == expected_passes(1.0 - leaves[None], 4)[0], row
