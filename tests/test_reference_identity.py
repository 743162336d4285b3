"""A reference's identity holds all that decides a continuation; what decides none is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inprocess import run_here
from processes import tiny_search
from tiny import TEXT, open_texts, replica, with_reference, write_model

from dtmsearch import config
from dtmsearch.core.evaluation import METRICS_VERSION, ModelSpec, PromptTokens, ReplicaSettings, reference_id
from dtmsearch.core.generation_rules import GenerationRules
from dtmsearch.core.identity import identity
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.errors import UserError
from dtmsearch.model.modules.discovery import read_manifest
from dtmsearch.model.replica.replica import Replica
from dtmsearch.store.store import ResultStore


def change(file: Path, **values: object) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def reference_id_of(folder: Path, trust: bool = False) -> str:
    model = Replica(ModelSpec(str(folder), dtype="float32", trust_remote_code=trust), ReplicaSettings(num_threads=1))
    return model.cut_prompts([TEXT], 4, 10, 12, 0)[1]


def correct_end_token(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[257, 10])


def name_another_end_token(folder: Path) -> None:
    change(folder / "tokenizer_config.json", eos_token="~")


def merge_two_letters(folder: Path) -> None:
    """A merge that no text of the prompts needs."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["ÿÿ"] = 258
    content["model"]["merges"] = [["ÿ", "ÿ"]]
    change(folder / "tokenizer.json", **content)


@pytest.mark.parametrize(
    ("device", "continuation", "other"), [("cuda", 1, True), ("cuda", 2, False), ("cpu", 1, False)]
)
def test_values_of_single_tokens_that_gpus_got_wrong_are_not_used_again(
    device: str, continuation: int, other: bool
) -> None:
    prompts = PromptTokens(np.ones((2, 5 + continuation), np.int32), 5)
    mode, rules = NumericMode("float32", device, "sdpa"), GenerationRules((), (), "tokenizer")
    was = {"manifest": "model", "mode": str(mode), "prompt_tokens": 5, "rules": asdict(rules)}
    before = identity(was | {"tokens": prompts.tokens.tolist(), "version": METRICS_VERSION})
    assert (reference_id("model", mode, prompts, rules) != before) == other


@pytest.mark.parametrize("changed", [correct_end_token, name_another_end_token, open_texts, merge_two_letters])
def test_what_decides_a_continuation_is_in_a_references_identity(
    changed: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = write_model(tmp_path)
    before = reference_id_of(folder)
    changed(folder)
    assert reference_id_of(folder) != before


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}),  # no prompt is written by it
        ("tokenizer_config.json", {"model_max_length": 77}),
        ("generation_config.json", {"temperature": 0.7, "do_sample": True}),  # every token is the likeliest
    ],
)
def test_what_decides_no_continuation_is_left_out(file: str, values: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    before = reference_id_of(folder)
    change(folder / file, **values)
    assert reference_id_of(folder) == before


def with_own_code(folder: Path, factor: float) -> Path:
    """The model as a class of its own code, which scales its logits."""
    write_model(folder)
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"}, architectures=["Own"])
    (folder / "own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n"
        "class Own(LlamaForCausalLM):\n"
        f"    factor = {factor}\n\n"
        "    def forward(self, *args, **kwargs):\n"
        "        output = super().forward(*args, **kwargs)\n"
        "        output.logits = output.logits * self.factor\n"
        "        return output\n"
    )
    return folder


def test_code_that_comes_with_a_model_is_part_of_what_the_model_is(tmp_path: Path) -> None:
    spec = ModelSpec(str(with_own_code(tmp_path, 1.0)), trust_remote_code=True)
    before = read_manifest(spec).id
    with_own_code(tmp_path, -1.0)
    assert read_manifest(spec).id != before


def test_code_that_does_not_run_is_not(tmp_path: Path) -> None:
    spec = ModelSpec(str(write_model(tmp_path)))
    before = read_manifest(spec).id
    (tmp_path / "train.py").write_text("print('how it was trained')\n")
    assert read_manifest(spec).id == before


def test_a_reference_comes_back_from_the_store_with_the_rules_that_made_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    open_texts(folder)
    made = with_reference(replica(folder), count=2)
    with ResultStore(tmp_path / "store").writer("run") as writer:
        stored = writer.share(made)
    assert stored.rules == made.rules == replica(folder).conditions()[1]
    assert stored.rules.opening == (256,)


def begun(tmp_path: Path) -> tuple[Path, Path]:
    """A search that was stopped after its end: (its file, its model's folder)."""
    file = tiny_search(tmp_path, search={"strategy": "probe", "schemes": ["int8-channel"]})
    run_here(file, tmp_path / "store")
    search = config.load(str(file))
    results = ResultStore(tmp_path / "store")
    with results.writer(search.run) as writer:
        record = results.run(search.run)
        assert record is not None
        writer.put_run(replace(record, status="stopped", finished_at=None))
    return file, Path(search.model_spec.path)


def go_on(file: Path, store: Path) -> None:
    run_here(file, store)


def test_a_run_whose_model_has_got_another_end_token_is_not_continued(tmp_path: Path) -> None:
    file, folder = begun(tmp_path)
    correct_end_token(folder)
    with pytest.raises(UserError, match="end-of-text tokens 10, 257, not 257"):
        go_on(file, tmp_path / "store")


def test_a_run_whose_tokenizer_has_changed_is_not_continued(tmp_path: Path) -> None:
    file, folder = begun(tmp_path)
    merge_two_letters(folder)
    with pytest.raises(UserError, match=r"other tokenizer files.*--set run="):
        go_on(file, tmp_path / "store")


def test_a_run_of_an_older_dtmsearch_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = begun(tmp_path)
    monkeypatch.setattr("dtmsearch.core.evaluation.METRICS_VERSION", 99)
    with pytest.raises(UserError, match="by an older dtmsearch"):
        go_on(file, tmp_path / "store")


def test_a_run_whose_model_is_as_it_was_is_continued(tmp_path: Path) -> None:
    file, _ = begun(tmp_path)
    go_on(file, tmp_path / "store")
    record = ResultStore(tmp_path / "store").run(config.load(str(file)).run)
    assert record is not None and record.status == "finished"


def test_a_replica_refuses_a_reference_that_was_made_with_other_end_tokens(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    made = with_reference(replica(folder))
    correct_end_token(folder)
    with pytest.raises(UserError, match=r"end-of-text tokens 257; .* has 10, 257"):
        replica(folder).use(made)
