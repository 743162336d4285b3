"""Python's collector of garbage, told to wait while very much is made that stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within, no garbage is looked for: imports of torch and transformers make a million objects that all stay, and
    looking through them again and again takes a sixth of the imports' time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
