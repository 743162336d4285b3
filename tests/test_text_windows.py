"""The windows of a search file's texts: held-out ones hold nothing that search or calibration read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from inprocess import run_here
from tiny import TEXT, TRAINING, write_model

from dtmsearch import config
from dtmsearch.analysis.summary import RunSummary, summarize_run
from dtmsearch.cli import cli
from dtmsearch.config import SearchFile, texts
from dtmsearch.console.run_text import run_text
from dtmsearch.core.evaluation import IntArray, PromptTokens
from dtmsearch.core.windows import TooLittleText, num_touching
from dtmsearch.errors import UserError
from dtmsearch.model.replica.prompts import Cutter
from dtmsearch.report.facts import gather
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.text_windows import check_not_trained_on, cut_held_out, cut_search, described, text_lines

SEARCH = """
run: same
model: {path: model, dtype: float32}
prompts: {files: [text.txt], count: 8, prompt_tokens: 10, continuation_tokens: 12}
search: {strategy: greedy, rank_by: kl, schemes: [int4-g16], stop: {components: 2}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("texts")
    write_model(place / "model")
    (place / "text.txt").write_text(TEXT)
    (place / "copy.txt").write_text(f"# A line before\n{TEXT}")
    (place / "short.txt").write_text(TEXT[: 22 * 12])
    (place / "once.txt").write_text(TEXT[:25])
    return place


def search_file(folder: Path, *sections: str) -> SearchFile:
    return config.parse("\n".join([SEARCH, *sections]), "search.yaml", folder)


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        return {"input_ids": list(text.encode())}


def cut(documents: list[str], count: int, prompt: int, continuation: int, seed: int, *further: Any) -> Any:
    return Cutter(Letters(), "a model").prompts(documents, count, prompt, continuation, seed, *further), ""


def lines_of(folder: Path, *sections: str) -> str:
    return "\n".join(text_lines(search_file(folder, *sections)))


@pytest.mark.parametrize(
    "validation", ["{count: 6}", "{files: [text.txt]}", "{files: [copy.txt], count: 30, prompt_tokens: 50}"]
)
def test_a_text_that_the_search_reads_is_cut_apart_and_said_to_be(folder: Path, validation: str) -> None:
    file = search_file(folder, f"validation: {validation}")
    search, _ = cut_search(file, cut)
    held_out, _ = cut_held_out(file, cut, [search.tokens])
    assert num_touching(held_out.tokens, search.tokens) == 0
    assert "what search and calibration leave of it" in described(file.prompts, held_out)


def test_held_out_windows_are_apart_from_calibration_too(folder: Path) -> None:
    calibration = "calibration: {files: [short.txt], count: 2, tokens: 120}"
    with pytest.raises(TooLittleText, match=r"validation.count asks for 8 .* the text holds \d of that length beside"):
        lines_of(folder, "validation: {files: [short.txt]}", calibration)


def sparsity_search(folder: Path, training: str, held_out: str) -> SearchFile:
    recovery = f"search: {{strategy: sparsity, rounds: [20], recovery: {{files: [{training}]}}}}"
    parts = SEARCH.partition("search:")[0], recovery, f"validation: {{files: [{held_out}], count: 6}}"
    return config.parse("\n".join(parts), "search.yaml", folder)


def test_held_out_windows_are_apart_from_what_is_trained_on(folder: Path) -> None:
    letters = bytes(np.random.default_rng(0).integers(ord("a"), ord("z"), 2_000).tolist()).decode()
    (folder / "letters.txt").write_text(letters)
    (folder / "half.txt").write_text(letters[:1_000])
    file = sparsity_search(folder, "half.txt", "letters.txt")
    documents = [np.array([list(letters[:1_000].encode())], np.int32)]
    held_out, _ = cut_held_out(file, cut, [], documents)
    assert all(bytes(row.tolist()).decode() in letters[1_000:] for row in held_out.tokens)
    assert "training leave of it (they hold 1,000 of its 2,000 tokens, 50%)" in "\n".join(text_lines(file))


def test_a_text_that_is_trained_on_holds_no_held_out_windows(folder: Path) -> None:
    with pytest.raises(TooLittleText, match=r"validation.count asks for 6 .* the text holds 0 of that length beside"):
        text_lines(sparsity_search(folder, "copy.txt", "text.txt"))


def test_what_a_run_held_out_is_not_trained_on_later() -> None:
    rows = np.arange(80, dtype=np.int32).reshape(2, 40)
    held_out = PromptTokens(rows, 20)
    check_not_trained_on("toy", held_out, [np.arange(41, 141, dtype=np.int32).reshape(1, -1)[:, 39:], rows[:1, :30]])
    with pytest.raises(UserError, match=r"1 of the 2 held-out prompts of run 'toy' hold text of recovery.files"):
        check_not_trained_on("toy", held_out, [np.arange(40, 140, dtype=np.int32).reshape(1, -1)])


def test_validate_says_where_held_out_text_comes_from(folder: Path) -> None:
    said = lines_of(folder, "validation: {count: 6}")
    assert "held-out prompts: 6 prompts of text.txt, cut from what search and calibration leave of it" in said


def test_validate_counts_what_repeats(folder: Path) -> None:
    many = [f"m{i}.txt" for i in range(50)]
    for name in many:
        (folder / name).write_text(TRAINING[:25])
    said = lines_of(folder, f"validation: {{files: {[*many]}, count: 20}}")
    assert "19 of them repeat the text of another, as 49 of the 50 windows that it holds do" in said


def test_validate_says_when_there_is_no_held_out_text(folder: Path) -> None:
    assert "held-out prompts: none" in lines_of(folder)


def test_too_little_held_out_text_is_one_line_and_exit_code_2(folder: Path) -> None:
    path = folder / "little.yaml"
    path.write_text(SEARCH.replace("text.txt", "short.txt") + "validation: {count: 6}\n")
    done = CliRunner().invoke(cli, ["validate", str(path)])
    assert isinstance(done.exception, TooLittleText) and done.exception.exit_code == 2
    assert len(str(done.exception).splitlines()) == 1


class Rows:
    """A data set whose rows are long enough once in 80."""

    def __init__(self, number: int) -> None:
        self.number, self.read = number, 0

    def __iter__(self) -> Iterator[dict[str, str]]:
        for i in range(self.number):
            self.read += 1
            yield {"text": f"{i:06d}" * (200 if i % 80 == 79 else 5)}


@pytest.mark.parametrize(("number", "found"), [(3_000, 8), (400, 5)])
def test_a_data_set_is_read_until_its_rows_hold_the_windows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, found: int
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = Rows(number)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    file = search_file(folder, "validation: {dataset: {path: rows}, count: 8, prompt_tokens: 1000}")
    if found == 8:
        held_out, _ = cut_held_out(file, cut, [])
        assert held_out.tokens.shape == (8, 1012)
        assert rows.read < number
    else:
        with pytest.raises(TooLittleText, match=f"the text holds {found} of that length"):
            cut_held_out(file, cut, [])


def test_a_data_set_with_rows_as_long_as_windows_is_read_no_further_than_needed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = Rows(12_000)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    file = search_file(folder, "validation: {dataset: {path: rows}, count: 8}")
    section = file.validation_prompts
    assert section is not None
    assert len(next(texts.growing(file, section))) < 100


@pytest.fixture(scope="module")
def ran(folder: Path) -> tuple[ResultStore, RunSummary]:
    """A whole run with one file for both, in this process."""
    path = folder / "same.yaml"
    path.write_text(SEARCH + "validation: {count: 6}\n")
    run_here(path, folder / "store")
    store = ResultStore(str(folder / "store"))
    return store, summarize_run(store, "same")


def prompts_of(store: ResultStore, reference_id: str | None) -> IntArray:
    assert reference_id is not None
    reference = store.reference(reference_id)
    assert reference is not None
    return reference.text


def test_a_run_validates_on_windows_that_its_search_did_not_see(ran: tuple[ResultStore, RunSummary]) -> None:
    store, summary = ran
    held_out = prompts_of(store, summary.validation_reference_id)
    assert num_touching(held_out, prompts_of(store, summary.reference_id)) == 0


def test_a_run_reports_on_other_prompts_than_it_chose_by(ran: tuple[ResultStore, RunSummary]) -> None:
    store, summary = ran
    record = store.run("same")
    assert record is not None
    chosen_by, reported = (prompts_of(store, i) for i in (record.choice_reference_id, record.validation_reference_id))
    assert (len(chosen_by), len(reported), num_touching(reported, chosen_by)) == (3, 3, 0)
    assert {row.summary and row.summary.num_prompts for row in summary.validation} == {3}


def test_status_and_report_say_where_held_out_text_comes_from(ran: tuple[ResultStore, RunSummary]) -> None:
    store, summary = ran
    said = "6 prompts of text.txt, cut from what search and calibration leave of it"
    assert said in run_text(summary)
    assert said in str(gather(store, "same").summary.held_out_text)


def test_prompts_that_repeat_are_said(folder: Path) -> None:
    windows = np.repeat(np.arange(22, dtype=np.int32)[None], 20, axis=0)
    assert "19 of them repeat the text of another" in described(search_file(folder).prompts, PromptTokens(windows, 10))
