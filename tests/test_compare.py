"""Two models compared: what a difference comes to, whatever holds them, and what is refused."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reported
import torch
from completions import Behaviour, Dialect, serving
from exports import in_process, measured_plan
from fakes import MODE
from reported import model_comparison
from rich.cells import cell_len
from tiny import TEXT, llama_config, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import dtmsearch as dtm
from dtmsearch.analysis.model_comparison import ModelComparison, compared
from dtmsearch.cli import main
from dtmsearch.console import terminal_tables
from dtmsearch.console.comparison_text import comparison_text
from dtmsearch.core.evaluation import Reference
from dtmsearch.core.positions import Likeliest, Positions, common, least_kl
from dtmsearch.workflows import served_model

LENGTHS = {"count": 10, "prompt_tokens": 12, "continuation_tokens": 8}
SETTINGS: dict[str, Any] = {**LENGTHS, "dtype": "float32"}
PLAN = "uniform:int6-channel"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the same under a plan."""
    base = write_model(tmp_path_factory.mktemp("base"))
    other = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    dtm.apply(PLAN, model).save_pretrained(other)
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    return base, other


@pytest.fixture(scope="module")
def local(folders: tuple[Path, Path]) -> ModelComparison:
    return dtm.compare(*folders, TEXT, **SETTINGS)


def test_a_planted_difference_is_what_measure_finds(folders: tuple[Path, Path], local: ModelComparison) -> None:
    base = folders[0]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    planted = dtm.measure(model, AutoTokenizer.from_pretrained(base), TEXT, PLAN, **LENGTHS)
    measured = planted.per_prompt.to_pydict()
    assert local.per_prompt["fdt"] == measured["fdt"] and local.per_prompt["sdt"] == measured["sdt"]
    for name in ("kl", "ppl", "dppl"):
        np.testing.assert_allclose(local.per_prompt[name], measured[name], rtol=1e-4)


def test_identical_models_are_not_told_apart(folders: tuple[Path, Path]) -> None:
    found = dtm.compare(folders[0], folders[0], TEXT, **SETTINGS)
    assert found.same and "every choice and probability is" in found.verdict
    assert found.values["kl"].mean == 0.0 and found.texts == ()


def test_percentiles_are_of_positions_and_flips_of_choices(local: ModelComparison) -> None:
    assert list(local.kl_percentiles) == ["50", "90", "95", "100"]  # 80 positions show no 99th
    assert local.kl_percentiles["50"] < local.values["kl"].mean < local.kl_percentiles["100"]
    assert local.values["flips"].mean == pytest.approx(local.values["sdt"].mean / LENGTHS["continuation_tokens"])


def test_models_of_other_widths_are_compared_by_their_own_heads(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """KL of a model of another width, against plain code."""
    wide = write_model(tmp_path, llama_config(hidden_size=48), seed=3)
    found = dtm.compare(folders[0], wide, TEXT, **SETTINGS)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (folders[0], wide)]
    worst = found.texts[0]
    start = AutoTokenizer.from_pretrained(folders[0])(worst.prompt_text)["input_ids"]
    with torch.inference_mode():
        row = torch.tensor([[*start, *worst.base.tokens]])
        p, q = (model(input_ids=row).logits[0, len(start) - 1 : -1].log_softmax(-1) for model in models)
    kl = (p.exp() * (p - q)).sum(1).mean()
    assert found.per_prompt["kl"][worst.prompt] == pytest.approx(float(kl), rel=1e-4)


@pytest.mark.parametrize("dialect", ["vllm", "echo", "llama.cpp"])
def test_a_server_is_measured_as_its_model_is(
    folders: tuple[Path, Path], local: ModelComparison, dialect: Dialect
) -> None:
    base, other = folders
    with serving(other, Behaviour(dialect)) as url:
        found = dtm.compare(base, url, TEXT, **SETTINGS)
    assert found.per_prompt["fdt"] == local.per_prompt["fdt"] and found.per_prompt["sdt"] == local.per_prompt["sdt"]
    np.testing.assert_allclose(found.per_prompt["dppl"], local.per_prompt["dppl"], rtol=1e-3)
    kl = np.array(found.per_prompt["kl"])
    assert (kl <= np.array(local.per_prompt["kl"]) + 1e-6).all() and kl.mean() > 0.0
    assert found.values["kl"].at_least and 0.0 < (found.covered or 0.0) < 1.0
    assert any("lower bound" in note for note in found.notes)
    assert ("ppl" in found.values) == (dialect != "llama.cpp")
    assert found.texts[0].own.tokens == local.texts[0].own.tokens


def test_told_of_all_tokens_the_bound_is_the_divergence(folders: tuple[Path, Path], local: ModelComparison) -> None:
    with serving(folders[1], Behaviour(most_top=258)) as url:
        found = dtm.compare(folders[0], url, TEXT, top=258, **SETTINGS)
    np.testing.assert_allclose(found.per_prompt["kl"], local.per_prompt["kl"], atol=2e-5)


def test_a_server_can_be_the_base(folders: tuple[Path, Path], local: ModelComparison) -> None:
    base, other = folders
    with serving(base) as url:
        found = dtm.compare(url, other, TEXT, **SETTINGS)
    assert found.per_prompt["fdt"] == local.per_prompt["fdt"]
    assert (np.array(found.per_prompt["kl"]) <= np.array(local.per_prompt["kl"]) + 1e-6).all()
    assert found.floor["fdt"].mean == LENGTHS["continuation_tokens"]
    np.testing.assert_allclose(found.per_prompt["ppl_base"], local.per_prompt["ppl_base"], rtol=1e-3)


def test_two_servers(folders: tuple[Path, Path], local: ModelComparison) -> None:
    with serving(folders[0]) as one, serving(folders[1]) as two:
        found = dtm.compare(one, two, TEXT, tokenizer=str(folders[0]), **LENGTHS)
    assert found.per_prompt["fdt"] == local.per_prompt["fdt"] and found.values["kl"].at_least


def test_text_alone_gives_fdt(folders: tuple[Path, Path], local: ModelComparison) -> None:
    with serving(folders[1], Behaviour("text", tokenize=None)) as url:
        found = dtm.compare(folders[0], url, TEXT, **SETTINGS)
    assert set(found.values) == {"fdt", "ppl_base"}
    # Bytes that make no characters look alike as text: what differs in them alone is not seen.
    assert all(seen >= true for seen, true in zip(found.per_prompt["fdt"], local.per_prompt["fdt"], strict=True))
    assert "tokens earlier" in found.verdict or "Too few" in found.verdict


def test_end_of_text_is_kept_from_the_server(folders: tuple[Path, Path]) -> None:
    behaviour = Behaviour()
    with serving(folders[1], behaviour) as url:
        dtm.compare(folders[0], url, TEXT, **SETTINGS)
    written = [body for body in behaviour.asked if body.get("max_tokens") == LENGTHS["continuation_tokens"]]
    assert written and all(body["logit_bias"] == {"257": -100} for body in written)


# What is refused, each in one line.


def refused(capsys: pytest.CaptureFixture[str], text: Path, *arguments: str, code: int = 2) -> str:
    options = ["--text", str(text), "--count", "10", "--prompt-tokens", "12", "--continuation-tokens", "8"]
    out = text.parent / "page.html"
    assert main(["compare", *arguments, *options, "--dtype", "float32", "--quiet", "--out", str(out)]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and not list(text.parent.glob("page*"))
    (line,) = captured.err.splitlines()
    return line


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_a_server_that_is_down(folders: tuple[Path, Path], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, text, str(folders[0]), "http://127.0.0.1:9", code=5)
    assert line.startswith("error: no server answers at http://127.0.0.1:9/v1 (")


@pytest.mark.parametrize("url", ["http://localhost:abc", "http://local host:80"])
def test_an_address_that_is_none(
    folders: tuple[Path, Path], text: Path, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert "is no address of a server" in refused(capsys, text, str(folders[0]), url)


def test_a_port_of_something_else(folders: tuple[Path, Path], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=_greet, args=(listening,), daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert f"no server answers at {url}/v1 (" in refused(capsys, text, str(folders[0]), url, code=5)


def _greet(listening: socket.socket) -> None:
    connection, _ = listening.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(b"220 mail.example ESMTP\r\n")


def test_windows_longer_than_a_model_reads(
    folders: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = write_model(tmp_path / "short", llama_config(max_position_embeddings=16))
    assert f"is 20, but {short} reads 16 at most" in refused(capsys, text, str(folders[0]), str(short))


@pytest.mark.parametrize("scheme", ["w8a8-channel", "fp8-channel"])
def test_what_layers_read_is_rounded_however_a_folder_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Other quantizers name a class of modules, and what they leave out."""
    in_process(monkeypatch)
    base = write_model(tmp_path / "base", llama_config(hidden_size=128, intermediate_size=128, num_hidden_layers=1))
    folder = tmp_path / "out"
    measured_plan(base, tmp_path / "store", scheme).export("compressed-tensors", folder, check=False)
    named = dtm.compare(base, folder, TEXT, **SETTINGS)
    config = json.loads((folder / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["targets"], config["quantization_config"]["ignore"] = ["Linear"], ["lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    by_class = dtm.compare(base, folder, TEXT, **SETTINGS)
    assert by_class.other.way == named.other.way and "as transformers runs it" in named.other.way
    assert by_class.values["kl"].mean == named.values["kl"].mean > 0.0


def test_a_server_that_is_slow(folders: tuple[Path, Path], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(folders[1], Behaviour(hangs=threading.Event())) as url:
        line = refused(capsys, text, str(folders[0]), url, "--timeout", "0.2", code=5)
    assert f"{url}/v1 gave no answer in 0.2 s" in line


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (Behaviour(tokenize=lambda text: [1, 2, 3]), "tiny at {url}/v1 has another tokenizer"),
        (Behaviour(models=("a", "b")), "{url}/v1 has several models (a, b): name one as {url}/v1#MODEL"),
        (
            Behaviour(instead=(400, b'{"error": {"message": "only text"}}')),
            "does not complete token ids: HTTP 400: only",
        ),
        (Behaviour(instead=(200, b"<html>")), "does not complete token ids: its answer is no JSON"),
        (Behaviour(instead=(401, b"{}")), "does not let us in (HTTP 401: {{}}): set OPENAI_API_KEY"),
        (Behaviour(context=16), "is 20, but tiny at {url}/v1 reads 15 at most"),
    ],
)
def test_a_server_that_cannot_be_used(
    folders: tuple[Path, Path], text: Path, capsys: pytest.CaptureFixture[str], behaviour: Behaviour, said: str
) -> None:
    with serving(folders[1], behaviour) as url:
        line = refused(capsys, text, str(folders[0]), url)
    assert said.format(url=url) in line


def test_a_server_that_counts_other_tokens(
    folders: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a server has no /tokenize, another tokenizer shows in how many tokens it counts."""
    other = write_model(tmp_path / "words")
    _count_twice(other)
    with serving(other, Behaviour(tokenize=None)) as url:
        assert "has another tokenizer: it counts" in refused(capsys, text, str(folders[0]), url)


def _count_twice(folder: Path) -> None:
    """Have a folder's tokenizer put a token before each text, and one behind."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    token = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"</s>": {"id": "</s>", "ids": [257], "tokens": ["</s>"]}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token, token, text, token],
        "pair": [token, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": special,
    }
    path.write_text(json.dumps(content))


def test_a_model_of_another_vocabulary(
    folders: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_model(tmp_path / "other")
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(vocabulary, [*range(100, 256), *range(100), 256, 257], strict=True))
    path.write_text(json.dumps(content))
    line = refused(capsys, text, str(folders[0]), str(other))
    assert "have different vocabularies (258 and 258 tokens; token 0 is" in line


@pytest.mark.parametrize("most", [5, 10])
def test_logprobs_that_a_server_does_not_give_are_asked_fewer(folders: tuple[Path, Path], most: int) -> None:
    with serving(folders[1], Behaviour(most_top=most)) as url:
        found = dtm.compare(folders[0], url, TEXT, **SETTINGS)
    assert f"the {most} likeliest tokens" in found.other.way


@pytest.mark.parametrize("told", [[None, {"1": {"logprob": None}}, {"1": {"logprob": None}}], [1, 2, 3], ["a"] * 3])
def test_probabilities_in_a_form_that_is_not_known_are_none(told: list[Any]) -> None:
    assert served_model._read("prompt_logprobs", {"prompt_logprobs": told}, [1, 2, 3], 1) is None


def test_a_server_that_takes_no_bias_is_used_and_said(folders: tuple[Path, Path], local: ModelComparison) -> None:
    with serving(folders[1], Behaviour(takes_bias=False)) as url:
        found = dtm.compare(folders[0], url, TEXT, **SETTINGS)
    assert found.per_prompt["sdt"] == local.per_prompt["sdt"]
    assert any("cannot be kept from end-of-text" in note for note in found.notes)


# The bound.


def test_the_bound_is_below_the_divergence_and_meets_it_when_nothing_is_cut() -> None:
    random = np.random.default_rng(0)
    p, q = (np.log(random.dirichlet(np.full(50, 0.3), size=200)).astype(np.float32) for _ in range(2))
    whole = (np.exp(p.astype(np.float64)) * (p - q.astype(np.float64))).sum(1)
    order = np.argsort(-q, axis=1)
    for most in (1, 5, 20, 50):
        ids = order[:, :most]
        bound, covered = least_kl(np.take_along_axis(p, ids, 1), np.take_along_axis(q, ids, 1))
        assert (bound <= whole + 1e-4).all() and (covered <= 1.0).all()
    np.testing.assert_allclose(bound, whole, atol=1e-3)


def test_tokens_that_two_servers_tell_are_matched_by_id() -> None:
    first = Likeliest(np.array([[[4, 7, -1]]], np.int32), np.array([[[-0.5, -1.0, -np.inf]]], np.float32))
    second = Likeliest(np.array([[[7, 9]]], np.int32), np.array([[[-0.2, -3.0]]], np.float32))
    own, theirs = common(first, second)
    assert own.tolist() == [[[-np.inf, -1.0, -np.inf]]] and theirs[0, 0, 1] == np.float32(-0.2)


def test_the_best_of_equals_is_the_lowest_that_may_be_chosen() -> None:
    told = Likeliest(np.array([[[3, 9, 5]]], np.int32), np.array([[[-0.1, -0.3, -0.3]]], np.float32))
    assert told.best((3,)).tolist() == [[5]]


def test_what_is_printed_fits_and_is_json(folders: tuple[Path, Path], text: Path, capsys: Any) -> None:
    options = ["--count", "10", "--prompt-tokens", "12", "--continuation-tokens", "8", "--dtype", "float32", "--quiet"]
    assert main(["compare", *map(str, folders), "--text", str(text), *options, "--format", "json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["kl_is"] == "exact" and values["values"]["fdt"]["mean"] == np.mean(values["per_prompt"]["fdt"])


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal_tables, "_window", lambda: width)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    shown = comparison_text(model_comparison())
    tables = shown.split("\n\n")[1:-1]  # of verdict and notes the terminal itself breaks the lines
    assert max(cell_len(line) for part in tables for line in part.split("\n")) <= width
    assert "FDT" in shown and ">= " in shown


def synthetic(diverged: np.ndarray[Any, Any], kl: float = 0.0) -> ModelComparison:
    """OTHER diverges at some positions [prompts, positions] from a BASE that agrees with itself."""
    found = reported.model_comparison()
    reference = Reference("r", "m", MODE, np.zeros((len(diverged), 9 + diverged.shape[1]), np.int32), np.zeros(
        diverged.shape, np.int32), np.ones(diverged.shape, np.bool_), ())  # fmt: skip
    nats = np.full(diverged.shape, 0.5, np.float32)
    return compared(found.base, found.other, reference, Positions(diverged, nats, nats * 2 * kl), None, 0)


def test_what_diverges_more_than_the_base_is_told_apart() -> None:
    random = np.random.default_rng(1)
    told = synthetic(random.random((64, 50)) < 0.1, 0.01)
    assert told.verdict.startswith("OTHER can be told apart from BASE by its text: OTHER chooses another token at ")
    assert told.over_floor.low > 0.0


def test_a_shift_of_probabilities_alone_is_said_beside_equal_text() -> None:
    never = synthetic(np.zeros((64, 50), np.bool_), 0.01)
    assert never.verdict == (
        "No choice of OTHER differs from BASE's on 64 prompts of 50 tokens. Its probabilities do differ: KL 0.01 nats "
        "per token."
    )


def test_too_few_prompts_are_said() -> None:
    assert synthetic(np.eye(4, 50, dtype=np.bool_)).verdict.startswith("Too few prompts to say")


def test_a_model_that_chooses_otherwise_at_most_positions_is_no_stand_in() -> None:
    assert synthetic(np.ones((16, 50), np.bool_)).verdict.startswith("OTHER is no stand-in for BASE: it chooses")
