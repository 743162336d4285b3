"""What a search tells Ray's metrics, from where Prometheus and the dashboard have it; every one bears the run's name.

Knows outcomes and numbers, nothing of how they come about.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Sequence

from ray.util import metrics

from dtmsearch.core.evaluation import EvalFailure, Outcome

_RUN = ("run",)


class Metrics:
    """The counters and gauges of one driver. Ray must have been joined."""

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._evaluations = metrics.Counter(
            "dtmsearch_evaluations", "Evaluations answered, by status: ok, or the kind of failure.", (*_RUN, "status")
        )
        self._tokens = metrics.Counter("dtmsearch_tokens", "Tokens that evaluations computed.", _RUN)
        self._lost = metrics.Counter("dtmsearch_replicas_lost", "Replicas that died, hung or were dismissed.", _RUN)
        self._replicas = metrics.Gauge(
            "dtmsearch_replicas", "Replicas by state: busy, idle, or starting.", (*_RUN, "state")
        )
        self._utilisation = metrics.Gauge("dtmsearch_replica_utilisation", "Busy share of the replicas at work.", _RUN)
        self._best_fdt = metrics.Gauge("dtmsearch_best_fdt", "Mean FDT of the last decision's plan.", _RUN)
        self._bits = metrics.Gauge("dtmsearch_bits_per_weight", "Bits per weight of the last decision's plan.", _RUN)

    def answered(self, outcomes: Sequence[Outcome]) -> None:
        statuses = Tally(o.kind if isinstance(o, EvalFailure) else "ok" for o in outcomes)
        for status, number in statuses.items():
            self._evaluations.inc(number, self._run | {"status": status})
        tokens = sum(outcome.provenance.tokens for outcome in outcomes)
        if tokens:
            self._tokens.inc(tokens, self._run)

    def lost(self) -> None:
        self._lost.inc(1, self._run)

    def replicas(self, busy: int, idle: int, starting: int) -> None:
        for state, number in (("busy", busy), ("idle", idle), ("starting", starting)):
            self._replicas.set(number, self._run | {"state": state})
        if busy + idle:
            self._utilisation.set(busy / (busy + idle), self._run)

    def decided(self, fdt: float, bits_per_weight: float) -> None:
        self._best_fdt.set(fdt, self._run)
        self._bits.set(bits_per_weight, self._run)
