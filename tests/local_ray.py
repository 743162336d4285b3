"""A Ray on this machine for tests in this process."""

from __future__ import annotations

from typing import Any

import ray
from processes import fork_for_ray

from dtmsearch.cluster.ray_compat import timed_out_at_start

_ATTEMPTS = 4


def start_ray(**settings: Any) -> None:
    """Start one as `dtmsearch.cluster.connect` does. Ray gives up after 30 s, which a busy machine may need longer."""
    fork_for_ray()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, namespace="dtmsearch", **settings)
            return
        except Exception as error:
            ray.shutdown()
            if attempt == _ATTEMPTS or not timed_out_at_start(error):
                raise
