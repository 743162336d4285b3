"""The calibration texts that a replica was given, one of them active, and how one goes through the model's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dtmsearch.core.calibration import Calibration
from dtmsearch.core.components import ModelManifest
from dtmsearch.model.calibration.input_statistics import Gatherer
from dtmsearch.model.forward.partial import Body


class CalibrationTexts:
    """Calibrations by their ids; `active` is the one that schemes are calibrated by at present.

    `body` is the pass as far as it goes here, `rows_in_batch` gives the rows of a batch for rows of so many tokens
    where the text begins here.
    """

    def __init__(self, body: Body, manifest: ModelManifest, rows_in_batch: Callable[[int], int]) -> None:
        self._body, self._manifest, self._rows_in_batch = body, manifest, rows_in_batch
        self._calibrations: dict[str, Calibration] = {}
        self._entries: dict[tuple[str, str], tuple[Tensor, int]] = {}
        self.active: str | None = None

    def take(self, calibration: Calibration) -> None:
        """Know a calibration from now on. Raises `ValueError` for one of another model."""
        if calibration.manifest_id != self._manifest.id:
            raise ValueError(
                f"calibration {calibration.id} is of another model: its manifest is {calibration.manifest_id}, that of "
                f"{self._manifest.model} is {self._manifest.id}"
            )
        self._calibrations.setdefault(calibration.id, calibration)

    def enter(self, calibration_id: str, batches: Sequence[Tensor], scheme: str = "") -> None:
        """Take the states of a calibration's text at the first layer that is here, a batch each: the base model's, or
        behind layers that are compressed by a scheme."""
        self._entries[calibration_id, scheme] = torch.cat(list(batches)), len(batches[0])

    def known(self, calibration_id: str) -> Calibration:
        """A calibration by its id. Raises `ValueError` for one that was not given."""
        if calibration_id not in self._calibrations:
            named = f"calibration {calibration_id}, which this replica was not given" if calibration_id else "none"
            raise ValueError(f"a calibrated scheme needs calibration text; the request names {named}")
        return self._calibrations[calibration_id]

    @property
    def usual(self) -> str:
        """The calibration to take where none is named: the active one, else the first."""
        return self.active or next(iter(self._calibrations), "")

    @property
    def in_use(self) -> Calibration:
        """The active calibration; there must be one."""
        assert self.active is not None
        return self._calibrations[self.active]

    @property
    def through_compressed(self) -> bool:
        """Whether the active calibration goes through compressed layers."""
        return self.active is not None and self.in_use.through == "compressed"

    def gatherer(self, calibration: Calibration, scheme: str = "") -> Gatherer:
        """A text before the first layer that is here; of a scheme, behind layers that it compresses."""
        tokens = torch.from_numpy(calibration.tokens).long().to(self._body.input_device)
        entry, rows = self._entries.get((calibration.id, scheme), (None, self._rows_in_batch(tokens.shape[1])))
        assert entry is not None or self._body.own.start == 0, "the text's states come from the stage below"
        everywhere = calibration.experts == "all"
        return Gatherer(self._body, tokens, self._manifest.components, rows, entry, everywhere)
