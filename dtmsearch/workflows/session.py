"""What every driver of replicas does, whatever it is after: open their pool, listen for a wish to stop, and make the
reference or find it in the store. Knows no strategy and no verb.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, cast

from dtmsearch.cluster.pool import ReplicaPool
from dtmsearch.cluster.pool_settings import PoolSettings as Where
from dtmsearch.config import PromptsSection, SearchFile, texts
from dtmsearch.core.evaluation import EXTRA_METRICS, EvalRequest, Reference, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.search.loop import Observer
from dtmsearch.store.store import ResultStore, RunWriter


def pool_for(file: SearchFile, where: Where, observer: Observer) -> ReplicaPool:
    """Replicas of a search file's model, to be closed by `with`. Raises `UserError` for a folder that holds none."""
    if file.model.trust_remote_code:
        observer.on_note(
            f"WARNING: TRUST_REMOTE_CODE IS ON. PYTHON CODE THAT COMES WITH {file.model.path} RUNS WITH ALL YOUR RIGHTS"
        )
    if where.address is None:
        texts.check_model(file)
    if where.in_process:
        from dtmsearch.model.replica.local_replicas import LocalReplicas

        settings = ReplicaSettings(where.batch_tokens, weights_folder=where.weights_folder)
        return cast(ReplicaPool, LocalReplicas(file.model_spec, settings))  # it answers as a pool does
    return ReplicaPool(file.model_spec, where, observer.on_note, run=file.run)


def reference_for(
    pool: ReplicaPool,
    results: ResultStore,
    writer: RunWriter,
    file: SearchFile,
    prompts: PromptsSection,
    known_id: str | None,
    on_note: Callable[[str], None],
) -> Reference:
    """The reference that a run began with; else that of its prompts, from the store if any run has made it before.

    `on_note` hears how the prompts differ from the text that they are cut from.
    """
    stored = None if known_id is None else results.reference(known_id)
    if stored is not None:
        return stored
    tokens, wanted_id = pool.cut_prompts(
        texts.read(file, prompts), prompts.count, prompts.prompt_tokens, prompts.continuation_tokens, prompts.seed
    )
    for note in tokens.notes:
        on_note(note)
    reference = results.reference(wanted_id)
    if reference is None:
        reference = writer.put_reference(pool.make_reference(tokens))
    return reference


def whole_request(plan: Plan, reference: Reference, calibration_id: str, weights_id: str = "") -> EvalRequest:
    """A plan on every prompt of a reference, in all metrics."""
    prompts = 0, reference.num_prompts
    return EvalRequest(plan, reference.id, prompts, EXTRA_METRICS, calibration_id=calibration_id, weights_id=weights_id)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends what is under way as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
