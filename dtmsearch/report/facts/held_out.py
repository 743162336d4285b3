"""What was measured on held-out prompts: values, texts, how long they stay the base model's, and other runs' plans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc

from dtmsearch.analysis.pareto_runs import Candidate, candidates
from dtmsearch.analysis.summary import RunSummary
from dtmsearch.core.records import RunRecord
from dtmsearch.report.facts.rows import Row
from dtmsearch.store.store import ResultStore


def validated(summary: RunSummary) -> list[Row]:
    """A row for each plan that was measured on held-out prompts."""
    rows = []
    for row in summary.validation:
        if row.summary is None:
            continue
        size = {"label": row.label, "share": row.share, "bits": row.bits_per_weight}
        rows.append({**size, **row.summary.metrics})
    return rows


def survival_of(store: ResultStore, record: RunRecord, summary: RunSummary) -> list[Row]:
    """For each validated plan and position: the share of held-out prompts whose text is still the base model's."""
    length = ceiling_of(store, record, held_out=True)
    if length is None:
        return []
    rows = []
    for label, lists in per_prompt(store, record, summary).items():
        fdt = np.asarray(lists["fdt"])
        if label != "base":
            same = [float((fdt >= position).mean()) for position in range(length + 1)]
            rows += [{"label": label, "token": position, "same": value} for position, value in enumerate(same)]
    return rows


def per_prompt(store: ResultStore, record: RunRecord, summary: RunSummary) -> dict[str, Row]:
    """label of a validated plan -> its values per held-out prompt: fdt, sdt, kl_list. One plan may stand under several
    labels, before and after a training."""
    wanted = {row.label: (row.plan_id, row.weights_id) for row in summary.validation if row.summary is not None}
    if not wanted or record.validation_reference_id is None:
        return {}
    where = (pc.field("reference_id") == record.validation_reference_id) & (pc.field("status") == "ok")
    where &= pc.field("plan_id").isin(sorted({plan_id for plan_id, _ in wanted.values()}))
    where &= pc.field("purpose") != "race"
    columns = ["plan_id", "weights_id", "fdt", "sdt", "kl_list"]
    rows = store.table("evaluations", columns, record.run, where).to_pylist()
    measured = {(row["plan_id"], row["weights_id"] or None): row for row in rows}
    return {label: measured[variant] for label, variant in wanted.items() if variant in measured}


def texts_of(store: ResultStore, record: RunRecord, plan_id: str | None) -> list[Row]:
    """How the base model and the plan go on from prompts, least robust first, with the position of the divergence."""
    if plan_id is None or record.validation_reference_id is None:
        return []
    where = (pc.field("plan_id") == plan_id) & (pc.field("reference_id") == record.validation_reference_id)
    rows = list(
        {row["prompt"]: row for row in store.table("continuations", None, record.run, where).to_pylist()}.values()
    )
    for row in rows:
        pairs = zip(row["base_tokens"], row["own_tokens"], strict=True)
        row["diverges_at"] = next((at for at, (a, b) in enumerate(pairs) if a != b), len(row["base_tokens"]))
    return sorted(rows, key=lambda row: (row["diverges_at"], row["prompt"]))


def sweep_of(store: ResultStore, record: RunRecord) -> list[Row]:
    """Every validated plan of the store on this run's held-out prompts, if more than one run has any."""
    if record.validation_reference_id is None:
        return []
    found = [c for c in candidates(store) if c.reference_id == record.validation_reference_id]
    if len({c.run for c in found if c.label == "plan"}) < 2:
        return []
    rows = plans_of(found)
    for row in rows:
        if row["label"] == "plan":
            row["whose"] = "this run" if row["run"] == record.run else "another run"
    return rows


def plans_of(found: Sequence[Candidate]) -> list[Row]:
    """Validated plans of any runs, as they are drawn beside each other."""
    return [
        {
            **{
                name: getattr(c, name)
                for name in (
                    "reference_id",
                    "model",
                    "num_prompts",
                    "run",
                    "label",
                    "plan_id",
                    "share",
                    "kl",
                    "num_compressed",
                )
            },
            "bits": c.bits_per_weight,
            "fdt": c.fdt_mean,
            "sdt": c.sdt_mean,
            "fronts": list(c.fronts),
            "name": c.run if c.label == "plan" else c.label.replace("uniform-nearest:", "uniform:").replace(":", " "),
            "whose": "a run"
            if c.label == "plan"
            else "llama.cpp's mixture"
            if c.label.startswith("preset")
            else "uniform plan",
        }
        for c in found
    ]


def ceiling_of(store: ResultStore, record: RunRecord, held_out: bool = False) -> int | None:
    """The most that FDT can be: tokens of a continuation; None where no reference is recorded."""
    reference_id = record.validation_reference_id if held_out else record.reference_id
    if reference_id is None:
        return None
    rows = store.segments.read("prompts", [reference_id], ["continuation"]).slice(0, 1).to_pylist()
    return len(rows[0]["continuation"]) if rows else None


def noise_floor_of(store: ResultStore, record: RunRecord) -> float | None:
    """Tokens a prompt at which the base model's single pass leaves its own cached generation, on held-out prompts."""
    reference_id = record.validation_reference_id or record.reference_id
    if reference_id is None:
        return None
    rows = store.segments.read("prompts", [reference_id], ["disagreements"])
    if rows.num_rows == 0:
        return None
    return float(pc.mean(pc.list_value_length(rows["disagreements"])).as_py())
