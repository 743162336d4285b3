"""Texts as people have them: conversations, several texts by weight, data sets on disk, rows of which few are long,
and texts of many megabytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inprocess import run_here
from tiny import DEMO_MODEL, TEXT, open_texts, write_model, write_tokenizer
from transformers import AutoTokenizer

from dtmsearch import config
from dtmsearch.config import texts
from dtmsearch.config.texts import check_vocabulary
from dtmsearch.core.documents import Conversation, Mixed, conversation_of
from dtmsearch.errors import UserError
from dtmsearch.model.replica import tokenizing
from dtmsearch.model.replica.prompts import Cutter
from dtmsearch.workflows.check_search import check_search
from dtmsearch.workflows.submit import pack
from dtmsearch.workflows.text_windows import cut_calibration, cut_search

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Any:
    folder.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def words(*seed: int) -> str:
    """Seven of seven letters that no other seed has in a row."""
    drawn = np.random.default_rng(seed).integers(97, 123, (7, 7))
    return " ".join(bytes(word).decode() for word in drawn.astype(np.uint8))


def talk(number: int, turns: int = 1) -> dict[str, Any]:
    said = [
        [
            {"role": "user", "content": f"question {words(number, turn, 7)} at length"},
            {"role": "assistant", "content": f"answer {words(number, turn, 5)} at length"},
        ]
        for turn in range(turns)
    ]
    return {"messages": [message for pair in said for message in pair]}


def conversation(number: int, turns: int = 1) -> Conversation:
    return conversation_of(talk(number, turns), "row")


def search_file(folder: Path, prompts: str, **model: object) -> Any:
    text = f"""
run: mine
model: {{path: model, dtype: float32}}
prompts: {{{prompts}, count: 6, prompt_tokens: 20, continuation_tokens: 10}}
search: {{schemes: [int8-channel], stop: {{components: 1}}}}
"""
    (folder / "search.yaml").write_text(text)
    return config.load(str(folder / "search.yaml"))


def decoded(tokenizer: Any, row: Any) -> str:
    found: str = tokenizer.decode(row, clean_up_tokenization_spaces=False)
    return found


# Conversations


def test_a_prompt_of_a_conversation_ends_where_the_assistant_begins(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "model")
    prompts = Cutter(tokenizer, "model").prompts([conversation(n) for n in range(8)], 6, 20, 10, 0)
    for row in prompts.tokens:
        assert decoded(tokenizer, row[:20]).endswith("length</s><assistant>")
        assert decoded(tokenizer, row[20:]).startswith("answer ")


def with_system(text: str, number: int, turns: int = 3) -> Conversation:
    talked = talk(number, turns)
    return conversation_of({"messages": [{"role": "system", "content": text}, *talked["messages"]]}, "row")


def test_prompts_keep_the_system_text_and_what_was_said_last(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "model")
    talks = [with_system("be kind", n) for n in range(4)]
    prompts = Cutter(tokenizer, "model").prompts(talks, 8, 80, 10, 0)
    for row in prompts.tokens:
        assert decoded(tokenizer, row[:80]).startswith("<system>be kind</s><user>")
        assert decoded(tokenizer, row[:80]).endswith("length</s><assistant>")
        assert decoded(tokenizer, row[80:]).startswith("answer ")
    assert prompts.notes == ()


def test_a_system_text_that_is_too_long_for_prompts_is_told(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "model")
    prompts = Cutter(tokenizer, "model").prompts([with_system("be kind " * 9, n) for n in range(4)], 4, 80, 10, 0)
    assert "takes more than half of prompt_tokens in 4 conversations" in " ".join(prompts.notes)


def test_tokens_that_a_model_lacks_are_found_in_conversations(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "model")
    tokenizer.add_tokens(["<odd>"])
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 258}')
    rows = [{"messages": [{"role": "user", "content": "an <odd> one"}, {"role": "assistant", "content": "yes"}]}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="<odd>"):
        check_vocabulary(search_file(tmp_path, "files: [chat.jsonl], chat: true"))


def test_windows_of_a_conversation_of_several_turns_do_not_overlap(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "model")
    one = conversation(1, turns=4)
    cutter = Cutter(tokenizer, "model")
    assert len(cutter.prompts([one], 4, 20, 10, 0).tokens) == 4
    with pytest.raises(UserError, match="holds 2 of that length"):
        cutter.prompts([one], 4, 90, 90, 0)


def test_a_thought_that_a_template_opens_for_an_answer_to_come_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    template = TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
    tokenizer = chat_tokenizer(tmp_path / "model", template)
    prompts = Cutter(tokenizer, "model").prompts([conversation(n) for n in range(8)], 6, 20, 10, 0)
    assert all(decoded(tokenizer, row[:20]).endswith("length</s><assistant>") for row in prompts.tokens)
    assert prompts.notes == ()


def test_an_answer_before_which_a_template_rewrites_what_was_said_begins_no_prompt(tmp_path: Path) -> None:
    template = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'][:20] }}")
    tokenizer = chat_tokenizer(tmp_path / "model", template)
    with pytest.raises(UserError, match=r"holds 0 of that length.* \(1 of 1 answers begin no prompt: "):
        Cutter(tokenizer, "model").prompts([conversation(1)], 1, 20, 10, 0)


@pytest.mark.parametrize("writes_begin", [True, False])
def test_windows_of_conversations_open_with_the_begin_token_once(writes_begin: bool, tmp_path: Path) -> None:
    chat_tokenizer(tmp_path / "model", ("<s>" if writes_begin else "") + TEMPLATE)
    open_texts(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    cutter = Cutter(tokenizer, "model")
    talks = [conversation(n, turns=2) for n in range(6)]
    question = talks[0].messages[0][1]
    for length in (21, len(f"<user>{question}</s><assistant>") + 1):  # within a conversation, and from its begin
        prompts = cutter.prompts(talks, 6, length, 10, 0)
        for row in prompts.tokens:
            assert decoded(tokenizer, row).count("<s>") == decoded(tokenizer, row[:1]).count("<s>") == 1
            assert decoded(tokenizer, row[:length]).endswith("length</s><assistant>")
    assert all(row[0] == 256 and 256 not in row[1:] for row in cutter.calibration(talks, 6, 30, 0))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "model", "content": "b"}]},
    ],
)
def test_the_usual_columns_of_conversations_are_read(row: dict[str, Any]) -> None:
    assert conversation_of(row, "row").messages == (("user", "a"), ("assistant", "b"))


def test_a_row_without_a_conversation_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(talk(1)) + '\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"line 2 of .*a.jsonl holds no conversation.*its columns are text"):
        texts.read(
            search_file(tmp_path, "files: [a.jsonl], chat: true"), config.PromptsSection(files=("a.jsonl",), chat=True)
        )


def test_a_tokenizer_without_a_chat_template_is_told(tmp_path: Path) -> None:
    cutter = Cutter(chat_tokenizer(tmp_path / "model", None), "model")
    with pytest.raises(UserError, match="chat: true needs a chat template, and the model's tokenizer has none"):
        cutter.prompts([conversation(1)], 1, 20, 10, 0)


def test_a_system_text_that_all_share_takes_no_held_out_conversation_away(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "model")
    system = ("system", "You are a helpful assistant, who answers every question politely, shortly and truly.")
    talks = [Conversation((system, *conversation(n).messages)) for n in range(10)]
    cutter = Cutter(tokenizer, "model")
    search = cutter.prompts(talks[:5], 5, 150, 10, 0)
    held_out = cutter.prompts(talks, 5, 150, 10, 0, [search.tokens])
    assert not {row.tobytes() for row in search.tokens} & {row.tobytes() for row in held_out.tokens}


def test_a_search_runs_on_conversations(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    chat_tokenizer(tmp_path / "model")
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk(n)) + "\n" for n in range(30)))
    search_file(tmp_path, "files: [talks.jsonl], chat: true")
    summary = run_here(tmp_path / "search.yaml", tmp_path / "store")
    assert summary.status == "finished"
    assert "6 prompts of talks.jsonl" in str(summary.search_text)


# Several texts


def test_every_text_gives_its_weight_s_share_and_more_prompts_extend_fewer() -> None:
    mixed = Mixed(((), ()), (3.0, 1.0))
    assert [mixed.turns(8).count(part) for part in (0, 1)] == [6, 2]
    assert mixed.turns(8)[:5] == mixed.turns(5)


def test_prompts_are_cut_from_several_texts_by_weight(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "model")
    (tmp_path / "a.txt").write_text("a" * 2000)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(talk(n)) + "\n" for n in range(8)))
    file = search_file(tmp_path, "mix: [{files: [a.txt], weight: 2}, {files: [b.jsonl], chat: true}]")
    cutter = Cutter(tokenizer, "model")
    prompts, _ = cut_search(file, lambda *arguments: (cutter.prompts(*arguments), ""))
    assert [decoded(tokenizer, row)[0] == "a" for row in prompts.tokens].count(True) == 4
    assert sum("<assistant>" in decoded(tokenizer, row) for row in prompts.tokens) == 2


def test_a_text_of_a_mixture_that_is_too_short_is_named(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
    texts = Mixed((["a long text " * 40], ["a short one " * 5]), (1.0, 1.0))
    with pytest.raises(UserError, match="of the mixture's texts number 2, whose share is 4, holds 2 of that length"):
        Cutter(tokenizer, "model").prompts(texts, 8, 20, 10, 0)


def test_validation_may_have_a_mixture_of_its_own(tmp_path: Path) -> None:
    search = "files: [a.txt]"
    file = search_file(tmp_path, search).model_copy(
        update={"validation": config.ValidationSection.model_validate({"mix": [{"files": ["b.txt"]}], "count": 3})}
    )
    held_out = file.validation_prompts
    assert held_out is not None
    assert (held_out.files, [part.files for part in held_out.mix], held_out.count) == ((), [("b.txt",)], 3)


def test_all_texts_of_a_mixture_are_sent(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    parcel = pack(search_file(tmp_path, "mix: [{files: [a.txt]}, {files: [b.txt]}]"))
    assert sorted(Path(name).name for name in parcel.files) == ["a.txt", "b.txt"]


# Data sets


def test_a_data_set_that_was_saved_to_disk_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["one", "two"]})
    rows.save_to_disk(tmp_path / "single")
    DatasetDict({"test": rows}).save_to_disk(tmp_path / "split")
    file = search_file(tmp_path, "dataset: {path: single}")
    assert texts.read(file, file.prompts) == ["one", "two"]
    file = search_file(tmp_path, "dataset: {path: split, split: test}")
    assert texts.read(file, file.prompts) == ["one", "two"]
    file = search_file(tmp_path, "dataset: {path: split}")
    with pytest.raises(UserError, match="dataset split has no split 'train'; it has test"):
        texts.read(file, file.prompts)


def test_a_data_set_s_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(talk(n)) + "\n" for n in range(3)))
    (tmp_path / "data" / "README.md").write_text("---\nlicense: mit\n---\nTalks\n")
    file = search_file(tmp_path, "dataset: {path: data}, chat: true")
    assert texts.read(file, file.prompts) == [conversation(n) for n in range(3)]


def test_long_rows_are_found_however_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration too, whose text `validate` cuts."""
    write_model(tmp_path / "model")
    rows = ["short" if n % 80 else f"{n} {TEXT[n % 400 : n % 400 + 300]}" for n in range(4_000)]
    monkeypatch.setattr(texts, "_dataset_rows", lambda *_: iter(rows))
    file = search_file(tmp_path, "dataset: {path: data}")
    file = file.model_copy(
        update={
            "prompts": file.prompts.model_copy(update={"count": 50}),
            "search": file.search.model_copy(update={"schemes": ("gptq-int4-g16",)}),
        }
    )
    cutter = Cutter(AutoTokenizer.from_pretrained(tmp_path / "model"), "model")
    assert len(cut_search(file, lambda *arguments: (cutter.prompts(*arguments), ""))[0].tokens) == 50
    found: list[Any] = []
    cut_calibration(file, lambda *arguments: found.append(cutter.calibration(*arguments)) or None)  # type: ignore[func-returns-value,arg-type,return-value]
    assert len(found[0]) == 50
    assert any("50 prompts" in line for line in check_search(file))


# Long texts


@pytest.mark.parametrize("model", ["demo", "bytes"])
def test_a_long_text_has_the_tokens_of_the_whole_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    tokenizer = chat_tokenizer(tmp_path) if model == "bytes" else AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = "".join(f"{TEXT[n * 37 : n * 37 + 90]}\n\n  é \U0001f600 {'=' * (n % 40)}" for n in range(120))
    whole = tokenizing.tokens_of(tokenizer, text).ids
    calls = []
    monkeypatch.setattr(tokenizing, "_PIECE", 2000)
    monkeypatch.setattr(tokenizing, "_OVERLAP", 400)
    monkeypatch.setattr(tokenizing, "_ids", lambda *arguments: calls.append(arguments))
    assert np.array_equal(tokenizing.tokens_of(tokenizer, text).ids, whole)
    assert not calls


def test_pieces_that_never_agree_are_tokenized_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chat_tokenizer(tmp_path)
    monkeypatch.setattr(tokenizing, "_PIECE", 300)
    monkeypatch.setattr(tokenizing, "_OVERLAP", 20)  # fewer tokens than have to be alike
    assert len(tokenizing.tokens_of(tokenizer, "ab" * 500).ids) == 1000
