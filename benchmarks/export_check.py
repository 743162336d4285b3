"""Exports of a small trained model, each measured by a fresh process against what was recorded, in the numeric mode of
this machine.

    python benchmarks/export_check.py MODEL TEXT FOLDER --dtype bfloat16

The plans are measured here, without a search and without Ray, and recorded in a store from which they are exported.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from dtmsearch.config import parse
from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import EvaluationRecord, RunRecord, StatisticsRecord
from dtmsearch.errors import ExportFailed
from dtmsearch.model.replica.replica import Replica
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.export import export

# what is exported: format, the scheme of attention, the scheme of the rest, what loads it
EXPORTS = (
    ("dense", "int4-g32", "int8-channel", "transformers"),
    ("dense", "magnitude-0.5", "nf4", "transformers"),
    ("dense", "gptq-int4-g32", "wanda-0.5", "transformers"),
    ("compressed-tensors", "int4-g32", "int8-channel", "vllm"),
    ("compressed-tensors", "int4-g32-asym", "int4-g64", "vllm"),
    ("compressed-tensors", "int4-channel-asym", "int4-channel", "vllm"),
    ("compressed-tensors", "int3-g32", "int5-channel-asym", "transformers"),
    ("compressed-tensors", "gptq-int4-g32", "gptq-int8-channel", "vllm"),
    ("bitsandbytes", "nf4", "fp4", "transformers"),
    ("bitsandbytes", "w8a8", "w8a8", "transformers"),
    ("bitsandbytes", "llm-int8", "llm-int8", "transformers"),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--only", default="", help="a scheme: only exports in which it occurs")
    arguments = parser.parse_args()
    model, store = str(Path(arguments.model).absolute()), arguments.folder / "store"
    spec = ModelSpec(model, dtype=arguments.dtype, scale_dtype="bfloat16")
    base = Replica(spec, ReplicaSettings())
    text = arguments.text.read_text(errors="replace")
    prompts, _ = base.cut_prompts([text], arguments.prompts, arguments.tokens, arguments.tokens, 0)
    reference = base.make_reference(prompts)
    base.use(reference)
    calibration = base.cut_calibration([text], 16, 2 * arguments.tokens, 1)
    base.use_calibration(calibration)
    print(f"{arguments.model}, {arguments.dtype}, {reference.mode}, {reference.num_prompts} prompts", flush=True)
    print("| format | attention | the rest | for | FDT | SDT | prompts that differ | bytes of tensors | seconds |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    manifest = base.manifest()
    for number, (to, attention, rest, runtime) in enumerate(EXPORTS):
        if arguments.only not in ("", attention, rest):
            continue
        plan = Plan.of({c.name: attention if "attn" in c.name else rest for c in manifest.components})
        known = calibration.id if plan.needs_calibration else ""
        request = EvalRequest(plan, reference.id, (0, reference.num_prompts), calibration_id=known)
        outcome = base.evaluate([request])[0]
        assert isinstance(outcome, EvalResult), outcome
        run = f"plan-{number}"
        file = parse(
            f"run: {run}\nmodel: {{path: {model}, dtype: {arguments.dtype}, scale_dtype: bfloat16}}\n"
            f"prompts: {{files: [{arguments.text.absolute()}]}}\nsearch: {{schemes: [int8-channel]}}\n",
            "search.yaml",
            Path(),
        )
        now = time.time()
        ids = (manifest.id, reference.id, None, plan.id)
        with ResultStore(store).writer(run) as writer:
            writer.put_components(manifest, manifest.components)
            writer.share(reference)
            writer.append([EvaluationRecord(request, outcome, "search")])
            if known:
                writer.share(StatisticsRecord(calibration.manifest_id, base.gather_statistics(calibration)))
                writer.share_parts(known, base.solve(known, plan.entries))
            writer.put_run(RunRecord(run, "finished", file.to_yaml(), "", *ids, now, now, "benchmark"))
        started_at = time.perf_counter()
        row = f"| {to} | {attention} | {rest} | {runtime} |"
        try:
            result = export(run, to, arguments.folder / run, str(store), runtime=runtime)
        except (ExportFailed, ValueError) as error:
            print(f"{row} failed: {str(error).splitlines()[0][:250]} |", flush=True)
            continue
        check, seconds = result.check, time.perf_counter() - started_at
        assert check is not None
        differing = f"{check.differing} of {check.num_prompts}"
        measured = f"{check.fdt_measured:.2f} | {check.sdt_measured:.3f} | {differing}"
        print(f"{row} {measured} | {result.tensor_bytes:,} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
