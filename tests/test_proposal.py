"""Beginning: a search file made for a model and a machine, files checked, the schema, completion."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from click.shell_completion import ShellComplete
from reported import make_run
from safetensors.torch import save_file
from tiny import DEMO_MODEL

from dtmsearch.cli import cli, main
from dtmsearch.config import json_schema, load, parse
from dtmsearch.workflows.init_config import Machine, ModelFacts, NamedText, propose, read_model

GIB = 1 << 30
CONFIGS = Path(__file__).parent.parent / "configs"
LARGE = ModelFacts("/models/large", "LlamaForCausalLM", 80, 70_000_000_000, "bfloat16", 8192)


def proposed(model: ModelFacts, machine: Machine) -> str:
    return propose(model, machine, NamedText("calibration.txt"), NamedText("validation.txt")).text


def test_a_models_facts_come_from_its_headers() -> None:
    facts = read_model(str(DEMO_MODEL))
    assert (facts.architecture, facts.num_layers) == ("LlamaForCausalLM", 6) and facts.num_weights > 100_000


def test_what_is_proposed_is_a_search_file() -> None:
    machine = Machine((), 16 * GIB, 4)
    file = parse(proposed(read_model(str(DEMO_MODEL)), machine), "proposed", Path())
    assert (file.run, file.model.dtype, file.search.strategy) == ("model", "float32", "auto")


def test_on_gpus_the_model_keeps_its_dtype() -> None:
    file = parse(proposed(LARGE, Machine((141 * GIB,) * 4, None, 64)), "proposed", Path())
    assert file.model.dtype == "bfloat16"


def test_a_model_larger_than_a_gpu_is_spread_over_several() -> None:
    assert "--gpus-per-replica 3" in proposed(LARGE, Machine((80 * GIB,) * 4, None, 64))


def test_weights_of_a_model_larger_than_all_gpus_pass_through_one() -> None:
    assert "--weights streamed" in proposed(LARGE, Machine((80 * GIB,), None, 64))


def test_a_model_that_fits_nowhere_is_said() -> None:
    with pytest.raises(ValueError, match=r"run on a larger machine, or on a cluster"):
        proposed(LARGE, Machine((), 16 * GIB, 4))


def test_a_model_with_a_short_context_gets_short_windows() -> None:
    short = ModelFacts("/models/short", "GPT2LMHeadModel", 2, 1_000, "float32", 64)
    file = parse(proposed(short, Machine((), GIB, 1)), "proposed", Path())
    assert file.prompts.prompt_tokens + file.prompts.continuation_tokens == 64


def test_a_model_that_groups_do_not_divide_gets_schemes_that_can_be_exported() -> None:
    uneven = ModelFacts("/models/uneven", "LlamaForCausalLM", 5, 260_000, "float32", 512, largest_group=0)
    file = parse(proposed(uneven, Machine((), GIB, 1)), "proposed", Path())
    assert file.search.schemes == ("int8-channel", "int6-channel", "int4-channel", "int3-channel")


def test_headers_say_which_groups_divide_every_matrix(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    for inputs, largest in ((64, 64), (172, 0), (768, 256)):
        save_file({"down.weight": torch.zeros(64, inputs), "norm.weight": torch.zeros(7)}, weights)
        assert read_model(str(tmp_path)).largest_group == largest


def test_init_prints_a_search_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", str(DEMO_MODEL)]) == 0
    assert parse(capsys.readouterr().out, "stdout", tmp_path).run == "model" and not list(tmp_path.iterdir())


def test_init_writes_no_file_over_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", str(DEMO_MODEL), "--out", "search.yaml"]) == 0
    assert capsys.readouterr().out.strip() == "search.yaml" and (tmp_path / "search.yaml").is_file()
    assert main(["init", str(DEMO_MODEL), "--out", "search.yaml"]) == 2
    assert "--force" in capsys.readouterr().err


def test_init_says_which_texts_to_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("text")
    assert main(["init", str(DEMO_MODEL), "--prompts", "mine.txt"]) == 0
    said = capsys.readouterr().err
    assert "'validation.txt'" in said and "--validation" in said and "--prompts" not in said


def test_texts_under_usual_names_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "test.parquet"):
        (tmp_path / name).write_text("text")
    assert main(["init", str(DEMO_MODEL), "--quick"]) == 0
    said = capsys.readouterr()
    file = parse(said.out, "stdout", tmp_path)
    assert file.prompts.files == ("train.jsonl",) and "bring" not in said.err.lower()


def test_for_a_text_that_is_not_there_a_data_set_can_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", str(DEMO_MODEL), "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    with_dataset = "\n".join(line.replace("  # dataset:", "  dataset:") for line in lines if "TO BRING" not in line)
    file = parse(with_dataset, "stdout", tmp_path)
    assert file.prompts.dataset is not None and file.prompts.dataset.column == "text"


def test_init_ends_with_the_whole_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", str(DEMO_MODEL), "--quick", "--for", "vllm", "--out", "mine.yaml"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[-4:] == [
        "next:",
        "  dtmsearch validate mine.yaml",
        "  dtmsearch run mine.yaml --in-process",
        "  dtmsearch export model --to compressed-tensors --runtime vllm --out model-vllm",
    ]


def test_on_a_busy_machine_and_in_haste_init_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.getloadavg = lambda: (999.0, 0.0, 0.0)\n"
        "from dtmsearch.cli import main\n"
        f"assert main(['init', {str(DEMO_MODEL)!r}]) == 0 == main(['init', {str(DEMO_MODEL)!r}, '--quick'])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "this machine is busy, so only headers are read" in done.stderr


def test_code_of_its_own_is_left_for_the_user_to_allow() -> None:
    own = ModelFacts("/models/own", "OwnForCausalLM", 2, 1_000, "float32", 64, own_code=True)
    assert "# trust_remote_code: true" in proposed(own, Machine((), GIB, 1))


def test_a_search_file_in_another_folder_names_the_texts_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "mine.txt").write_text("text")
    assert main(["init", str(DEMO_MODEL), "--prompts", "mine.txt", "--out", "configs/search.yaml"]) == 0
    assert load(tmp_path / "configs" / "search.yaml").prompts.files == (str(tmp_path / "mine.txt"),)


def test_init_says_what_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["init", "nobody/nothing"]) == 2
    assert "hf download nobody/nothing" in capsys.readouterr().err


def test_validate_says_that_a_file_is_good(capsys: Any) -> None:
    assert main(["validate", str(CONFIGS / "llama-demo.yaml")]) == 0
    assert "is a search file: run llama-demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("search.widht=3", "did you mean 'search.width'?"),
        ("prompts.files=[nosuch.txt]", "no prompt file 'nosuch.txt'"),
        ("model.path=./nosuch", "no model at"),
    ],
)
def test_validate_says_what_is_wrong(override: str, words: str, capsys: Any) -> None:
    assert main(["validate", str(CONFIGS / "llama-demo.yaml"), "--set", override]) == 2
    assert words in capsys.readouterr().err


def test_the_schema_that_is_kept_is_the_programs(capsys: Any) -> None:
    kept = Path(__file__).parent.parent / "docs" / "search-file.schema.json"
    assert main(["schema"]) == 0
    assert kept.read_text() == json_schema() == capsys.readouterr().out


def test_the_schema_takes_what_the_program_takes() -> None:
    schema = json.loads(json_schema())
    content = yaml.safe_load((CONFIGS / "llama-demo.yaml").read_text())
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"prompst": {}}, schema)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_comes_as_a_script(shell: str, capsys: Any) -> None:
    assert main(["completion", shell]) == 0
    assert "_DTMSEARCH_COMPLETE" in capsys.readouterr().out


def test_a_runs_name_is_completed_from_the_store(tmp_path: Path) -> None:
    url = make_run(tmp_path, status="running").url
    words = ShellComplete(cli, {}, "dtmsearch", "_DTMSEARCH_COMPLETE").get_completions(["status", "--store", url], "t")
    assert [word.value for word in words] == ["toy"]
