"""How far schemes move weights, as they are and as the calibration text weighs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dtmsearch.core.calibration import InputStatistics, WeightError
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.schemes import Scheme, parse_scheme
from dtmsearch.model.calibration.hessians import Hessians
from dtmsearch.model.calibration.matrix_solver import MatrixSolver
from dtmsearch.model.compress.bitsandbytes_layers import compressed_module, restored_weight
from dtmsearch.model.compress.rounding import round_weight
from dtmsearch.model.weights.applied import Weights
from dtmsearch.model.weights.standing import Standing

# As LLM.int8() rounds weights.
_BY_ROW = parse_scheme("int8-channel")


class ErrorMeter:
    """Errors of schemes on components, each measured once; `statistics` gives those of a calibration by its id."""

    def __init__(
        self,
        hessians: Hessians,
        solver: MatrixSolver,
        standing: Standing,
        manifest: ModelManifest,
        statistics: Callable[[str], InputStatistics],
    ) -> None:
        self._hessians, self._solver, self._standing = hessians, solver, standing
        self._manifest, self._statistics = manifest, statistics
        self._known: dict[tuple[str, str, str, bool], WeightError] = {}

    def of(
        self, components: Sequence[str], schemes: Sequence[Scheme], calibration_id: str, by_hessian: bool
    ) -> list[WeightError]:
        """Errors of every scheme on every component, in this order of nesting; see `Replica.weight_errors`.

        The model stands on the base model's weights, the calibration is the active one."""
        if any(scheme.needs_calibration for scheme in schemes) and not calibration_id:
            names = ", ".join(scheme.name for scheme in schemes)
            raise ValueError(f"errors of {names} need calibration text; no calibration is named")
        if caches := [name for name in components if self._manifest.by_name[name].is_cache]:
            raise ValueError(f"{caches[0]} is a KV cache: it has no weights that could have errors")
        by_layer: dict[int, list[str]] = {}
        for component in components:
            if any((calibration_id, component, s.name, by_hessian) not in self._known for s in schemes):
                by_layer.setdefault(self._manifest.by_name[component].layer, []).append(component)
        for layer in sorted(by_layer):
            self._measure_errors(by_layer[layer], schemes, calibration_id, by_hessian)
        self._hessians.rest()
        return [self._known[calibration_id, c, s.name, by_hessian] for c in components for s in schemes]

    def _measure_errors(
        self, components: Sequence[str], schemes: Sequence[Scheme], calibration_id: str, by_hessian: bool
    ) -> None:
        """Errors of all schemes on components of one layer; the device is asked for them once, at the end."""
        self._solver.solve([(component, scheme) for component in components for scheme in schemes])
        found: dict[tuple[str, str], Tensor] = {}
        weighed: set[str] = set()
        parts = self._hessians.in_parts(self._solver.layer_of(components[0]), components) if by_hessian else ()
        for shared in (shared for part in parts for shared in part):
            for component in shared.components:
                if component in components:
                    weighed.add(component)
                    found |= self._norms_of(component, schemes, calibration_id, shared.hessian)
        for component in components:
            if component not in weighed:
                found |= self._norms_of(component, schemes, calibration_id, None)
        rows = torch.stack(list(found.values())).tolist()
        for (component, name), (plain, by_inputs, hessian) in zip(found, rows, strict=True):
            error = WeightError(
                component,
                name,
                plain,
                by_inputs if self._squares(component, calibration_id) is not None else None,
                hessian if component in weighed else None,
            )
            self._known[calibration_id, component, name, by_hessian] = error

    def _norms_of(
        self, component: str, schemes: Sequence[Scheme], calibration_id: str, hessian: Tensor | None
    ) -> dict[tuple[str, str], Tensor]:
        """(component, scheme) -> norms of what the scheme changes, over those of the weights."""
        weight = self._standing.weights.original(component)
        matrix = weight if weight.ndim == 2 else weight.unsqueeze(0)
        squares = self._squares(component, calibration_id)
        norms = _norms(matrix.float(), squares, hessian)
        return {
            (component, scheme.name): _norms(
                applied(self._standing.weights, component, matrix, scheme).float().sub_(matrix), squares, hessian
            ) / norms
            for scheme in schemes
        }  # fmt: skip

    def _squares(self, component: str, calibration_id: str) -> Tensor | None:
        known = calibration_id and component in self._statistics(calibration_id).mean_squares
        return self._standing.weights.compressor.mean_squares(component) if known else None


def applied(weights: Weights, component: str, weight: Tensor, scheme: Scheme) -> Tensor:
    """The dense matrix [rows, cols] of a component under a scheme."""
    if scheme.is_unquantized:
        return weight.clone()
    if not scheme.kind.as_module:
        return weights.compressor.compress(component, weight, scheme)
    if scheme.rounds_activations:  # vector-wise: a scale for each row, as in rounding
        return round_weight(weight, _BY_ROW)
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    return restored_weight(compressed_module(linear, weight, scheme))


def _norms(matrix: Tensor, squares: Tensor | None, hessian: Tensor | None) -> Tensor:
    """Squared norms of `matrix`: plain, weighted by mean squared inputs, weighted by the Hessian; 1 where not known."""
    one = matrix.new_ones(())
    squared = matrix.square()
    plain = squared.sum(dtype=torch.float64)
    by_inputs = one if squares is None else (squared.sum(dim=0) * squares.to(matrix.device)).sum(dtype=torch.float64)
    by_hessian = one if hessian is None else ((matrix @ hessian) * matrix).sum(dtype=torch.float64)
    return torch.stack([plain, by_inputs.double(), by_hessian.double()])
