"""A replica: the model on a device, which measures plans against references.

Requests that share a parent are measured in the order of the first layer in which they differ from it, and only from
that layer upwards: the replica carries the parent's states from boundary to boundary as it goes. Knows nothing of the
search, of Ray or of the store.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtmsearch.core.calibration import (
    Calibration,
    InputStatistics,
    PackedMatrix,
    Through,
    WeightError,
    calibration_id,
)
from dtmsearch.core.components import ModelManifest, weight_files
from dtmsearch.core.evaluation import (
    Continuation,
    EvalRequest,
    FloatArray,
    GenerationRules,
    IntArray,
    ModelSpec,
    Outcome,
    PromptTokens,
    Provenance,
    Reference,
    ReplicaSettings,
    Speed,
    StatesKept,
    check_agreement,
    first_changed_layer,
    reference_id,
)
from dtmsearch.core.identity import canonical
from dtmsearch.core.library_versions import versions
from dtmsearch.core.metric_registry import METRICS, Metric
from dtmsearch.core.metrics import perplexity, share_of_divergent_tokens
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import PASSES, PriceBlock, PriceRequest
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import UserError
from dtmsearch.model.calibration.calibrator import Calibrator
from dtmsearch.model.calibration.outliers import outlier_shares
from dtmsearch.model.compress.compressor import Fetch
from dtmsearch.model.forward.activation_cache import Room, Stream
from dtmsearch.model.forward.batch_size import Batches, is_out_of_memory
from dtmsearch.model.forward.expert_routing import routed_tokens
from dtmsearch.model.forward.head_metrics import Divergence, Scores, compare, fetch
from dtmsearch.model.forward.layer_reuse import Reuse
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.modules.compiled import Slot, as_loaded, compile_layers
from dtmsearch.model.modules.discovery import find_layers, read_manifest
from dtmsearch.model.modules.fingerprints import tokenizer_fingerprint
from dtmsearch.model.modules.loading import (
    checkpoint_folder,
    load_model,
    load_tokenizer,
    suppressed_tokens,
    vocabulary_size,
)
from dtmsearch.model.modules.slots import Places
from dtmsearch.model.replica.loaded_reference import Loaded, greedy
from dtmsearch.model.replica.pricing import Pricer
from dtmsearch.model.replica.prompts import Cutter, around
from dtmsearch.model.replica.results import Launched, outcome_of
from dtmsearch.model.replica.samples import margins, written_out
from dtmsearch.model.replica.timing import candidates_of, time_batch, time_candidates, timed_reference, whole_plans
from dtmsearch.model.weights.applied import Checkpoint, Weights
from dtmsearch.model.weights.trained import check_only_pruned, trained_file, write_pruned

log = logging.getLogger(__name__)

# From this width on compiled layers pay.
_WIDE = 1_024
# The part of a model's weights that may be in memory both as in a request's parent and as in its plan.
_MOST_HELD_TWICE = 0.1
# Weights, parent, reference, prompts, first layer that differs.
_Place = tuple[str, str, str, tuple[int, int], int]


@dataclass(frozen=True)
class LoadedModel:
    """What a replica is made of."""

    model: Any
    tokenizer: Any
    manifest: ModelManifest
    checkpoint: Checkpoint
    tokenizer_fingerprint: str


class Replica:
    """A model on a device, with every method a whole answer.

    One thread at a time. `node` and `name` go into the provenance of what it measures.
    """

    def __init__(self, spec: ModelSpec, settings: ReplicaSettings, name: str = "local", node: str = "") -> None:
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
        self._name, self._node = name, node
        self._versions = canonical(versions())
        self._spec = spec
        self._device = self._choose_device()
        if settings.num_devices > torch.cuda.device_count() and settings.num_devices > 1:
            raise UserError(f"{settings.num_devices} GPUs a replica, but it sees {torch.cuda.device_count()}")
        self._references: dict[str, Loaded] = {}
        self._batches = Batches(settings.batch_tokens, self._device, self.release_memory, self._longest_row)
        loaded = self._load(spec, settings)
        model, self._tokenizer, self._manifest = loaded.model, loaded.tokenizer, loaded.manifest
        self._tokenizer_fingerprint = loaded.tokenizer_fingerprint
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        num_embeddings = int(model.get_input_embeddings().weight.shape[0])
        self._cutter = Cutter(self._tokenizer, spec.path, context, num_embeddings)
        self._suppressed = suppressed_tokens(model, self._tokenizer)
        self._never = torch.zeros(vocabulary_size(model), dtype=torch.bool)
        self._never[list(self._suppressed)] = True
        self._never = self._never.to(model.get_output_embeddings().weight.device)
        self._weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)
        self._body = self._make_body(model)
        self._slots: dict[str, Slot] = {}
        places = Places(model, self._slots)
        self._compiled = settings.num_devices == settings.num_stages == 1 and _pays_to_compile(
            spec, model, self._device
        )
        self._reuse = Reuse(self._body, self._manifest, places, self._compiled)
        if self._compiled:
            self._slots.update(compile_layers(*find_layers(model)))
        self._weights_folder, self._weights_id = settings.weights_folder, ""
        self._weights = self._make_weights(loaded, places, getattr(torch, spec.scale_dtype))
        self._calibrator = self._make_calibrator(
            self._weights,
            self._manifest,
            lambda weights_id: self._to_parent(Plan(), weights_id),
            lambda: self._weights_id,
            self._generating,
            self._batches.rows,
        )
        self._states = settings.states
        self._place_before: _Place | None = None
        self._finished_at = 0.0

    def _choose_device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _load(self, spec: ModelSpec, settings: ReplicaSettings) -> LoadedModel:
        folder = checkpoint_folder(spec)
        manifest = read_manifest(spec)
        model = load_model(folder, spec, self._device, settings.num_devices)
        checkpoint = Checkpoint(weight_files(folder))
        checkpoint.map_apart(model)
        tokenizer = load_tokenizer(folder, spec)
        return LoadedModel(model, tokenizer, manifest, checkpoint, tokenizer_fingerprint(folder, tokenizer))

    def _make_body(self, model: Any) -> Body:
        return Body(model)

    def _make_weights(self, loaded: LoadedModel, places: Places, scale_dtype: torch.dtype) -> Weights:
        return Weights(loaded.model, loaded.checkpoint, places, scale_dtype)

    def _make_calibrator(self, *parts: Any) -> Calibrator:
        return Calibrator(self._body, *parts)

    @property
    def mode(self) -> NumericMode:
        spec = self._spec
        return NumericMode(spec.dtype, self._device.type, spec.attention, self._compiled, spec.scale_dtype)

    def manifest(self) -> ModelManifest:
        return self._manifest

    def conditions(self) -> tuple[NumericMode, GenerationRules]:
        """What decides the continuations of prompts that this replica makes, beside the model."""
        opening, _ = around(self._tokenizer)
        return self.mode, GenerationRules(self._suppressed, tuple(opening), self._tokenizer_fingerprint)

    @property
    def states_kept(self) -> StatesKept:
        """Where the states of parents are kept for the prompts in use; what the settings say while there are none."""
        return next((stream.kept for stream in self._streams()), self._states)

    def cut_prompts(
        self,
        texts: Sequence[str],
        count: int,
        prompt_tokens: int,
        continuation_tokens: int,
        seed: int,
        apart_from: Sequence[IntArray] = (),
        key: str = "prompts.count",
    ) -> tuple[PromptTokens, str]:
        """Prompts of `texts` (see `prompts.py`), and the id that their reference has or will have."""
        lengths = count, prompt_tokens, continuation_tokens, seed
        prompts = self._cutter.prompts(texts, *lengths, apart_from, key)
        return prompts, self.reference_id(prompts)

    def tokenized(self, texts: Sequence[str]) -> list[IntArray]:
        """See `prompts.Cutter.documents`."""
        return self._cutter.documents(texts)

    def reference_id(self, prompts: PromptTokens) -> str:
        """The id that the reference of prompts has or will have."""
        mode, rules = self.conditions()
        return reference_id(self._manifest.id, mode, prompts, rules)

    @torch.inference_mode()
    def make_reference(self, prompts: PromptTokens) -> Reference:
        """The base model's greedy continuations of `prompts`, and where its own single pass disagrees with them.

        Raises `UserError` where its logits are not finite, or it agrees with itself too little to measure others by.
        """
        self._to_base()
        mode, rules = self.conditions()
        continuation = self._batches.halving(lambda: self._continue(prompts))
        reference = Reference(
            id=self.reference_id(prompts),
            manifest_id=self._manifest.id,
            mode=mode,
            text=prompts.tokens,
            continuation=continuation,
            agrees=np.ones(continuation.shape, dtype=np.bool_),
            suppressed=rules.suppressed,
            opening=rules.opening,
            tokenizer=rules.tokenizer,
        )
        loaded = Loaded(reference)
        check = self._dense_divergence(loaded)
        self._refuse_infinite(int((~np.isfinite(check.nll)).any(axis=1).sum()), reference.num_prompts)
        made = replace(reference, agrees=~check.diverged)
        check_agreement(made)
        return made

    def _refuse_infinite(self, num_infinite: int, num_prompts: int) -> None:
        if not num_infinite:
            return
        remedy = {
            "float16": "Its activations pass 65504, the most that float16 holds: try model.dtype: bfloat16, which has "
            "the range of float32",
            "float32": "The checkpoint itself may hold values that are no numbers",
        }.get(self._spec.dtype, "Try model.dtype: float32")
        raise UserError(
            f"the base model {self._spec.path} gives logits that are not finite in {self._spec.dtype}, on "
            f"{num_infinite} of {num_prompts} prompts. {remedy}"
        )

    def _generating(self) -> AbstractContextManager[None]:
        """Layers as they were loaded: shapes change with every token, so compiled ones would compile for ever."""
        return as_loaded(*find_layers(self._body.model), self._slots)

    def _continue(self, prompts: PromptTokens) -> np.ndarray[Any, np.dtype[np.int32]]:
        rows = torch.from_numpy(prompts.tokens[:, : prompts.prompt_tokens]).long().to(self._body.input_device)
        batches = rows.split(self._batches.rows(prompts.tokens.shape[1]))
        length = prompts.continuation_tokens
        with self._generating():
            parts = [self._body.generate(batch, length, self._suppressed).cpu() for batch in batches]
        return torch.cat(parts).numpy().astype(np.int32)

    @torch.inference_mode()
    def measure_speed(self, count: int, prompt_tokens: int, continuation_tokens: int) -> Speed:
        """What one of `count` prompts takes, timed on one batch of random tokens."""
        length = prompt_tokens + continuation_tokens
        rows = min(count, self._batches.rows(length))
        seconds = time_batch(self._body, self._never, self._generating, rows, prompt_tokens, continuation_tokens)
        memory_bytes = self._memory_bytes()  # before any states are kept
        first, last, whole = self._candidate_seconds(rows, prompt_tokens, continuation_tokens)
        return Speed(
            layers_seconds=seconds.layers / rows,
            first_layer_seconds=max(first - seconds.head, 0.0) / rows,
            last_layer_seconds=max(last - seconds.head, 0.0) / rows,
            compress_seconds=max(whole - first, 0.0),
            head_seconds=seconds.head / rows,
            text_head_factor=(length - 1) / continuation_tokens,
            generation_seconds=seconds.generation / rows,
            memory_bytes=memory_bytes,
            states_kept=self._stream(np.zeros((count, length), np.int32), prompt_tokens).kept,
        )

    def _candidate_seconds(self, rows: int, prompt_tokens: int, continuation_tokens: int) -> list[float]:
        """Seconds in which candidates that change the first layer, the last, and every component run over random
        tokens."""
        tokens = torch.randint(self._body.vocabulary_size, (rows, prompt_tokens + continuation_tokens))
        text = PromptTokens(tokens.numpy().astype(np.int32), prompt_tokens)
        reference = timed_reference(text, self._manifest.id, self.mode, self._suppressed)
        self.use(reference)
        timed = [candidates_of(layer, self._manifest, reference) for layer in (0, self._manifest.num_layers - 1)]
        try:
            return [
                time_candidates(self.evaluate, requests)
                for requests in (*timed, whole_plans(self._manifest, reference))
            ]
        finally:
            del self._references[reference.id]

    def _memory_bytes(self) -> int:
        """Weights and the activations of one batch: the device's own count, or what the widest layer makes of it."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        widest = max(max(c.shape) for c in self._manifest.components)
        return int(self._weight_bytes + 4 * self._batches.tokens * widest * self._body.itemsize)

    def cut_calibration(
        self, texts: Sequence[str], count: int, tokens: int, seed: int, through: Through = "base"
    ) -> Calibration:
        """Calibration text: `count` rows of `tokens` tokens, cut from `texts` as prompts are."""
        rows = self._cutter.calibration(texts, count, tokens, seed)
        own_id = calibration_id(self._manifest.id, self.mode, rows, through)
        return Calibration(own_id, self._manifest.id, rows, through)

    def use_calibration(self, calibration: Calibration, statistics: InputStatistics | None = None) -> None:
        """Take a calibration, which requests may name from now on, with its statistics if they are known."""
        self._calibrator.use(calibration, statistics)

    def use_solved(self, calibration_id: str, fetch: Fetch) -> None:
        """Take solved matrices from `fetch` (component, scheme), and solve only for those of which it gives None."""
        self._calibrator.fetch_from(calibration_id, fetch)

    @torch.inference_mode()
    def gather_statistics(self, calibration: Calibration) -> InputStatistics:
        """Mean squares of all components' inputs over a calibration, which is in use from then on."""
        self._calibrator.use(calibration, None)
        return self._batches.halving(lambda: self._calibrator.statistics(calibration.id))

    @torch.inference_mode()
    def solve(self, calibration_id: str, pairs: Sequence[tuple[str, str]]) -> list[PackedMatrix]:
        """Solve the base model's (component, scheme) pairs whose scheme needs Hessians, in one sweep up the layers."""

        def solved() -> list[PackedMatrix]:
            if self._weights_id:
                self._to_base()
            self._calibrator.activate(calibration_id)
            return self._calibrator.solve([(component, parse_scheme(scheme)) for component, scheme in pairs])

        return self._batches.halving(solved)

    @torch.inference_mode()
    def weight_errors(
        self, components: Sequence[str], schemes: Sequence[str], calibration_id: str = "", by_hessian: bool = False
    ) -> list[WeightError]:
        """How far schemes move components' weights: for each component, in this order, each scheme.

        No evaluation; with a calibration also weighted by mean squared inputs and, with `by_hessian`, by Hessians.
        """
        parsed = [parse_scheme(scheme) for scheme in schemes]
        return self._batches.halving(
            lambda: self._calibrator.weight_errors(components, parsed, calibration_id, by_hessian)
        )

    @torch.inference_mode()
    def outlier_shares(self, calibration_id: str, multiple: float = 5.0) -> dict[int, float]:
        """See `dtmsearch.model.calibration.outliers.outlier_shares`, of the base model by a calibration."""
        self._to_base()
        self._calibrator.activate(calibration_id)
        return self._outlier_shares(multiple)

    def _outlier_shares(self, multiple: float) -> dict[int, float]:
        return outlier_shares(self._weights, self._manifest.components, multiple)

    def use(self, reference: Reference) -> None:
        """Take a reference, against which requests may be made from now on."""
        if reference.mode != self.mode:
            raise UserError(
                f"reference {reference.id} was made in mode {reference.mode}, this replica runs in {self.mode}"
            )
        if reference.suppressed != self._suppressed:
            theirs, own = (", ".join(map(str, ids)) or "none" for ids in (reference.suppressed, self._suppressed))
            raise UserError(
                f"reference {reference.id} was made with the end-of-text tokens {theirs}; {self._spec.path} has {own}"
            )
        self._references.setdefault(reference.id, Loaded(reference))

    @torch.inference_mode()
    def canary(self, reference_id: str) -> float:
        """Share of the reference's tokens on which this replica's dense model diverges: 0 where all is well."""
        loaded = self._references[reference_id]
        diverged = self._dense_divergence(loaded).diverged
        return float((diverged & loaded.reference.agrees).mean())

    @torch.inference_mode()
    def routed_tokens(self, reference_id: str) -> dict[str, int]:
        """Component -> tokens of a reference's prompts and continuations that reach it, for every expert's matrix."""
        reference = self._references[reference_id].reference
        self._to_base()
        rows = torch.from_numpy(greedy(reference, slice(None))).long().to(self._body.input_device)
        with self._generating():
            return routed_tokens(self._body, rows.split(self._batches.rows(rows.shape[1])))

    @torch.inference_mode()
    def check(self, plan: Plan, reference_id: str, num_prompts: int) -> tuple[IntArray, FloatArray]:
        """`plan` on a reference's first prompts, from the tokens upward: (SDT, DPPL), each [num_prompts].

        Of no plan is less to do than of the one whose weights stand here already. Layers run eagerly: a compiled graph
        for these few rows would cost more than they do.
        """
        loaded = self._references[reference_id]
        rows = slice(0, num_prompts)
        self._to_parent(plan)
        stream = self._stream(greedy(loaded.reference, rows), loaded.reference.prompt_tokens)
        with self._generating():
            found = fetch(
                self._batches.halving(lambda: self._measure(stream.head_inputs(0, ()), stream.targets_from, None))
            )
        return share_of_divergent_tokens(found.diverged & loaded.reference.agrees[rows]), perplexity(found.nll)

    def _dense_divergence(self, loaded: Loaded) -> Divergence:
        request = EvalRequest(Plan(), loaded.reference.id, (0, loaded.reference.num_prompts))
        return fetch(self._batches.halving(lambda: self._score(loaded, request))["continuation"])

    @torch.inference_mode()
    def evaluate(self, requests: Sequence[EvalRequest]) -> list[Outcome]:
        """An outcome for each request, in the order of the requests."""
        outcomes: dict[int, Outcome] = {}
        launched: tuple[int, Launched] | None = None
        self._solve_ahead(requests)
        self._finished_at = time.perf_counter()
        places = [self._place(request) for request in requests]
        for index in sorted(range(len(requests)), key=places.__getitem__):
            # The next is on its way before the last is waited for, so that a GPU never waits for us.
            shared = places.count(places[index]) > 1 or places[index] == self._place_before
            following = index, self._launch(requests[index], shared)
            self._place_before = places[index]
            if launched is not None:
                outcomes[launched[0]] = self._finish(launched[1])
            launched = following
        if launched is not None:
            outcomes[launched[0]] = self._finish(launched[1])
        return [outcomes[i] for i in range(len(requests))]

    def unpriceable(self, components: Sequence[str]) -> str:
        """Why prices of these components cannot be had from backward passes; empty where they can."""
        return self._pricer().unpriceable(components)

    def price(self, request: PriceRequest) -> PriceBlock:
        """Products of a request's options over its samples (see `dtmsearch.core.prices`). Layers run eagerly.

        Raises `UserError` for components of which prices cannot be had.
        """
        started_at = time.perf_counter()
        reference = self._references[request.reference_id].reference
        pricer = self._pricer()
        found = self._batches.halving(lambda: pricer.products(request, reference, self._to_parent))
        tokens = PASSES[request.kind] * reference.text.shape[1] * len(found)
        return PriceBlock(request, found, tokens, time.perf_counter() - started_at)

    def _pricer(self) -> Pricer:
        return Pricer(self._body, self._weights, self._calibrator, self._manifest, self._generating, self._batches.rows)

    @torch.inference_mode()
    def generate(self, plan: Plan, prompts: PromptTokens) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Free greedy generation with the compressed model: [num_prompts, continuation_tokens]."""
        self._to_parent(plan)
        return self._continue(prompts)

    @torch.inference_mode()
    def continuations(
        self, plan: Plan, reference_id: str, prompts: Sequence[int], weights_id: str = ""
    ) -> list[Continuation]:
        """How the base model and the compressed one go on from some prompts of a reference that is in use."""
        reference = self._references[reference_id].reference
        rows = reference.text[list(prompts)]
        start = PromptTokens(rows, reference.prompt_tokens)
        self._to_parent(plan, weights_id)
        own = self._batches.halving(lambda: self._continue(start))
        own_margins = self._margins(start, own)
        self._to_base()
        base = reference.continuation[list(prompts)]
        return written_out(self._tokenizer, prompts, start, (base, self._margins(start, base)), (own, own_margins))

    def _margins(self, start: PromptTokens, continuation: np.ndarray[Any, np.dtype[np.int32]]) -> FloatArray:
        tokens = np.concatenate([start.tokens[:, : start.prompt_tokens], continuation], axis=1)
        rows = torch.from_numpy(tokens).long().to(self._body.input_device)
        return np.concatenate([margins(self._body, row, start.prompt_tokens, self._never) for row in rows.split(1)])

    def _solve_ahead(self, requests: Sequence[EvalRequest]) -> None:
        """Solve what several requests need in one sweep up the layers. What goes wrong, each request says itself."""
        requests = [r for r in requests if r.weights_id == self._weights_id]
        calibrations = dict.fromkeys(r.calibration_id for r in requests if r.plan.needs_calibration)
        for name in calibrations:
            plans = {plan.id: plan for r in requests if r.calibration_id == name for plan in (r.plan, r.parent)}
            with suppress(ValueError, RuntimeError):
                self._calibrator.prepare(plans.values(), name)
        self._calibrator.rest()

    def _place(self, request: EvalRequest) -> _Place:
        """Where a request leaves its parent: those that do so at the same place share all that comes before."""
        layer = first_changed_layer(request, self._manifest)
        return request.weights_id, request.parent.id, request.reference_id, request.prompts, layer

    def _launch(self, request: EvalRequest, shared: bool) -> Launched:
        loaded = self._references[request.reference_id]
        try:
            return Launched(request, self._batches.halving(lambda: self._score(loaded, request, shared)))
        except ValueError as error:
            return Launched(request, failure=("invalid", str(error)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return Launched(request, failure=("out_of_memory", f"even with one prompt in a batch: {error}"))

    def _finish(self, launched: Launched) -> Outcome:
        reference = self._references[launched.request.reference_id].reference
        streams = launched.fetched()
        started_at, self._finished_at = self._finished_at, time.perf_counter()
        provenance = Provenance(
            replica=self._name,
            node=self._node,
            wall_seconds=self._finished_at - started_at,
            tokens=sum(s.nll.shape[0] * reference.text.shape[1] for s in streams.values()),
            finished_at=time.time(),
            versions=self._versions,
        )
        return outcome_of(launched, streams, reference, provenance)

    def _score(self, loaded: Loaded, request: EvalRequest, shared: bool = False) -> dict[str, list[Scores]]:
        """What the request's plan makes of each stream, from the first layer in which it leaves its parent. `shared`:
        other requests leave this parent there too."""
        loaded.set_range(request.prompts, self._stream)
        asked = [METRICS[name] for name in request.extra_metrics]
        names = ["continuation"] + (["text"] if any("text" in metric.needs for metric in asked) else [])
        with_base = any(metric.needs_base for metric in asked)
        own = [metric for metric in asked if metric.at_positions is not None]
        if with_base and loaded.base_hidden is None:
            loaded.base_hidden = self._base_hidden(loaded)
        request = self._with_near_parent(request)
        boundary = first_changed_layer(request, self._manifest)
        if request.weights_id != self._weights_id:
            self._to_weights(request.weights_id)
        self._calibrator.prepare((request.plan, request.parent), request.calibration_id)
        self._to_parent(request.parent, request.weights_id)
        changed = request.plan.diff(request.parent).keys()
        for name in names:
            loaded.streams[name].carry(boundary)
            if shared:
                loaded.streams[name].look_ahead(boundary)
        with self._weights.perturbed(request.plan):
            return {
                name: self._measure(
                    loaded.streams[name].head_inputs(boundary, changed),
                    loaded.streams[name].targets_from,
                    loaded.base_hidden if name == "continuation" and with_base else None,
                    own if name == "continuation" else (),
                )
                for name in names
            }

    def _with_near_parent(self, request: EvalRequest) -> EvalRequest:
        """The request; with the plan as its own parent where the two are so far apart that memory would hold much of
        the model twice, once for each."""
        changed = [self._manifest.by_name[component] for component in request.plan.diff(request.parent)]
        if len({component.layer for component in changed}) <= 1:
            return request
        share = sum(c.num_weights for c in changed) / sum(c.num_weights for c in self._manifest.components)
        return request if share <= _MOST_HELD_TWICE else replace(request, parent=request.plan)

    def _stream(self, tokens: IntArray, targets_from: int) -> Stream:
        on_device = torch.from_numpy(tokens).long().to(self._body.input_device)
        room = Room.on(self._body.input_device, self._weight_bytes) if self._batches.roomy else Room.none()
        rows = self._batches.rows(tokens.shape[1])
        return Stream(self._body, self._reuse, on_device, targets_from, rows, room, self._states)

    def _to_parent(self, parent: Plan, weights_id: str = "") -> None:
        if weights_id != self._weights_id:
            self._to_weights(weights_id)
        self._calibrator.prepare((parent,))
        changed = parent.diff(self._weights.plan)
        if changed:
            above = first_changed_layer(EvalRequest(parent, "", (0, 0), parent=self._weights.plan), self._manifest)
            for stream in self._streams():
                stream.forget(above)
            self._weights.become(parent)

    def _to_weights(self, weights_id: str) -> None:
        """Stand on trained weights, or on the base model's own, with no plan applied."""
        path = trained_file(self._weights_folder, weights_id) if weights_id else None
        for stream in self._streams():
            stream.forget()
        self._weights.become(Plan())
        self._weights.rest_on(path)
        self._weights_id = weights_id

    @torch.inference_mode()
    def save_pruned(self, plan: Plan, weights_id: str, calibration_id: str, folder: str) -> None:
        """Write what a training starts from into a folder: the plan's components as they are after pruning, and the
        masks of what is kept."""
        check_only_pruned(plan)
        self._to_parent(Plan(), weights_id)
        self._calibrator.prepare((plan,), calibration_id)
        self._to_parent(plan, weights_id)
        write_pruned(self._weights, plan, Path(folder))

    def _to_base(self) -> None:
        self._to_parent(Plan())

    def _streams(self) -> list[Stream]:
        return [stream for loaded in self._references.values() for stream in loaded.streams.values()]

    def _base_hidden(self, loaded: Loaded) -> list[Tensor]:
        """The base model's inputs of the head, kept to compare distributions with."""
        self._to_base()
        return [hidden.clone() for _, hidden in loaded.streams["continuation"].head_inputs(0, ())]

    def _measure(
        self,
        head_inputs: Iterator[tuple[Tensor, Tensor]],
        targets_from: int,
        base_hidden: list[Tensor] | None,
        metrics: Sequence[Metric] = (),
    ) -> list[Scores]:
        return [
            compare(
                self._body,
                hidden,
                tokens[:, targets_from:],
                base_hidden[index] if base_hidden else None,
                self._never,
                metrics,
            )
            for index, (tokens, hidden) in enumerate(head_inputs)
        ]

    def _longest_row(self) -> int:
        return max((r.reference.text.shape[1] for r in self._references.values()), default=1)

    def release_memory(self) -> None:
        """Let go of states and statistics that can be made again."""
        for loaded in self._references.values():
            loaded.forget()
        self._calibrator.forget()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _pays_to_compile(spec: ModelSpec, model: Any, device: torch.device) -> bool:
    """Narrow models spend their time on launches, and a search of theirs is over before compiling has paid."""
    if spec.compile == "auto":
        return device.type == "cuda" and bool(model.config.get_text_config().hidden_size >= _WIDE)
    return spec.compile == "always"
