"""What processes of the tests have imported before they are forked (tests/ray_forks.py).

    python imported.py FOLDER PID

forks for those who ask in that folder, for as long as that process lives.
"""

import contextlib
import gc
import importlib
import pkgutil
import sys
from pathlib import Path

import ray_forks

_BEFORE_RAY = (
    "aiohttp",
    "colorful",
    "fsspec",
    "google.protobuf.json_format",
    "grpc.aio",
    "jsonschema",
    "msgpack",
    "opencensus.stats.stats",
    "opentelemetry.sdk.metrics",
    "pandas",
    "processes",
    "pdb",
    "prometheus_client",
    "pyarrow.parquet",
    "pydantic",
    "pytest",
    "requests",
    "toy",
    "transformers.models.llama.modeling_llama",
    "dtmsearch.console.progress",
    "dtmsearch.model.replica.local_replicas",
    "dtmsearch.workflows.evaluate",
    "dtmsearch.workflows.run",
)
_WITH_RAY = ("ray", "dtmsearch.cluster.pool")
# What Ray's agents look through for their parts.
_OF_AGENTS = "ray.dashboard.modules"


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        importlib.import_module(name)
    # A fork neither visits nor copies what is here already when it collects garbage of its own.
    gc.collect()
    gc.freeze()


def _import_ray(with_agents: bool) -> None:
    _import(_WITH_RAY)
    if with_agents:
        parts = importlib.import_module(_OF_AGENTS)
        with contextlib.suppress(ImportError):  # then an agent imports them itself
            _import(tuple(found.name for found in pkgutil.walk_packages(parts.__path__, f"{_OF_AGENTS}.")))


if __name__ == "__main__":
    _import(_BEFORE_RAY)
    ray_forks.serve(Path(sys.argv[1]), int(sys.argv[2]), _import_ray)
