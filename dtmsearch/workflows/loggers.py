"""Where the numbers of a search go beside its store: TensorBoard, MLflow, Weights & Biases, behind one interface.

Off unless asked for. A session that goes on with a run logs all of it, decisions of earlier sessions first; one that
finds it finished logs nothing, and what stands in a log stays. The store remains the record: what a logger cannot take
is said once, and the search goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from dtmsearch.analysis.summary import RunSummary
from dtmsearch.config import SearchFile
from dtmsearch.errors import SearchStopped, UserError
from dtmsearch.search.protocols import Decision, Observer, Progress, tell_stage

# Seconds between two values of how fast a search is.
_PACE_SECONDS = 5.0
_PROJECT = "dtmsearch"
_TENSORBOARD_FOLDER = "tensorboard"
_MLFLOW_ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# The longest value of a parameter that MLflow takes.
_MOST_LETTERS = 500


class Logger(Protocol):
    """Takes what a run comes to. Values have names like `decisions/kl`; those of one name have rising steps."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def finish(self, values: Mapping[str, float], status: str) -> None:
        """The last call: `finished` with the plan's held-out values, `stopped` or `failed` without."""


class LoggerType(Protocol):
    """Opens a logger (run, keys of the search file, where). `library` is what it needs."""

    library: str

    def __call__(self, run: str, keys: Mapping[str, str], where: str) -> Logger: ...


class _TensorBoard:
    """Event files in `where`/RUN, by tensorboardX, which Ray's Tune brings."""

    library = "tensorboardX"

    def __init__(self, run: str, keys: Mapping[str, str], where: str) -> None:
        # What an earlier session wrote of the run is written again.
        self._writer = _library(self.library).SummaryWriter(f"{where or _TENSORBOARD_FOLDER}/{run}", purge_step=0)
        self._writer.add_text("search file", "\n".join(f"    {key}: {value}" for key, value in keys.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, values: Mapping[str, float], status: str) -> None:
        self.log(values, 0)
        self._writer.add_text("status", status)
        self._writer.close()


class _MLflow:
    """A run of the experiment `dtmsearch`; `where` is a tracking URI, otherwise MLflow's own setting."""

    library = "mlflow.tracking"

    def __init__(self, run: str, keys: Mapping[str, str], where: str) -> None:
        tracking = _library(self.library)
        self._client = tracking.MlflowClient(tracking_uri=where or None)
        found = self._client.get_experiment_by_name(_PROJECT)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(_PROJECT)
        self._id = self._client.create_run(experiment, run_name=run).info.run_id
        for key, value in keys.items():
            self._client.log_param(self._id, key, value[:_MOST_LETTERS])

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def finish(self, values: Mapping[str, float], status: str) -> None:
        self.log(values, 0)
        self._client.set_terminated(self._id, _MLFLOW_ENDS[status])


class _WeightsAndBiases:
    """A run of the project `where`, otherwise `dtmsearch`."""

    library = "wandb"

    def __init__(self, run: str, keys: Mapping[str, str], where: str) -> None:
        self._run = _library(self.library).init(project=where or _PROJECT, name=run, config=dict(keys))
        # Names of one kind share a count of steps of their own.
        for kind in ("decisions", "pace"):
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        kinds = {name.partition("/")[0] for name in values}
        self._run.log({**values, **{f"{kind}/step": step for kind in kinds}})

    def finish(self, values: Mapping[str, float], status: str) -> None:
        self._run.summary.update({**values, "status": status})
        self._run.finish(exit_code=int(status == "failed"))


LOGGERS: Mapping[str, LoggerType] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _WeightsAndBiases,
}


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(
            f"this log needs {package}, which cannot be imported here ({error}): pip install {package}"
        ) from None


class Logged:
    """An observer behind which loggers hear of a search too. Each is opened (`openings`) when there is something to
    log."""

    def __init__(self, observer: Observer, openings: Mapping[str, Callable[[], Logger]]) -> None:
        self._observer, self._openings = observer, dict(openings)
        self._loggers: dict[str, Logger] = {}
        self._paced_at = -_PACE_SECONDS

    def on_progress(self, progress: Progress) -> None:
        self._observer.on_progress(progress)
        if monotonic() - self._paced_at >= _PACE_SECONDS:
            self._paced_at = monotonic()
            pace = {"evaluations_per_second": progress.evaluations_per_second, "in_flight": progress.in_flight}
            self._tell(lambda logger: logger.log({f"pace/{name}": v for name, v in pace.items()}, progress.evaluations))

    def on_decision(self, decision: Decision, replayed: bool) -> None:
        self._observer.on_decision(decision, replayed)
        size = {"bits_per_weight": decision.size.bits_per_weight, "share": decision.size.share}
        values = decision.summary.metrics | size | {"components": decision.size.num_compressed}
        named = {f"decisions/{name}": float(value) for name, value in values.items() if value is not None}
        self._tell(lambda logger: logger.log(named, decision.step))

    def on_note(self, text: str) -> None:
        self._observer.on_note(text)

    def on_stage(self, text: str, done: str = "") -> None:
        tell_stage(self._observer, text, done)

    def finish(self, summary: RunSummary | None, status: str) -> None:
        """The end of a session. Of a run that was finished already nothing is logged."""
        if not self._loggers:
            return
        plan = None if summary is None else next((row for row in summary.validation if row.label == "plan"), None)
        values: dict[str, float] = {}
        if plan is not None and plan.summary is not None:
            values = {f"held_out/{name}": float(v) for name, v in plan.summary.metrics.items() if v is not None}
            values["held_out/bits_per_weight"] = plan.bits_per_weight
        self._tell(lambda logger: logger.finish(values, status))

    def _tell(self, what: Callable[[Logger], None]) -> None:
        for name, opening in list(self._openings.items()):
            try:
                if name not in self._loggers:
                    self._loggers[name] = opening()
                what(self._loggers[name])
            except Exception as error:  # a library's, a disk's, a network's: a search does not end for it
                del self._openings[name]
                self._loggers.pop(name, None)
                self._observer.on_note(f"nothing more is logged to {name}: {type(error).__name__}: {error}")


@contextmanager
def logged_to(names: Sequence[str], file: SearchFile | None, observer: Observer) -> Iterator[tuple[Observer, Any]]:
    """An observer that logs to `names`, each `NAME` or `NAME:WHERE`, and what is to be told the run's summary at its
    end. Without names the observer itself, and no file is needed. Raises `UserError` for one that is unknown or whose
    library is missing."""
    if not names:
        yield observer, lambda summary: None
        return
    assert file is not None, "whoever names loggers gives the search file"
    check_loggers(names)
    keys = _flat(file.model_dump(mode="json", exclude_none=True))
    logged = Logged(observer, {name: _opening(name, file.run, keys) for name in names})
    ended: list[RunSummary] = []
    try:
        yield logged, ended.append
    except (SearchStopped, KeyboardInterrupt):
        logged.finish(None, "stopped")
        raise
    except BaseException:
        logged.finish(None, "failed")
        raise
    logged.finish(ended[0] if ended else None, "finished")


def check_loggers(names: Sequence[str]) -> None:
    """Raises `UserError` for a log that is unknown, or whose library is missing here."""
    for name in names:
        kind = name.partition(":")[0]
        if kind not in LOGGERS:
            raise UserError(f"--log-to: got {name!r}; {', '.join(LOGGERS)} are known, each alone or with :WHERE")
        _library(LOGGERS[kind].library)


def in_any_folder(names: Sequence[str]) -> tuple[str, ...]:
    """The same logs for a process that works in another folder: `tensorboard` with its whole path. Raises `UserError`
    as `check_loggers` does."""
    check_loggers(names)
    parts = [(kind, where or _TENSORBOARD_FOLDER) for kind, _, where in (name.partition(":") for name in names)]
    whole = {where: where if "://" in where else str(Path(where).expanduser().absolute()) for _, where in parts}
    return tuple(
        f"{kind}:{whole[where]}" if kind == "tensorboard" else name
        for name, (kind, where) in zip(names, parts, strict=True)
    )


def _opening(name: str, run: str, keys: Mapping[str, str]) -> Callable[[], Logger]:
    kind, _, where = name.partition(":")
    return partial(LOGGERS[kind], run, keys, where)


def _flat(section: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """The keys of a search file as `--set` takes them, with their values as text."""
    found: dict[str, str] = {}
    for key, value in section.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": str(value)}
    return found
