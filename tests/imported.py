"""What processes of the tests have imported before they are forked. Loading this module is all that the fork server of
tests/processes.py does first.

Ray reads its environment when it is imported. So what is forked for it (tests/ray_forks.py) has all but Ray.
"""

import gc
import importlib
import os

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
    "prometheus_client",
    "pyarrow.parquet",
    "pydantic",
    "requests",
    "toy",
    "transformers.models.llama.modeling_llama",
    "dtmsearch.console.progress",
    "dtmsearch.model.replica.local_replicas",
)
_WITH_RAY = (
    "pytest",
    "ray",
    "dtmsearch.cluster.pool",
    "dtmsearch.workflows.run",
    "dtmsearch.workflows.evaluate",
)


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        importlib.import_module(name)
    # A fork neither visits nor copies what is here already when it collects garbage of its own.
    gc.collect()
    gc.freeze()


_import(_BEFORE_RAY)
if os.fork() == 0:
    ray_forks.serve()
_import(_WITH_RAY)
