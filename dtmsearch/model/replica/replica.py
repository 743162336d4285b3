"""A replica: the model on a device, which measures plans against references. The face that pools and notebooks see.

It loads the model and puts together what works on it: a `Bench`, a `PlanEvaluator`, a `ReferenceMaker`, a calibrator
and a `Pricer`. Knows nothing of the search, of Ray or of the store.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtmsearch.core.calibration import (
    Calibration,
    ExpertUse,
    InputStatistics,
    PackedMatrix,
    Routing,
    Through,
    WeightError,
)
from dtmsearch.core.checkpoint_files import weight_files
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.documents import Texts
from dtmsearch.core.evaluation import (
    Continuation,
    EvalRequest,
    FloatArray,
    IntArray,
    ModelSpec,
    Outcome,
    PromptTokens,
    Reference,
    ReplicaSettings,
    Speed,
    StatesFound,
)
from dtmsearch.core.fusion import input_readers, scale_partners
from dtmsearch.core.generation_rules import GenerationRules
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Plan, check_versions
from dtmsearch.core.prices import PASSES, PriceBlock, PriceRequest
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.core.variant import BASE, Variant
from dtmsearch.errors import UserError
from dtmsearch.model.calibration.calibrator import AnyCalibrator, Calibrator
from dtmsearch.model.calibration.outliers import outlier_shares
from dtmsearch.model.compress.compressor import Fetch
from dtmsearch.model.forward.batch_size import Batches
from dtmsearch.model.forward.expert_routing import routed_tokens
from dtmsearch.model.forward.layer_reuse import Reuse
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.forward.streamed_body import StreamedBody
from dtmsearch.model.modules import kv_caches
from dtmsearch.model.modules.compiled import Slot, compile_layers
from dtmsearch.model.modules.discovery import find_layers, identified_manifest, survey
from dtmsearch.model.modules.fingerprints import tokenizer_fingerprint
from dtmsearch.model.modules.loading import (
    checkpoint_folder,
    load_model,
    load_tokenizer,
    suppressed_tokens,
    use_repeatable_attention,
    vocabulary_size,
)
from dtmsearch.model.modules.slots import Places
from dtmsearch.model.modules.streamed_layers import StreamedLayers
from dtmsearch.model.replica.loaded_reference import greedy
from dtmsearch.model.replica.plan_evaluator import Bench, PlanEvaluator
from dtmsearch.model.replica.pricing import Pricer
from dtmsearch.model.replica.reference_maker import ReferenceMaker
from dtmsearch.model.replica.spread_model import load_spread_model
from dtmsearch.model.replica.streamed_evaluator import StreamedEvaluator
from dtmsearch.model.replica.streamed_model import PassingWeights, load_streamed_model, rehearsed, streams
from dtmsearch.model.replica.timing import measured_speed
from dtmsearch.model.weights.applied import Weights
from dtmsearch.model.weights.checkpoint import Checkpoint
from dtmsearch.model.weights.standing import Standing
from dtmsearch.model.weights.trained import check_only_pruned, write_pruned

# From this width on compiled layers pay.
_WIDE = 1_024


@dataclass(frozen=True)
class LoadedModel:
    """What a replica is made of."""

    model: Any
    tokenizer: Any
    manifest: ModelManifest
    checkpoint: Checkpoint
    tokenizer_fingerprint: str
    streamed: StreamedLayers | None = None


class Replica:
    """A model on a device, with every method a whole answer.

    One thread at a time. `node` and `name` go into the provenance of what it measures.
    """

    def __init__(self, spec: ModelSpec, settings: ReplicaSettings, name: str = "local", node: str = "") -> None:
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
        use_repeatable_attention()
        self._spec = spec
        self._device, self._num_devices = self._choose_device(), settings.num_devices
        if settings.weights == "streamed" and (settings.num_devices > 1 or settings.num_stages > 1):
            raise UserError("weights pass through one GPU: --weights streamed goes without shares of several")
        if settings.num_devices > torch.cuda.device_count() and settings.num_devices > 1:
            raise UserError(f"{settings.num_devices} GPUs a replica, but it sees {torch.cuda.device_count()}")
        self._batches = Batches(
            settings.batch_tokens, self._device, self.release_memory, lambda: self._evaluator.longest_row()
        )
        loaded = self._load(spec, settings)
        model, self._tokenizer, self._manifest = loaded.model, loaded.tokenizer, loaded.manifest
        suppressed = self._suppressed_tokens(loaded)
        never = torch.zeros(vocabulary_size(model), dtype=torch.bool)
        never[list(suppressed)] = True
        streamed, known_as = loaded.streamed, self._known_as(loaded)
        slots: dict[str, Slot] = {}
        places = Places(model, slots)
        alone = settings.num_devices == settings.num_stages == 1
        compiled = alone and _pays_to_compile(spec, model, self._device)

        def cut() -> tuple[Body, Reuse]:
            body = self._make_body(model, known_as) if streamed is None else StreamedBody(model)
            return body, Reuse(body, self._manifest, places, compiled, known_as)

        self._body, self._reuse = cut() if streamed is None else rehearsed(streamed, cut)
        if compiled:
            slots.update(compile_layers(*find_layers(model)))
        self._mode = NumericMode(spec.dtype, self._device.type, spec.attention, compiled, spec.scale_dtype)
        self._weights = self._make_weights(loaded, places, getattr(torch, spec.scale_dtype))
        self._standing = self._make_standing(settings.weights_folder, slots)
        self._calibrator = self._make_calibrator()
        self._bench = Bench(
            standing=self._standing,
            calibrator=self._calibrator,
            manifest=self._manifest,
            reuse=self._reuse,
            batches=self._batches,
            never=never.to(model.get_output_embeddings().weight.device),
            weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta),
            states=settings.states,
        )
        self._evaluator = (
            PlanEvaluator(self._bench, name, node)
            if streamed is None
            else StreamedEvaluator(self._bench, name, node, streamed)
        )
        self._references = ReferenceMaker(
            *(self._bench, self._evaluator, spec, self._mode),
            *(loaded.tokenizer, loaded.tokenizer_fingerprint, suppressed),
        )

    # How it is put together: what replicas of other models have of their own.

    def _choose_device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _load(self, spec: ModelSpec, settings: ReplicaSettings) -> LoadedModel:
        folder = checkpoint_folder(spec)
        found = survey(spec)
        checkpoint = Checkpoint(weight_files(folder))
        streamed = None
        with ThreadPoolExecutor(1, thread_name_prefix="digest") as beside:  # which reads all files
            identified = beside.submit(identified_manifest, spec, found)
            if settings.num_devices > 1:
                model = load_spread_model(folder, spec, settings.num_devices)
            elif streams(settings.weights, found.manifest, self._device):
                model, streamed = load_streamed_model(folder, spec, checkpoint, self._device)
            else:
                model = load_model(folder, spec, self._device)
            manifest = identified.result()
        if streamed is None:
            checkpoint.map_apart(model)
        if spec.kv_context:
            kv_caches.attach(model, spec.attention)
        tokenizer = load_tokenizer(folder, spec)
        fingerprint = tokenizer_fingerprint(folder, tokenizer)
        return LoadedModel(model, tokenizer, manifest, checkpoint, fingerprint, streamed)

    def _suppressed_tokens(self, loaded: LoadedModel) -> tuple[int, ...]:
        return suppressed_tokens(loaded.model, loaded.tokenizer)

    def _known_as(self, loaded: LoadedModel) -> Hashable:
        """All that decides how the model's passes may be cut; None where that is to be proved at every loading."""
        if type(self) is not Replica or loaded.streamed is not None or self._num_devices > 1:
            return None
        code = frozenset((type(module), type(module).forward) for module in loaded.model.modules())
        mode = self._spec.dtype, self._spec.attention, self._device.type, torch.get_num_threads()
        return loaded.manifest.content_hash, mode, code

    def _make_body(self, model: Any, known_as: Hashable) -> Body:
        return Body(model, known_as=known_as)

    def _make_weights(self, loaded: LoadedModel, places: Places, scale_dtype: torch.dtype) -> Weights:
        streamed = loaded.streamed
        passing = None if streamed is None else PassingWeights(streamed, loaded.manifest, places)
        manifest = loaded.manifest
        weights = Weights(
            loaded.model, loaded.checkpoint, places, scale_dtype, passing, manifest.blocks, manifest.components
        )
        weights.share_scales(scale_partners(loaded.manifest.components))
        weights.share_inputs(input_readers(loaded.manifest.components))
        return weights

    def _make_standing(self, weights_folder: str, slots: dict[str, Slot]) -> Standing:
        return Standing(self._body, self._weights, weights_folder, slots)

    def _make_calibrator(self) -> AnyCalibrator:
        return Calibrator(self._body, self._standing, self._manifest, self._batches.rows)

    # What it says of itself.

    @property
    def mode(self) -> NumericMode:
        return self._mode

    def manifest(self) -> ModelManifest:
        return self._manifest

    def conditions(self) -> tuple[NumericMode, GenerationRules]:
        """What decides the continuations of prompts that this replica makes, beside the model."""
        return self._references.conditions()

    @property
    def model(self) -> Any:
        """The model in memory, under whatever was asked of it last (see `under`)."""
        return self._body.model

    @contextmanager
    def under(self, variant: Variant) -> Iterator[Any]:
        """The model as a variant leaves it, blocks that it cuts really smaller, until the context ends."""
        become = torch.inference_mode()(self._bench.become)
        become(variant)
        try:
            yield self._body.model
        finally:
            become(BASE)

    @property
    def states_kept(self) -> StatesFound:
        """Where the states of parents are kept for the prompts in use; what the settings say while there are none."""
        return self._evaluator.states_kept

    @torch.inference_mode()
    def measure_speed(self, count: int, prompt_tokens: int, continuation_tokens: int) -> Speed:
        """What one of `count` prompts takes, timed on one batch of random tokens."""
        return measured_speed(self._bench, self._evaluator, self._mode, count, prompt_tokens, continuation_tokens)

    @torch.inference_mode()
    def routed_tokens(self, reference_id: str) -> dict[str, int]:
        """Component -> tokens of a reference's prompts and continuations that reach it, for every expert's matrix."""
        reference = self._evaluator.references[reference_id].reference
        self._bench.become(BASE)
        rows = torch.from_numpy(greedy(reference, slice(None))).long().to(self._body.input_device)
        with self._standing.eagerly():
            return routed_tokens(self._body, rows.split(self._batches.rows(rows.shape[1])))

    # References.

    def cut_prompts(self, texts: Texts, *lengths: Any, **further: Any) -> tuple[PromptTokens, str]:
        """Prompts of `texts`, arguments as `Cutter.prompts` takes them, and the id that their reference has or will
        have."""
        prompts = self._references.cutter.prompts(texts, *lengths, **further)
        return prompts, self._references.id_of(prompts)

    def tokenized(self, texts: Texts) -> list[IntArray]:
        """See `prompts.Cutter.documents`."""
        return self._references.cutter.documents(texts)

    def reference_id(self, prompts: PromptTokens) -> str:
        """The id that the reference of prompts has or will have."""
        return self._references.id_of(prompts)

    @torch.inference_mode()
    def make_reference(self, prompts: PromptTokens) -> Reference:
        """See `ReferenceMaker.make`."""
        return self._references.make(prompts)

    def use(self, reference: Reference) -> None:
        """Take a reference, against which requests may be made from now on."""
        self._references.check_fits(reference)
        self._evaluator.use(reference)

    def leave(self, reference_id: str) -> None:
        """Let go of a reference, and of what is kept for its prompts."""
        self._evaluator.leave(reference_id)

    @torch.inference_mode()
    def generate(self, plan: Plan, prompts: PromptTokens) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Free greedy generation with the compressed model: [num_prompts, continuation_tokens]."""
        return self._references.generate(Variant(plan), prompts)

    @torch.inference_mode()
    def continuations(self, variant: Variant, reference_id: str, prompts: Sequence[int]) -> list[Continuation]:
        """How the base model and a variant of it go on from some prompts of a reference that is in use."""
        reference = self._evaluator.references[reference_id].reference
        return self._references.side_by_side(variant, reference, prompts)

    # Evaluations.

    @torch.inference_mode()
    def evaluate(self, requests: Sequence[EvalRequest]) -> list[Outcome]:
        """An outcome for each request, in the order of the requests. Raises `LibraryMissing` where schemes are computed
        here by another build than where the requests were made."""
        for request in requests:
            check_versions(request.plan.scheme_versions, (scheme for _, scheme in request.plan.entries))
        return self._evaluator.evaluate(requests)

    @torch.inference_mode()
    def canary(self, reference_id: str) -> float:
        """Share of the reference's tokens on which this replica's unquantized model diverges: 0 where all is well."""
        return self._evaluator.canary(reference_id)

    @torch.inference_mode()
    def check(self, plan: Plan, reference_id: str, num_prompts: int) -> tuple[IntArray, FloatArray]:
        """`plan` on a reference's first prompts, from the tokens upward: (SDT, DPPL), each [num_prompts].

        Of no plan is less to do than of the one whose weights stand here already. Layers run eagerly: a compiled graph
        for these few rows would cost more than they do.
        """
        return self._evaluator.check(plan, reference_id, num_prompts)

    def unpriceable(self, components: Sequence[str]) -> str:
        """Why prices of these components cannot be had from backward passes; empty where they can."""
        return self._pricer().unpriceable(components)

    def price(self, request: PriceRequest) -> PriceBlock:
        """Products of a request's options over its samples (see `dtmsearch.core.prices`). Layers run eagerly.

        Raises `UserError` for components of which prices cannot be had, `LibraryMissing` as `evaluate`.
        """
        request.check_versions()
        started_at = time.perf_counter()
        reference = self._evaluator.references[request.reference_id].reference
        pricer, stand_on = self._pricer(), lambda plan: self._bench.become(Variant(plan))
        found = self._batches.halving(lambda: pricer.products(request, reference, stand_on))
        tokens = PASSES[request.kind] * reference.text.shape[1] * len(found)
        return PriceBlock(request, found, tokens, time.perf_counter() - started_at)

    def _pricer(self) -> Pricer:
        return Pricer(
            *(self._body, self._weights, self._calibrator, self._manifest, self._standing.eagerly, self._batches.rows)
        )

    # Calibration.

    def cut_calibration(
        self,
        texts: Texts,
        count: int,
        tokens: int,
        seed: int,
        through: Through = Calibration.through,
        experts: Routing = Calibration.experts,
    ) -> Calibration:
        """Calibration text: `count` rows of `tokens` tokens, cut from `texts` as prompts are."""
        rows = self._references.cutter.calibration(texts, count, tokens, seed)
        return self._references.calibration(rows, through, experts)

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
        parsed = [(component, parse_scheme(scheme)) for component, scheme in pairs]

        def solved() -> list[PackedMatrix]:
            self._standing.rest_on_base()
            self._calibrator.activate(calibration_id)
            return self._calibrator.solve(parsed)

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
    def expert_uses(self, components: Sequence[str], schemes: Sequence[str], calibration_id: str) -> list[ExpertUse]:
        """How a calibration's text uses the experts among some components, and what each scheme does there. Raises
        `UserError` for a mixture whose calls do not tell which experts a token is given to."""
        parsed = [parse_scheme(scheme) for scheme in schemes]
        if not isinstance(self._calibrator, Calibrator):
            raise UserError("how text uses experts cannot be told of a model in stages: use --nodes-per-replica 1")
        return self._calibrator.expert_uses(components, parsed, calibration_id)

    @torch.inference_mode()
    def outlier_shares(self, calibration_id: str, multiple: float = 5.0) -> dict[int, float]:
        """See `dtmsearch.model.calibration.outliers.outlier_shares`, of the base model by a calibration."""
        self._bench.become(BASE)
        self._calibrator.activate(calibration_id)
        return self._outlier_shares(multiple)

    def _outlier_shares(self, multiple: float) -> dict[int, float]:
        return outlier_shares(self._weights, self._manifest.components, multiple)

    # Weights and memory.

    @torch.inference_mode()
    def save_pruned(self, variant: Variant, folder: str) -> None:
        """Write what a training starts from into a folder: the components of a variant's plan as they are after
        pruning, and the masks of what is kept."""
        check_only_pruned(variant.plan)
        dropped = variant.plan.dropped
        variant = variant.under(variant.plan.by_matrices(self._manifest.components))
        pruned = [name for name, _ in variant.plan.entries if name not in variant.plan.widths]
        cut = [c.name for c in self._manifest.components if variant.plan.width_of(c) is not None]
        self._bench.become(variant.under(Plan()))
        self._calibrator.prepare((variant.plan,), variant.calibration_id)
        self._bench.become(variant)
        write_pruned(self._weights, dict.fromkeys((*pruned, *cut)), dropped, Path(folder))

    def forget(self) -> None:
        """Let go of states and statistics that can be made again."""
        self._evaluator.forget()
        self._calibrator.forget()

    def release_memory(self) -> None:
        """The same, and of what nothing refers to any more, when memory did not suffice."""
        self.forget()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _pays_to_compile(spec: ModelSpec, model: Any, device: torch.device) -> bool:
    """Narrow models spend their time on launches, and a search of theirs is over before compiling has paid."""
    if spec.kv_context:  # parts of caches are exchanged, for which compiled layers have no slots
        return False
    if spec.compile == "auto":
        return device.type == "cuda" and bool(model.config.get_text_config().hidden_size >= _WIDE)
    return spec.compile == "always"
