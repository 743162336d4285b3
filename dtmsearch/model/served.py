"""A checkpoint folder as its users load it, measured against a reference: `python -m dtmsearch.model.served JOB`.

A process of its own, so that nothing of what wrote the folder is left in memory. JOB is a JSON file written by
`write_job`; the answer, per prompt, is JSON on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from dtmsearch.model.loading import load_tokenizer
from dtmsearch.model.replica import LoadedModel, Replica
from dtmsearch.model.weights import Checkpoint
from dtmsearch.plans.components import ModelManifest, weight_files
from dtmsearch.plans.evaluation import EvalRequest, EvalResult, ModelSpec, Reference, ReplicaSettings
from dtmsearch.plans.plan import Plan


class ServedReplica(Replica):
    """A replica of a folder that nothing but `AutoModelForCausalLM` has had a hand in; it takes no plan."""

    def _load(self, spec: ModelSpec, settings: ReplicaSettings) -> LoadedModel:
        transformers_logging.disable_progress_bar()
        folder = Path(spec.path)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, spec.dtype), attn_implementation=spec.attention, device_map=str(self._device)
        )
        nothing = ModelManifest(str(folder), None, spec.dtype, model.config.get_text_config().num_hidden_layers, "", ())
        checkpoint = Checkpoint(weight_files(folder))
        return LoadedModel(model.eval().requires_grad_(False), load_tokenizer(folder, spec), nothing, checkpoint)


def measure(spec: ModelSpec, settings: ReplicaSettings, reference: Reference) -> EvalResult:
    """The folder at `spec.path` against a reference of the base model. Raises `ValueError` when it cannot be measured
    in the reference's numeric mode."""
    replica = ServedReplica(spec, settings)
    replica.use(reference)
    request = EvalRequest(Plan(), reference.id, (0, reference.num_prompts))
    outcome = replica.evaluate([request])[0]
    if not isinstance(outcome, EvalResult):
        raise ValueError(f"{spec.path} could not be measured: {outcome.kind}: {outcome.message}")
    return outcome


def write_job(folder: Path, spec: ModelSpec, settings: ReplicaSettings, reference: Reference) -> Path:
    """A job for this module's process, its files in `folder`."""
    arrays = folder / "reference.npz"
    np.savez(arrays, text=reference.text, continuation=reference.continuation, agrees=reference.agrees)
    job = folder / "job.json"
    values = {
        "spec": asdict(spec),
        "settings": asdict(settings),
        "arrays": str(arrays),
        "reference": {"id": reference.id, "manifest_id": reference.manifest_id, "mode": reference.mode},
        "suppressed": list(reference.suppressed),
    }
    job.write_text(json.dumps(values), encoding="utf-8")
    return job


def _read_job(job: Mapping[str, Any]) -> tuple[ModelSpec, ReplicaSettings, Reference]:
    with np.load(job["arrays"]) as arrays:
        reference = Reference(**job["reference"], **dict(arrays), suppressed=tuple(job["suppressed"]))
    return ModelSpec(**job["spec"]), ReplicaSettings(**job["settings"]), reference


def main(path: str) -> None:
    result = measure(*_read_job(json.loads(Path(path).read_text(encoding="utf-8"))))
    values = {"fdt": result.fdt.tolist(), "sdt": result.sdt.tolist(), "dppl": result.dppl.tolist()}
    sys.stdout.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
