"""The model card of an exported folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dtmsearch.core.plan import Plan, PlanSize


@dataclass(frozen=True)
class Card:
    """What a card tells. `files`: name -> bytes. `measured` has a line for each metric or says why there is none;
    `recorded` names what it was measured against, for programs: run, reference, weights."""

    base_model: str
    format_name: str
    loads: str
    plan: Plan
    size: PlanSize
    files: Mapping[str, int]
    measured: Sequence[str]
    notes: Sequence[str]
    command: str
    version: str
    recorded: Mapping[str, str] = field(default_factory=dict)


def card_text(card: Card) -> str:
    """The README.md of an exported folder, with the front matter that model hubs read."""
    counts = Counter(scheme for _, scheme in card.plan.entries).most_common()
    schemes = [f"| `{scheme}` | {number} |" for scheme, number in counts]
    size = card.size
    active = f", {size.active_bits_per_weight:.3f} of those that a token reads" if size.is_of_mixture else ""
    lines = [
        "---",
        f"base_model: {card.base_model}",
        "library_name: transformers",
        "tags: [dtmsearch, compressed]",
        *_front(card),
        "---",
        "",
        f"# {card.base_model.rstrip('/').rpartition('/')[2]}, compressed",
        "",
        f"Made from `{card.base_model}` by dtmsearch {card.version}.",
        f"Format `{card.format_name}`, loaded by {card.loads}.",
        "",
        "## Plan",
        "",
        f"{size.num_compressed} components compressed, {size.share:.1%} of the searched weights, "
        f"{size.bits_per_weight:.3f} bits per weight{active}; plan `{card.plan.id}`.",
        "",
        "| scheme | components |",
        "|---|---|",
        *schemes,
        "",
        "## Measured",
        "",
        *[f"- {line}" for line in card.measured],
        "",
        "## Size",
        "",
        "| file | bytes |",
        "|---|---|",
        *[f"| `{name}` | {number:,} |" for name, number in card.files.items()],
        f"| all | {sum(card.files.values()):,} |",
        *(["", "## Notes", "", *[f"- {note}" for note in card.notes]] if card.notes else []),
        "",
        "## Made with",
        "",
        "```",
        card.command,
        "```",
    ]
    return "\n".join(lines) + "\n"


def _front(card: Card) -> list[str]:
    """What a program finds the plan's measurement by."""
    lines = [f"  {name}: {json.dumps(value)}" for name, value in {"plan": card.plan.id, **card.recorded}.items()]
    return ["dtmsearch:", *lines]
