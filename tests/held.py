"""A replica that stops for good in the middle of a pass, so that a test can kill it there."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from dtmsearch.core.evaluation import EvalRequest, Outcome
from dtmsearch.model.replica.replica import Replica

# Beside the model: the process that stopped. Where it is there, others go on.
HELD_FILE = "held"


class Held(Replica):
    """Stops before the second layer of its first evaluations."""

    def evaluate(self, requests: Sequence[EvalRequest]) -> list[Outcome]:
        place = Path(self._spec.path) / HELD_FILE
        if not place.exists():
            self._body._real[1].register_forward_pre_hook(lambda *_: _hold(place))
        return super().evaluate(requests)


def _hold(place: Path) -> None:
    (place.parent / "held.new").write_text(str(os.getpid()))
    (place.parent / "held.new").rename(place)
    while True:
        time.sleep(1.0)
