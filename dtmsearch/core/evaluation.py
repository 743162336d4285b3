"""All that crosses a process border: what a replica is, what is measured against, what is asked, what is answered.

Values only. Arrays are numpy's, so that neither side needs the other's libraries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.components import ModelManifest, is_block_name
from dtmsearch.core.decoding import GREEDY, Decoding
from dtmsearch.core.generation_rules import GenerationRules
from dtmsearch.core.identity import canonical, identity, identity_of_text
from dtmsearch.core.metric_registry import METRICS, metric_versions
from dtmsearch.core.numeric_mode import ATTENTION, DTYPE, SCALE_DTYPE, NumericMode
from dtmsearch.core.plan import Plan
from dtmsearch.core.variant import Variant
from dtmsearch.core.windows import Supply
from dtmsearch.errors import UserError

# Raise it when the same plan and reference would yield other numbers.
METRICS_VERSION = 2

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
FailureKind = Literal["replica_lost", "out_of_memory", "nonfinite", "invalid"]
# What held-out prompts are measured by beside what every plan is.
EXTRA_METRICS = ("kl", "ppl")
# Where a replica keeps its parent's hidden states: beside the model, in the host's memory, or one boundary at a time.
StatesKept = Literal["auto", "device", "host", "sweep"]
# The same as it is found; "together": those of all candidates go up the layers with weights that pass through.
StatesFound = Literal["auto", "device", "host", "sweep", "together"]
# Candidates that go up the layers together at most: enough that reading all weights for them is a small part, few
# enough that what is lost with a worker is little.
MOST_TOGETHER = 64
# Where the weights of a replica's layers are: on its device, or brought there one layer at a time.
WeightsKept = Literal["auto", "device", "streamed"]


@dataclass(frozen=True)
class ModelSpec:
    """Which model a replica loads, and in which numeric mode. `path` is a folder or a hub id; scales of rounded weights
    are those that `scale_dtype` can hold, as they are once they are stored in it. What its layers keep of `kv_batch`
    texts of `kv_context` tokens each are components, too; of no tokens they are none. `decoding` is how references that
    it makes go on from their prompts."""

    path: str
    revision: str | None = None
    dtype: str = DTYPE
    attention: str = ATTENTION
    trust_remote_code: bool = False
    compile: Literal["auto", "always", "never"] = "auto"
    scale_dtype: str = SCALE_DTYPE
    kv_context: int = 0
    kv_batch: int = 1
    decoding: Decoding = GREEDY


@dataclass(frozen=True)
class ReplicaSettings:
    """How a replica runs; none of it changes what it answers, beyond the noise of batch shapes.

    `batch_tokens` bounds the tokens of one forward batch (0: chosen by device), `num_devices` spreads the model over
    several GPUs, `num_threads` bounds the CPU threads (0: torch's choice), `states` says where hidden states of
    the parent plan are kept (`auto`: by the memory there is), `weights` whether those of layers stay on the device or
    pass through it (`auto`: by the memory of the GPU), `weights_folder` where trained weights are found. A model
    of several stages is cut at its layers, and a process has one of them, the `stage`-th.
    """

    batch_tokens: int = 0
    num_devices: int = 1
    num_threads: int = 0
    states: StatesKept = "auto"
    weights: WeightsKept = "auto"
    weights_folder: str = ""
    num_stages: int = 1
    stage: int = 0


@dataclass(frozen=True)
class PromptTokens:
    """Prompts without a reference: `tokens` [num_prompts, prompt_tokens + continuation_tokens] of human text. `notes`
    say, for a person, how they differ from the text that they were cut from; `supply` what else that text held."""

    tokens: IntArray
    prompt_tokens: int
    notes: tuple[str, ...] = ()
    supply: Supply | None = None

    @property
    def continuation_tokens(self) -> int:
        return int(self.tokens.shape[1]) - self.prompt_tokens


@dataclass(frozen=True, eq=False)
class Reference:
    """The base model's own continuations of prompts, and how far it agrees with itself.

    `id` follows model, prompts, numeric mode and generation rules. `text` [num_prompts, prompt_tokens +
    continuation_tokens] is human text, whose first `prompt_tokens` columns are the prompts. `continuation`
    [num_prompts, continuation_tokens] holds the tokens that the base model chose, end-of-text (`suppressed`) never
    among them. `agrees` [num_prompts, continuation_tokens] is False where the base model's own teacher-forced choice
    leaves its continuation (a near tie): no divergence is counted there. `decoding` says how tokens are chosen, by the
    base model and by those that are measured against it.
    """

    id: str
    manifest_id: str
    mode: NumericMode
    text: IntArray
    continuation: IntArray
    agrees: NDArray[np.bool_]
    suppressed: tuple[int, ...]
    opening: tuple[int, ...] = ()
    tokenizer: str = ""
    decoding: Decoding = GREEDY

    @property
    def rules(self) -> GenerationRules:
        """What the base model's continuations were generated by, beside its weights."""
        return GenerationRules(self.suppressed, self.opening, self.tokenizer, str(self.decoding))

    @property
    def prompts(self) -> PromptTokens:
        """The prompts without what the base model makes of them."""
        return PromptTokens(self.text, self.prompt_tokens)

    @property
    def num_prompts(self) -> int:
        """Prompts."""
        return int(self.continuation.shape[0])

    @property
    def continuation_tokens(self) -> int:
        """Tokens that the base model generated for each prompt."""
        return int(self.continuation.shape[1])

    @property
    def prompt_tokens(self) -> int:
        """Tokens of each prompt."""
        return int(self.text.shape[1]) - self.continuation_tokens

    @property
    def disagreement(self) -> float:
        """The share of the continuations' tokens that the base model itself does not choose again in a single pass."""
        return float(1.0 - self.agrees.mean())

    @property
    def base_agreement(self) -> IntArray:
        """[num_prompts]: first position where the base model leaves its own continuation, its length if nowhere."""
        first = np.where(self.agrees.all(axis=1), self.continuation_tokens, (~self.agrees).argmax(axis=1))
        return first.astype(np.int32)


# Of a base model that agrees less with itself nothing is measured.
LEAST_AGREEMENT = 0.9


def check_agreement(reference: Reference) -> None:
    """Raise `UserError` where the base model does not say the same twice, so that nothing can be told from others."""
    agreement = 1.0 - reference.disagreement
    if agreement >= LEAST_AGREEMENT:
        return
    mode = reference.mode
    finer = "" if mode.dtype in ("float32", "float64") else " Set model.dtype: float32, which rounds less."
    other = "" if mode.attention == "eager" else " model.attention: eager computes it in another way."
    raise UserError(
        f"in {mode.dtype} the base model chooses only {agreement:.1%} of the {reference.agrees.size} tokens of its own "
        f"continuations again in a single pass, where {LEAST_AGREEMENT:.0%} are the least to measure others "
        f"by.{finer}{other}"
    )


def reference_id(manifest_id: str, mode: NumericMode, prompts: PromptTokens, rules: GenerationRules) -> str:
    """Identity of the reference that a model in a numeric mode gives to prompts by generation rules.

    Continuations of one token were once compared with other prompts' tokens on GPUs, and such values are not used
    again.
    """
    one_token = mode.device == "cuda" and prompts.continuation_tokens == 1
    return identity(
        ({"one_token": 2} if one_token else {})
        | {
            "manifest": manifest_id,
            "mode": str(mode),
            "prompt_tokens": prompts.prompt_tokens,
            "rules": asdict(rules),
            "tokens": prompts.tokens.tolist(),
            "version": METRICS_VERSION,
        }
    )


# Plans that change the head, or embeddings that may be tied to it, whatever a model calls them: what lies in no layer
# has no number in its name. Their KL was once taken with the plan's head on both sides, and such values are not used
# again.
_IN_A_LAYER = re.compile(r"(?:^|\.)\d+(?:\.|$)")
# Raise it when what a dropped block hands on is another. Of the first, a block that adds the residual itself handed on
# zeros in its place.
BLOCKS_VERSION = 2


@dataclass(frozen=True)
class EvalRequest:
    """An evaluation to make: `plan` against a reference, on its prompts from `prompts[0]` up to `prompts[1]`.

    `extra_metrics` names what is measured beside fdt, sdt and dppl. `parent` is a plan whose intermediate states are
    likely to serve this one too: a hint, and no part of the identity. `calibration_id` says by which text calibrated
    schemes are calibrated; it is part of the identity of plans that hold one, and of no others. `weights_id` names
    trained weights that the plan is applied to; empty for the base model's own. Versions of the schemes' arithmetic
    are part of the identity, too (`Plan.scheme_versions`), and so are those of metrics of other packages.
    """

    plan: Plan
    reference_id: str
    prompts: tuple[int, int]
    extra_metrics: tuple[str, ...] = ()
    parent: Plan = field(default=Plan(), compare=False)
    calibration_id: str = ""
    weights_id: str = ""

    @cached_property
    def id(self) -> str:
        """Identity over the canonical JSON of [plan, reference, ...]; put together, for all but the plan repeats."""
        schemes = tuple(sorted(self.plan.scheme_versions.items()))
        if self._is_beside_the_base and any(not _IN_A_LAYER.search(name) for name, _ in self.plan.entries):
            schemes += (("head", 2),)
        if any(is_block_name(name) for name in self.plan.dropped):
            schemes += (("blocks", BLOCKS_VERSION),)
        metrics = tuple(metric_versions(self.extra_metrics).items()) if self.extra_metrics else ()
        rest = _rest_of_identity(
            self.reference_id, self.prompts, self.extra_metrics, self.calibrated_by, self.weights_id, schemes, metrics
        )
        return identity_of_text(f'["{self.plan.id}",{rest}]')

    @property
    def _is_beside_the_base(self) -> bool:
        """Whether the base model's distributions are asked for as well."""
        return any(METRICS[name].needs_base for name in self.extra_metrics)

    @staticmethod
    def of(
        variant: Variant, reference_id: str, prompts: tuple[int, int], extra_metrics: tuple[str, ...] = ()
    ) -> EvalRequest:
        """The request to measure a variant."""
        return EvalRequest(
            variant.plan,
            reference_id,
            prompts,
            extra_metrics,
            calibration_id=variant.calibration_id,
            weights_id=variant.weights_id,
        )

    @property
    def variant(self) -> Variant:
        """What is measured."""
        return Variant(self.plan, self.weights_id, self.calibration_id)

    @property
    def calibrated_by(self) -> str:
        """The calibration that decides the value; empty where the plan has no calibrated scheme."""
        return self.variant.calibrated_by

    @cached_property
    def changed(self) -> tuple[str, ...]:
        """The components in which the plan and its parent differ."""
        return tuple(self.plan.diff(self.parent))


@lru_cache
def _rest_of_identity(
    reference_id: str,
    prompts: tuple[int, int],
    extra_metrics: tuple[str, ...],
    calibration_id: str,
    weights_id: str,
    scheme_versions: tuple[tuple[str, int | str], ...],
    metric_versions: tuple[tuple[str, str], ...],
) -> str:
    """The members after the first of the list that is a request's identity, as canonical JSON."""
    parts = [reference_id, list(prompts), sorted(extra_metrics), METRICS_VERSION]
    calibrated = [calibration_id] if calibration_id else []
    trained = [{"weights": weights_id}] if weights_id else []
    versions = [{"schemes": dict(scheme_versions)}] if scheme_versions else []
    measured = [{"metrics": dict(metric_versions)}] if metric_versions else []
    return canonical([*parts, *calibrated, *trained, *versions, *measured])[1:-1]


def first_changed_layer(request: EvalRequest, manifest: ModelManifest) -> int:
    """Index of the first layer that must run: below it the request's plan and its parent have the same states."""
    changed = (manifest.by_name[component].layer for component in request.changed)
    return min(max(min(changed, default=0), 0), manifest.num_layers - 1)


# What an evaluation costs beyond its layers (head, dispatch), in layers.
FIXED_COST = 1.0


def evaluation_cost(request: EvalRequest, manifest: ModelManifest) -> float:
    """What a request takes of a replica, in layers times prompts, the parent's states given."""
    layers = manifest.num_layers - first_changed_layer(request, manifest)
    return (layers + FIXED_COST) * (request.prompts[1] - request.prompts[0])


@dataclass(frozen=True)
class Speed:
    """What a replica takes for one prompt, in seconds: all layers; the layers of a candidate that changes the first
    one, and of one that changes the last; the head where continuations are predicted; generating the continuation.
    `compress_seconds` is how much longer an evaluation takes, whatever its prompts, for changing every component.
    `text_head_factor` is how much more head there is over human text. `memory_bytes`: the weights and the activations
    of one batch. `states_kept`: where states of parents are kept for these prompts."""

    layers_seconds: float
    first_layer_seconds: float
    last_layer_seconds: float
    compress_seconds: float
    head_seconds: float
    text_head_factor: float
    generation_seconds: float
    memory_bytes: int
    states_kept: StatesFound


def mean_speed(speeds: Sequence[Speed]) -> Speed:
    """The means of what several replicas take; of their memory the most."""
    means = {
        each.name: sum(getattr(speed, each.name) for speed in speeds) / len(speeds)
        for each in fields(Speed)
        if each.name not in ("memory_bytes", "states_kept")
    }
    return replace(speeds[0], memory_bytes=max(speed.memory_bytes for speed in speeds), **means)


@dataclass(frozen=True)
class Provenance:
    """Where and when an outcome came about; never part of an identity. `finished_at` in seconds since the epoch;
    `versions` are those of the libraries that computed it, as canonical JSON, empty where nobody said."""

    replica: str = ""
    node: str = ""
    attempts: int = 1
    wall_seconds: float = 0.0
    tokens: int = 0
    finished_at: float = 0.0
    versions: str = ""


@dataclass(frozen=True, eq=False)
class EvalResult:
    """What was measured, per prompt, each array [num_prompts]; `kl` and `ppl` are None when not asked for.

    `fdt` in tokens, `sdt` a count of tokens, `dppl` and `ppl` perplexities, `kl` in nats per token. Positions at which
    the base model's single pass leaves its own continuation are left out of `fdt` and `sdt`; `fdt_unmasked` and
    `sdt_unmasked` count them too, and only these compare with the base model against itself (None in rows of versions
    that did not keep them). `others` are the metrics of other packages.
    """

    request_id: str
    fdt: IntArray
    sdt: IntArray
    dppl: FloatArray
    kl: FloatArray | None = None
    ppl: FloatArray | None = None
    provenance: Provenance = Provenance()
    fdt_unmasked: IntArray | None = None
    sdt_unmasked: IntArray | None = None
    others: Mapping[str, FloatArray] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, IntArray | FloatArray]:
        """Metric -> its value on each prompt, of those that were measured."""
        own = {"fdt": self.fdt, "sdt": self.sdt, "dppl": self.dppl, "ppl": self.ppl, "kl": self.kl}
        return {name: values for name, values in own.items() if values is not None} | dict(self.others)


@dataclass(frozen=True)
class Writing:
    """A text that a model wrote: its `tokens`, the characters that each added (`pieces`; none for a token within a
    character), and the `margins` in nats by which each was likelier than the runner-up."""

    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    margins: tuple[float, ...]


@dataclass(frozen=True)
class Continuation:
    """How the base model and a compressed one each go on from a prompt of a reference, in text."""

    prompt: int
    prompt_text: str
    base: Writing
    own: Writing


@dataclass(frozen=True)
class EvalFailure:
    """Why there is no measurement; a value like any other."""

    request_id: str
    kind: FailureKind
    message: str
    provenance: Provenance = Provenance()


Outcome = EvalResult | EvalFailure


def combine(request_id: str, parts: Sequence[EvalResult]) -> EvalResult:
    """The results of one plan on ranges of prompts that join up, in their order, as one. It costs no tokens."""
    kl = [part.kl for part in parts if part.kl is not None]
    ppl = [part.ppl for part in parts if part.ppl is not None]
    fdt_unmasked = [part.fdt_unmasked for part in parts if part.fdt_unmasked is not None]
    sdt_unmasked = [part.sdt_unmasked for part in parts if part.sdt_unmasked is not None]
    return EvalResult(
        request_id,
        fdt=np.concatenate([part.fdt for part in parts]),
        sdt=np.concatenate([part.sdt for part in parts]),
        dppl=np.concatenate([part.dppl for part in parts]),
        kl=np.concatenate(kl) if kl else None,
        ppl=np.concatenate(ppl) if ppl else None,
        provenance=Provenance(attempts=0, finished_at=max(part.provenance.finished_at for part in parts)),
        fdt_unmasked=np.concatenate(fdt_unmasked) if len(fdt_unmasked) == len(parts) else None,
        sdt_unmasked=np.concatenate(sdt_unmasked) if len(sdt_unmasked) == len(parts) else None,
        others={name: np.concatenate([part.others[name] for part in parts]) for name in parts[0].others},
    )
