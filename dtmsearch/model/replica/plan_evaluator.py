"""Measures variants of a model against references.

Requests that share a parent are measured in the order of the first layer in which they differ from it, and only from
that layer upwards: the parent's states are carried from boundary to boundary as the work goes. Knows nothing of how a
model is loaded, how references come about, or who asks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.decoding import GREEDY, Decoding
from dtmsearch.core.evaluation import (
    EvalRequest,
    FloatArray,
    IntArray,
    Outcome,
    Provenance,
    Reference,
    StatesFound,
    StatesKept,
    first_changed_layer,
)
from dtmsearch.core.identity import canonical
from dtmsearch.core.library_versions import versions
from dtmsearch.core.metric_registry import METRICS, Metric, perplexity, share_of_divergent_tokens
from dtmsearch.core.plan import Plan
from dtmsearch.core.variant import BASE, Variant
from dtmsearch.errors import LibraryMissing
from dtmsearch.model.calibration.calibrator import AnyCalibrator
from dtmsearch.model.forward.activation_cache import ActivationCache, CacheMemory
from dtmsearch.model.forward.batch_size import Batches, is_out_of_memory
from dtmsearch.model.forward.head_metrics import Divergence, Scores, compare, fetch
from dtmsearch.model.forward.layer_reuse import Reuse
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.forward.shared_noise import Sampling
from dtmsearch.model.replica.device_order import busy_order
from dtmsearch.model.replica.loaded_reference import BaseOutputs, Loaded, greedy
from dtmsearch.model.replica.results import Launched, outcome_of
from dtmsearch.model.replica.spread_model import head_in_layers
from dtmsearch.model.weights.standing import Standing

# The part of a model's weights that may be in memory both as in a request's parent and as in its plan.
_MOST_HELD_TWICE = 0.1
# Of a model over several devices, requests that are on their way for each: counted in layers, 3 hold two GPUs back once
# outputs of layers are kept (test_device_order).
_AHEAD_OF_EACH = 6
# Weights, parent, reference, prompts, first layer that differs.
_Place = tuple[str, str, str, tuple[int, int], int]


@dataclass(frozen=True)
class Bench:
    """What variants of a model are measured on.

    `never` [vocabulary] marks tokens that are not chosen; `weight_bytes` are those of the model; `longest_row` and
    `batches` say how large batches are; `states` where states of parents are kept.
    """

    standing: Standing
    calibrator: AnyCalibrator
    manifest: ModelManifest
    reuse: Reuse
    batches: Batches
    never: Tensor
    weight_bytes: int
    states: StatesKept = "auto"

    def become(self, variant: Variant) -> None:
        """Have the model under a variant, with what its plan needs solved for solved first: by its calibration or,
        where it names none, by the active one."""
        if variant.weights_id != self.standing.weights_id:
            self.standing.rest_on(variant.weights_id)
        self.calibrator.prepare((variant.plan,), variant.calibration_id or None)
        self.standing.weights.become(variant.plan)


class PlanEvaluator:
    """Measures requests on a bench, against the references that it was given. `name` and `node` go into the provenance
    of what it measures."""

    def __init__(self, bench: Bench, name: str, node: str) -> None:
        self._bench, self._body = bench, bench.standing.body
        self._name, self._node, self._versions = name, node, canonical(versions())
        self._device_ends = self._body.device_ends
        self._head_work = _head_work(self._body) if len(self._device_ends) > 1 else 0.0
        self._ahead = 1 if len(self._device_ends) == 1 else _AHEAD_OF_EACH * len(self._device_ends)
        self.references: dict[str, Loaded] = {}
        self._states_of = BASE
        self._place_before: _Place | None = None
        self._finished_at = 0.0
        self._head, self._in_head = _head_of(self._body.model, bench.manifest)

    def use(self, reference: Reference, base: BaseOutputs | None = None) -> None:
        """Take a reference, against which requests may be made from now on; `base`: of another model than this one."""
        self.references.setdefault(reference.id, Loaded(reference, base=base))

    def leave(self, reference_id: str) -> None:
        """Let go of a reference."""
        del self.references[reference_id]

    @property
    def states_kept(self) -> StatesFound:
        """Where the states of parents are kept for the prompts in use; what the bench says while there are none."""
        return next((cache.kept for cache in self._caches()), self._bench.states)

    def kept_for(self, tokens: IntArray, targets_from: int) -> StatesFound:
        """Where they would be kept for other rows."""
        return self._cache(tokens, targets_from).kept

    def evaluate(self, requests: Sequence[EvalRequest]) -> list[Outcome]:
        """An outcome for each request, in the order of the requests."""
        outcomes: dict[int, Outcome] = {}
        launched: deque[tuple[int, Launched]] = deque()
        self._solve_ahead(requests)
        self._finished_at = time.perf_counter()
        places = [self._place(request) for request in requests]
        for index, shared in self._in_order(requests, places):
            # The next is on its way before the last is waited for, so that a GPU never waits for us; of a model over
            # several GPUs so many that all of them have something to do.
            launched.append((index, self._launch(requests[index], shared)))
            self._place_before = places[index]
            if len(launched) > self._ahead:
                first, request = launched.popleft()
                outcomes[first] = self._finish(request)
        for first, request in launched:
            outcomes[first] = self._finish(request)
        return [outcomes[i] for i in range(len(requests))]

    def positions(self, request: EvalRequest) -> dict[str, Divergence]:
        """What the request's plan makes of every position of each text."""
        loaded = self.references[request.reference_id]
        return {
            name: fetch(scores)
            for name, scores in self._bench.batches.halving(lambda: self._score(loaded, request)).items()
        }

    def head_inputs(self, reference_id: str) -> Tensor:
        """The unquantized model's inputs of its head where it predicts continuations, [num_prompts,
        continuation_tokens, hidden]."""
        loaded = self.references[reference_id]

        def found() -> Tensor:
            loaded.set_range((0, loaded.reference.num_prompts), self._cache)
            return torch.cat(self._base_hidden(loaded))

        return self._bench.batches.halving(found)

    def divergence_of_base(self, loaded: Loaded) -> Divergence:
        """Where the unquantized model leaves its own continuations."""
        request = EvalRequest(Plan(), loaded.reference.id, (0, loaded.reference.num_prompts))
        return fetch(self._bench.batches.halving(lambda: self._score(loaded, request))["continuation"])

    def canary(self, reference_id: str) -> float:
        """Share of a reference's tokens on which the unquantized model here diverges: 0 where all is well."""
        loaded = self.references[reference_id]
        return float((self.divergence_of_base(loaded).diverged & loaded.reference.agrees).mean())

    def check(self, plan: Plan, reference_id: str, num_prompts: int) -> tuple[IntArray, FloatArray]:
        """See `Replica.check`."""
        loaded = self.references[reference_id]
        rows = slice(0, num_prompts)
        self._bench.become(Variant(plan))
        cache = self._cache(greedy(loaded.reference, rows), loaded.reference.prompt_tokens)
        with self._bench.standing.eagerly():
            found = fetch(
                self._bench.batches.halving(
                    lambda: self._measure(
                        cache.head_inputs(0, ()), cache.targets_from, None, decoding=loaded.reference.decoding
                    )
                )
            )
        return share_of_divergent_tokens(found.diverged & loaded.reference.agrees[rows]), perplexity(found.nll)

    def longest_row(self) -> int:
        """The most tokens of a row in use."""
        return max((loaded.reference.text.shape[1] for loaded in self.references.values()), default=1)

    def forget(self) -> None:
        """Let go of states that can be made again."""
        for loaded in self.references.values():
            loaded.forget()

    def _solve_ahead(self, requests: Sequence[EvalRequest]) -> None:
        """Solve what several requests need in one sweep up the layers. What goes wrong, each request says itself."""
        requests = [r for r in requests if r.weights_id == self._bench.standing.weights_id]
        calibrations = dict.fromkeys(r.calibration_id for r in requests if r.plan.needs_calibration)
        for name in calibrations:
            plans = {plan.id: plan for r in requests if r.calibration_id == name for plan in (r.plan, r.parent)}
            with suppress(ValueError, RuntimeError):
                self._bench.calibrator.prepare(plans.values(), name)
        self._bench.calibrator.rest()

    def _place(self, request: EvalRequest) -> _Place:
        """Where a request leaves its parent: those that do so at the same place share all that comes before."""
        layer = first_changed_layer(request, self._bench.manifest)
        return request.weights_id, request.parent.id, request.reference_id, request.prompts, layer

    def _in_order(self, requests: Sequence[EvalRequest], places: Sequence[_Place]) -> Iterator[tuple[int, bool]]:
        """The positions of requests as they are to be launched, and whether others leave their parent at the same
        place before or behind them."""
        by_place = sorted(range(len(requests)), key=places.__getitem__)
        for _, group in groupby(by_place, key=lambda index: places[index][:-1]):
            own = list(group)
            if len(self._device_ends) > 1 and self._keeps_all_states(requests[own[0]]):
                order = busy_order([places[index][-1] for index in own], self._device_ends, self._head_work)
                yield from ((own[at], places.count(places[own[at]]) > 1) for at in order)
            else:
                for index in own:
                    yield index, places.count(places[index]) > 1 or places[index] == self._place_before

    def _keeps_all_states(self, request: EvalRequest) -> bool:
        loaded = self.references[request.reference_id]
        loaded.set_range(request.prompts, self._cache)
        return all(cache.kept == "device" for cache in loaded.caches.values())

    def _launch(self, request: EvalRequest, shared: bool) -> Launched:
        loaded = self.references[request.reference_id]
        try:
            return Launched(request, self._bench.batches.halving(lambda: self._score(loaded, request, shared)))
        except LibraryMissing:  # of this machine, not of the plan: nothing to record
            raise
        except ValueError as error:
            return Launched(request, failure=("invalid", str(error)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return Launched(request, failure=("out_of_memory", f"even with one prompt in a batch: {error}"))

    def _finish(self, launched: Launched) -> Outcome:
        reference = self.references[launched.request.reference_id].reference
        scored = launched.fetched()
        started_at, self._finished_at = self._finished_at, time.perf_counter()
        provenance = Provenance(
            replica=self._name,
            node=self._node,
            wall_seconds=self._finished_at - started_at,
            tokens=sum(s.nll.shape[0] * reference.text.shape[1] for s in scored.values()),
            finished_at=time.time(),
            versions=self._versions,
        )
        return outcome_of(launched, scored, reference, provenance)

    def _score(self, loaded: Loaded, request: EvalRequest, shared: bool = False) -> dict[str, list[Scores]]:
        """What the request's plan makes of each text, from the first layer in which it leaves its parent. `shared`:
        other requests leave this parent there too."""
        loaded.set_range(request.prompts, self._cache)
        asked = [METRICS[name] for name in request.extra_metrics]
        names = ["continuation"] + (["text"] if any("text" in metric.needs for metric in asked) else [])
        overlaps = loaded.compares_samples(asked)
        with_base = overlaps or any(metric.needs_base for metric in asked)
        own = [metric for metric in asked if metric.at_positions is not None]
        if with_base and loaded.base_hidden is None:
            loaded.base_hidden = self._base_hidden(loaded) if loaded.base is None else loaded.base_in_batches()
        request = self._with_near_parent(request)
        boundary = first_changed_layer(request, self._bench.manifest)
        standing = self._bench.standing
        if request.weights_id != standing.weights_id:
            standing.rest_on(request.weights_id)
        self._bench.calibrator.prepare((request.plan, request.parent), request.calibration_id)
        self._stand(request.variant.under(request.parent))
        changed = request.plan.diff(request.parent).keys()
        for name in names:
            loaded.caches[name].carry(boundary)
            if shared:
                loaded.caches[name].look_ahead(boundary)
        as_base = self._own_head(request.plan.schemes) if with_base and loaded.base is None else nullcontext
        with standing.weights.perturbed(request.plan):
            return {
                name: self._measure(
                    loaded.caches[name].head_inputs(boundary, changed),
                    loaded.caches[name].targets_from,
                    loaded.base_hidden if name == "continuation" and with_base else None,
                    own if name == "continuation" else (),
                    None if loaded.base is None else loaded.base.body,
                    as_base,
                    loaded.reference.decoding if name == "continuation" else GREEDY,
                    overlaps,
                )
                for name in names
            }

    def _with_near_parent(self, request: EvalRequest) -> EvalRequest:
        """The request; with the plan as its own parent where the two are so far apart that memory would hold much of
        the model twice, once for each. KV caches are rounded as tokens pass and held nowhere."""
        manifest = self._bench.manifest
        changed = [manifest.by_name[component] for component in request.plan.diff(request.parent)]
        changed = [component for component in changed if not (component.is_cache or component.is_block)]
        if len({component.layer for component in changed}) <= 1:
            return request
        share = sum(c.num_weights for c in changed) / sum(c.num_weights for c in manifest.components)
        return request if share <= _MOST_HELD_TWICE else replace(request, parent=request.plan)

    def _stand(self, variant: Variant) -> None:
        """Have the model under a variant, and keep of states what it shares with the one that they are of."""
        above = variant.first_difference(self._states_of, self._bench.manifest)
        if above is not None:
            for cache in self._caches():
                cache.forget(above)
        self._states_of = variant
        self._bench.become(variant)

    def _caches(self) -> list[ActivationCache]:
        return [cache for loaded in self.references.values() for cache in loaded.caches.values()]

    def _cache(self, tokens: IntArray, targets_from: int) -> ActivationCache:
        bench = self._bench
        on_device = torch.from_numpy(tokens).long().to(self._body.input_device)
        devices = {self._body.device_of(layer) for layer in range(self._body.num_layers)}
        room = CacheMemory.on(devices, bench.weight_bytes) if bench.batches.roomy else CacheMemory.none()
        rows = bench.batches.rows(tokens.shape[1])
        return ActivationCache(self._body, bench.reuse, on_device, targets_from, rows, room, bench.states)

    def _base_hidden(self, loaded: Loaded) -> list[Tensor]:
        """The base model's inputs of the head, kept to compare distributions with."""
        self._stand(BASE)
        return [hidden.clone() for _, hidden in loaded.caches["continuation"].head_inputs(0, ())]

    def _measure(
        self,
        head_inputs: Iterator[tuple[Tensor, Tensor]],
        targets_from: int,
        base_hidden: list[Tensor] | None,
        metrics: Sequence[Metric] = (),
        base: Body | None = None,
        as_base: Callable[[], AbstractContextManager[None]] = nullcontext,
        decoding: Decoding = GREEDY,
        overlaps: bool = False,
    ) -> list[Scores]:
        return [
            self._compared(
                hidden,
                tokens,
                targets_from,
                base_hidden[index] if base_hidden else None,
                metrics,
                base,
                as_base,
                decoding,
                overlaps,
            )
            for index, (tokens, hidden) in enumerate(head_inputs)
        ]

    def _compared(
        self, hidden: Tensor, tokens: Tensor, targets_from: int, base_hidden: Tensor | None,
        metrics: Sequence[Metric], base: Body | None, as_base: Callable[[], AbstractContextManager[None]],
        decoding: Decoding, overlaps: bool,
    ) -> Scores:  # fmt: skip
        """See `head_metrics.compare`."""
        other = None if base_hidden is None else base
        sampling, targets = Sampling.of(decoding, tokens[:, :targets_from]), tokens[:, targets_from:]
        return compare(
            self._body, hidden, targets, base_hidden, self._bench.never, metrics, other, as_base, sampling, overlaps
        )

    def _own_head(self, changed: Collection[str]) -> Callable[[], AbstractContextManager[None]]:
        """Within what it gives, the head is the base model's, where it is among what a plan changes, by itself or as
        embeddings. To be asked for before the plan stands."""
        weights = self._bench.standing.weights
        name = next((name for name in self._in_head if name in changed), None)
        return nullcontext if name is None else partial(weights.with_original, {self._head: weights.original(name)})


def _head_work(body: Body) -> float:
    """What the last device does for a head, in layers: nothing for one that is the embedding, where passes begin."""
    head = body.model.get_output_embeddings().weight
    return head_in_layers(body.model) if head.device == body.device_of(body.num_layers - 1) else 0.0


def _head_of(model: Any, manifest: ModelManifest) -> tuple[str, tuple[str, ...]]:
    """The head's name, and the components whose weights are its: itself, or embeddings that it is tied to."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None:
        return "", ()
    sharing = [name for name, module in model.named_modules() if getattr(module, "weight", None) is weight]
    name = next(name for name, module in model.named_modules() if module is head)
    return name, tuple(component.name for component in manifest.others if component.name in sharing)
