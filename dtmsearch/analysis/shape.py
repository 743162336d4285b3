"""What a plan takes out of a model's shape, in words."""

from __future__ import annotations

from collections.abc import Sequence

from dtmsearch.core.components import BLOCK_KINDS, Component, blocks_of
from dtmsearch.core.plan import Plan, plan_size
from dtmsearch.core.plan_widths import widths_left


def shape_sentence(plan: Plan, components: Sequence[Component]) -> str | None:
    """Which blocks of which layers a plan drops and cuts, and what share of the weights of `components`, a model's
    matrices, is left; None where it does neither."""
    matrices = [component for component in components if not component.is_cache and component.layer_name]
    known = blocks_of(matrices)
    parts = [block for block in known if block.kind != "layer"]
    gone = [block for block in parts if plan.drops(block.name)]
    layers = [b for b in known if b.kind == "layer" and all(plan.drops(c.name) for c in matrices if c.layer == b.layer)]
    whole = {block.layer for block in layers}
    if not gone and not layers and not plan.widths:
        return None
    left = f"{plan_size(plan, matrices, 16).parameters:.1%} of the weights left"
    cut = [
        f"{kind} left in layers: {', '.join(f'{layer} {own}/{whole}' for layer, (own, whole) in sorted(found.items()))}"
        for kind, found in sorted(widths_left(plan, matrices).items())
    ]
    if not gone and not layers:
        return "; ".join([*cut, left])
    said = [f"layers {_listed(sorted(whole))}"] if whole else []
    for kind in BLOCK_KINDS[:2]:
        single = sorted(block.layer for block in gone if block.kind == kind and block.layer not in whole)
        said += [f"{kind} of {_listed(single)}"] if single else []
    of_blocks = f"{len(gone)} of {len(parts)} blocks dropped" if parts else f"{len(layers)} layers dropped"
    return "; ".join([f"{of_blocks}: {', '.join(said)}", *cut, left])


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
