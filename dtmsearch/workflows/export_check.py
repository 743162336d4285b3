"""Whether what was written is what was measured: its bytes, and its FDT and SDT as a fresh process finds them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.evaluation import FloatArray, ModelSpec, Reference, ReplicaSettings
from dtmsearch.core.statistics import FEWEST, paired_difference
from dtmsearch.errors import ExportFailed, UserError
from dtmsearch.export.job import Job, Written
from dtmsearch.export.smaller_code import CODE_FILE
from dtmsearch.export.writer import header_bytes
from dtmsearch.model.modules.compat import repacks_4bit
from dtmsearch.model.replica.by_llama_cpp import write_job as write_engine_job
from dtmsearch.model.replica.exported import write_job
from dtmsearch.workflows.export_source import Recorded, Source


@dataclass(frozen=True)
class Repacked:
    """What this CPU makes of a folder of bitsandbytes' 4-bit weights when nobody keeps it from packing them anew (see
    `repacks_4bit`): means over prompts, in tokens, and how many prompts differ from what is recorded. Or the `error` in
    which it ends."""

    fdt: float = float("nan")
    sdt: float = float("nan")
    differing: int = 0
    error: str = ""


@dataclass(frozen=True)
class Check:
    """The exported folder, measured by a fresh process, beside what the store holds of the plan. Means over prompts, in
    tokens; `differing` prompts have another FDT or SDT. `repacked`: where this CPU changes the weights on their way."""

    run: str
    reference_id: str
    num_prompts: int
    fdt_recorded: float
    fdt_measured: float
    sdt_recorded: float
    sdt_measured: float
    differing: int
    repacked: Repacked | None = None

    @property
    def equal(self) -> bool:
        return self.differing == 0


# llama.cpp's sums run in another order, after which some values round the other way: two runs of one plan have the
# same damage, but for noise, which a first divergent token amplifies. A file fails whose mean is further off than this
# part of it and the interval of the confidence allows.
_TOLERANCE = 0.1
_CONFIDENCE = {"FDT": 0.999, "KL": 0.95}
_SEED = 0


@dataclass(frozen=True)
class EngineCheck:
    """A GGUF file as llama.cpp itself runs it, beside what the store holds of the plan, means over prompts: FDT in
    tokens against the recorded continuations (`fdt_base`: of the base model's own file), KL in nats per token against
    the base model's own file in llama.cpp; None where the store holds no KL. `faults` say what is off by more than
    noise."""

    run: str
    reference_id: str
    num_prompts: int
    fdt_recorded: float
    fdt_measured: float
    fdt_base: float
    kl_recorded: float | None
    kl_measured: float
    faults: tuple[str, ...]


def check_enough_prompts(recorded: Recorded) -> None:
    """Raises `UserError` where too few prompts are recorded to tell a fault of a file from noise, or other choices than
    llama.cpp's check makes."""
    if not recorded.reference.decoding.is_greedy:
        raise UserError(
            f"the store's measurement of this plan (run {recorded.run}) is of sampled continuations, and llama.cpp's "
            "check of a file is of greedy ones. Measure the plan without search.decoding, or give --no-check"
        )
    if len(recorded.fdt) < FEWEST:
        raise UserError(
            f"the store's measurement of this plan (run {recorded.run}) is of {len(recorded.fdt)} prompts, where "
            f"llama.cpp's check of a file needs {FEWEST}, since its sums run in another order. Measure the plan on "
            "more (dtmsearch evaluate), or give --no-check"
        )


def measured_by_llama_cpp(file: Path, base: Path, recorded: Recorded) -> EngineCheck:
    """A file as a fresh process of llama.cpp finds it. Raises `ExportFailed` when it cannot be loaded and measured."""
    with tempfile.TemporaryDirectory(prefix="dtmsearch-check-") as scratch:
        job = write_engine_job(Path(scratch), base, file, recorded.reference)
        answer = _answer_of("dtmsearch.model.replica.by_llama_cpp", job, str(file))
    fdt, kl, fdt_base = (np.array(answer[name]) for name in ("fdt", "kl", "base_fdt"))
    faults = [_fault("FDT", fdt, recorded.fdt)] + ([] if recorded.kl is None else [_fault("KL", kl, recorded.kl)])
    return EngineCheck(
        run=recorded.run,
        reference_id=recorded.reference.id,
        num_prompts=len(fdt),
        fdt_recorded=float(recorded.fdt.mean()),
        fdt_measured=float(fdt.mean()),
        fdt_base=float(fdt_base.mean()),
        kl_recorded=None if recorded.kl is None else float(recorded.kl.mean()),
        kl_measured=float(kl.mean()),
        faults=tuple(fault for fault in faults if fault),
    )


def _fault(name: str, found: NDArray[np.generic], recorded: NDArray[np.generic]) -> str:
    """In words, where a metric is off by more than `_TOLERANCE` and its interval, or by the tolerance where there is no
    interval (values that are no numbers, or that are all the same); empty where it is not."""
    difference = paired_difference(found, recorded, _SEED, _CONFIDENCE[name])
    own = float(recorded.astype(np.float64).mean())
    if abs(difference.mean) <= _TOLERANCE * own:
        return ""
    interval = ""
    if np.isfinite([difference.low, difference.high]).all():
        if not difference.excludes_zero:
            return ""
        interval = f" ({difference.low:+.2g} to {difference.high:+.2g})"
    return f"{name} {own + difference.mean:.4g} instead of {own:.4g}{interval}"


def check_bytes(job: Job, written: Written) -> None:
    """Raises `ExportFailed` unless the files hold what the plan's arithmetic and the format's own account for, to the
    byte."""
    if not written.tensor_bytes:
        return
    on_disk = sum(path.stat().st_size - header_bytes(path) for path in written.files)
    accounted = job.plan_bits + sum(written.extra_bits.values())
    if not 8 * on_disk == 8 * written.tensor_bytes == accounted:
        raise ExportFailed(
            f"{written.files[0].parent} holds {on_disk} bytes of tensors, where {written.tensor_bytes} were written "
            f"and the plan's arithmetic accounts for {accounted / 8:g}: a fault of dtmsearch or of the disk. The "
            "folder is left as it is"
        )


def measured(folder: Path, found: Source, recorded: Recorded, batch_tokens: int) -> Check:
    """The folder as a fresh process finds it, in the numeric mode of what is recorded."""
    spec = replace(found.spec, path=str(folder.absolute()), revision=None)
    spec = replace(spec, compile="always" if recorded.reference.mode.compiled else "never")
    if (folder / CODE_FILE).exists():  # ours
        spec = replace(spec, trust_remote_code=True)
    settings = ReplicaSettings(batch_tokens=batch_tokens)
    answer = measure_apart(spec, settings, recorded.reference)
    fdt, sdt = np.array(answer["fdt"]), np.array(answer["sdt"])
    on_cpu = recorded.reference.mode.device == "cpu"
    return Check(
        run=recorded.run,
        reference_id=recorded.reference.id,
        num_prompts=len(fdt),
        fdt_recorded=float(recorded.fdt.mean()),
        fdt_measured=float(fdt.mean()),
        sdt_recorded=float(recorded.sdt.mean()),
        sdt_measured=float(sdt.mean()),
        differing=_differing(fdt, sdt, recorded),
        repacked=_repacked(spec, settings, recorded) if on_cpu and _in_4_bits(folder) and repacks_4bit() else None,
    )


def _differing(fdt: FloatArray, sdt: FloatArray, recorded: Recorded) -> int:
    return int(((fdt != recorded.fdt) | (sdt != recorded.sdt)).sum())


def _in_4_bits(folder: Path) -> bool:
    """Whether a folder's weights are bitsandbytes' own of 4 bits."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("quantization_config", {}).get("load_in_4bit"))


def _repacked(spec: ModelSpec, settings: ReplicaSettings, recorded: Recorded) -> Repacked:
    try:
        answer = measure_apart(spec, settings, recorded.reference, True)
    except ExportFailed as error:
        return Repacked(error=str(error).rpartition(": ")[2])
    fdt, sdt = np.array(answer["fdt"]), np.array(answer["sdt"])
    return Repacked(float(fdt.mean()), float(sdt.mean()), _differing(fdt, sdt, recorded))


def measure_apart(
    spec: ModelSpec, settings: ReplicaSettings, reference: Reference, repacked: bool = False
) -> dict[str, list[float]]:
    """The folder at `spec.path` against a reference, by a fresh process: metric -> value of each prompt. For `repacked`
    see `dtmsearch.model.replica.exported.measure`.

    Raises `ExportFailed` when it cannot be loaded or measured.
    """
    with tempfile.TemporaryDirectory(prefix="dtmsearch-check-") as scratch:
        job = write_job(Path(scratch), spec, settings, reference, repacked)
        return _answer_of("dtmsearch.model.replica.exported", job, f"the folder {spec.path}")


def _answer_of(module: str, job: Path, what: str) -> dict[str, list[float]]:
    """What a process of one of our modules says of a job."""
    command = [sys.executable, "-m", module, str(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own module
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ExportFailed(f"{what} cannot be loaded and measured: {last}")
    answer: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return answer
