"""Where a plan spends its bits, beside what compressing layers and kinds costs; and how it can be written for use."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence

from dtmsearch.analysis.plan_difference import Part, difference_from_uniform
from dtmsearch.analysis.summary import RunSummary, scale_bits_of
from dtmsearch.core.components import CACHE_KINDS
from dtmsearch.core.holders import HOLDERS, holders_of
from dtmsearch.core.records import RunRecord
from dtmsearch.core.schemes import DENSE, DROP, Scheme, parse_scheme, uniform_parts
from dtmsearch.report.facts.rows import Row, bits_of, damage


def spending_of(plan_rows: Sequence[Row], by: str) -> list[Row]:
    """For each layer or kind (`by`) and each scheme there: the bits per weight of the whole group that are spent on it,
    which add up to the group's own (`group_bits`)."""
    weights: Counter[object] = Counter()
    bits: Counter[tuple[object, str]] = Counter()
    shares: Counter[tuple[object, str]] = Counter()
    for row in plan_rows:
        weights[row[by]] += row["num_weights"]
        bits[row[by], row["scheme"]] += row["bits"] * row["num_weights"]
        shares[row[by], row["scheme"]] += row["num_weights"]
    whole: Counter[object] = Counter()
    for (group, _), number in bits.items():
        whole[group] += number
    return [
        {
            by: group,
            "scheme": scheme,
            "width": bits_of(scheme),
            "bits": number / weights[group],
            "share": shares[group, scheme] / weights[group],
            "group_bits": whole[group] / weights[group],
        }
        for (group, scheme), number in bits.items()
    ]


def suffering_of(alone: Sequence[Row], metric: str, ceiling: int | None, by: str) -> tuple[str | None, list[Row]]:
    """For each layer or kind: what compressing a weight there costs under one scheme, the rest of the model as it was,
    as a multiple of the mean over all weights. The scheme is that of fewest bits under which every component was
    measured or priced; None where there is none."""
    found: dict[str, dict[str, Row]] = {}
    for row in alone:
        if row.get(metric) is not None:
            found.setdefault(row["scheme"], {})[row["component"]] = row
    most = max(map(len, found.values()), default=0)
    schemes = [scheme for scheme, rows in found.items() if len(rows) == most]
    if not schemes:
        return None, []
    scheme = min(schemes, key=lambda s: (bits_of(s), s))
    rows = list(found[scheme].values())
    damages: defaultdict[object, float] = defaultdict(float)
    weights: Counter[object] = Counter()
    for row in rows:
        damages[row[by]] += damage(metric, row[metric], ceiling)
        weights[row[by]] += row["num_weights"]
    whole = sum(damages.values()) / sum(weights.values())
    if not whole > 0.0:
        return None, []
    return scheme, [{by: group, "times": damages[group] / weights[group] / whole} for group in damages]


def difference_of(plan_rows: Sequence[Row], summary: RunSummary) -> str | None:
    """How the plan differs from the uniform plan that it is held against, in a sentence; without one, from its own most
    used scheme."""
    named = (row["scheme"] for row in plan_rows if row["scheme"] not in (DENSE, DROP))
    schemes = Counter(scheme for scheme in named if parse_scheme(scheme).width is None)
    rival = next((row for row in summary.validation if row.label == summary.rival), None)
    uniform = schemes.most_common(1)[0][0] if schemes else None
    uniform = uniform if rival is None or rival.uniform_scheme is None else rival.uniform_scheme
    if uniform is None:
        return None
    schemes_there = uniform_parts(uniform)
    parts = [
        Part(
            layer=row["layer"],
            kind=row["kind"],
            scheme=row["scheme"],
            bits=row["bits"],
            uniform_bits=_uniform_bits(schemes_there, row),
        )
        for row in plan_rows
    ]
    return difference_from_uniform(parts, uniform)


def _uniform_bits(schemes: Sequence[Scheme], row: Row) -> float:
    """Bits per weight of a component's row under a uniform plan of these schemes, unquantized if none is for it."""
    is_cache = row["kind"] in CACHE_KINDS
    scheme = next((scheme for scheme in schemes if scheme.is_unquantized or scheme.is_of_cache == is_cache), None)
    if scheme is None:
        return float(row["dense_bits"])
    if scheme.is_source and row.get("source_bits"):
        return float(row["source_bits"] / row["num_weights"])
    return scheme.stored_bits((row["rows"], row["cols"]), row["dense_bits"]) / float(row["num_weights"])


def uses_of(record: RunRecord, summary: RunSummary, plan_rows: Sequence[Row], store_url: str) -> list[Row]:
    """Each export that can hold the final plan: its command, who loads it, the size of all searched components in MB,
    and whether that is the plan's own; then those that cannot, with the obstacle."""
    plan = summary.final_plan
    if plan is None or not plan.entries or not summary.components:
        return []
    dense_bits, scale_bits = plan_rows[0]["dense_bits"], scale_bits_of(record)
    chosen = [c for c in summary.components if plan.scheme_of(c.name) != DENSE]
    # What goes with a block is in no file.
    gone = sum(c.num_weights for c in chosen if c.name not in plan.schemes)
    compressed = sum(component.num_weights for component in chosen)
    rest = sum(row["num_weights"] for row in plan_rows) - compressed
    rows = []
    found = holders_of(plan, summary.components, dense_bits, scale_bits, summary.source_format)
    for holder, held in zip(HOLDERS, found, strict=True):
        if holder.export == "source" and not summary.source_format:
            continue
        size = None
        if held.bits_per_weight is not None:
            size = (held.bits_per_weight * (compressed - gone) + rest * dense_bits) / 8e6
        runtime = " --runtime vllm" if holder.engine == "vllm" else ""
        rows.append(
            {
                "loads": _loaded_by(holder.export, holder.engine),
                "command": _command(record.run, f"{holder.export}{runtime}", holder.export, store_url),
                "size_mb": size,
                "at_size": held.at_size,
                "obstacle": held.obstacle,
            }
        )
    return sorted(rows, key=_as_offered)


def _as_offered(row: Row) -> tuple[bool, bool, float]:
    """What is possible first, of that what is of the plan's size, of that the smallest."""
    return row["obstacle"] is not None, not row["at_size"], row["size_mb"] or 0.0


def _loaded_by(export: str, engine: str) -> str:
    if engine == "any":
        return "anything that loads a Hugging Face checkpoint"
    if export == "source":
        return engine
    return {"vllm": "vLLM"}.get(engine, f"{engine} with {export}")


def _command(run: str, to: str, name: str, store_url: str) -> str:
    out = shlex.quote(f"{run}-{name}")
    return f"dtmsearch export {shlex.quote(run)} --to {to} --out {out} --store {shlex.quote(store_url)}"


def recipe_command(run: str, store_url: str) -> str:
    """The export of the plan alone, which every plan allows."""
    return _command(run, "json", "recipe", store_url)
