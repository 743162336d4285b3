"""The plan of a run, what each component costs alone, and how such damages add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtmsearch.core.components import Component, blocks_of
from dtmsearch.core.plan import Plan, plan_size
from dtmsearch.core.records import RunRecord
from dtmsearch.core.schemes import DENSE, DROP, parse_scheme
from dtmsearch.report.facts.rows import DENSE_PLAN, Row, column_of, damage, spread
from dtmsearch.store.store import ResultStore

# Plans whose damage is compared with that of their parts, at most.
_MOST_SUMS = 800


def components_of(store: ResultStore, record: RunRecord) -> list[Row]:
    """A row for each component of a run's model."""
    if record.manifest_id is None:
        return []
    columns = ["component", "layer", "kind", "rows", "cols", "num_weights", "dense_bits", "source_bits"]
    rows = store.table("components", columns, record.run, pc.field("manifest_id") == record.manifest_id).to_pylist()
    return list({row["component"]: row for row in rows}.values())


def plan_rows_of(
    store: ResultStore,
    record: RunRecord,
    plan_id: str | None,
    components: list[Row],
    share: float | None,
    path: list[Row],
) -> tuple[list[Row], float | None, float | None]:
    """Each component with its scheme and bits in a plan; the size in MB of those searched, and of their dense form."""
    if plan_id is None:
        return [], None, None
    where = pc.field("plan_id") == plan_id
    stored = store.table("plans", ["component", "scheme", "stored_bits", "num_weights"], record.run, where).to_pylist()
    by_name = {row["component"]: row for row in stored}
    rows = []
    plan = Plan.of({row["component"]: row["scheme"] for row in stored})
    for component in components:
        if plan.widths:
            rows.append({**component, **_in_cut_plan(plan, component)})
            continue
        own = by_name.get(component["component"]) or dropped_with(component["component"], by_name)
        bits = component["dense_bits"] if own is None else own["stored_bits"] / own["num_weights"]
        scheme = DENSE if own is None else own["scheme"]
        pruned = parse_scheme(scheme).pruned_weights((component["rows"], component["cols"]))
        rows.append({**component, "scheme": scheme, "bits": bits, "pruned": pruned / component["num_weights"]})
    share = share if share is not None else (path[-1]["share"] if path else None)
    if not stored or not share:
        return rows, None, None
    if plan.widths:
        changed = [row for row in rows if row["scheme"] != DENSE]
        stored = [{"num_weights": r["num_weights"], "stored_bits": r["bits"] * r["num_weights"]} for r in changed]
    compressed = sum(row["num_weights"] for row in stored)
    dense_bits = components[0]["dense_bits"] if components else 16
    total = compressed / share
    size = sum(row["stored_bits"] for row in stored) + (total - compressed) * dense_bits
    return rows, size / 8e6, total * dense_bits / 8e6


def _in_cut_plan(plan: Plan, row: Row) -> Row:
    """A component's scheme, bits and pruned share in a plan that cuts blocks."""
    component = _component_of(row)
    size = plan_size(plan, [component], row["dense_bits"])
    bits, pruned = size.stored_bits / component.num_weights, size.pruned_weights / component.num_weights
    return {"scheme": plan.shown_scheme_of(component), "bits": bits, "pruned": pruned}


def _component_of(row: Row) -> Component:
    return Component(row["component"], row["layer"], row["kind"], (row["rows"], row["cols"]))


def dropped_with(component: str, rows: Mapping[str, Row]) -> Row | None:
    """The row, of a plan's rows by name, of the block or layer that a component is dropped with; None without one."""
    parts = component.split(".")
    above = (rows.get(".".join(parts[:end])) for end in range(1, len(parts)))
    return next((row for row in above if row is not None and row["scheme"] == DROP), None)


def block_rows(components: Sequence[Row]) -> list[Row]:
    """Rows for the blocks and layers in which some components lie."""
    if not components:
        return []
    held = list(map(_component_of, components))
    of_weights = {"dense_bits": components[0]["dense_bits"], "source_bits": 0}
    return [
        {"component": b.name, "layer": b.layer, "kind": b.kind, "rows": 1, "cols": b.num_weights,
         "num_weights": b.num_weights, **of_weights}
        for b in blocks_of(c for c in held if not c.is_cache)
    ]  # fmt: skip


def sensitivity_of(candidates: pa.Table, components: list[Row], metrics: Sequence[str]) -> list[Row]:
    """Every component under every scheme that was measured with nothing else compressed and nothing trained, tied ones
    together; where one was measured more than once, on the most prompts."""
    alone = candidates.filter(
        pc.or_(
            pc.is_valid(candidates["component"]),
            pc.and_(pc.equal(candidates["parent_plan_id"], DENSE_PLAN), pc.is_valid(candidates["perturbation"])),
        )
    )
    alone = alone.filter(pc.and_(pc.equal(alone["status"], "ok"), pc.is_null(alone["weights_id"])))
    by_name = {row["component"]: row for row in (*components, *block_rows(components))}
    found: dict[tuple[str, str], Row] = {}
    for row in alone.to_pylist():
        names, scheme = _edge(row)
        for name in names:
            before = found.get((name, scheme))
            if name in by_name and (before is None or before["num_prompts"] < row["num_prompts"]):
                values = {m: row[column_of(m)] for m in metrics if row[column_of(m)] is not None}
                place = {key: by_name[name][key] for key in ("component", "layer", "kind", "num_weights")}
                size = {"bits": row["bits_per_weight"], "num_prompts": row["num_prompts"]}
                found[name, scheme] = {**place, "scheme": scheme, **size, **values}
    return list(found.values())


def _edge(row: Row) -> tuple[list[str], str]:
    """The components and the scheme of a plan that is one step from dense."""
    if row["component"] is not None:
        return [row["component"]], row["scheme"]
    names, _, scheme = row["perturbation"].partition("=")
    return names.split("+"), scheme


def sums_of(
    store: ResultStore,
    record: RunRecord,
    complete: pa.Table,
    sensitivity: list[Row],
    metrics: Sequence[str],
    ceiling: int | None,
) -> list[Row]:
    """Plans of several components: the damage measured, and the sum of what their components do alone."""
    metric = next((m for m in ("kl", "sdt") if m in metrics), None)
    several = complete.filter(pc.greater(complete["num_compressed"], 1)) if metric else complete.slice(0, 0)
    if metric is None or several.num_rows == 0 or not sensitivity:
        return []
    several = spread(several, "num_compressed", column_of(metric), _MOST_SUMS)
    alone = {(r["component"], r["scheme"]): damage(metric, r[metric], ceiling) for r in sensitivity if metric in r}
    where = pc.field("plan_id").isin(several["plan_id"].to_pylist())
    parts = store.table("plans", ["plan_id", "component", "scheme"], record.run, where)
    sums: dict[str, float] = {}
    columns = (parts[name].to_pylist() for name in ("plan_id", "component", "scheme"))
    for plan_id, component, scheme in zip(*columns, strict=True):
        sums[plan_id] = sums.get(plan_id, 0.0) + alone.get((component, scheme), np.nan)
    rows = []
    for row in several.to_pylist():
        expected = sums.get(row["plan_id"], np.nan)
        if np.isfinite(expected):
            found = damage(metric, row[column_of(metric)], ceiling)
            rows.append({"metric": metric, "sum": expected, "measured": found, "num_compressed": row["num_compressed"]})
    return rows
