"""The trainings of a run: found in the store, or made by the side that has the model.

The driver's side, without torch: what a training starts from comes from a replica, what it comes to goes back to all
of them by way of the store's folder. A training is named by all that determines it, so a run that is killed finds its
checkpoints, and another run that wants the same finds the weights.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from dtmsearch.config import texts
from dtmsearch.core.identity import file_digest, identity
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import TrainingRecord
from dtmsearch.core.training_settings import RecoverySettings
from dtmsearch.core.variant import Variant
from dtmsearch.errors import RecoveryDiverged, SearchStopped, UserError
from dtmsearch.model.training.main import FAILURE_FILE, JOB_FILE, LOG_FILE, STOPPED
from dtmsearch.search.protocols import TrainRequest
from dtmsearch.store.files import LocalFolder
from dtmsearch.workflows.session import Session

# Raise it when the same job would come to other weights; of plans that drop blocks, whose biases stayed before.
_VERSION, _VERSION_OF_DROPPED = 2, 3


class Recovering:
    """Answers the trainings of a run: a `dtmsearch.search.protocols.Trainer`."""

    def __init__(self, session: Session, recovery: RecoverySettings, calibration_id: str = "") -> None:
        store = session.store
        if not isinstance(store.folder, LocalFolder):
            raise UserError(
                f"recovery writes checkpoints and weights to files, but the store {store.url} is a bucket: give "
                "--store a folder that every node sees"
            )
        self._session, self._recovery, self._calibration_id = session, recovery, calibration_id
        self._root = Path(store.folder.full("trainings"))
        self._weights = Path(store.weights_folder)
        self._text_digest = _digest(texts.paths(session.file, recovery.files))

    def __call__(self, request: TrainRequest) -> str:
        """The weights that a model comes to by training, which is recorded. Raises `RecoveryDiverged`, `SearchStopped`,
        and `UserError` for settings that cannot be."""
        number, plan, weights_id = request.number, request.plan, request.weights_id
        training_id = self._training_id(plan, weights_id)
        folder = self._root / training_id
        if not (folder / "result.json").exists():
            self._prepare(folder, plan, weights_id)
            self._session.note(f"round {number + 1}: {_said(self._recovery)}; its log is {folder / LOG_FILE}")
            self._train(folder)
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if self._recovery.repair_tokens and not result["fitted"]:
            self._session.note(
                "nothing was fitted: no block that may be fitted stands before what is dropped, or is cut, or no fit "
                f"served it; see {folder / LOG_FILE}"
            )
        self._session.writer.add(
            [
                TrainingRecord(
                    round=number,
                    training_id=training_id,
                    plan_id=plan.id,
                    from_weights_id=weights_id,
                    weights_id=result["weights_id"],
                    steps=result["steps"],
                    tokens=result["tokens"],
                    wall_seconds=result["seconds"],
                    losses=tuple(result["losses"]),
                )
            ]
        )
        return str(result["weights_id"])

    def _training_id(self, plan: Plan, weights_id: str) -> str:
        settings = named_by(self._recovery)
        calibrated = self._calibration_id if plan.needs_calibration else ""
        model = [self._session.manifest.id, self._session.file.model.dtype, plan.id, weights_id, calibrated]
        version = _VERSION_OF_DROPPED if plan.dropped else _VERSION
        return identity([*model, settings, self._text_digest, self._session.file.seed, version])

    def _prepare(self, folder: Path, plan: Plan, weights_id: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "masks.safetensors").exists():  # it is written last
            self._session.pool.save_pruned(Variant(plan, weights_id, self._calibration_id), str(folder))
        job = {
            "config": self._session.file.to_yaml(),
            "config_folder": str(self._session.file.folder.absolute()),
            "base": str(self._weights / f"{weights_id}.safetensors") if weights_id else None,
            "weights_folder": str(self._weights),
            "recipe": asdict(self._recovery) | {"seed": self._session.file.seed},
        }
        (folder / JOB_FILE).write_text(json.dumps(job, indent=1), encoding="utf-8")

    def _train(self, folder: Path) -> None:
        (folder / FAILURE_FILE).unlink(missing_ok=True)
        code = self._session.pool.train(folder / JOB_FILE, self._session.stop_requested)
        if code == STOPPED:
            raise SearchStopped
        if not (folder / "result.json").exists():
            raise _failure(folder, code)


def _said(recovery: RecoverySettings) -> str:
    """What is done to the model, for a person."""
    fit = f"fitting what is left to {recovery.repair_tokens:,} tokens" if recovery.repair_tokens else ""
    steps = f"training {recovery.masked_steps} steps under the mask and {recovery.unmasked_steps} without"
    return ", then ".join(part for part in (fit, steps if recovery.num_steps else "") if part)


def named_by(recovery: RecoverySettings) -> dict[str, Any]:
    """The settings of which a training's name is made: what came later is left out where it is not used, so that
    trainings of older stores are found."""
    unused = {name for name in ("distill_hidden", "repair_tokens") if not getattr(recovery, name)}
    return {k: v for k, v in asdict(recovery).items() if k not in ("files", "checkpoint_steps") and k not in unused}


def _failure(folder: Path, code: int) -> Exception:
    path = folder / FAILURE_FILE
    if path.exists():
        failure = json.loads(path.read_text(encoding="utf-8"))
        kind = RecoveryDiverged if failure["kind"] == "diverged" else UserError
        return kind(failure["message"])
    lines = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    return RuntimeError(f"the training ended with code {code}; the last line of {folder / LOG_FILE}: {lines[-1]}")


def _digest(paths: list[Path]) -> str:
    whole = sha256()
    for path in paths:
        whole.update(bytes.fromhex(file_digest(path)))
    return whole.hexdigest()[:32]
