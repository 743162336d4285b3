"""`Study`: a question, the searches that answer it, and what is concluded from their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from dtmsearch.analysis.findings import Findings
from dtmsearch.config import SearchFile, from_mapping
from dtmsearch.config.reading import override_key, read_yaml
from dtmsearch.core.plugins import nearest
from dtmsearch.core.records import RunRecord
from dtmsearch.errors import UserError
from dtmsearch.store.store import ResultStore

# What the part without a label is asked for by.
MAIN = "main"


@dataclass(frozen=True)
class Part:
    """A search of a study: its label, empty where there is one search, and what it sets in the study's file."""

    label: str = ""
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class PartRun:
    """A part that has run: its label, the file that it ran by, and what the store has of it."""

    label: str
    file: SearchFile
    record: RunRecord

    @property
    def run(self) -> str:
        """The run's name."""
        return self.record.run


@dataclass(frozen=True)
class Study:
    """A question that searches answer.

    `title` names it, `asks` is the question in a sentence. `parts` are its searches; `of_texts` gives them where they
    follow from the texts. `conclude` makes of the rows of the finished searches what is said and shown. Its search file
    lies beside it, in `files/NAME.yaml`. `mixes`: its prompts are a mixture of the texts, which it tells apart.
    `least_prompts`: with fewer nothing can be concluded.
    """

    name: str
    title: str
    asks: str
    conclude: Callable[[ResultStore, Sequence[PartRun]], Findings]
    parts: tuple[Part, ...] = (Part(),)
    mixes: bool = False
    least_prompts: int = 1


def search_files(
    study: Study,
    model: str,
    texts: Sequence[str],
    held_out: Sequence[str] = (),
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
) -> list[tuple[str, SearchFile]]:
    """The searches of a study of a model: (label, search file) each. `texts` are where prompts are cut from, `held_out`
    where validation's are; `overrides` are `--set`'s; `only` names parts, where not all are
    wanted (`main`: the one without a label). Raises `UserError` for a user's mistake."""
    source = f"{study.name}.yaml"
    text = (files("dtmsearch.studies") / "files" / source).read_text(encoding="utf-8")
    labels = [part.label or MAIN for part in study.parts]
    for label in only:
        if label not in labels:
            raise UserError(nearest(label, labels, f"part of the study {study.name}"))
    found = []
    for part in study.parts:
        if only and (part.label or MAIN) not in only:
            continue
        content = read_yaml(text, source)
        content["model"]["path"] = model
        content["run"] = f"{study.name}-{_word(Path(model).name)}"
        if study.mixes:
            content["prompts"]["mix"] = [{"files": [name]} for name in texts]
            content["search"].setdefault("options", {})["domains"] = len(texts)
        elif texts:
            content["prompts"]["files"] = list(texts)
        if held_out:
            if "validation" not in content:
                raise UserError(f"study {study.name} judges no plan on held-out text: leave --held-out out")
            content["validation"] = {**(content["validation"] or {}), "files": list(held_out)}
        for override in (*part.overrides, *overrides):
            override_key(content, override)
        if part.label:
            content["run"] = f"{content['run']}-{part.label}"
        file = from_mapping(content, source, Path.cwd())
        count, least = file.prompts.count, study.least_prompts
        if count < least:
            raise UserError(f"prompts.count: study {study.name} needs {least} prompts at least, got {count}")
        found.append((part.label, file))
    return found


def _word(name: str) -> str:
    """A name as a run may have it."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in name)
