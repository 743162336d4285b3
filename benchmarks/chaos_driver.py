"""The driver of a search for `chaos.py`: the real `run`, over replicas without a model.

    python chaos_driver.py FILE STORE ADDRESS REPLICAS

With `CHAOS_FAIL_EVERY=K` in the environment every K-th write to the store fails. Ends with the exit codes of the
command line.
"""

from __future__ import annotations

import errno
import importlib
import itertools
import os
import sys
import traceback
from pathlib import Path

from dtmsearch import config
from dtmsearch.cluster.health import Health
from dtmsearch.cluster.pool import ReplicaPool
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.config import SearchFile
from dtmsearch.errors import ClusterLost, ClusterUnreachable, RunLocked, SearchStopped, StoreError, StoreFull
from dtmsearch.search.protocols import Decision, Progress
from dtmsearch.store.files import LocalFolder

# By name: in the package itself `run` is the verb.
composed = importlib.import_module("dtmsearch.workflows.run")
HEALTH = Health(first_seconds=60.0, floor_seconds=3.0, canary_seconds=1.0)


class Notes:
    """An observer that writes down what is worth knowing."""

    def on_progress(self, progress: Progress) -> None: ...

    def on_decision(self, decision: Decision, replayed: bool) -> None: ...

    def on_note(self, text: str) -> None:
        print("note:", text, flush=True)


def fail_every(number: int) -> None:
    """Let every `number`-th write to a local store fail as a broken disk does."""
    write, calls = LocalFolder._write_synced, itertools.count(1)

    def sometimes(self: LocalFolder, path: Path, content: object) -> None:
        if next(calls) % number == 0:
            raise OSError(errno.EIO, "every so often this disk fails")
        write(self, path, content)  # type: ignore[arg-type]

    LocalFolder._write_synced = sometimes  # type: ignore[method-assign,assignment]


def faulty_pool(file: SearchFile, where: PoolSettings) -> ReplicaPool:
    return ReplicaPool(
        file.model_spec, where, Notes().on_note, replica_class="faulty:Faulty", health=HEALTH, run=file.run
    )


def main(file: str, store: str, address: str, replicas: str) -> int:
    if "CHAOS_FAIL_EVERY" in os.environ:
        fail_every(int(os.environ["CHAOS_FAIL_EVERY"]))
    try:
        # The undisturbed search guesses nothing, so that it has made all evaluations that are asked for and no more.
        calm = float((Path(os.environ["CHAOS_FOLDER"]) / "seconds").read_text()) == 0
        where = composed.Where(address=address, replicas=int(replicas), guess_from=99 if calm else 1)
        composed.run(config.load(file), store, where, Notes(), faulty_pool)
    except (SearchStopped, StoreFull, ClusterLost) as stopped:
        print("stopped:", stopped)
        return 3
    except (RunLocked, StoreError) as refused:
        print("store:", refused)
        return 4
    except ClusterUnreachable as unreachable:
        print("cluster:", unreachable)
        return 5
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a cluster that has died would keep the interpreter from ending
