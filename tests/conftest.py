"""Kinds of tests, by what their modules import, so that `pytest -m "unit or model"` needs no list to be kept.

A test that starts processes by the package, without importing what starts them, says `pytest.mark.process` itself.
"""

import contextlib
import gc
import importlib
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings
from kinds_picture import picture

# A loaded machine is no failure, and a test that fails in one run fails in the next.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# In the background, and under `nohup`, signals would be ignored here and in every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A Ray of the tests starts no worker that nobody has asked for: each takes a second of CPU time.
os.environ |= {"RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0"}
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # what a process of the tests has read when it imported Ray, all have
# Ray's agents end with the pipe that they have from their raylet: they may be no children of it (see ray_forks.py).
os.environ |= {"RAY_enable_pipe_based_agent_to_parent_health_check": "1"}
# Workers of pytest share the CPUs: threads of torch that wait for each other spinning would take them from the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Stores sync every commit: on a disk a test waits milliseconds for each, in memory none. What a kill of a process
# leaves is the same in both. Folders are there during a run only (`tmp_path_retention_policy`), some 400 MB.
_MEMORY = Path("/dev/shm")
if os.access(_MEMORY, os.W_OK) and min(shutil.disk_usage(_MEMORY).free, psutil.virtual_memory().available) > 6 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

# The first kind whose modules a test's module, or a helper module of the tests that it imports, has loaded.
KINDS = {
    "browser": {"selenium"},
    "cluster": {"ray"},
    "process": {"processes", "subprocess", "multiprocessing", "moto"},  # moto: an S3 server over HTTP
    "model": {"torch", "transformers", "tiny", "inprocess"},
}
_HERE = Path(__file__).parent
_BEGAN = time.monotonic()


def kind_of(module: object) -> str:
    """The costliest kind of thing that a test's module uses."""
    used = _used(module)
    return next((kind for kind, names in KINDS.items() if used & names), "unit")


def _used(module: object) -> set[str]:
    names: set[str] = set()
    for value in vars(module).values():
        name = getattr(value, "__module__", None) or getattr(value, "__name__", "")
        root = name.partition(".")[0] if isinstance(name, str) else ""
        names.add(root)
        helper = sys.modules.get(root)
        if helper is not None and root != getattr(module, "__name__", "") and _is_ours(helper):
            names |= {r for r in _used(helper) if r in set.union(*KINDS.values())}
    return names


def _is_ours(module: object) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).parent == _HERE and not Path(file).name.startswith(("test_", "conftest"))


def pytest_collection(session: pytest.Session) -> None:
    """Of two workers that collect all files the second begins with the last: what one has compiled, the other reads."""
    if os.environ.get("PYTEST_XDIST_WORKER") != "gw1" or session.config.args != session.config.getini("testpaths"):
        return
    for path in sorted(_HERE.glob("test_*.py"), reverse=True):
        with contextlib.suppress(Exception, pytest.skip.Exception):  # said when it is collected
            importlib.import_module(path.stem)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `covering` marks do, mark kinds, and put the costly ones first: no worker begins a long file when
    the others are done."""
    if not config.getoption("all_cases"):
        items[:] = [item for item in items if _is_covering(item)]
    found: dict[object, str] = {None: "unit"}
    for item in items:
        module = getattr(item, "module", None)
        if module not in found:
            found[module] = kind_of(module)
        if module is not None and not any(item.get_closest_marker(kind) for kind in KINDS):
            item.add_marker(getattr(pytest.mark, found[module]))
    costly_first = ("cluster", "process", "browser", "model", "unit")
    items.sort(key=lambda item: costly_first.index(found[getattr(item, "module", None)]))


def _is_covering(item: pytest.Item) -> bool:
    """Whether a case of a product of cases is one of those that hold every value, and every pair that matters."""
    mark, call = item.get_closest_marker("covering"), getattr(item, "callspec", None)
    return mark is None or call is None or bool(mark.args[0](**call.params))


def pytest_collection_finish() -> None:
    """What torch, transformers and Ray hold stays until the end, with the garbage beside it: without it a full
    collection, which some tests ask for at every step, takes milliseconds instead of a second."""
    gc.freeze()
    gc.set_threshold(5_000)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """What a file's tests have imported stays, too."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture
def quick_collections() -> None:
    """The same for what earlier tests have made: for a test in which garbage is collected at every step."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-cases", action="store_true", help="whole products of cases; a part holds each value at least once"
    )
    parser.addoption("--kinds", metavar="FILE", help="draw the seconds of each kind of test into FILE (SVG)")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests of each kind there were, and how long they took, fixtures included."""
    reports = [report for found in terminalreporter.stats.values() for report in found if hasattr(report, "duration")]
    seconds: Counter[str] = Counter()
    tests: dict[str, set[str]] = {}
    for report in reports:
        kind = next((kind for kind in (*KINDS, "unit") if kind in report.keywords), "unit")
        seconds[kind] += report.duration
        tests.setdefault(kind, set()).add(report.nodeid)
    terminalreporter.section("seconds by kind")
    for kind, spent in seconds.most_common():
        terminalreporter.write_line(f"{spent:8.1f} s in {len(tests[kind]):5d} tests  {kind}")
    if file := terminalreporter.config.getoption("kinds"):
        minutes, workers = (time.monotonic() - _BEGAN) / 60, terminalreporter.config.getoption("numprocesses") or 1
        said = f"{time.strftime('%Y-%m-%d')}: {workers} workers on {os.cpu_count()} CPUs, {minutes:.1f} minutes"
        Path(file).write_text(picture(seconds, {kind: len(found) for kind, found in tests.items()}, said))
