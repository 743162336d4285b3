"""What is asked of replicas beside evaluations: whole answers of whichever is up, and things that all of them take.

Knows nothing of searches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from dtmsearch.cluster.outstanding import MAX_ATTEMPTS
from dtmsearch.cluster.replica_handle import ReplicaHandle
from dtmsearch.cluster.replicas import ReplicaSet, cause_of, is_loss
from dtmsearch.core.calibration import (
    Calibration,
    ExpertUse,
    InputStatistics,
    PackedMatrix,
    Routing,
    Through,
    WeightError,
)
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.documents import Texts
from dtmsearch.core.evaluation import Continuation, IntArray, PromptTokens, Reference, Speed, mean_speed
from dtmsearch.core.generation_rules import GenerationRules
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.prices import PriceBlock, PriceRequest
from dtmsearch.core.variant import Variant
from dtmsearch.errors import ReplicasFailed


class Services:
    """The replicas' methods, each called on one replica or given to all. `check_alive` is called while none is up."""

    def __init__(self, replicas: ReplicaSet, check_alive: Callable[[], None]) -> None:
        self._replicas, self._check_alive = replicas, check_alive
        self._solved: dict[str, dict[tuple[str, str], Any]] = {}

    def manifest(self) -> ModelManifest:
        manifest: ModelManifest = self._ask_one("manifest")
        return manifest

    def conditions(self) -> tuple[NumericMode, GenerationRules]:
        """See `dtmsearch.model.replica.replica.Replica.conditions`."""
        conditions: tuple[NumericMode, GenerationRules] = self._ask_one("conditions")
        return conditions

    def cut_prompts(self, *arguments: Any) -> Any:
        """See `dtmsearch.model.replica.replica.Replica.cut_prompts`."""
        return self._ask_one("cut_prompts", *arguments)

    def tokenized(self, texts: Texts) -> list[IntArray]:
        """See `dtmsearch.model.replica.replica.Replica.tokenized`."""
        documents: list[IntArray] = self._ask_one("tokenized", texts)
        return documents

    def reference_id(self, prompts: PromptTokens) -> str:
        """See `dtmsearch.model.replica.replica.Replica.reference_id`."""
        reference_id: str = self._ask_one("reference_id", prompts)
        return reference_id

    def make_reference(self, prompts: Any) -> Reference:
        """See `dtmsearch.model.replica.replica.Replica.make_reference`."""
        reference: Reference = self._ask_one("make_reference", prompts)
        return reference

    def measure_speed(self, count: int, prompt_tokens: int, continuation_tokens: int) -> Speed:
        """See `Replica.measure_speed` in `dtmsearch.model.replica`. Every replica that has a place measures at the same
        time, for they share machines: the mean of what they say."""
        self._first_ready()
        while self._replicas.num_loading:
            self._check_alive()
            self._replicas.welcome(timeout_seconds=1.0)
        calls = [
            (member, member.actor.call.remote("measure_speed", count, prompt_tokens, continuation_tokens))
            for member in self._replicas.ready
        ]
        measured: list[Speed] = []
        for member, call in calls:
            try:
                measured.append(ray.get(call))
            except (RayTaskError, RayActorError) as error:
                if not is_loss(error):
                    raise cause_of(error) from error
                self._replicas.lose(member, error)
        return mean_speed(measured) if measured else self.measure_speed(count, prompt_tokens, continuation_tokens)

    def continuations(self, variant: Variant, reference_id: str, prompts: Sequence[int]) -> list[Continuation]:
        """See `dtmsearch.model.replica.replica.Replica.continuations`."""
        written: list[Continuation] = self._ask_one("continuations", variant, reference_id, tuple(prompts))
        return written

    def save_pruned(self, variant: Variant, folder: str) -> None:
        """See `dtmsearch.model.replica.replica.Replica.save_pruned`."""
        self._ask_one("save_pruned", variant, folder)

    def routed_tokens(self, reference_id: str) -> dict[str, int]:
        """See `dtmsearch.model.replica.replica.Replica.routed_tokens`."""
        routed: dict[str, int] = self._ask_one("routed_tokens", reference_id)
        return routed

    def use(self, reference: Reference) -> None:
        """Give a reference to every replica, those to come included; each repeats the base model's own evaluation."""
        self._replicas.use(reference)

    def cut_calibration(
        self,
        texts: Texts,
        count: int,
        tokens: int,
        seed: int,
        through: Through = Calibration.through,
        experts: Routing = Calibration.experts,
    ) -> Calibration:
        """See `dtmsearch.model.replica.replica.Replica.cut_calibration`."""
        calibration: Calibration = self._ask_one("cut_calibration", texts, count, tokens, seed, through, experts)
        return calibration

    def gather_statistics(self, calibration: Calibration) -> InputStatistics:
        """See `dtmsearch.model.replica.replica.Replica.gather_statistics`."""
        statistics: InputStatistics = self._ask_one("gather_statistics", calibration)
        return statistics

    def weight_errors(
        self, components: Sequence[str], schemes: Sequence[str], calibration_id: str = "", by_hessian: bool = False
    ) -> list[WeightError]:
        """See `dtmsearch.model.replica.replica.Replica.weight_errors`."""
        errors: list[WeightError] = self._ask_one("weight_errors", components, schemes, calibration_id, by_hessian)
        return errors

    def expert_uses(self, components: Sequence[str], schemes: Sequence[str], calibration_id: str) -> list[ExpertUse]:
        """See `dtmsearch.model.replica.replica.Replica.expert_uses`."""
        uses: list[ExpertUse] = self._ask_one("expert_uses", components, schemes, calibration_id)
        return uses

    def outlier_shares(self, calibration_id: str) -> dict[int, float]:
        """See `dtmsearch.model.replica.replica.Replica.outlier_shares`."""
        shares: dict[int, float] = self._ask_one("outlier_shares", calibration_id)
        return shares

    def use_calibration(self, calibration: Calibration, statistics: InputStatistics) -> None:
        """Give a calibration to every replica, those to come included."""
        self._replicas.give("call", "use_calibration", ray.put(calibration), ray.put(statistics))

    def use_solved(self, calibration_id: str, matrices: Iterable[PackedMatrix]) -> None:
        """Give solved matrices to every replica, those to come included; they lie in the cluster's memory."""
        held = self._solved.setdefault(calibration_id, {})
        held |= {(packed.component, packed.scheme): ray.put(packed) for packed in matrices}
        self._replicas.give("take_solved", calibration_id, dict(held))

    def solve(
        self, calibration_id: str, parts: Sequence[Sequence[tuple[str, str]]]
    ) -> Iterator[Sequence[PackedMatrix]]:
        """Have (component, scheme) pairs solved, a part on whichever replica is free; yields a part as it is done.

        In order of layers each replica gathers on its way up. A part whose replica is lost goes to another.
        """
        yield from self._spread("solve", [(calibration_id, part) for part in parts])

    def unpriceable(self, components: Sequence[str]) -> str:
        """See `dtmsearch.model.replica.replica.Replica.unpriceable`."""
        reason: str = self._ask_one("unpriceable", tuple(components))
        return reason

    def price_blocks(self, requests: Sequence[PriceRequest]) -> Iterator[PriceBlock]:
        """Have prices taken, a request on whichever replica is free; yields a block as it is done. One whose replica is
        lost goes to another."""
        yield from self._spread("price", [(request,) for request in requests])

    def _spread(self, method: str, parts: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """The answers of a method for each of `parts`, its arguments, in the order in which they come."""
        waiting = deque((number, 1) for number in range(len(parts)))
        under_way: dict[Any, tuple[ReplicaHandle, int, int]] = {}
        while waiting or under_way:
            self._first_ready()
            busy = [member for member, _, _ in under_way.values()]
            for member in (m for m in self._replicas.ready if m not in busy):
                if waiting:
                    number, attempt = waiting.popleft()
                    under_way[member.actor.call.remote(method, *parts[number])] = member, number, attempt
            done, _ = ray.wait(list(under_way), timeout=1.0)
            for call in done:
                member, number, attempt = under_way.pop(call)
                try:
                    yield ray.get(call)
                except (RayTaskError, RayActorError) as error:
                    if not is_loss(error):
                        raise cause_of(error) from error
                    if attempt >= MAX_ATTEMPTS:
                        raise ReplicasFailed(f"{attempt} replicas were lost in `{method}` of the same part") from error
                    waiting.appendleft((number, attempt + 1))
                    self._replicas.lose(member, error)

    def _ask_one(self, method: str, *arguments: Any) -> Any:
        """The answer of whichever replica is up first; another is asked if that one is lost."""
        while True:
            member = self._first_ready()
            try:
                return ray.get(member.actor.call.remote(method, *arguments))
            except (RayTaskError, RayActorError) as error:
                if not is_loss(error):
                    raise cause_of(error) from error
                self._replicas.lose(member, error)

    def _first_ready(self) -> ReplicaHandle:
        while not (ready := self._replicas.ready):
            self._check_alive()
            self._replicas.fill()
            self._replicas.welcome(timeout_seconds=1.0)
        return ready[0]
