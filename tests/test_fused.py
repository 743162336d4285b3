"""What a runtime fuses is tied before the search, and found where a plan splits it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import toy_manifest

from dtmsearch.config import parse
from dtmsearch.core.components import Component
from dtmsearch.core.fusion import tied_plan, untied_groups
from dtmsearch.core.plan import Plan
from dtmsearch.workflows.build import space_of

FILE = """
run: mine
model: {path: some/model}
prompts: {files: [text.txt]}
search: {schemes: [int8-channel], fused: true, components: {include: %s}}
"""
LAYER = [Component(f"layers.0.{kind}_proj", 0, kind, (8, 8)) for kind in ("q", "k", "v", "o", "gate", "up", "down")]
SPLIT = Plan.of({"layers.0.q_proj": "int8-channel", "layers.0.k_proj": "int4-channel"})


def test_a_fused_search_changes_fused_components_together() -> None:
    manifest = toy_manifest()
    file = parse(FILE % '["*"]', "file", Path())
    kinds = {c.kind for c in manifest.components}
    together = max(len(p.components) for p in space_of(file, manifest).perturbations(Plan()))
    assert together == len({"q", "k", "v"} & kinds)


def test_a_fused_search_of_one_kind_has_nothing_to_tie() -> None:
    manifest = toy_manifest()
    kind = manifest.components[0].kind
    edges = space_of(parse(FILE % f"[{kind}]", "file", Path()), manifest).perturbations(Plan())
    assert {len(edge.components) for edge in edges} == {1}


def test_what_a_plan_splits_is_found() -> None:
    assert [[c.kind for c in group] for group in untied_groups(SPLIT, LAYER)] == [["q", "k", "v"]]


def test_a_group_under_one_scheme_is_tied() -> None:
    assert untied_groups(Plan.uniform(LAYER, "int4-channel"), LAYER) == []


@pytest.mark.parametrize(("widest", "scheme"), [(True, "dense"), (False, "int4-channel")])
def test_a_repair_takes_the_widest_or_the_narrowest_scheme_of_a_group(widest: bool, scheme: str) -> None:
    plan = tied_plan(SPLIT, untied_groups(SPLIT, LAYER), 16, widest)
    assert {plan.scheme_of(f"layers.0.{kind}_proj") for kind in "qkv"} == {scheme}
