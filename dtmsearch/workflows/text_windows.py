"""The windows that a search file's texts are cut into: the search's own, calibration's, and held-out ones, which hold
no text of either, nor of what is trained on; and what is said of them. Knows nothing of what is measured on them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dtmsearch.analysis.format import counted
from dtmsearch.config import MixedSection, PromptsSection, SearchFile, texts
from dtmsearch.core.calibration import Calibration
from dtmsearch.core.checkpoint_files import is_gguf
from dtmsearch.core.documents import Texts
from dtmsearch.core.evaluation import IntArray, PromptTokens
from dtmsearch.core.training_settings import RecoverySettings
from dtmsearch.core.windows import SHARED_RUN, TooLittleText, num_repeats, taken
from dtmsearch.errors import UserError

T = TypeVar("T")
_MIN_FDT_KEY = "search.stop.min_fdt_prompts"
# `Replica.cut_prompts` of any replica: prompts, and the id that their reference has or will have.
Cut = tuple[PromptTokens, str]
CutPrompts = Callable[..., Cut]


def _cut(file: SearchFile, section: PromptsSection, cutting: Callable[[Texts], T]) -> T:
    """What `cutting` makes of a section's text; of a dataset more is read as long as it raises `TooLittleText`."""
    error: TooLittleText | None = None
    for documents in texts.growing(file, section):
        try:
            return cutting(documents)
        except TooLittleText as too_little:
            error = too_little
    assert error is not None
    raise error


def cut_search(file: SearchFile, cut_prompts: CutPrompts) -> Cut:
    """The search's prompts. Raises `TooLittleText`."""
    return _prompts(file, file.prompts, cut_prompts)


def cut_held_out(
    file: SearchFile, cut_prompts: CutPrompts, others: Sequence[IntArray], trained_on: Sequence[IntArray] = ()
) -> Cut:
    """The held-out prompts: none of them holds text of `others`, the search's windows and
    calibration's, or of the documents that a model is `trained_on`. Raises `TooLittleText`."""
    section = file.validation_prompts
    assert section is not None
    apart_from = *others, *_telling(trained_on, section.prompt_tokens + section.continuation_tokens)
    return _prompts(file, section, cut_prompts, apart_from, "validation.count")


def training_text(
    file: SearchFile, recovery: RecoverySettings | None, tokenized: Callable[[list[str]], list[IntArray]]
) -> list[IntArray]:
    """The documents [1, tokens] that a recovery trains on, by `Replica.tokenized` of any replica."""
    return [] if recovery is None else tokenized(texts.read_texts(file, recovery.files))


def check_not_trained_on(run: str, held_out: PromptTokens, trained_on: Sequence[IntArray]) -> None:
    """Raises `UserError` where held-out prompts that a run began with hold text of what is to be trained on."""
    documents = [row for rows in _telling(trained_on, held_out.tokens.shape[1]) for row in rows]
    touching = sum(bool(held.any()) for held in taken(list(held_out.tokens), documents, held_out.tokens.shape[1]))
    if touching:
        raise UserError(
            f"{touching} of the {counted(len(held_out.tokens), 'held-out prompt')} of run {run!r} hold text of "
            "recovery.files: what is trained on is not held out. Train on other text, or give the search file other "
            "text under validation and a new run name"
        )


def _telling(documents: Sequence[IntArray], length: int) -> list[IntArray]:
    """Those documents that are long enough for a run of theirs in a window of `length` to say anything."""
    return [document for document in documents if document.shape[1] >= min(SHARED_RUN, length)]


def cut_min_fdt(file: SearchFile, cut_prompts: CutPrompts, others: Sequence[IntArray]) -> Cut:
    """The prompts on which `stop.min_fdt` is shown to be kept: from the search's text or, where that does not hold
    enough beside `others`, from the held-out text. Raises `TooLittleText`."""
    section, held_out = file.min_fdt_prompts, file.validation_prompts
    assert section is not None
    try:
        return _prompts(file, section, cut_prompts, tuple(others), _MIN_FDT_KEY)
    except TooLittleText:
        if held_out is None:
            raise
    lengths = {name: getattr(section, name) for name in ("count", "prompt_tokens", "continuation_tokens", "seed")}
    return _prompts(file, held_out.model_copy(update=lengths), cut_prompts, tuple(others), _MIN_FDT_KEY)


def cut_calibration(file: SearchFile, cutting: Callable[[Texts, int, int, int], Calibration]) -> Calibration:
    """The rows of calibration text. Raises `TooLittleText`."""
    section = file.calibration_text
    tokens = section.prompt_tokens + section.continuation_tokens
    return _cut(file, section, lambda documents: cutting(documents, section.count, tokens, section.seed))


def _prompts(file: SearchFile, section: PromptsSection, cut_prompts: CutPrompts, *further: object) -> Cut:
    settings = section.count, section.prompt_tokens, section.continuation_tokens, section.seed
    return _cut(file, section, lambda documents: cut_prompts(documents, *settings, *further))


def halves(prompts: PromptTokens) -> tuple[PromptTokens, PromptTokens] | None:
    """Prompts to choose by, and as many others to report what was chosen on, so that the report is not optimistic.

    Prompts that repeat each other are in one part together. None where that leaves one part without any.
    """
    rows = [row.tobytes() for row in prompts.tokens]
    first: set[bytes] = set()
    num_first = 0
    for row, count in Counter(rows).items():
        if num_first < len(rows) // 2:
            first.add(row)
            num_first += count
    in_first = np.array([row in first for row in rows])
    if in_first.all() or not in_first.any():
        return None
    one, other = (replace(prompts, tokens=prompts.tokens[part], supply=None) for part in (in_first, ~in_first))
    return one, other


def text_lines(file: SearchFile) -> list[str]:
    """What a run will say of its texts, by the model's tokenizer alone: where its prompts come from, and how many
    repeat a text. Raises `UserError` where a text does not hold enough."""
    folder = Path(file.model_spec.path)
    if not (folder.is_dir() or is_gguf(folder)):
        return [f"prompts: not looked at, since the tokenizer of {file.model.path} is not in a folder here"]
    from dtmsearch.model.modules.loading import load_tokenizer, tokenizer_folder
    from dtmsearch.model.replica.prompts import Cutter

    folder = tokenizer_folder(file.model_spec)
    cutter = Cutter(load_tokenizer(folder, file.model_spec), file.model_spec.path, *_limits(folder))

    def cut_prompts(*arguments: Any) -> Cut:
        return cutter.prompts(*arguments), ""

    def calibration(*arguments: Any) -> Calibration:
        return Calibration("", "", cutter.calibration(*arguments))

    search, _ = cut_search(file, cut_prompts)
    note = file.model_spec.decoding.note
    lines = [f"the search's prompts: {described(file.prompts, search)}{note}"]
    others = [search.tokens]
    if file.calibration is not None:
        others.append(cut_calibration(file, calibration).tokens)
    if file.validation_prompts is None:
        lines.append("held-out prompts: none, since there is no section validation")
    else:
        trained_on = training_text(file, file.search.recovery, cutter.documents)
        held_out, _ = cut_held_out(file, cut_prompts, others, trained_on)
        others.append(held_out.tokens)
        lines.append(f"held-out prompts: {described(file.validation_prompts, held_out, bool(trained_on))}{note}")
    if file.min_fdt_prompts is not None:
        prompts, _ = cut_min_fdt(file, cut_prompts, others)
        lines.append(f"min_fdt is shown to be kept on {counted(len(prompts.tokens), 'prompt')} of its own")
    return lines


def _limits(folder: Path) -> tuple[int | None, int | None]:
    """How many tokens the model of a folder reads at most, and how many it knows, where its configuration says so."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = content.get("text_config", content)  # a model of images and text has one for its text
        limits = [text.get(key) for key in ("max_position_embeddings", "vocab_size")]
    except (OSError, ValueError, AttributeError):
        return None, None
    context, num_embeddings = (limit if isinstance(limit, int) else None for limit in limits)
    return context, num_embeddings


def described(section: PromptsSection, prompts: PromptTokens, trains: bool = False) -> str:
    """Where prompts come from, what of their text others read, and how many repeat a text; for a person."""
    said = f"{counted(len(prompts.tokens), 'prompt')} of {_source(section)}"
    supply = prompts.supply
    if supply is not None and supply.num_taken:
        share = supply.num_taken / supply.num_tokens
        readers = "search, calibration and training" if trains else "search and calibration"
        said += (
            f", cut from what {readers} leave of it (they hold {supply.num_taken:,} of its "
            f"{supply.num_tokens:,} tokens, {share:.0%})"
        )
    repeats = num_repeats(prompts.tokens)
    again = 0 if supply is None else supply.num_windows - supply.num_distinct
    if repeats or again:
        said += f"; {repeats or 'none'} of them {'repeat' if repeats > 1 else 'repeats'} the text of another"
    if supply is not None and again:
        said += f", as {again:,} of the {supply.num_windows:,} windows that it holds {'does' if again == 1 else 'do'}"
    return said


def _source(section: PromptsSection) -> str:
    if section.mix:
        whole = sum(source.weight for source in section.mix)
        return ", ".join(f"{source.weight / whole:.0%} {_named(source)}" for source in section.mix)
    return _named(section)


def _named(section: PromptsSection | MixedSection) -> str:
    dataset = section.dataset
    if dataset is None:
        return ", ".join(section.files)
    return " ".join(["dataset", dataset.path, *([dataset.name] if dataset.name else []), f"({dataset.split})"])
