"""The package as a notebook uses it: results that show themselves, models that are in memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar, Self, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from stores import bucket_filesystem
from tiny import TEXT, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import dtmsearch as dtm
from dtmsearch.errors import UserError
from dtmsearch.model.replica.local_replicas import LocalReplicas
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.search.protocols import Evaluator
from dtmsearch.store.store import ResultStore

IN_PROCESS = dtm.Where(in_process=True)


def search_of(folder: Path, **search: Any) -> dict[str, Any]:
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return {
        "run": "tiny",
        "model": {"path": str(write_model(folder / "model")), "dtype": "float32"},
        "prompts": {
            "files": [str(folder / "text.txt")],
            "count": 4,
            "prompt_tokens": 8,
            "continuation_tokens": 8,
        },
        "search": {"strategy": "probe", "schemes": ["int4-channel"], **search},
    }


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> dtm.Run:
    folder = tmp_path_factory.mktemp("api")
    return dtm.run(search_of(folder), folder / "store", IN_PROCESS)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    folder = write_model(tmp_path_factory.mktemp("model"))
    yield AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_a_search_from_a_mapping_gives_its_evaluations_as_rows(searched: dtm.Run) -> None:
    assert len(searched.evaluations) == searched.summary.num_evaluations > 1


def test_a_finished_search_is_already_complete(searched: dtm.Run) -> None:
    assert dtm.resume("tiny", searched.store, IN_PROCESS).already_complete


@pytest.mark.parametrize("as_given", [str, Path, dtm.open_store], ids=["text", "path", "object"])
def test_every_verb_takes_a_store_as_name_path_or_object(searched: dtm.Run, as_given: Any) -> None:
    assert [line.run for line in dtm.ls(as_given(searched.store.url))] == ["tiny"]


@pytest.mark.parametrize(
    "as_given", [lambda store: store, lambda store: ResultStore(store.folder)], ids=["Store", "ResultStore"]
)
def test_a_store_in_a_filesystem_of_its_own_is_searched_in_as_it_is(tmp_path: Path, as_given: Any) -> None:
    (tmp_path / "bucket").mkdir()
    store = as_given(dtm.Store("a-bucket/store", bucket_filesystem(tmp_path / "bucket")))
    dtm.run(search_of(tmp_path, schemes=["drop"]), store, IN_PROCESS)
    assert [line.run for line in dtm.ls(store)] == ["tiny"]
    assert (tmp_path / "bucket" / "a-bucket" / "store").is_dir() and not Path("a-bucket").exists()


def test_a_store_keeps_its_listener_when_it_is_opened_again(tmp_path: Path) -> None:
    heard: list[str] = []
    again = dtm.open_store(ResultStore(tmp_path, on_note=heard.append))
    assert again.on_note is not None
    again.on_note("a damaged segment")
    assert heard == ["a damaged segment"]


def test_a_base_model_that_overflows_ends_a_run_before_anything_is_recorded_of_it(tmp_path: Path) -> None:
    content = search_of(tmp_path)
    path = Path(content["model"]["path"]) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 40_000  # activations pass 65504
    save_file(tensors, path, metadata={"format": "pt"})
    content["model"]["dtype"] = "float16"
    with pytest.raises(dtm.UserError, match=r"try model\.dtype: bfloat16"):
        dtm.run(content, tmp_path / "store", IN_PROCESS)
    results = ResultStore(tmp_path / "store")
    assert (len(results.table("prompts")), len(results.table("evaluations"))) == (0, 0)


def test_a_run_shows_itself_as_a_table(searched: dtm.Run) -> None:
    assert "<th>status</th><td>finished</td>" in searched._repr_html_()


def test_rows_show_no_markup_of_a_value() -> None:
    import pyarrow as pa

    assert "&lt;b&gt;" in dtm.Rows(pa.table({"text": ["<b>"]}))._repr_html_()


def test_an_unquantized_model_diverges_nowhere(loaded: tuple[Any, Any]) -> None:
    found = dtm.measure(*loaded, TEXT, count=4, prompt_tokens=8, continuation_tokens=8)
    assert found.summary.sdt_mean == 0.0


@pytest.mark.parametrize("scheme", ["int3-channel", "wanda-0.5", "gptq-int3-channel", "nf4"])
def test_measuring_a_plan_changes_no_weight_of_the_model(loaded: tuple[Any, Any], scheme: str) -> None:
    model, tokenizer = loaded
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dtm.measure(model, tokenizer, TEXT, f"uniform:{scheme}", count=4, prompt_tokens=8, continuation_tokens=8)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_measured_is_the_model_that_applying_gives(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """The KL that `measure` reports, from plain forward passes of two model objects."""
    model, tokenizer = loaded
    found = dtm.measure(model, tokenizer, TEXT, "uniform:int3-channel", count=1, prompt_tokens=8, continuation_tokens=8)
    other = dtm.apply("uniform:int3-channel", AutoModelForCausalLM.from_pretrained(model.name_or_path).eval())
    replica_text = _greedy(model, tokenizer, 8, 8)
    with torch.inference_mode():
        base, own = (m(replica_text).logits[0, 7:-1].log_softmax(-1) for m in (model, other))
    expected = float((base.exp() * (base - own)).sum(-1).mean())
    assert found.summary.kl == pytest.approx(expected, rel=1e-3)


def _greedy(model: Any, tokenizer: Any, prompt_tokens: int, new_tokens: int) -> torch.Tensor:
    from dtmsearch.model.replica.in_memory import InMemoryReplica

    replica = InMemoryReplica(model, tokenizer)
    prompts, _ = replica.cut_prompts([TEXT], 1, prompt_tokens, new_tokens, 0)
    reference = replica.make_reference(prompts)
    return torch.cat(
        [torch.from_numpy(prompts.tokens[:, :prompt_tokens]), torch.from_numpy(reference.continuation)], dim=1
    ).long()


def test_a_plan_for_another_model_is_refused(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="does not have; its components are named like"):
        dtm.measure(*loaded, TEXT, {"model.layers.99.mlp": "int4-channel"})


def test_applying_a_calibrated_plan_says_what_to_use(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="dtmsearch export"):
        dtm.apply("uniform:gptq-int4-channel", loaded[0])


def test_schemes_of_caches_are_not_for_weights(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match="all that is searched are weights"):
        dtm.apply("uniform:kv-int8", loaded[0])
    with pytest.raises(UserError, match=r"schemes of KV caches .* are for caches"):
        dtm.apply({"model.layers.0.mlp.up_proj": "kv-int4"}, loaded[0])


def test_everything_exported_is_there() -> None:
    assert {name for name in dtm.__all__ if not hasattr(dtm, name)} == set()


@pytest.mark.parametrize("strategy", ["auto", "fisher"])
def test_a_search_by_prices_runs_in_this_process(tmp_path: Path, strategy: str) -> None:
    schemes = ["int2-g16", "int4-g16", "int8-channel"]
    options = {"fisher": {"fisher": {"samples": 8}}, "auto": {"auto": {"samples": 8, "rounds": 1, "swap_prompts": 0}}}
    wanted = search_of(tmp_path, strategy=strategy, schemes=schemes, stop={"bits_per_weight": 5.0}, **options[strategy])
    run = dtm.run(wanted, tmp_path / "store", IN_PROCESS)
    assert run.status == "finished" and len(run.store.table("prices")) > 0


ASKED = {name for each in (Evaluator, ModelEvaluator) for name in vars(each) if not name.startswith("_")}


def test_a_replica_in_this_process_answers_whatever_a_run_asks() -> None:
    from dtmsearch.model.replica.replica import Replica

    assert ASKED - {*vars(LocalReplicas), *vars(Replica)} == set()


def test_a_pool_answers_whatever_a_run_asks() -> None:
    from dtmsearch.cluster.pool import ReplicaPool

    assert ASKED - {*dir(ReplicaPool)} == set()


class Noting(LocalReplicas):
    """Notes when it is opened and closed."""

    told: ClassVar[list[str]] = []

    def __enter__(self) -> Self:
        self.told.append("opened")
        return self

    def __exit__(self, *_: object) -> None:
        self.told.append("closed")


def test_a_run_asks_the_evaluator_that_it_is_given(tmp_path: Path) -> None:
    def opened(file: dtm.SearchFile, where: dtm.Where) -> dtm.ModelEvaluator:
        return cast(dtm.ModelEvaluator, Noting(file.model_spec))

    found = dtm.run(search_of(tmp_path), tmp_path / "store", evaluator=opened)
    assert (found.status, Noting.told) == ("finished", ["opened", "closed"])


def test_a_search_in_this_process_is_estimated_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_cluster(*_: object) -> None:
        raise AssertionError("a pool was opened")

    monkeypatch.setattr("dtmsearch.cluster.pool.ReplicaPool.__init__", no_cluster)
    assert dtm.estimate(search_of(tmp_path), IN_PROCESS).evaluations > 1


def test_validating_finds_a_text_that_holds_too_few_prompts(tmp_path: Path) -> None:
    wanted = search_of(tmp_path)
    wanted["prompts"]["count"] = 10_000
    with pytest.raises(dtm.UserError, match="10000"):
        dtm.validate(wanted)


def test_every_member_of_a_public_type_says_what_it_is() -> None:
    kinds = (property, cached_property, FunctionType)
    types = {name: getattr(dtm, name) for name in dtm.__all__ if inspect.isclass(getattr(dtm, name))}
    members = {(name, key): value for name, one in types.items() for key, value in vars(one).items() if key[0] != "_"}
    assert len(types) > 20
    assert [key for key, value in members.items() if isinstance(value, kinds) and not value.__doc__] == []
