"""The verb `score`: tasks of lm-evaluation-harness on the base model and on the compressed one, answer by answer.

The harness asks and judges; what stands here is which models it gets, and what differs between their answers. None of
its caches is used: every answer is the model's own, now.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtmsearch.core.checkpoint_files import read_model_config
from dtmsearch.core.statistics import PairedDifference, paired_difference
from dtmsearch.core.user_files import is_folder
from dtmsearch.errors import UserError
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.described_folder import base_model_of
from dtmsearch.workflows.export import export
from dtmsearch.workflows.export_source import find

# Intervals are made with the same weights every time.
_INTERVAL_SEED = 0


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task: means over the same questions, and compressed minus base, paired over them.

    `changed` answers are others than the base model's, right or wrong; `to_wrong` and `to_right` count those that the
    metric judges otherwise, where it judges right or wrong (None for metrics that give degrees).
    """

    task: str
    metric: str
    num_questions: int
    base: float
    compressed: float
    difference: PairedDifference
    changed: int
    to_wrong: int | None
    to_right: int | None

    @property
    def flips(self) -> int | None:
        """Answers that went from right to wrong or back (arXiv 2407.09141)."""
        return None if self.to_wrong is None or self.to_right is None else self.to_wrong + self.to_right


@dataclass(frozen=True)
class Asked:
    """How the harness is asked: its tasks, a folder with more of them, questions of each at most (None: all), examples
    before each question (None: the task's own), rows of a batch."""

    tasks: tuple[str, ...]
    include: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8


def score(
    source: str,
    asked: Asked,
    store: str,
    *,
    base: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[TaskScore]:
    """Score a run's plan, or a folder that was exported, beside its base model.

    `base` is where the base model lies, if not where the run or the folder's README says. Raises `UserError` for what
    is neither folder nor plan, for a task that the harness does not have, and where the harness is missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("score needs an extra: pip install 'dtmsearch[eval]'")
    _check(source, store, base)
    manager = _tasks(asked)
    with ExitStack() as stack:
        if is_folder(Path(source)):
            folder = source
        else:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="dtmsearch-score-"))
            folder = _exported(source, store, base, f"{scratch}/model", say)
        original = base or base_model_of(Path(folder))
        dtype = read_model_config(Path(folder)).get("dtype", "auto")
        say(f"asking the base model at {original}")
        before = _answers(original, asked, dtype, manager)
        say("asking the compressed model")
        after = _answers(folder, asked, dtype, manager)
    return [row for task in before for row in _compared(task, before[task], after[task])]


def _check(source: str, store: str, base: str | None) -> None:
    """What is no plan, or of no known model, is said before the harness reads its thousands of tasks."""
    if not is_folder(Path(source)):
        find(source, ResultStore(store), base)
    elif base is None:
        base_model_of(Path(source))


def _exported(run: str, store: str, base: str | None, out: str, say: Callable[[str], None]) -> str:
    results = ResultStore(store)
    record = results.run(run)
    found = None if record is None or record.final_plan_id is None else results.plan(record.final_plan_id, run)
    rounding = [] if found is None else [s for s in found.parsed.values() if s.rounds_activations]
    # A dense checkpoint cannot say that activations are rounded.
    form = "dense" if not rounding else "bitsandbytes" if rounding[0].kind.as_module else "compressed-tensors"
    export(run, form, out, store, check=False, model=base, say=say)
    return out


def _tasks(asked: Asked) -> Any:
    """The harness's tasks and those of the folder. Raises `UserError` for one that neither has."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=asked.include)
    unknown = [task for task in asked.tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm-evaluation-harness has no task {', '.join(unknown)}; a folder of your own: --include")
    return manager


def _answers(model: str, asked: Asked, dtype: str, manager: Any) -> dict[str, list[dict[str, Any]]]:
    """What a model answered: task -> samples of the harness, in the order of its questions."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = HFLM(pretrained=model, device=device, dtype=dtype, batch_size=asked.batch_size, logits_cache=False)
    results = simple_evaluate(
        model=loaded,
        tasks=list(asked.tasks),
        num_fewshot=asked.num_fewshot,
        limit=asked.limit,
        log_samples=True,
        task_manager=manager,
        use_cache=None,
        cache_requests=False,
        bootstrap_iters=0,
    )
    del loaded
    gc.collect()
    samples = {task: sorted(rows, key=_question) for task, rows in results["samples"].items()}
    return dict(sorted(samples.items()))


def _question(sample: Mapping[str, Any]) -> tuple[int, str]:
    return int(sample["doc_id"]), str(sample.get("filter", ""))


def _compared(
    task: str, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> Iterable[TaskScore]:
    """A row for each metric and filter of a task."""
    assert [_question(s) for s in before] == [_question(s) for s in after], f"{task}: the questions differ"
    filters = dict.fromkeys(str(sample.get("filter", "none")) for sample in before)
    for name in filters:
        pairs = [(b, a) for b, a in zip(before, after, strict=True) if str(b.get("filter", "none")) == name]
        for metric in pairs[0][0]["metrics"]:
            if isinstance(pairs[0][0][metric], int | float):
                label = metric if len(filters) == 1 else f"{metric}, {name}"
                yield _row(task, label, metric, pairs)


def _row(task: str, label: str, metric: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> TaskScore:
    base = np.array([float(b[metric]) for b, _ in pairs])
    compressed = np.array([float(a[metric]) for _, a in pairs])
    judged = bool(np.isin(np.concatenate([base, compressed]), (0.0, 1.0)).all())
    return TaskScore(
        task=task,
        metric=label,
        num_questions=len(pairs),
        base=float(base.mean()),
        compressed=float(compressed.mean()),
        difference=paired_difference(
            compressed, base, _INTERVAL_SEED, limits=(-1.0, 1.0) if judged else (-math.inf, math.inf)
        ),
        changed=sum(answer_of(b) != answer_of(a) for b, a in pairs),
        to_wrong=int((base > compressed).sum()) if judged else None,
        to_right=int((base < compressed).sum()) if judged else None,
    )


def answer_of(sample: Mapping[str, Any]) -> object:
    """What a model chose: the likeliest of several continuations, or the text that it wrote; of a single continuation,
    whether it would write it."""
    responses = sample["filtered_resps"]
    scored = [response for response in responses if isinstance(response, list | tuple)]
    if len(scored) != len(responses) or not scored:
        return [str(response) for response in responses]
    if len(scored) == 1:
        return bool(scored[0][1]) if len(scored[0]) > 1 else float(scored[0][0])
    return max(range(len(scored)), key=lambda place: float(scored[place][0]))
