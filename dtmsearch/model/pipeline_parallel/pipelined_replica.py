"""A replica whose layers lie in several processes: the first stage, which asks the others.

Its pass is a `PipelineBody`'s, its calibrator a `PipelineCalibrator`. How the others are reached is
the business of `remote.Peer`: nothing here knows Ray.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import ModelSpec, ReplicaSettings, Speed
from dtmsearch.core.fusion import input_readers, scale_partners
from dtmsearch.core.plan import Plan
from dtmsearch.model.calibration.calibrator import AnyCalibrator, Calibrator
from dtmsearch.model.calibration.outliers import outlier_shares
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.modules.compiled import Slot
from dtmsearch.model.modules.fingerprints import tokenizer_fingerprint
from dtmsearch.model.modules.loading import load_tokenizer
from dtmsearch.model.modules.slots import Places
from dtmsearch.model.pipeline_parallel.pipeline_body import PipelineBody
from dtmsearch.model.pipeline_parallel.pipeline_calibrator import PipelineCalibrator
from dtmsearch.model.pipeline_parallel.pipeline_pricer import PipelinePricer
from dtmsearch.model.pipeline_parallel.remote import Peer, Remote
from dtmsearch.model.pipeline_parallel.stage import Stage, StageBody, cut, load_part, received
from dtmsearch.model.replica.pricing import Pricer
from dtmsearch.model.replica.replica import LoadedModel, Replica
from dtmsearch.model.weights.applied import Weights
from dtmsearch.model.weights.checkpoint import Checkpoint
from dtmsearch.model.weights.standing import Standing


def make_stage(
    spec: ModelSpec, settings: ReplicaSettings, name: str = "local", node: str = "", peers: Sequence[Peer] = ()
) -> Stage | PipelineReplica:
    """The stage that the settings say; the first one is the replica, and gets the others."""
    if settings.stage:
        return Stage(spec, settings)
    return PipelineReplica(spec, settings, name, node, peers)


class PipelineWeights(Weights):
    """A whole model's components under a plan, each where its layer is."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        places: Places,
        scale_dtype: torch.dtype,
        remotes: Sequence[Remote],
        manifest: ModelManifest,
        device: torch.device,
    ) -> None:
        super().__init__(model, checkpoint, places, scale_dtype)
        self.share_scales(scale_partners(manifest.components))
        self.share_inputs(input_readers(manifest.components))
        self._device = device
        self._remote_of = {c.name: r for r in remotes for c in manifest.components if c.layer in r.layers}

    def become(self, plan: Plan) -> None:
        for remote, changed in self._changes_elsewhere(plan).items():
            remote.tell("become", self._part(remote, self.plan, changed))
            self.plan = Plan.of(self.plan.schemes | changed)
        super().become(plan)

    @contextmanager
    def perturbed(self, plan: Plan) -> Iterator[None]:
        with ExitStack() as stack:
            for remote, changed in self._changes_elsewhere(plan).items():
                remote.tell("perturb", self._part(remote, self.plan, changed))
                stack.callback(remote.peer.ask, "restore")
            here = {c: s for c, s in plan.diff(self.plan).items() if c not in self._remote_of}
            stack.enter_context(super().perturbed(Plan.of(self.plan.schemes | here)))
            yield

    def _changes_elsewhere(self, plan: Plan) -> dict[Remote, dict[str, str]]:
        changes: dict[Remote, dict[str, str]] = {}
        for component, scheme in plan.diff(self.plan).items():
            if component in self._remote_of:
                changes.setdefault(self._remote_of[component], {})[component] = scheme
        return changes

    def _part(self, remote: Remote, plan: Plan, changed: Mapping[str, str]) -> Plan:
        """What a stage has of a plan with some changes."""
        return Plan.of({c: s for c, s in plan.entries if self._remote_of.get(c) is remote} | dict(changed))

    def standing(self, component: str) -> Tensor:
        return self._fetched("standing", component) if component in self._remote_of else super().standing(component)

    def original(self, component: str) -> Tensor:
        return self._fetched("original", component) if component in self._remote_of else super().original(component)

    def _fetched(self, method: str, component: str) -> Tensor:
        weight: Tensor = received(self._remote_of[component].get(method, component), self._device)
        return weight


class PipelineStanding(Standing):
    """The same of all stages."""

    def __init__(self, body: Body, weights: Weights, weights_folder: str, remotes: Sequence[Remote]) -> None:
        super().__init__(body, weights, weights_folder)
        self._remotes = remotes

    def rest_on(self, weights_id: str) -> None:
        changes = weights_id != self.weights_id
        super().rest_on(weights_id)
        if changes:
            for remote in self._remotes:
                remote.tell("stand_on", weights_id)


class PipelineReplica(Replica):
    """A replica that has the model's first layers itself, and asks the stages that have the others."""

    def __init__(self, spec: ModelSpec, settings: ReplicaSettings, name: str, node: str, peers: Sequence[Peer]) -> None:
        self._peers = peers
        super().__init__(spec, settings, name, node)

    def _load(self, spec: ModelSpec, settings: ReplicaSettings) -> LoadedModel:
        part = load_part(spec, settings, self._device)
        self._own = part.layers
        stages = cut(part.manifest.num_layers, settings.num_stages)[1:]
        self._remotes = [Remote(*pair) for pair in zip(stages, self._peers, strict=True)]
        tokenizer = load_tokenizer(part.folder, spec)
        fingerprint = tokenizer_fingerprint(part.folder, tokenizer)
        return LoadedModel(part.model, tokenizer, part.manifest, part.checkpoint, fingerprint)

    def _make_body(self, model: Any, known_as: Hashable) -> Body:
        body = PipelineBody(model, self._own, self._remotes)
        body.check_cuts()
        body.check_cache()
        return body

    def _make_weights(self, loaded: LoadedModel, places: Places, scale_dtype: torch.dtype) -> Weights:
        device = self._body.input_device
        return PipelineWeights(
            loaded.model, loaded.checkpoint, places, scale_dtype, self._remotes, loaded.manifest, device
        )

    def _make_standing(self, weights_folder: str, slots: dict[str, Slot]) -> Standing:
        return PipelineStanding(self._body, self._weights, weights_folder, self._remotes)

    def _make_calibrator(self) -> AnyCalibrator:
        assert isinstance(self._body, PipelineBody)
        own = Calibrator(StageBody(self._body.model, self._own), self._standing, self._manifest, self._batches.rows)
        return PipelineCalibrator(*(own, self._body, self._standing, self._remotes, self._manifest, self._batches.rows))

    def _pricer(self) -> Pricer:
        return PipelinePricer(
            *(self._body, self._weights, self._calibrator, self._manifest, self._standing.eagerly, self._batches.rows),
            self._remotes,
        )

    def measure_speed(self, count: int, prompt_tokens: int, continuation_tokens: int) -> Speed:
        """See `Replica.measure_speed`; the memory is that of all stages together."""
        speed = super().measure_speed(count, prompt_tokens, continuation_tokens)
        others = sum(remote.get("memory_bytes") for remote in self._remotes)
        return replace(speed, memory_bytes=speed.memory_bytes + others)

    def routed_tokens(self, reference_id: str) -> dict[str, int]:
        """See `Replica.routed_tokens`."""
        for remote in self._remotes:
            remote.tell("begin_counting")
        routed = super().routed_tokens(reference_id)
        for remote in self._remotes:
            routed |= remote.get("end_counting")
        return routed

    def _outlier_shares(self, multiple: float) -> dict[int, float]:
        here = [c for c in self._manifest.components if c.layer in self._own]
        shares = outlier_shares(self._weights, here, multiple)
        for remote in self._remotes:
            shares |= remote.get("outlier_shares", multiple)
        return shares

    def release_memory(self) -> None:
        super().release_memory()
        for remote in self._remotes:
            remote.tell("rest")
