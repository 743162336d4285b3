from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fakes import request_for, run_search, toy_components
from numpy.typing import NDArray
from solving import errors_of
from stores import run_record

from dtmsearch.config import SearchFile, SearchSection, difference, json_schema, load, parse, recorded, texts
from dtmsearch.config.search_section import BUILT_IN_STRATEGIES, USED_BY
from dtmsearch.core.components import blocks_of
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.strategy_settings import AutoSettings, PruningSettings, TreeSettings
from dtmsearch.errors import UserError
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.strategy_registry import SolverSettings, make_strategy

TEXT = """
run: toy
model: {path: models/toy}
prompts: {files: [calibration.txt], count: 8, prompt_tokens: 20}
validation: {files: [validation.txt], count: 4}
search:
  schemes: [int8-channel]
  stop: {share: 0.8}
"""


def read(text: str = TEXT, *overrides: str) -> SearchFile:
    return parse(text, "search.yaml", Path(), overrides)


def test_what_is_not_written_has_its_default() -> None:
    search = read().search
    assert (search.strategy, search.rank_by, search.width, search.expand) == ("beam", "fdt", 10, "all")


@pytest.mark.parametrize(
    ("override", "read_back", "value"),
    [
        ("search.width=4", lambda f: f.search.width, 4),
        ("search.schemes=[nf4, int4-g128]", lambda f: f.search.schemes, ("nf4", "int4-g128")),
        ("search.stop.share=null", lambda f: f.search.stop.share, None),
        ("search.expand=5", lambda f: f.search.expand, 5),
        ("search.components.exclude=['*.0.*']", lambda f: f.search.components.exclude, ("*.0.*",)),
        ("model.dtype=float32", lambda f: f.model.dtype, "float32"),
        ("seed=7", lambda f: f.seed, 7),
    ],
)
def test_an_override_sets_any_key(override: str, read_back: Any, value: object) -> None:
    assert read_back(read(TEXT, override)) == value


def test_the_last_override_of_a_key_counts() -> None:
    assert read(TEXT, "search.width=4", "search.width=5").search.width == 5


def test_an_override_of_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'search.widht'; did you mean 'search.width'\?"):
        read(TEXT, "search.widht=4")


@pytest.mark.parametrize("override", ["search.width", "=4", ""])
def test_an_override_without_key_or_value_is_an_error(override: str) -> None:
    with pytest.raises(ValueError, match="--set takes KEY=VALUE"):
        read(TEXT, override)


@pytest.mark.parametrize("override", ["search.components.include=[*attn*]", "model.path=[1"])
def test_an_override_that_is_no_yaml_says_to_quote(override: str) -> None:
    with pytest.raises(ValueError, match=r"the value is not YAML: .* Quote"):
        read(TEXT, override)


def test_an_override_below_a_value_is_an_error() -> None:
    with pytest.raises(ValueError, match="run is a value, not a section"):
        read(TEXT, "run.name=x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sede: 3", "unknown key 'sede'; did you mean 'seed'"),
        ("strategy: beam", "unknown key 'strategy'; did you mean 'search.strategy'"),
        (
            "xyzzy: 3",
            "unknown key 'xyzzy'; known keys there are run, model, prompts, validation, calibration, search, seed",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_or_all(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(TEXT + line)


def test_an_unknown_key_of_a_section_names_the_nearest_there() -> None:
    with pytest.raises(
        ValueError, match=r"search.yaml: unknown key 'search.stop.shares'; did you mean 'search.stop.share'"
    ):
        read(TEXT.replace("share:", "shares:"))


def test_an_unknown_scheme_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"search\.schemes: unknown scheme 'int8-chanel'; the nearest is 'int8-channel'"
    ):
        read(TEXT.replace("int8-channel", "int8-chanel"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schemes: [int8-channel]", "schemes: [dense]", "dense is where every search starts"),
        ("schemes: [int8-channel]", "schemes: [nf4, nf4]", "a scheme stands there twice"),
        ("schemes: [int8-channel]", "schemes: []", "search.schemes"),
        ("  schemes: [int8-channel]\n", "", "search.schemes is missing"),
        ("share: 0.8", "share: 80", "search.stop.share: .* got 80"),
        ("run: toy", "run: a/b", "run: .* got 'a/b'"),
        ("files: [calibration.txt], ", "", "give either files or dataset"),
        ("count: 8", "count: 0", "prompts.count: .* got 0"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_key_and_value(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(TEXT.replace(old, new))


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)search\.stop\.share.*unknown key 'sede'"):
        read(TEXT.replace("0.8", "80") + "sede: 3")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_a_text_that_is_no_mapping_is_no_search_file(text: str) -> None:
    with pytest.raises(ValueError, match="is no search file"):
        read(text)


def test_broken_yaml_is_an_error_that_names_the_file() -> None:
    with pytest.raises(ValueError, match=r"search\.yaml is not YAML"):
        read("run: [")


def test_yaml_that_would_make_objects_is_refused() -> None:
    with pytest.raises(ValueError, match=r"search\.yaml is not YAML"):
        read("run: !!python/object/apply:os.getcwd []")


def test_a_missing_search_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no search file at"):
        load(tmp_path / "search.yaml")


def test_a_folder_is_no_search_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the search file"):
        load(tmp_path)


def test_validation_takes_from_the_prompts_what_it_does_not_set() -> None:
    prompts = read().validation_prompts
    assert prompts is not None
    assert (prompts.files, prompts.count, prompts.prompt_tokens) == (("validation.txt",), 4, 20)


def test_without_a_validation_section_there_are_no_validation_prompts() -> None:
    text = TEXT.replace("validation: {files: [validation.txt], count: 4}\n", "")
    assert read(text).validation_prompts is None


def test_a_validation_data_set_replaces_the_files_of_the_prompts() -> None:
    prompts = read(TEXT.replace("files: [validation.txt]", "dataset: {path: wiki}")).validation_prompts
    assert prompts is not None
    assert (prompts.files, prompts.dataset and prompts.dataset.path) == ((), "wiki")


def test_the_budget_holds_the_rules_of_size_only() -> None:
    assert read(TEXT, "search.stop.min_fdt=50", "search.stop.size_mb=3").search.stop.budget == Budget(
        share=0.8, size_mb=3
    )


def test_a_path_starts_at_the_folder_of_the_search_file(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(TEXT)
    (tmp_path / "calibration.txt").write_text("text")
    assert load(tmp_path / "search.yaml").resolve("calibration.txt") == tmp_path / "calibration.txt"


def test_a_path_that_is_not_there_starts_at_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "search.yaml").write_text(TEXT)
    (tmp_path / "calibration.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path / "files" / "search.yaml").resolve("calibration.txt").read_text() == "text"


def test_a_model_that_lies_beside_the_search_file_is_loaded_from_there(tmp_path: Path) -> None:
    (tmp_path / "models" / "toy").mkdir(parents=True)
    (tmp_path / "search.yaml").write_text(TEXT)
    assert load(tmp_path / "search.yaml").model_spec.path == os.fspath(tmp_path / "models" / "toy")


def test_a_model_that_is_no_folder_keeps_its_name_for_the_hub() -> None:
    assert read(TEXT.replace("models/toy", "meta-llama/Llama-2-7b-hf")).model_spec.path == "meta-llama/Llama-2-7b-hf"


def test_a_file_reads_back_from_its_own_yaml() -> None:
    assert read(read().to_yaml()) == read()


def test_held_out_prompts_are_the_same_from_a_file_written_out_in_full() -> None:
    file = read(TEXT, "prompts.seed=5", "validation.seed=0")
    assert read(file.to_yaml()).validation_prompts == file.validation_prompts


def test_files_that_mean_the_same_do_not_differ() -> None:
    assert difference(read().to_yaml(), read(TEXT + "seed: 0\n").to_yaml()) == []


def test_the_difference_of_two_files_names_keys_and_values() -> None:
    other = read(TEXT, "search.width=4", "search.stop.share=null", "search.stop.components=3")
    assert sorted(difference(read().to_yaml(), other.to_yaml())) == [
        "search.stop.components: None -> 3",
        "search.stop.share: 0.8 -> None",
        "search.width: 10 -> 4",
    ]


def test_the_difference_shows_sections_that_only_one_file_has() -> None:
    bare = read(TEXT.replace("validation: {files: [validation.txt], count: 4}\n", ""))
    assert "validation.count: unset -> 4" in difference(bare.to_yaml(), read().to_yaml())


@pytest.mark.parametrize("name", sorted(set(BUILT_IN_STRATEGIES) - {"sparsity", "mc_moe"}))
def test_every_strategy_that_a_file_may_name_can_be_made(name: str) -> None:
    blocks = blocks_of(toy_components()) if name == "floating" else ()
    space = SearchSpace(toy_components(), ("nf4",), blocks=blocks, budget=Budget(blocks=1) if blocks else Budget())
    options = len(space.components), len(space.schemes)

    def take(_kind: str, _around: Plan, samples: tuple[int, int]) -> NDArray[np.float32]:
        return np.ones((samples[1] - samples[0], *options), np.float32)

    settings = SolverSettings(errors=errors_of(space), take=take)
    assert make_strategy(name, space, request_for, continuation_tokens=8, solver=settings).ask()


def test_greedy_is_a_beam_of_width_one() -> None:
    greedy = make_strategy("greedy", SearchSpace(toy_components(), ("nf4",)), request_for, tree=TreeSettings(width=10))
    beam = make_strategy("beam", SearchSpace(toy_components(), ("nf4",)), request_for, tree=TreeSettings(width=1))
    run_search(greedy)
    run_search(beam)
    assert greedy.decisions == beam.decisions


HEAD = "run: toy\nmodel: {path: toy}\nprompts: {files: [a.txt]}\n"


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ("rounds: [60, 45]", r"rounds add up to 105 points, but there are 100"),
        ("cap: 0.9", r"needs rounds, such as \[20, 15, 10\], or stop.sparsity"),
        ("rounds: [20]\n  schemes: [magnitude-0.5]", "no schemes"),
        ("rounds: [20]\n  recovery: {files: [a], masked_steps: 0, unmasked_steps: 0}", "are all 0"),
        ("rounds: [20]\n  recovery: {files: [a], repair_tokens: 4096}", "sparsity prunes weight by weight"),
        ("rounds: [20]\n  recovery: {files: [a], batch_tokens: 256}", "batch_tokens 256 is less than 1 x"),
    ],
)
def test_a_sparsity_search_that_cannot_be_is_explained(rounds: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(f"{HEAD}search:\n  strategy: sparsity\n  {rounds}\n", "search.yaml", Path())


@pytest.mark.parametrize(
    ("strategy", "key", "users"),
    [
        ("greedy", "width: 10", "search.width is a key of beam, lazy_beam"),  # also where the value is the default
        ("auto", "expand: 3", "search.expand is a key of greedy, beam, lazy_greedy, lazy_beam"),
        ("knapsack", "confidence: 0.99", "search.confidence is a key of greedy, beam"),
        ("beam", "audit: 0.1", "search.audit is a key of lazy_greedy, lazy_beam"),
        ("beam", "auto: {rounds: 2}", "search.auto is a key of auto, sensitivity"),
        ("sensitivity", "auto: {probe_prompts: 2, rounds: 2}", r"search.auto.rounds is a key of auto"),
        ("auto", "knapsack: {prompts: 8}", "search.knapsack is a key of knapsack"),
        ("beam", "rounds: [20]", "search.rounds is a key of sparsity"),
        ("beam", "recovery: {files: [a]}", "search.recovery is a key of sparsity"),
    ],
)
def test_a_key_of_other_strategies_is_an_error_that_names_them(strategy: str, key: str, users: str) -> None:
    text = f"{HEAD}search:\n  strategy: {strategy}\n  schemes: [nf4]\n  {key}\n"
    with pytest.raises(UserError, match=f"{strategy} does not use every key that is given: {users}"):
        parse(text, "search.yaml", Path())


def test_every_key_that_only_some_strategies_use_is_one_of_the_files() -> None:
    known = {*SearchSection.model_fields, *(f"auto.{field.name}" for field in dataclasses.fields(AutoSettings))}
    assert set(USED_BY) <= known
    assert {user for users in USED_BY.values() for user in users} <= set(BUILT_IN_STRATEGIES)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("search.auto.sample=3", "unknown key 'search.auto.sample'; did you mean 'search.auto.samples'?"),
        ("search.auto.plans=0", "search.auto.plans: Input should be greater than or equal to 1, got 0"),
        (f"search.auto.rounds={2**60}", f"rounds is larger than {2**53}"),
    ],
)
def test_a_strategys_settings_are_checked_as_every_section_is(change: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        read(TEXT, "search.strategy=auto", "search.width=null", change)


def test_a_size_that_pruning_reaches_in_small_matrices_is_not_refused() -> None:
    # 768 x 768 under it takes 0.68 bits per weight; in the largest, where a weight's place takes more, 1.02.
    schemes = "search.schemes=[int2-channel+magnitude-0.97]"
    file = read(TEXT, "search.strategy=auto", "search.width=null", schemes, "search.stop={bits_per_weight: 0.9}")
    assert file.search.stop.bits_per_weight == 0.9


def test_what_a_file_says_of_a_strategy_is_what_its_constructor_takes() -> None:
    assert read(TEXT, "search.strategy=auto", "search.width=null", "search.auto.plans=3").search.auto == AutoSettings(
        plans=3
    )


def test_a_key_set_to_null_is_left_out() -> None:
    file = read(TEXT, "search.width=4", "search.strategy=greedy", "search.width=null")
    assert file.search.strategy == "greedy"


@pytest.mark.parametrize("strategy", BUILT_IN_STRATEGIES)
def test_a_file_that_is_written_out_is_read_again(strategy: str) -> None:
    rest = {"sparsity": "rounds: [20]", "floating": "drop: [mlp]\n  stop: {blocks: 2}"}.get(strategy, "schemes: [nf4]")
    file = parse(f"{HEAD}search:\n  strategy: {strategy}\n  {rest}\n", "search.yaml", Path())
    assert parse(file.to_yaml(), "search.yaml", Path()) == file


def test_what_an_older_dtmsearch_recorded_is_read_with_the_keys_that_it_did_not_use() -> None:
    written = yaml.safe_load(read(TEXT, "search.strategy=greedy").to_yaml())
    written["search"] |= {"width": 4, "auto": {"rounds": 5}, "recovery": None, "rounds": []}
    assert recorded(run_record(config=yaml.safe_dump(written))).search == read(TEXT, "search.strategy=greedy").search


def test_a_single_sparsity_is_a_single_round() -> None:
    text = f"{HEAD}search:\n  strategy: sparsity\n  stop: {{sparsity: 0.5}}\n"
    assert parse(text, "search.yaml", Path()).search.pruning_rounds == (50.0,)


def test_every_key_of_a_search_file_has_a_description() -> None:
    schema = json.loads(json_schema())
    sections = {"": schema, **schema["$defs"]}
    keys = {f"{name}.{key}": value for name, part in sections.items() for key, value in part["properties"].items()}
    assert [key for key, value in keys.items() if not value.get("description")] == []


# Texts as people have them.


def documents(tmp_path: Path, name: str, content: bytes) -> list[str]:
    (tmp_path / name).write_bytes(content)
    return texts.read_files(parse(TEXT, "search.yaml", tmp_path), [name])


def test_each_row_of_json_lines_is_a_document(tmp_path: Path) -> None:
    assert documents(tmp_path, "a.jsonl", b'{"text": "one"}\n\n{"text": "two", "id": 7}\n') == ["one", "two"]


def test_each_row_of_a_parquet_file_is_a_document(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["one", None, "two"]}), tmp_path / "made.parquet")
    content = (tmp_path / "made.parquet").read_bytes()
    assert documents(tmp_path, "a.parquet", content) == ["one", "two"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_says_the_same_in_every_encoding_with_a_mark(tmp_path: Path, encoding: str) -> None:
    assert documents(tmp_path, "a.txt", "Grüße, 世界".encode(encoding)) == ["Grüße, 世界"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\x7fELF\x02\x01\x01\x00\x00", "is no text: it holds zero bytes"),
        ("a.txt", "text".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("a.jsonl", b'{"text": "one"}\n{"text"', "line 2 of .*a.jsonl is no JSON"),
        ("a.jsonl", b'{"body": "one"}', "line 1 of .*a.jsonl has no text in a field 'text': its fields are 'body'"),
        ("a.parquet", b"PAR1 or not", "no Parquet file, or a damaged one"),
    ],
)
def test_what_holds_no_text_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        documents(tmp_path, name, content)


def test_what_else_ends_lines_may_stand_in_a_string_of_json(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one\u2028line"}\r\n{"text": "and\u0085one"}\n', encoding="utf-8")
    file = parse(TEXT.replace("text.txt", "rows.jsonl"), "search.yaml", tmp_path)
    assert texts.read_files(file, ("rows.jsonl",)) == ["one\u2028line", "and\u0085one"]


def test_a_search_file_has_the_defaults_of_the_strategies_settings() -> None:
    search = read().search
    assert (search.tree, search.pruning) == (TreeSettings(), PruningSettings())
