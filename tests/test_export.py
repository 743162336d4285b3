"""Exports: what is written measures as the store says, takes the bytes that are accounted for, and says what it is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exports import RUN, Measured, in_process, measured_plan
from safetensors.torch import load_file, save_file
from tiny import llama_config, replica, values, with_reference, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtmsearch.cli import main
from dtmsearch.cli.using import EXPORT_FORMATS
from dtmsearch.core.evaluation import EvalRequest, ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.core.plan_file import plan_from_json, plan_to_json
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import ExportFailed, UserError
from dtmsearch.export.formats.format_registry import FORMATS
from dtmsearch.export.job import Written, refuse
from dtmsearch.model.compress.rounding import round_weight
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.replica.exported import measure
from dtmsearch.workflows.export import export, publish, resolve, verify, write
from dtmsearch.workflows.export_check import check_bytes

MIXED = {
    "model.layers.0.self_attn.q_proj": "int4-g16",
    "model.layers.0.mlp.down_proj": "int3-g32-asym",
    "model.layers.1.self_attn.v_proj": "int8-channel",
    "model.layers.1.mlp.up_proj": "nf4",
    "model.layers.2.self_attn.o_proj": "int2-tensor",
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("mixed")
    return measured_plan(write_model(folder / "model"), folder / "store", MIXED)


def test_the_command_line_names_every_format() -> None:
    assert set(EXPORT_FORMATS) == set(FORMATS)


@pytest.mark.process
def test_a_dense_export_measures_as_recorded_in_a_fresh_process(mixed: Measured, tmp_path: Path) -> None:
    check = mixed.export("dense", tmp_path / "out").check
    assert check is not None and check.equal and check.fdt_measured < 12


def test_of_a_folder_that_is_only_measured_whole_passes_are_asked_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path)
    base = replica(folder)
    reference = with_reference(base)
    expected = values(base.evaluate([EvalRequest(Plan(), reference.id, (0, reference.num_prompts))])[0])
    starts: list[int] = []
    finish = Body.finish
    monkeypatch.setattr(
        Body, "finish", lambda body, tokens, state, start: starts.append(start) or finish(body, tokens, state, start)
    )
    monkeypatch.delattr(Body, "generate")
    found = measure(ModelSpec(str(folder), dtype="float32"), ReplicaSettings(num_threads=1), reference)
    assert values(found) == expected and starts and set(starts) == {0}


def test_a_dense_export_holds_the_rounded_weights(mixed: Measured, tmp_path: Path) -> None:
    mixed.export("dense", tmp_path / "out", check=False)
    before = load_file(Path(mixed.manifest.model) / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(after[f"{name}.weight"], round_weight(before[f"{name}.weight"], parse_scheme(MIXED[name])))


def test_what_the_plan_leaves_dense_is_untouched(mixed: Measured, tmp_path: Path) -> None:
    mixed.export("dense", tmp_path / "out", check=False)
    before = load_file(Path(mixed.manifest.model) / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    untouched = [name for name in before if name.removesuffix(".weight") not in MIXED]
    assert [name for name in untouched if not torch.equal(before[name], after[name])] == []


def test_a_folder_that_says_something_else_fails_the_export(
    mixed: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)

    dense = FORMATS["dense"]

    def write_wrongly(job, folder):  # type: ignore[no-untyped-def]
        written = dense.write(job, folder)
        tensors = load_file(written.files[0])
        tensors["model.layers.2.mlp.down_proj.weight"].neg_()
        save_file(tensors, written.files[0], metadata={"format": "pt"})
        return written

    from dataclasses import replace

    monkeypatch.setitem(FORMATS, "dense", replace(dense, write=write_wrongly))
    with pytest.raises(ExportFailed, match=r"FDT [0-9.]+ instead of [0-9.]+ \([-+][0-9.]+\)"):
        mixed.export("dense", tmp_path / "out")


def test_a_failed_export_leaves_no_folder_of_that_name(
    mixed: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtmsearch.workflows import export_check as check

    monkeypatch.setattr(check, "measure_apart", lambda *_: {"fdt": [0] * 6, "sdt": [0] * 6})
    with pytest.raises(ExportFailed):
        mixed.export("dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_stands_where_it_was_asked_for_once_it_is_published(mixed: Measured, tmp_path: Path) -> None:
    order = resolve(RUN, "dense", tmp_path / "out", str(mixed.store), check=False)
    assert list(tmp_path.iterdir()) == []
    draft = verify(write(order))
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert Path(publish(draft).folder) == tmp_path / "out" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_format_refuses_leaves_nothing_behind(mixed: Measured, tmp_path: Path) -> None:
    order = resolve(RUN, "compressed-tensors", tmp_path / "out", str(mixed.store), check=False)
    with pytest.raises(UserError, match="compressed-tensors cannot hold this plan"):
        write(order)
    assert list(tmp_path.iterdir()) == []


def test_every_chat_template_is_exported(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "TOOLS {{ messages[0].content }}"}
    tokenizer.save_pretrained(folder)
    measured_plan(folder, tmp_path / "store", MIXED).export("dense", tmp_path / "out", check=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_weights_that_the_configuration_names_are_exported_under_the_usual_name(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "best.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "best.safetensors")
    measured_plan(folder, tmp_path / "store", MIXED).export("dense", tmp_path / "out", check=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_sizes_reported_are_bytes_of_files(mixed: Measured, tmp_path: Path) -> None:
    files = mixed.export("dense", tmp_path / "out", check=False).files
    on_disk = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name != "README.md"}
    assert dict(files) == on_disk


def test_a_json_export_to_a_file_is_a_plan_file(mixed: Measured, tmp_path: Path) -> None:
    found = mixed.export("json", tmp_path / "plan.json")
    assert Path(found.folder) == tmp_path / "plan.json" and list(found.files) == ["plan.json"]
    text = (tmp_path / "plan.json").read_text()
    assert plan_from_json(text, mixed.manifest, "plan.json") == mixed.plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_an_interrupted_export_leaves_nothing_behind(
    mixed: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dtmsearch.workflows.export.measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mixed.export("dense", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["awq-int4-g16", "fp8-tensor"])
def test_a_plan_that_was_never_measured_has_no_calibration(mixed: Measured, tmp_path: Path, scheme: str) -> None:
    plan = Plan.of({"model.layers.0.mlp.up_proj": scheme})
    (tmp_path / "plan.json").write_text(plan_to_json(plan, mixed.manifest))
    with pytest.raises(UserError, match=r"the store holds no measurement of it.*dtmsearch evaluate FILE --plan PLAN"):
        export(str(tmp_path / "plan.json"), "compressed-tensors", tmp_path / "out", str(mixed.store), check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_refusal_names_a_few_components_and_how_many_more_there_are() -> None:
    said = str(refuse("dense", "no", [f"layers.{n}: w8a8" for n in range(9)]))
    assert said.splitlines()[-1] == "  and 4 more" and len(said.splitlines()) == 7


def test_a_json_export_is_the_plan(mixed: Measured, tmp_path: Path) -> None:
    mixed.export("json", tmp_path / "out")
    text = (tmp_path / "out" / "plan.json").read_text()
    assert plan_from_json(text, mixed.manifest, "plan.json") == mixed.plan


def test_a_plan_file_is_exported_like_its_run(mixed: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    mixed.export("json", tmp_path / "json")
    check = export(str(tmp_path / "json" / "plan.json"), "dense", tmp_path / "out", str(mixed.store)).check
    assert check is not None and check.equal


def test_a_plan_that_nobody_measured_is_not_exported_unchecked(mixed: Measured, tmp_path: Path) -> None:
    mixed.export("json", tmp_path / "json")
    plan = tmp_path / "json" / "plan.json"
    content = json.loads(plan.read_text())
    content["schemes"] = {"model.layers.0.mlp.up_proj": "int8-tensor"}
    plan.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="holds no measurement of this plan"):
        export(str(plan), "dense", tmp_path / "out", str(mixed.store))


def test_the_card_says_what_the_folder_is(mixed: Measured, tmp_path: Path) -> None:
    mixed.export("dense", tmp_path / "out", check=False)
    card = (tmp_path / "out" / "README.md").read_text()
    wanted = [f"base_model: {mixed.manifest.model}", mixed.plan.id, "`int4-g16`", "dtmsearch export mine --to dense"]
    assert [text for text in wanted if text not in card] == []


def test_a_folder_with_something_in_it_is_not_overwritten(mixed: Measured, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="new or empty"):
        mixed.export("dense", tmp_path)


def test_activations_that_are_rounded_have_no_dense_form(tmp_path: Path) -> None:
    plan = {"model.layers.0.mlp.up_proj": "w8a8"}
    measured = measured_plan(write_model(tmp_path / "model"), tmp_path / "store", plan)
    with pytest.raises(ValueError, match=r"rounds activations as well[^$]*\n  model.layers.0.mlp.up_proj: w8a8"):
        measured.export("dense", tmp_path / "out")


def test_a_large_model_goes_into_several_files(
    mixed: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtmsearch.export import writer as folder

    monkeypatch.setattr(folder, "_LEAST_SHARD_BYTES", 1)
    exported = mixed.export("dense", tmp_path / "out", check=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len([name for name in exported.files if name.endswith(".safetensors")]) > 2


def test_the_verb_exports_and_says_so_in_json(
    mixed: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_process(monkeypatch)
    out = str(tmp_path / "out")
    assert main(["export", RUN, "--to", "dense", "--out", out, "--store", str(mixed.store), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["check"]["differing"] == 0


def test_half_precision_is_exported_as_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    config = llama_config(tie_word_embeddings=True, dtype="bfloat16")
    measured = measured_plan(write_model(tmp_path / "model", config), tmp_path / "store", "int4-g16")
    check = measured.export("dense", tmp_path / "out").check
    assert check is not None and check.equal


def test_files_of_other_bytes_than_the_plan_accounts_for_are_an_error(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(4)}, tmp_path / "model.safetensors")
    job = SimpleNamespace(plan_bits=8 * 17)
    with pytest.raises(ExportFailed, match=r"holds 16 bytes of tensors, where 16 were written .* accounts for 17"):
        check_bytes(job, Written((tmp_path / "model.safetensors",), tensor_bytes=16))  # type: ignore[arg-type]


@pytest.mark.parametrize(("to", "library"), [("compressed-tensors", "compressed_tensors"), ("gguf-recipe", "gguf")])
def test_a_missing_library_is_said_before_anything_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, library: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else found(name))
    with pytest.raises(UserError, match=rf"^{to} needs an extra: pip install"):
        export("no-such-run", to, tmp_path / "out", str(tmp_path / "no-such-store"))
