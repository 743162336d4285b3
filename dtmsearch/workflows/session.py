"""`Session`: what every use case carries while it has a model at hand, and what each of them does with it first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

from dtmsearch.analysis.format import counted
from dtmsearch.cluster.pool_settings import PoolSettings as Where
from dtmsearch.config import SearchFile, texts
from dtmsearch.core.collection import uncollected
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import (
    EXTRA_METRICS,
    EvalRequest,
    Outcome,
    Reference,
    ReplicaSettings,
    check_agreement,
    reference_id,
)
from dtmsearch.core.generation_rules import GenerationRules
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.records import Purpose
from dtmsearch.core.schemes import check_libraries
from dtmsearch.core.variant import Variant
from dtmsearch.errors import UserError
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.search.loop import measure
from dtmsearch.search.protocols import Observer, tell_stage
from dtmsearch.search.space import SearchSpace
from dtmsearch.store.store import ResultStore, RunWriter
from dtmsearch.workflows.build import space_of
from dtmsearch.workflows.text_windows import Cut

# What is being done while plans are measured, by what they are measured for.
_MEASURING: dict[Purpose, str] = {
    "choice": "choosing among the plan and uniform plans on held-out prompts",
    "validation": "measuring the plan and uniform plans on held-out prompts",
    "evaluate": "measuring",
}

# What opens the side that has the model, for a search file and where it runs.
OpenEvaluator = Callable[[SearchFile, Where], ModelEvaluator]


@dataclass(frozen=True)
class Session:
    """One driver's time with the model of a search file: the file, the store that it reads and the writer by which it
    adds to it, the side that has the model and that model's components, who watches, and whether it is to stop."""

    file: SearchFile
    store: ResultStore
    writer: RunWriter
    pool: ModelEvaluator
    manifest: ModelManifest
    observer: Observer
    stop_requested: Callable[[], bool] = lambda: False

    @cached_property
    def space(self) -> SearchSpace:
        """What is searched. Raises `UserError` for components, ties or budgets that cannot be."""
        return space_of(self.file, self.manifest)

    def note(self, text: str) -> None:
        self.observer.on_note(text)

    def stage(self, text: str, done: str = "") -> None:
        tell_stage(self.observer, text, done)

    def reference(self, cut: Cut) -> Reference:
        """The reference of prompts, from the store if any run has made it before. Says how the prompts differ from the
        text that they are cut from."""
        prompts, wanted_id = cut
        for note in prompts.notes:
            self.note(note)
        reference = self.store.reference(wanted_id)
        if reference is None:
            self.stage(f"the unquantized model continues {counted(len(prompts.tokens), 'prompt')}")
            reference = self.writer.share(self.pool.make_reference(prompts))
        check_agreement(reference)  # of one that an earlier version recorded
        return reference

    def recorded(self, known_id: str | None) -> Cut | None:
        """The prompts of a reference that the run began with, which it keeps to whatever its texts hold now. Raises
        `UserError` where the model would continue them otherwise than it did then."""
        reference = None if known_id is None else self.store.reference(known_id)
        if reference is None:
            return None
        _check_conditions(self.file.run, reference, *self.pool.conditions())
        return reference.prompts, reference.id

    def measure(self, requests: Mapping[str, EvalRequest], purpose: Purpose) -> dict[str, Outcome]:
        """Measure named requests outside a search. Raises `SearchStopped` when that is wished."""
        text = _MEASURING.get(purpose, "measuring")

        def heard(answered: int, asked: int) -> None:
            self.stage(text, f"{answered} of {asked} plans")

        self.stage(text)
        return measure(requests, self.pool, self.writer, purpose, self.stop_requested, heard)


@contextmanager
def opened(
    file: SearchFile,
    store: ResultStore,
    writer: RunWriter,
    where: Where,
    observer: Observer,
    evaluator: OpenEvaluator | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Iterator[Session]:
    """A session, over what has the model: replicas on a cluster or in this process, or what `evaluator` opens in the
    place of both; closed at the end. Raises `UserError` for a folder that holds no model."""
    where = replace(where, weights_folder=store.weights_folder)
    with pool_for(file, where, observer, evaluator) as pool:
        yield Session(file, store, writer, pool, pool.manifest(), observer, stop_requested)


def check_holds_whole(where: Where) -> None:
    """Raises `UserError` for replicas of which it is known that they drop no blocks."""
    if where.nodes_per_replica > 1:
        raise UserError(
            "blocks are dropped of models that one process holds whole: leave out --nodes-per-replica. A model that "
            "does not fit one GPU passes through it (--weights streamed), or is spread over several of a host by "
            "--gpus-per-replica"
        )


def pool_for(
    file: SearchFile, where: Where, observer: Observer, evaluator: OpenEvaluator | None = None
) -> ModelEvaluator:
    """What has a search file's model, as in `opened`; to be closed by `with`."""
    if file.search.shapes_blocks:
        check_holds_whole(where)
    if evaluator is not None:
        return evaluator(file, where)
    if file.model.trust_remote_code:
        observer.on_note(
            f"WARNING: TRUST_REMOTE_CODE IS ON. PYTHON CODE THAT COMES WITH {file.model.path} RUNS WITH ALL YOUR RIGHTS"
        )
    if where.address is None:
        texts.check_model(file)
        texts.check_vocabulary(file)
        check_libraries(file.search.every_scheme)
    if where.in_process:
        settings = ReplicaSettings(where.batch_tokens, weights=where.weights, weights_folder=where.weights_folder)
        with uncollected():
            tell_stage(observer, "loading PyTorch and transformers")
            from dtmsearch.model.replica.local_replicas import LocalReplicas

            tell_stage(observer, f"loading the model, {file.model.path}")
            return cast(ModelEvaluator, LocalReplicas(file.model_spec, settings))  # its replica answers the rest
    tell_stage(observer, "starting Ray and its replicas")
    from dtmsearch.cluster.pool import ReplicaPool

    return ReplicaPool(file.model_spec, where, observer.on_note, run=file.run)


def _check_conditions(run: str, stored: Reference, mode: NumericMode, rules: GenerationRules) -> None:
    if reference_id(stored.manifest_id, mode, stored.prompts, rules) == stored.id:
        return
    changed = stored.mode.differences(mode)
    changed += stored.rules.differences(rules) if stored.tokenizer else []
    what = "; ".join(changed) or "by an older dtmsearch, whose measurements are not comparable with this one's"
    raise UserError(
        f"run {run!r} was begun with other continuations of its prompts than the model gives now: {what}. Undo the "
        f"change, or search anew under a name of its own (--set run={run}-2)"
    )


def whole_request(
    variant: Variant,
    reference: Reference,
    metrics: tuple[str, ...] = EXTRA_METRICS,
) -> EvalRequest:
    """A variant on every prompt of a reference, in all of this package's metrics, or those `metrics`."""
    prompts = 0, reference.num_prompts
    return EvalRequest.of(variant, reference.id, prompts, metrics)
