"""The store in a bucket: a real S3 server over HTTP, which at times refuses, rejects, or leaves a request hanging."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from contracts import ids, make_records, make_step
from fakes import FakeEvaluator, MemoryLog, request_for, run_search, toy_components
from moto.moto_server.werkzeug_app import create_backend_app
from pyarrow import fs
from test_store import opened, replayed
from werkzeug.serving import make_server

from dtmsearch.core.plan import Budget
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.errors import RunLocked, StoreError
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.task import Task
from dtmsearch.store import locks
from dtmsearch.store.files import open_folder
from dtmsearch.store.store import ResultStore

# boto3 inside the server asks Python for what the next release of Python will not have.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

Answer = Iterable[bytes]
Application = Callable[[dict[str, Any], Callable[..., Any]], Answer]


class Faulty:
    """An S3 server's application whose every `every`-th write goes wrong, in the way of `fault`. Heartbeats of leases,
    of which there are as many as there is time, are not counted."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self.fault: Callable[[Callable[..., Any]], Answer] | None = None
        self.every = 1
        self.of = ""
        self.writes = 0
        self.faults = 0
        self.released = threading.Event()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Answer:
        beat = f"/{locks.FOLDER}/" in environ["PATH_INFO"]
        is_counted = environ["REQUEST_METHOD"] == "PUT" and self.of in environ["PATH_INFO"] and not beat
        if self.fault is not None and is_counted:
            self.writes += 1
            if self.writes % self.every == 0:
                self.faults += 1
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                return self.fault(start)
        return self._application(environ, start)

    def goes_wrong(self, fault: Callable[[Callable[..., Any]], Answer] | None, every: int = 1, of: str = "") -> None:
        """Have writes `of` paths with that in them go wrong from now on."""
        self.fault, self.every, self.of, self.writes, self.faults = fault, every, of, 0, 0

    def hang(self, start: Callable[..., Any]) -> Answer:
        """Keep the client waiting for longer than it has patience."""
        self.goes_wrong(None)
        self.released.wait(60.0)
        start("500 Internal Server Error", [("Content-Length", "0")])
        return []


def refuse(start: Callable[..., Any]) -> Answer:
    """As S3 does when it is asked too much: the client is to try again."""
    start("503 Slow Down", [("Content-Length", "0")])
    return []


def reject(start: Callable[..., Any]) -> Answer:
    """An error that no client tries again."""
    body = b"<Error><Code>InvalidRequest</Code><Message>not today</Message></Error>"
    start("400 Bad Request", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


@contextmanager
def serving() -> Iterator[tuple[Faulty, int]]:
    """A server of buckets, all of which are in this process, and its port."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    faulty = Faulty(create_backend_app("s3"))
    running = make_server("127.0.0.1", 0, faulty, threaded=True)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield faulty, running.port
    faulty.released.set()
    running.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Faulty, int]]:
    with serving() as served:
        yield served


@pytest.fixture
def faulty(server: tuple[Faulty, int]) -> Iterator[Faulty]:
    yield server[0]
    server[0].goes_wrong(None)


_NUMBERS = itertools.count()


def bucket_at(port: int, patch: pytest.MonkeyPatch) -> str:
    """The URL of a store in a bucket of its own."""
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setattr(locks, "_BEAT_SECONDS", 0.2)
    options = f"endpoint_override=http://127.0.0.1:{port}&region=us-east-1&allow_bucket_creation=true"
    bucket = f"bucket-{next(_NUMBERS)}"
    fs.FileSystem.from_uri(f"s3://{bucket}?{options}")[0].create_dir(bucket)
    return f"s3://{bucket}/store?{options}"


@pytest.fixture
def url(server: tuple[Faulty, int], monkeypatch: pytest.MonkeyPatch) -> str:
    return bucket_at(server[1], monkeypatch)


_WRITE = """
import sys
from contracts import make_records
from stores import opened
from dtmsearch.store.store import ResultStore
with opened(ResultStore(sys.argv[1])) as writer:
    writer.append(make_records(1))
"""


@dataclass(frozen=True)
class Hung:
    """Another process that writes into a store of its own server, which leaves it hanging once."""

    process: Any
    url: str
    faulty: Faulty


@pytest.fixture(scope="module", autouse=True)
def hung(request: pytest.FixtureRequest) -> Iterator[Hung | None]:
    """Begun before the other tests of this file: a client waits for ten seconds before it tries again, and none other
    can be made in its process meanwhile."""
    if not any(item.name == "test_a_write_that_hangs_is_tried_again" for item in request.session.items):
        yield None
        return
    import subprocess  # at the top it would make processes of all tests here

    with serving() as (faulty, port), pytest.MonkeyPatch.context() as patch:
        url = bucket_at(port, patch)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(Path(__file__).parent), *sys.path))))
        faulty.goes_wrong(faulty.hang, of="/evaluations/")
        with subprocess.Popen([sys.executable, "-c", _WRITE, url], stderr=subprocess.PIPE, text=True) as process:
            yield Hung(process, url, faulty)
            process.kill()


def recorded_through(url: str, numbers: Iterable[int]) -> tuple[list[str], int]:
    """Record evaluations one by one, each again in a new session when it could not be: what was recorded, failures."""
    recorded: list[str] = []
    failures = 0
    waiting = list(numbers)
    while waiting:
        try:
            with opened(ResultStore(url)) as writer:
                while waiting:
                    (record,) = make_records(waiting[0])
                    writer.append([record])
                    recorded += ids([record])
                    waiting.pop(0)
        except StoreError:
            failures += 1
    return recorded, failures


def test_writes_that_the_server_refuses_now_and_then_are_tried_again(url: str, faulty: Faulty) -> None:
    faulty.goes_wrong(refuse, every=3)
    recorded, failures = recorded_through(url, range(3))
    assert (replayed(ResultStore(url)), failures, faulty.faults > 0) == (recorded, 0, True)


def test_nothing_recorded_is_lost_when_every_fifth_write_is_rejected(url: str, faulty: Faulty) -> None:
    faulty.goes_wrong(reject, every=5)
    recorded, failures = recorded_through(url, range(4))
    faulty.goes_wrong(None)
    assert (replayed(ResultStore(url)), failures > 0) == (recorded, True)


def test_a_search_through_rejected_writes_ends_with_the_undisturbed_plan(url: str, faulty: Faulty) -> None:
    def beam() -> Beam:
        return Beam(
            Task(SearchSpace(toy_components(), ("int4-channel",), budget=Budget(components=2)), request_for),
            TreeSettings(width=1),
        )

    undisturbed = MemoryLog()
    expected = run_search(beam(), FakeEvaluator(per_poll=8), undisturbed)
    faulty.goes_wrong(reject, every=4)
    found, evaluated = None, []
    while found is None:
        evaluator = FakeEvaluator(per_poll=8)
        try:
            with opened(ResultStore(url)) as writer:
                found = run_search(beam(), evaluator, writer)  # type: ignore[arg-type]
        except StoreError:
            evaluated.append(len(evaluator.evaluated))
    faulty.goes_wrong(None)
    recorded = set(replayed(ResultStore(url)))
    assert (found, recorded, len(evaluated) > 0) == (expected, {r.request.id for r in undisturbed.records}, True)


def test_a_rejected_write_says_which_store_and_why(url: str, faulty: Faulty) -> None:
    faulty.goes_wrong(reject)
    with pytest.raises(StoreError, match=r"cannot write store\.json in the store s3://.*not today"):
        ResultStore(url).create()


def test_a_bucket_remembers_evaluations_and_decisions_for_this_run_and_for_others(url: str) -> None:
    with opened(ResultStore(url), "one") as writer:
        writer.append(make_records(1, 2))
        writer.decide([make_step(0)])
    with opened(ResultStore(url), "one") as again, opened(ResultStore(url), "two") as other:
        found = other.recorded_elsewhere(ids(make_records(2, 3)))
        seen = (ids(list(again.replay())), list(again.decisions()), list(found))
    assert seen == (ids(make_records(1, 2)), [make_step(0)], ids(make_records(2)))


def test_a_second_driver_of_a_run_is_refused(url: str) -> None:
    with opened(ResultStore(url)), pytest.raises(RunLocked), opened(ResultStore(url)):
        pass


def test_credentials_in_the_url_are_not_said(server: tuple[Faulty, int]) -> None:
    with pytest.raises(StoreError) as error:
        ResultStore(f"s3://key:hush@bucket/store?endpoint_override=http://127.0.0.1:{server[1]}&region=us-east-1&x=y")
    assert "hush" not in str(error.value)


def test_a_google_bucket_s_url_makes_its_filesystem() -> None:
    folder = open_folder("gs://bucket/some/store?retry_limit_seconds=1")
    assert (folder.filesystem.type_name, folder.root) == ("gcs", "bucket/some/store")


@pytest.mark.process
def test_a_write_that_hangs_is_tried_again(hung: Hung) -> None:
    _, said = hung.process.communicate()
    assert (hung.process.returncode, hung.faulty.fault) == (0, None), said
    assert replayed(ResultStore(hung.url)) == ids(make_records(1))
