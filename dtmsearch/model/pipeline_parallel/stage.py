"""A stage: some consecutive layers of a model that is cut over several processes, and what the first of them asks it.

Every stage has the model's tree, and all that lies outside the layers with its weights, so that the model's own code
runs at each; of the layers it has its own only. Knows neither references nor which plans are tried in which order.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtmsearch.core.calibration import Calibration, FloatArray, InputStatistics, PackedMatrix, WeightError
from dtmsearch.core.checkpoint_files import weight_files
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import ModelSpec, ReplicaSettings
from dtmsearch.core.fusion import input_readers, scale_partners
from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import PriceRequest
from dtmsearch.core.schemes import Scheme
from dtmsearch.errors import UserError
from dtmsearch.model.calibration.calibrator import Calibrator
from dtmsearch.model.calibration.outliers import outlier_shares
from dtmsearch.model.compress.compressor import Fetch
from dtmsearch.model.forward.boundary_states import Below, Elsewhere, State
from dtmsearch.model.forward.expert_routing import counting
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.modules.compat import Cache, each_tensor, move_loaded
from dtmsearch.model.modules.discovery import find_layers, read_manifest
from dtmsearch.model.modules.loading import checkpoint_folder, load_model, use_repeatable_attention
from dtmsearch.model.modules.slots import Places
from dtmsearch.model.replica.price_layers import PricedLayers
from dtmsearch.model.weights.applied import Weights
from dtmsearch.model.weights.checkpoint import Checkpoint
from dtmsearch.model.weights.standing import Standing


def cut(num_layers: int, num_stages: int) -> list[range]:
    """The layers of each stage, as even as can be; the first, which has more to do, never has more than another.

    Raises `UserError` where there are more stages than layers.
    """
    if num_stages > num_layers:
        raise UserError(
            f"a model of {num_layers} layers cannot be cut into {num_stages} stages: a replica takes a stage for each "
            "GPU of its nodes, so give it fewer of them (--nodes-per-replica, --gpus-per-replica)"
        )
    each, left = divmod(num_layers, num_stages)
    ends = [each * (i + 1) + max(0, i + 1 - num_stages + left) for i in range(num_stages)]
    return [range(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True, eq=False)
class Sent:
    """A tensor on its way between processes: its bytes, which are not copied again where memory is shared."""

    data: NDArray[np.uint8]
    dtype: str
    shape: tuple[int, ...]


def to_send(values: Any) -> Any:
    """`values`, in whatever nesting, with each tensor as a `Sent`."""
    return each_tensor(_send, values)


def _send(tensor: Tensor) -> Sent:
    data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return Sent(data, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def received(values: Any, device: torch.device) -> Any:
    """What `to_send` was given, its tensors on a device."""
    return each_tensor(_receive, values, device, test_type=lambda value: isinstance(value, Sent))


def _receive(sent: Sent, device: torch.device) -> Tensor:
    # What lies in shared memory may not be written to, and a tensor may be.
    data = torch.from_numpy(sent.data.copy())
    return data.view(getattr(torch, sent.dtype)).reshape(sent.shape).to(device)


@dataclass(frozen=True)
class Part:
    """A model of which `layers` have weights here."""

    model: Any
    layers: range
    folder: Path
    manifest: ModelManifest
    checkpoint: Checkpoint


def load_part(spec: ModelSpec, settings: ReplicaSettings, device: torch.device) -> Part:
    """Load a stage's part. The host's memory maps the files, and holds only what a device gets of them."""
    if spec.kv_context:
        raise UserError("model.kv_cache is for replicas of one process: leave out --nodes-per-replica, or kv_cache")
    folder = checkpoint_folder(spec)
    manifest = read_manifest(spec)
    layers = cut(manifest.num_layers, settings.num_stages)[settings.stage]
    model = load_model(folder, spec, torch.device("cpu"))
    for index, layer in enumerate(find_layers(model)[1]):
        if index not in layers:
            layer.to("meta")
    checkpoint = Checkpoint(weight_files(folder))
    checkpoint.map_apart(model)
    move_loaded(model, device)
    return Part(model, layers, folder, manifest, checkpoint)


class StageBody(Body):
    """The forward pass as far as it goes here: from the first of the own layers, and to above the last of them."""

    def finish(self, tokens: Tensor, state: State | None, start: int) -> Tensor:
        assert not isinstance(state, Elsewhere | Below)
        return self.through(state, start, self.own.stop, lambda: self.run(tokens))


class Stage:
    """All stages but the first. States arrive and leave as `Sent`, components are its own. One thread at a time."""

    def __init__(self, spec: ModelSpec, settings: ReplicaSettings) -> None:
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
        use_repeatable_attention()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        part = load_part(spec, settings, self._device)
        self._manifest = part.manifest
        self._components = [c for c in part.manifest.components if c.layer in part.layers]
        self._body = StageBody(part.model, part.layers)
        self._weights = Weights(part.model, part.checkpoint, Places(part.model, {}), getattr(torch, spec.scale_dtype))
        self._weights.share_scales(scale_partners(part.manifest.components))
        self._weights.share_inputs(input_readers(part.manifest.components))
        self._standing = Standing(self._body, self._weights, settings.weights_folder)
        self._calibrator = Calibrator(self._body, self._standing, part.manifest)
        self._priced = PricedLayers(self._body, self._weights, self._calibrator, part.manifest)
        # Of each batch its tokens and the states at the boundaries of the layers here, while prices are taken.
        self._risen: list[tuple[Tensor, list[Tensor]]] = []
        self._perturbed, self._counting = ExitStack(), ExitStack()
        self._counted: dict[str, int] = {}
        self._cache: Cache | None = None

    # Passes.

    @torch.inference_mode()
    def run(self, tokens: Sent, state: Sent, start: int, stop: int) -> Any:
        """The state at boundary `stop` from that at `start`, both within this stage."""
        rows, entering = received((tokens, state), self._device)
        return to_send(self._body.through(entering, start, stop, lambda: self._body.run(rows)))

    def begin_generation(self, length: int) -> None:
        """Forget the texts before; the next are of `length` tokens in all."""
        self._cache = self._body.new_cache(length)

    @torch.inference_mode()
    def decode(self, arguments: Any, state: Sent) -> Any:
        """The state above this stage in a pass of a generation. `arguments`, in order and by name, are those that the
        module around the layers has there, without its cache."""
        (ordered, named), entering = received((arguments, state), self._device)
        own, around = self._body.own, self._body.around_layers
        run = partial(around, *ordered, past_key_values=self._cache, **named)
        return to_send(self._body.through(entering, own.start, own.stop, run))

    def begin_counting(self) -> None:
        """Count the tokens that experts get, from now on."""
        self._counted = self._counting.enter_context(counting(self._body.model))

    def end_counting(self) -> dict[str, int]:
        """See `dtmsearch.model.forward.expert_routing.counting`."""
        self._counting.close()
        return self._counted

    # Prices: outside inference mode, for gradients go through what is made.

    def unpriceable(self, components: Sequence[str]) -> str:
        """See `PricedLayers.unpriceable`, for those of the components that lie here."""
        return self._priced.unpriceable(self._priced.here(components))

    def begin_prices(self) -> None:
        """The weights that stand are those through which gradients will go."""
        self.end_prices()
        self._calibrator.rest()
        self._weights.let_gradients_through()

    def end_prices(self) -> None:
        """Let go of states that are kept: no gradients come down to this stage."""
        self._risen = []

    @torch.no_grad()
    def rise(self, tokens: Sent, state: Sent) -> Any:
        """The state above this stage of a batch; those below are kept until `fall`."""
        rows, entering = received((tokens, state), self._device)
        states = self._body.own_boundaries(rows, entering)
        self._risen.append((rows, states))
        return to_send(states[-1])

    def fall(self, request: PriceRequest, gradients: Sequence[Sent]) -> tuple[dict[str, FloatArray], Any]:
        """Products of the request's components here, and the gradients below this stage, from those above it."""
        batches, states = zip(*self._risen, strict=True)
        self._risen = []
        found, below = self._priced.down(request, batches, states, received(gradients, self._device))
        return found, to_send(below)

    # Weights.

    @torch.no_grad()
    def become(self, plan: Plan) -> None:
        """See `Weights.become`; `plan` has components of this stage only. Outside inference mode: gradients may go
        through these weights."""
        self._weights.become(plan)

    @torch.inference_mode()
    def perturb(self, plan: Plan) -> None:
        """`plan` until `restore`, which must come before anything else is changed."""
        self._perturbed.enter_context(self._weights.perturbed(plan))

    @torch.inference_mode()
    def restore(self) -> None:
        self._perturbed.close()

    @torch.inference_mode()
    def stand_on(self, weights_id: str) -> None:
        """See `Standing.rest_on`."""
        self._standing.rest_on(weights_id)

    @torch.inference_mode()
    def original(self, component: str) -> Any:
        """See `Weights.original`."""
        return to_send(self._weights.original(component))

    @torch.inference_mode()
    def standing(self, component: str) -> Any:
        """See `Weights.standing`."""
        return to_send(self._weights.standing(component))

    def memory_bytes(self) -> int:
        """What this stage takes of its device now."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return held_bytes(self._body.model)

    def rest(self) -> None:
        """Let go of all that can be had again."""
        self._calibrator.forget()
        self.end_prices()
        self._cache = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # Calibration: `Calibrator`'s, for the components of this stage.

    def use_calibration(self, calibration: Calibration, statistics: InputStatistics | None) -> None:
        self._calibrator.use(calibration, statistics)

    def use_solved(self, calibration_id: str, fetch: Fetch) -> None:
        self._calibrator.fetch_from(calibration_id, fetch)

    def enter(self, calibration_id: str, scheme: str, *states: Sent) -> None:
        """Take the states of a calibration's text at the first layer of this stage, a batch each: see
        `CalibrationTexts.enter`."""
        self._calibrator.texts.enter(calibration_id, received(states, torch.device("cpu")), scheme)

    @torch.inference_mode()
    def gather(self, calibration_id: str) -> tuple[Mapping[str, FloatArray], Mapping[str, int], Mapping[str, float]]:
        """Mean squares of the inputs of this stage's components, how many tokens these are of, and the largest."""
        statistics = self._calibrator.statistics(calibration_id)
        return statistics.mean_squares, statistics.num_tokens, statistics.largest

    @torch.inference_mode()
    def activate(self, calibration_id: str) -> None:
        self._calibrator.activate(calibration_id)

    @torch.inference_mode()
    def lacks(self, pairs: Sequence[tuple[str, Scheme]]) -> bool:
        """Whether some of these (component, solved scheme) pairs have yet to be solved."""
        return self._calibrator.solver.lacks(pairs)

    @torch.inference_mode()
    def solve(self, pairs: Sequence[tuple[str, Scheme]]) -> list[PackedMatrix]:
        solved = self._calibrator.solve(pairs)
        self._calibrator.rest()
        return solved

    @torch.inference_mode()
    def solve_for_itself(self, pairs: Sequence[tuple[str, Scheme]]) -> None:
        """`solve`, when nobody else needs the matrices."""
        self.solve(pairs)

    @torch.inference_mode()
    def weight_errors(
        self, components: Sequence[str], schemes: Sequence[Scheme], calibration_id: str, by_hessian: bool
    ) -> list[WeightError]:
        return self._calibrator.weight_errors(components, schemes, calibration_id, by_hessian)

    @torch.inference_mode()
    def outlier_shares(self, multiple: float) -> dict[int, float]:
        return outlier_shares(self._weights, self._components, multiple)


def held_bytes(model: nn.Module) -> int:
    """Bytes of the weights that are here."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)
