"""A metric's value as a person reads it: its name, digits that say something, its unit."""

from __future__ import annotations

from dtmsearch.analysis.format import number
from dtmsearch.core.metric_registry import METRICS, Metric
from dtmsearch.errors import UserError

# Below this, decimals that are always the same would show too few digits.
_SMALL = 0.1


def _known(name: str) -> Metric | None:
    """None for a metric of a package that is not installed here, which a store may well hold values of."""
    try:
        return METRICS[name]
    except UserError:
        return None


def metric_value(name: str, value: float, with_unit: bool = False) -> str:
    """`KL 0.03351`, `FDT 41.2`; with its unit `KL 0.03351 nats per token`."""
    found = _known(name)
    if found is None:
        return f"{name} {number(value)}"
    unit = f" {found.unit}" if with_unit and found.unit else ""
    return f"{found.title or name} {metric_number(name, value)}{unit}"


def metric_number(name: str, value: float) -> str:
    """The value alone."""
    found = _known(name)
    fits = found is not None and (value == 0 or abs(value) >= _SMALL)
    return format(value, found.digits) if found is not None and fits else number(value)
