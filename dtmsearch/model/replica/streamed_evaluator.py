"""Measures variants of a model whose weights pass through the device layer by layer.

All candidates of a round go up the layers together: each layer's weights are brought once, and every candidate that
differs from the others at or below that layer runs through it there. Candidates that are the same up to a layer are
one until they part. Where states of all of them do not fit, prompts go in blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from torch import Tensor

from dtmsearch.core.decoding import GREEDY
from dtmsearch.core.evaluation import EvalRequest, FloatArray, IntArray, Outcome, StatesFound
from dtmsearch.core.metric_registry import METRICS, Metric, perplexity, share_of_divergent_tokens
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import DROP
from dtmsearch.errors import LibraryMissing
from dtmsearch.model.forward.activation_cache import ActivationCache, free_bytes
from dtmsearch.model.forward.batch_size import is_out_of_memory
from dtmsearch.model.forward.boundary_states import State
from dtmsearch.model.forward.head_metrics import Scores, fetch
from dtmsearch.model.modules.streamed_layers import StreamedLayers
from dtmsearch.model.replica.loaded_reference import Loaded
from dtmsearch.model.replica.plan_evaluator import Bench, PlanEvaluator
from dtmsearch.model.replica.results import Launched

# The part of a device's free memory that states may take.
_STATES_SHARE = 0.6
# A batch of a text: name of the text, number of the batch.
_Item = tuple[str, int]
_SchemesHere = tuple[tuple[str, str], ...]


@dataclass
class _Line:
    """Candidates that are the same so far, by their numbers; their states [rows, tokens, hidden] by item, None at the
    tokens; how many groups of them have yet to go on."""

    members: list[int]
    states: dict[_Item, State | None]
    waiting: int = 0


@dataclass(frozen=True)
class _Asked:
    """What requests of one pass have in common."""

    loaded: Loaded
    texts: tuple[str, ...]
    with_base: bool
    metrics: tuple[Metric, ...]
    overlaps: bool = False


class StreamedEvaluator(PlanEvaluator):
    """See the module. `streamed` brings the layers."""

    def __init__(self, bench: Bench, name: str, node: str, streamed: StreamedLayers) -> None:
        super().__init__(bench, name, node)
        self._streamed = streamed
        layers = range(self._body.num_layers)
        ends = frozenset({layers[0], layers[-1]})
        self._stages = {
            name: frozenset({component.layer}) if component.layer in layers else ends
            for name, component in bench.manifest.by_name.items()
        }
        self._layers = {block.layer: block.name for block in bench.manifest.blocks if block.kind == "layer"}

    @property
    def states_kept(self) -> StatesFound:
        return "together"

    def kept_for(self, tokens: IntArray, targets_from: int) -> StatesFound:
        return "together"

    def evaluate(self, requests: Sequence[EvalRequest]) -> list[Outcome]:
        """An outcome for each request, in the order of the requests."""
        together: dict[tuple[object, ...], list[int]] = {}
        for index, request in enumerate(requests):
            key = request.weights_id, request.calibration_id, request.reference_id, request.prompts
            together.setdefault((*key, request.extra_metrics), []).append(index)
        outcomes: dict[int, Outcome] = {}
        for indices in together.values():
            self._finished_at = time.perf_counter()
            launched = self._launched([requests[index] for index in indices])
            done = [self._finish(each) for each in launched]
            outcomes |= zip(indices, self._sharing_time(done), strict=True)
        return [outcomes[index] for index in range(len(requests))]

    def check(self, plan: Plan, reference_id: str, num_prompts: int) -> tuple[IntArray, FloatArray]:
        """See `Replica.check`."""
        loaded = self.references[reference_id]
        request = EvalRequest(plan, reference_id, (0, num_prompts))
        (scores,) = self._bench.batches.halving(lambda: self._passed(loaded, [request], None))
        if isinstance(scores, str):
            raise ValueError(scores)
        found = fetch(scores["continuation"])
        agrees = loaded.reference.agrees[:num_prompts]
        return share_of_divergent_tokens(found.diverged & agrees), perplexity(found.nll)

    @staticmethod
    def _sharing_time(outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Each with its share of the time of the pass that they had in common."""
        seconds = sum(outcome.provenance.wall_seconds for outcome in outcomes) / len(outcomes)
        return [replace(o, provenance=replace(o.provenance, wall_seconds=seconds)) for o in outcomes]

    def _launched(self, requests: Sequence[EvalRequest]) -> list[Launched]:
        loaded = self.references[requests[0].reference_id]
        try:
            found = self._bench.batches.halving(lambda: self._passed(loaded, requests, requests[0].calibration_id))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            said = f"even with one prompt in a batch: {error}"
            return [Launched(request, failure=("out_of_memory", said)) for request in requests]
        return [
            Launched(request, scores) if isinstance(scores, dict) else Launched(request, failure=("invalid", scores))
            for request, scores in zip(requests, found, strict=True)
        ]

    def _score(self, loaded: Loaded, request: EvalRequest, shared: bool = False) -> dict[str, list[Scores]]:
        (found,) = self._passed(loaded, [request], request.calibration_id)
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _passed(
        self, loaded: Loaded, requests: Sequence[EvalRequest], calibration_id: str | None
    ) -> list[dict[str, list[Scores]] | str]:
        """For each request what its plan makes of each text, or why there is nothing. They differ in their plans
        alone. A calibration that is None is the active one."""
        one, bench = requests[0], self._bench
        loaded.set_range(one.prompts, self._cache)
        asked = [METRICS[name] for name in one.extra_metrics]
        texts = ("continuation", *(("text",) if any("text" in metric.needs for metric in asked) else ()))
        own = tuple(metric for metric in asked if metric.at_positions is not None)
        overlaps = loaded.compares_samples(asked)
        with_base = overlaps or any(metric.needs_base for metric in asked)
        common = _Asked(loaded, texts, with_base, own, overlaps)
        if common.with_base and loaded.base is not None:
            loaded.base_hidden = loaded.base_in_batches()
        base_too = common.with_base and loaded.base_hidden is None
        if base_too and one.weights_id:  # another model than the one that these plans change
            loaded.base_hidden = self._base_hidden(loaded)
            base_too = False
        bench.standing.rest_on(one.weights_id)
        plans = [request.plan for request in requests]
        failures = self._prepared(plans, calibration_id)
        if base_too:
            plans.append(Plan())
        hidden: list[Tensor] = []
        scores: list[dict[str, list[Scores]]] = [{text: [] for text in texts} for _ in plans]
        going = [number for number in range(len(plans)) if number not in failures]
        for block in self._blocks(common, len(going)):
            self._pass(common, block, [plans[number] for number in going], going, scores, failures, hidden)
        if base_too:
            loaded.base_hidden = hidden
        return [failures.get(number, scores[number]) for number in range(len(requests))]

    def _base_hidden(self, loaded: Loaded) -> list[Tensor]:
        """The base model's inputs of the head, kept to compare distributions with."""
        if loaded.base_hidden is not None:
            return loaded.base_hidden
        self._bench.standing.rest_on("")
        hidden: list[Tensor] = []
        common = _Asked(loaded, ("continuation",), True, ())
        for block in self._blocks(common, 1):
            self._pass(common, block, [Plan()], [0], [{"continuation": []}], {}, hidden)
        return hidden

    def _prepared(self, plans: Sequence[Plan], calibration_id: str | None) -> dict[int, str]:
        """Solve what the plans need solved, all together; by number, why some cannot be applied."""
        prepare = self._bench.calibrator.prepare
        try:
            prepare(plans, calibration_id)
            return {}
        except LibraryMissing:
            raise
        except ValueError:
            failures: dict[int, str] = {}
            for number, plan in enumerate(plans):
                try:
                    prepare((plan,), calibration_id)
                except ValueError as error:
                    failures[number] = str(error)
            prepare([plan for number, plan in enumerate(plans) if number not in failures], calibration_id)
            return failures

    def _blocks(self, common: _Asked, num_plans: int) -> Iterator[list[_Item]]:
        """Batches of all texts, as many at once as there is memory for states of all plans."""
        caches = common.loaded.caches
        items = [(text, index) for text in common.texts for index in range(len(caches[text].batches))]
        largest = max(caches[text].batches[index].numel() for text, index in items) * self._body.hidden_bytes
        room = _STATES_SHARE * free_bytes(self._body.input_device)
        count = max(1, int(room // (largest * (num_plans + 1))))
        for at in range(0, len(items), count):
            yield items[at : at + count]

    def _pass(
        self, common: _Asked, block: Sequence[_Item], plans: Sequence[Plan], numbers: Sequence[int],
        scores: list[dict[str, list[Scores]]], failures: dict[int, str], hidden: list[Tensor],
    ) -> None:  # fmt: skip
        """Take some batches up all layers. Adds to `scores` and, for an unquantized plan beyond them, to `hidden`."""
        plan_of = dict(zip(numbers, plans, strict=True))
        gone = [at for at, name in self._layers.items() if all(name in plan.dropped for plan in plans)]
        with self._streamed.passing_by(gone):
            self._through_layers(common, block, plan_of, scores, failures, hidden)

    def _through_layers(
        self, common: _Asked, block: Sequence[_Item], plan_of: Mapping[int, Plan],
        scores: list[dict[str, list[Scores]]], failures: dict[int, str], hidden: list[Tensor],
    ) -> None:  # fmt: skip
        """See `_pass`."""
        lines = [_Line(list(plan_of), dict.fromkeys(block))]
        last = self._body.num_layers - 1
        for layer in range(last + 1):
            groups = self._parted(layer, lines, plan_of, failures)
            here = [dict(schemes) for schemes, parts in groups.items() if parts]
            if not all(schemes.get(self._layers.get(layer, "")) == DROP for schemes in here):
                self._streamed.need(layer)
            lines = []
            for schemes, parts in groups.items():
                own = common.loaded.base is None and layer == last
                as_base = self._own_head([name for name, _ in schemes]) if own else nullcontext
                try:
                    with self._bench.standing.weights.perturbed(Plan.of(dict(schemes))):
                        for line, members in parts:
                            if layer < last:
                                states: dict[_Item, State | None] = {
                                    item: self._advanced(common, item, line, layer) for item in block
                                }
                                lines.append(_Line(members, states))
                            else:
                                self._end(common, block, line, members, scores, hidden, as_base)
                            line.waiting -= 1
                            if not line.waiting:
                                line.states = {}
                except LibraryMissing:
                    raise
                except ValueError as error:
                    failures |= {member: str(error) for _, members in parts for member in members}

    def _parted(
        self, layer: int, lines: Sequence[_Line], plan_of: Mapping[int, Plan], failures: Mapping[int, str]
    ) -> dict[_SchemesHere, list[tuple[_Line, list[int]]]]:
        """What runs in a layer: the schemes of its components -> lines with the members that have them. Unchanged
        weights come first, and of the last layer the unquantized plan, to which others are compared."""
        groups: dict[_SchemesHere, list[tuple[_Line, list[int]]]] = {(): []}
        for line in lines:
            parted: dict[_SchemesHere, list[int]] = {}
            for member in line.members:
                if member not in failures:
                    parted.setdefault(self._schemes_in(layer, plan_of[member]), []).append(member)
            line.waiting = len(parted)
            for schemes, members in parted.items():
                groups.setdefault(schemes, []).append((line, members))
        groups[()].sort(key=lambda part: not any(plan_of[member] == Plan() for member in part[1]))
        return groups

    def _schemes_in(self, layer: int, plan: Plan) -> _SchemesHere:
        """Those of components of a layer; with the first and the last those of what lies outside of layers, which may
        be embeddings and head at once."""
        return tuple((name, scheme) for name, scheme in sorted(plan.schemes.items()) if layer in self._stages[name])

    def _cache_of(self, common: _Asked, item: _Item) -> ActivationCache:
        return common.loaded.caches[item[0]]

    def _advanced(self, common: _Asked, item: _Item, line: _Line, layer: int) -> State:
        batch = self._cache_of(common, item).batches[item[1]]
        return self._body.advance(batch, line.states[item], layer, layer + 1)

    def _end(
        self, common: _Asked, block: Sequence[_Item], line: _Line, members: Sequence[int],
        scores: list[dict[str, list[Scores]]], hidden: list[Tensor],
        as_base: Callable[[], AbstractContextManager[None]],
    ) -> None:  # fmt: skip
        """The last layer and the head, of candidates that are all the same."""
        for text, index in block:
            cache = self._cache_of(common, (text, index))
            tokens, made = cache.ended(index, line.states[text, index])
            compared = text == "continuation" and common.with_base
            if compared and common.loaded.base_hidden is None and len(hidden) == index:
                hidden.append(made.clone())  # of the unquantized plan, which comes first
            base = None
            if compared:
                base = (common.loaded.base_hidden or hidden)[index]
            found = self._compared(
                made, tokens, cache.targets_from, base, common.metrics if text == "continuation" else (),
                None if common.loaded.base is None else common.loaded.base.body, as_base,
                common.loaded.reference.decoding if text == "continuation" else GREEDY, common.overlaps,
            )  # fmt: skip
            for member in members:
                scores[member][text].append(found)
