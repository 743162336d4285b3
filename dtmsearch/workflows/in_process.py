"""Plans on a model object in this process, without Ray or a store: `measure` and `apply`."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.decoding import GREEDY, Decoding
from dtmsearch.core.evaluation import EXTRA_METRICS, EvalFailure, EvalRequest, EvalResult
from dtmsearch.core.gguf_presets import PRESET, preset_plan
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.metrics import Summary, summarize
from dtmsearch.core.plan import Plan, PlanSize, plan_size
from dtmsearch.core.plan_file import check_takes, schemes_from_json
from dtmsearch.core.schemes import parse_scheme, solved_pairs
from dtmsearch.core.user_files import is_file, read_text
from dtmsearch.errors import UserError
from dtmsearch.model.modules.blocks import set_to_zero
from dtmsearch.model.replica.in_memory import InMemoryReplica, manifest_of, weights_of
from dtmsearch.workflows.lookup import UNIFORM, uniform_plan

# What a plan may be given as: a plan, component -> scheme, a plan file, `uniform:SCHEME`, or `preset:NAME`.
PlanLike = Plan | Mapping[str, str] | str | Path


@dataclass(frozen=True)
class Measurement:
    """A plan measured on a model object. `per_prompt` has a row a prompt with fdt (tokens), sdt (a count of tokens),
    dppl and ppl (perplexities) and kl (nats per token); `summary` their aggregates over the prompts."""

    plan: Plan
    size: PlanSize
    summary: Summary
    per_prompt: pa.Table

    def to_pandas(self) -> Any:
        """A row a prompt."""
        return self.per_prompt.to_pandas()

    def _repr_html_(self) -> str:
        values = {each.name: getattr(self.summary, each.name) for each in fields(Summary) if each.name != "others"}
        values |= self.summary.others
        rows = {"bits per weight": f"{self.size.bits_per_weight:.2f}", "compressed": self.size.num_compressed} | {
            name: f"{value:.4g}" for name, value in values.items() if value is not None
        }
        cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{value}</td></tr>" for name, value in rows.items())
        return f"<table>{cells}</table>"


def plan_of(plan: PlanLike, manifest: ModelManifest) -> Plan:
    """A plan for a model's components. Raises `UserError` for components or schemes that there are not."""
    if isinstance(plan, Plan):
        found = plan
    elif isinstance(plan, Mapping):
        found = Plan.of(plan)
    elif str(plan).startswith(UNIFORM):
        found = uniform_plan(str(plan), manifest.components)
    elif str(plan).startswith(PRESET):
        found = preset_plan(str(plan).removeprefix(PRESET), manifest.components, manifest)
    elif is_file(Path(plan)):
        found = Plan.of(schemes_from_json(read_text(Path(plan), "plan file"), str(plan)))
    else:
        raise UserError(f"plan {str(plan)!r} is no plan file, and not {UNIFORM}SCHEME")
    for component, scheme in found.entries:
        parsed = parse_scheme(scheme)
        if component not in manifest.by_name:
            raise UserError(
                f"the plan names {component!r}, which {manifest.model} does not have; its components are named like "
                f"{manifest.components[0].name!r}"
            )
        check_takes(parsed, manifest.by_name[component], "the plan")
    return found


def apply(plan: PlanLike, model: Any) -> Any:
    """Put a plan's compressed weights into `model`, in place, and return it.

    Rounded and pruned weights stand in the model's own dtype, as every evaluation has them; bitsandbytes' schemes put
    its modules there. Blocks and layers that the plan drops do not run, and their matrices and biases are zero, so
    that a model which is saved from here computes the same, as large as before: `dtmsearch export` writes a smaller
    one. Raises `UserError` for a plan with calibrated schemes (GPTQ, Wanda, SparseGPT, AWQ, ...), which are solved
    over text: export these from a run.
    """
    manifest = manifest_of(model)
    found = plan_of(plan, manifest)
    if found.needs_calibration:
        raise UserError(
            "the plan has schemes that are calibrated over text (GPTQ, Wanda, SparseGPT, AWQ, ...): use "
            "`dtmsearch export`, which finds their matrices in the store"
        )
    weights_of(model).become(found)
    for name in sorted(found.dropped):
        if manifest.by_name[name].is_block:
            set_to_zero(model.get_submodule(name))
    return model


def measure(
    model: Any,
    tokenizer: Any,
    texts: str | Sequence[str],
    plan: PlanLike = Plan(),
    *,
    count: int = 64,
    prompt_tokens: int = 100,
    continuation_tokens: int = 100,
    seed: int = 0,
    calibration: str | Sequence[str] | None = None,
    batch_tokens: int = 0,
    metrics: Sequence[str] = (),
    decoding: Decoding = GREEDY,
) -> Measurement:
    """FDT, SDT, DPPL, PPL and KL of `model` under `plan` against the model as it is, and further `metrics`.

    `texts` are documents, of which `count` windows of `prompt_tokens` + `continuation_tokens` tokens are drawn by
    `seed`: the first part of each is a prompt, from which the model's own continuation is made, greedy or as `decoding`
    says. `calibration` is text for calibrated schemes (`texts` where it is not given). The model has its own weights
    again at the end. Raises `UserError` for too little text, for a plan that does not fit the model, and for a metric
    that there is not.
    """
    for name in metrics:
        METRICS[name]
    replica = InMemoryReplica(model, tokenizer, batch_tokens, decoding)
    manifest = replica.manifest()
    found = plan_of(plan, manifest)
    documents = [texts] if isinstance(texts, str) else list(texts)
    prompts, _ = replica.cut_prompts(documents, count, prompt_tokens, continuation_tokens, seed)
    try:
        reference = replica.make_reference(prompts)
        replica.use(reference)
        request = EvalRequest(found, reference.id, (0, count), (*EXTRA_METRICS, *metrics))
        if found.needs_calibration:
            text = documents if calibration is None else [calibration] if isinstance(calibration, str) else calibration
            request = replace(request, calibration_id=_calibrate(replica, found, text, prompts.tokens.shape[1], seed))
        (outcome,) = replica.evaluate([request])
    finally:
        replica.restore()
    if isinstance(outcome, EvalFailure):
        raise UserError(f"the plan could not be measured ({outcome.kind}): {outcome.message}")
    size = plan_size(found, manifest.in_plans(found.schemes), manifest.dense_bits)
    return Measurement(found, size, summarize(outcome), _per_prompt(outcome))


def _calibrate(replica: InMemoryReplica, plan: Plan, texts: Sequence[str], tokens: int, seed: int) -> str:
    """Gather and solve what the plan's calibrated schemes need; the calibration's id."""
    calibration = replica.cut_calibration(texts, 64, tokens, seed)
    replica.gather_statistics(calibration)
    pairs = [(component, scheme.name) for component, scheme in solved_pairs(plan.parsed.items())]
    solved = {(matrix.component, matrix.scheme): matrix for matrix in replica.solve(calibration.id, pairs)}
    replica.use_solved(calibration.id, lambda component, scheme: solved.get((component, scheme)))
    return calibration.id


def _per_prompt(result: EvalResult) -> pa.Table:
    found = result.metrics
    columns = {name: found[name] for name in ("fdt", "sdt", "dppl", "ppl", "kl") if name in found}
    return pa.table({"prompt": pa.array(range(len(result.fdt)))} | columns | dict(result.others))
