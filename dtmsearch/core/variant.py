"""What is measured: a plan over weights, by a calibration."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.plan import Plan


@dataclass(frozen=True)
class Variant:
    """A model as compressing and training have made it: `plan` over the trained weights of `weights_id` (empty: the
    base model's own), its calibrated schemes by the calibration of `calibration_id` (empty: of none)."""

    plan: Plan = field(default=Plan())
    weights_id: str = ""
    calibration_id: str = ""

    @property
    def calibrated_by(self) -> str:
        """The calibration that decides what the model computes; empty where the plan has no calibrated scheme."""
        return self.calibration_id if self.calibration_id and self.plan.needs_calibration else ""

    def under(self, plan: Plan) -> Variant:
        """The same weights, by the same calibration, under another plan."""
        return replace(self, plan=plan)

    def first_difference(self, other: Variant, manifest: ModelManifest) -> int | None:
        """Index of the first layer in which two variants differ: below it they have the same states. None where they
        are one."""
        if self.weights_id != other.weights_id or (
            self.calibrated_by and other.calibrated_by and self.calibrated_by != other.calibrated_by
        ):
            return 0
        changed = [manifest.by_name[component].layer for component in self.plan.diff(other.plan)]
        return min(max(min(changed), 0), manifest.num_layers - 1) if changed else None


BASE = Variant()
