"""Many searches as one Ray Tune experiment: each trial is a whole search with its replicas reserved.

Nothing is kept in Tune: a sweep that is run again asks the store what is left. Knows runs, and not what they search.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from dtmsearch.cluster.connect import connect
from dtmsearch.cluster.placement import Share, alive_nodes, share_of
from dtmsearch.cluster.ray_compat import QUIET_TUNE
from dtmsearch.config import SearchFile, parse
from dtmsearch.core.pareto import Point, Race
from dtmsearch.errors import StoreError, UserError
from dtmsearch.search.protocols import Decision, Progress
from dtmsearch.workflows.loggers import in_any_folder, logged_to
from dtmsearch.workflows.run import DOMINATED, Where, is_left_out, open_store, run, stop

# A trial whose process is lost with its node is started again so often; what it had recorded is not measured again.
_MAX_LOST = 5


@dataclass(frozen=True)
class SweepOutcome:
    """How each of a sweep's runs stands at its end: run -> status, with the store's message where there is one."""

    statuses: dict[str, str]
    messages: dict[str, str]

    @property
    def is_complete(self) -> bool:
        return all(status in ("finished", "dominated") for status in self.statuses.values())


class _Reporter:
    """An observer of a search that is a trial: Tune hears of its decisions."""

    def on_progress(self, progress: Progress) -> None: ...

    def on_decision(self, decision: Decision, replayed: bool) -> None:
        size, fdt = decision.size.bits_per_weight, decision.summary.fdt_mean
        tune.report({"step": decision.step, "bits_per_weight": size, "fdt": fdt})

    def on_note(self, text: str) -> None:
        logging.getLogger(__name__).warning(text)


class StopDominated(FIFOScheduler):
    """Asks a dominated search to stop, which its driver then does between two evaluations, and writes down why."""

    def __init__(self, race: Race, groups: dict[str, str], store: str, on_note: Callable[[str], None]) -> None:
        super().__init__()
        self._race, self._groups, self._store, self._on_note = race, groups, store, on_note
        self._asked: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = trial.config["run"]
        if name not in self._asked and "fdt" in result:
            point = Point(result["bits_per_weight"], result["fdt"])
            winner = self._race.add(self._groups[name], name, point)
            if winner is not None:
                self._asked.add(name)
                self._on_note(f"{name} is stopped at {point.size:.2f} bits per weight: {winner} dominates it")
                try:
                    stop(name, self._store, DOMINATED + winner)
                except (ValueError, StoreError) as error:  # it may have ended meanwhile
                    self._on_note(f"{name} could not be stopped: {error}")
        return str(TrialScheduler.CONTINUE)


class _Notes(tune.Callback):
    """A line when a search starts and when it ends."""

    def __init__(self, on_note: Callable[[str], None]) -> None:
        self._on_note = on_note

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._on_note(f"{trial.config['run']}: started")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._on_note(f"{trial.config['run']}: ended")


def sweep(
    files: Sequence[SearchFile],
    store: str,
    where: Where = Where(),
    race: Race | None = None,
    on_note: Callable[[str], None] = logging.getLogger(__name__).warning,
    log_to: Sequence[str] = (),
) -> SweepOutcome:
    """Run searches side by side until none is left; those that the store calls finished or dominated are left out.

    `where.replicas` is the number of replicas of each search (one without it). With `race`, dominated searches are
    stopped. Each search logs to `log_to` as a single one does. Raises `UserError` when a search's replicas have no room
    on this machine and for a log that there is not, `ClusterUnreachable`.
    """
    store = store if "://" in store else str(Path(store).expanduser().absolute())
    results = open_store(store)
    log_to = in_any_folder(log_to)
    left = [file for file in files if not is_left_out(results, file.run)]
    on_note(f"{len(left)} of {len(files)} searches are left to run")
    if left:
        own_ray = connect(where.address)
        try:
            _run_trials(left, store, where, race, on_note, log_to)
        finally:
            if own_ray:
                ray.shutdown()
    return _outcome(files, store)


def _run_trials(
    files: Sequence[SearchFile],
    store: str,
    where: Where,
    race: Race | None,
    on_note: Callable[[str], None],
    log_to: Sequence[str],
) -> None:
    replicas = where.replicas or 1
    share = share_of(
        alive_nodes(), replicas, where.gpus_per_replica, where.cpus_per_replica or 1.0, where.nodes_per_replica
    )
    _check_room(share, replicas, where)
    inside = replace(
        where,
        address=None,
        replicas=replicas,
        gpus_per_replica=share.num_gpus,
        cpus_per_replica=share.num_cpus,
    )
    texts = {file.run: (file.to_yaml(), str(file.folder)) for file in files}

    def trial(config: dict[str, str]) -> None:
        text, folder = texts[config["run"]]
        try:
            file = parse(text, f"the search {config['run']}", Path(folder))
            with logged_to(log_to, file, _Reporter()) as (logged, ended):
                ended(run(file, store, inside, logged))
        except Exception as error:  # the store has it, as the run's status; another try would end the same way
            logging.getLogger(__name__).warning("%s: %s", config["run"], error)

    scheduler = None
    if race is not None:
        scheduler = StopDominated(race, {file.run: _group(file) for file in files}, store, on_note)
    os.environ.update(QUIET_TUNE)
    with tempfile.TemporaryDirectory(prefix="dtmsearch-sweep-") as folder:
        tune.Tuner(
            tune.with_resources(trial, tune.PlacementGroupFactory([{}] + [share.bundle] * replicas * share.num_nodes)),
            param_space={"run": tune.grid_search([file.run for file in files])},
            tune_config=tune.TuneConfig(scheduler=scheduler, num_samples=1),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=folder,
                verbose=0,
                callbacks=[_Notes(on_note)],
                failure_config=tune.FailureConfig(max_failures=_MAX_LOST),
            ),
        ).fit()


def _check_room(share: Share, replicas: int, where: Where) -> None:
    room = share.room(alive_nodes())
    if where.address is None and room < replicas:
        raise UserError(
            f"each search of the sweep asks for {replicas} replicas with {share}, but this machine has room for {room}"
        )


def _group(file: SearchFile) -> str:
    """Searches of one group can be compared step by step: one model on the same prompts."""
    return f"{file.model.model_dump_json()} {file.prompts.model_dump_json()} {file.folder}"


def _outcome(files: Sequence[SearchFile], store: str) -> SweepOutcome:
    results = open_store(store)
    statuses: dict[str, str] = {}
    messages: dict[str, str] = {}
    for file in files:
        record = results.run(file.run)
        statuses[file.run] = "not begun" if record is None else record.status
        if record is not None and record.message:
            messages[file.run] = record.message
        if is_left_out(results, file.run) and statuses[file.run] == "stopped":
            statuses[file.run] = "dominated"
    return SweepOutcome(statuses, messages)
