"""The studies by their names, and how one is made: its searches run one after the other, then what follows from their
rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from dtmsearch.analysis.findings import Findings
from dtmsearch.cluster.pool_settings import PoolSettings as Where
from dtmsearch.config import SearchFile
from dtmsearch.core.plugins import nearest
from dtmsearch.errors import UserError
from dtmsearch.search.protocols import Observer
from dtmsearch.studies import (
    bound,
    discriminability,
    domains,
    metric_cost,
    prompt_numbers,
    quantization_order,
    sampling,
    sparsity_rounds,
    speculative,
    square_root,
    tasks,
)
from dtmsearch.studies.study import PartRun, Study, search_files
from dtmsearch.workflows.lookup import StoreLike
from dtmsearch.workflows.run import open_store, run
from dtmsearch.workflows.session import OpenEvaluator

_MODULES = (
    discriminability,
    quantization_order,
    sparsity_rounds,
    metric_cost,
    prompt_numbers,
    domains,
    sampling,
    speculative,
    tasks,
    bound,
    square_root,
)
STUDIES: dict[str, Study] = {module.STUDY.name: module.STUDY for module in _MODULES}


@dataclass(frozen=True)
class Answer:
    """A study that was made: what it found, and the runs that it rests on."""

    study: Study
    findings: Findings
    runs: tuple[str, ...]


def study(
    name: str,
    model: str | os.PathLike[str],
    texts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    store: StoreLike,
    where: Where = Where(),
    observer: Observer | None = None,
    *,
    held_out: Sequence[str] = (),
    overrides: Sequence[str] = (),
    parts: Sequence[str] = (),
    evaluator: OpenEvaluator | None = None,
) -> Answer:
    """Answer a question about metrics on a model, as `dtmsearch study` does: run the searches of the study `name`, or
    what is missing of them in the store, and conclude.

    `texts` are the files that prompts are cut from, `held_out` those on which plans are judged, where a study finds
    plans; `overrides` are keys of its search file, such as `prompts.count=64`, and `parts` names some of its searches.
    Raises `UserError` for a study that there is not, and what `run` raises.
    """
    files = [texts] if isinstance(texts, str | os.PathLike) else texts
    found = study_of(name)
    searches = search_files(found, str(model), [str(file) for file in files], held_out, overrides, parts)
    return make(found, searches, store, where, observer, evaluator)


def study_of(name: str) -> Study:
    """The study of a name. Raises `UserError`, naming the nearest, where there is none."""
    if name not in STUDIES:
        raise UserError(nearest(name, STUDIES, "study"))
    return STUDIES[name]


def make(
    study: Study,
    searches: Sequence[tuple[str, SearchFile]],
    store: StoreLike,
    where: Where = Where(),
    observer: Observer | None = None,
    evaluator: OpenEvaluator | None = None,
) -> Answer:
    """Run the searches of a study, or what is missing of them, and conclude. Raises as `workflows.run.run` does."""
    for _, file in searches:
        run(file, store, where, observer, evaluator)
    return answer(study, searches, store)


def answer(study: Study, searches: Sequence[tuple[str, SearchFile]], store: StoreLike) -> Answer:
    """What follows from the rows of a study's finished searches. Raises `UserError` where one has not run."""
    results = open_store(store)
    parts = []
    for label, file in searches:
        record = results.run(file.run)
        if record is None:
            raise UserError(f"run {file.run!r} of the study {study.name} is not in the store")
        parts.append(PartRun(label, file, record))
    return Answer(study, study.conclude(results, parts), tuple(part.run for part in parts))
