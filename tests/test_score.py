"""Scores: the base model beside the compressed one, over the same questions of tasks in local files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from exports import RUN, Measured, measured_plan
from tiny import write_model

from dtmsearch.errors import UserError
from dtmsearch.workflows import score as score_module
from dtmsearch.workflows.described_folder import base_model_of
from dtmsearch.workflows.score import Asked, TaskScore, _compared, answer_of, score

# The harness and what it loads warn of much that is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

TASK = """
task: local_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """
output_type: generate_until
doc_to_target: "{{target}}"
generation_kwargs: {until: [ZZ], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TaskScore]:
    TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager  # noqa: N806
    folder = tmp_path_factory.mktemp("scores")
    questions = [
        {"question": f"def f{i}(x):", "choices": ["a", "b\n", "return", ")"], "label": i % 4, "target": "!"}
        for i in range(12)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    for name, form in (("choice", CHOICE), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=folder / "questions.jsonl") + form)
    measured: Measured = measured_plan(write_model(folder / "model"), folder / "store", "int2-channel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        # The harness's own tasks are thousands of files, which are not asked for.
        patch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
        asked = Asked(("local_choice", "local_write"), include=str(folder), batch_size=4)
        return {row.task: row for row in score(RUN, asked, str(measured.store))}


def test_every_task_is_scored_over_all_its_questions(scores: dict[str, TaskScore]) -> None:
    assert {name: row.num_questions for name, row in scores.items()} == {"local_choice": 12, "local_write": 12}


def test_two_bits_change_what_a_random_model_writes(scores: dict[str, TaskScore]) -> None:
    assert scores["local_write"].changed > 0


def test_the_difference_is_that_of_the_means(scores: dict[str, TaskScore]) -> None:
    choice = scores["local_choice"]
    assert choice.difference.mean == pytest.approx(choice.compressed - choice.base)


def test_answers_that_flip_add_up_to_the_difference(scores: dict[str, TaskScore]) -> None:
    choice = scores["local_choice"]
    assert choice.to_right is not None and choice.to_wrong is not None
    assert choice.to_right - choice.to_wrong == pytest.approx(12 * choice.difference.mean)


def sample(number: int, responses: list[object], acc: float) -> dict[str, object]:
    return {"doc_id": number, "filter": "none", "filtered_resps": responses, "metrics": ["acc"], "acc": acc}


def test_flips_are_counted_both_ways() -> None:
    before = [sample(0, [(-1.0, True), (-2.0, False)], 1.0), sample(1, [(-1.0, True), (-2.0, False)], 0.0)]
    after = [sample(0, [(-3.0, True), (-2.0, False)], 0.0), sample(1, [(-3.0, True), (-2.0, False)], 1.0)]
    (row,) = _compared("task", before, after)
    assert (row.to_wrong, row.to_right, row.flips, row.changed, row.difference.mean) == (1, 1, 2, 2, 0.0)


def test_a_metric_of_degrees_has_no_flips() -> None:
    before, after = [sample(0, ["text"], 0.25)], [sample(0, ["text"], 0.75)]
    (row,) = _compared("task", before, after)
    assert (row.flips, row.changed) == (None, 0)


def test_the_answer_to_a_choice_is_the_likeliest() -> None:
    assert answer_of({"filtered_resps": [(-4.0, False), (-1.0, False), (-2.0, False)]}) == 1


def test_a_run_that_is_not_there_is_said_before_the_harness_reads_its_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_module, "_tasks", lambda asked: pytest.fail("tasks were read"))
    with pytest.raises(UserError, match="no run of the store"):
        score("nobody", Asked(("arc_easy",)), str(tmp_path / "store"))


def test_a_folder_without_a_card_has_no_base_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--base"):
        base_model_of(tmp_path)
