"""Small searches over the toy model whose whole trees are kept as JSON in `golden/`.

After a change that is meant to change them, `python tests/golden_trees.py` writes them again: read the difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fakes import MemoryLog, readable_tree, request_for, run_search, toy_components

from dtmsearch.core.plan import Budget
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.search.protocols import Strategy
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.probe import Probe
from dtmsearch.search.strategies.task import Task

FOLDER = Path(__file__).parent / "golden"


def beam_to_bits() -> Strategy:
    space = SearchSpace(
        toy_components(), ("int8-channel", "int4-g32"), (("q", "k"),), budget=Budget(bits_per_weight=7.0)
    )
    return Beam(Task(space, request_for, "kl"), TreeSettings(width=2))


CASES: dict[str, Callable[[], Strategy]] = {
    "greedy": lambda: Beam(Task(SearchSpace(toy_components(), ("nf4",)), request_for), TreeSettings(width=1)),
    "beam": lambda: Beam(
        Task(SearchSpace(toy_components(), ("int8-channel", "int4-channel"), budget=Budget(share=0.6)), request_for),
        TreeSettings(width=2),
    ),
    "beam-expand": lambda: Beam(
        Task(SearchSpace(toy_components(), ("int4-channel",)), request_for, "dppl"), TreeSettings(width=2, expand=2)
    ),
    "beam-tied-bits": beam_to_bits,
    "probe": lambda: Probe(Task(SearchSpace(toy_components(), ("int8-channel", "int4-channel")), request_for, "sdt")),
}


def tree(name: str) -> str:
    log, strategy = MemoryLog(), CASES[name]()
    plan = run_search(strategy, log=log)
    best = None if plan is None else dict(plan.entries)
    return json.dumps(readable_tree(log) | {"best": best}, indent=2) + "\n"


if __name__ == "__main__":
    for case in CASES:
        (FOLDER / f"{case}.json").write_text(tree(case))
