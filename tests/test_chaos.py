"""A handful of real kills in a real cluster of two nodes; `benchmarks/chaos.py` does hundreds.

As a script, this is that program where processes of Ray are forks (see ray_forks.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from processes import PATIENCE_SECONDS, Ended, below, ended, forking_python

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.timeout(2 * PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def disturbed() -> Ended:
    options = "--kills 3 --seed 4 --layers 2 --seconds 0.03 --evaluations 10 --pause 0.1"
    return ended([forking_python(), __file__, *options.split(), "--faults", "driver,replica,worker,lie"])


def test_a_search_amid_kills_comes_to_the_undisturbed_plan(disturbed: Ended) -> None:
    assert "searches that did not: 0" in disturbed.out, disturbed.err


def test_nothing_recorded_is_lost_or_changed_by_kills(disturbed: Ended) -> None:
    assert "lost: 0; changed: 0" in disturbed.out, disturbed.err


def test_evaluations_amid_kills_and_lies_have_the_undisturbed_values(disturbed: Ended) -> None:
    assert "evaluations with other values than undisturbed: 0" in disturbed.out, disturbed.err


if __name__ == "__main__":
    sys.path.insert(0, str(BENCHMARKS))
    from chaos import main
    from chaos_machines import Machines

    Machines.replicas = lambda self: below(os.getpid(), "ray::_Host")  # type: ignore[method-assign]
    main()
