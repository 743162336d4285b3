"""Where AutoRound is: in this environment, or in one of its own, whose Python `DTMSEARCH_AUTOROUND` names."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from dtmsearch.errors import LibraryMissing, UserError

VARIABLE = "DTMSEARCH_AUTOROUND"
# Of matrices that it tunes: their sides are multiples of it, others it leaves as they are.
MULTIPLE = 32
_ASKED = "import importlib.metadata as m; print('release:', m.version('auto-round'))"


def python() -> str:
    """The Python that has it. Raises `LibraryMissing` where none does."""
    named = _named()
    if not _release(named):
        where = f"{VARIABLE}: {named} has none" if named else "it is not installed here"
        raise LibraryMissing(
            f"autoround- schemes are computed by AutoRound, and {where}: pip install auto-round, or name the Python of "
            f"an environment that has it by {VARIABLE}"
        )
    return named or sys.executable


def build() -> str:
    """Which release is found here; empty where there is none."""
    return _release(_named())


def _named() -> str:
    """The Python that the variable names, as it is started from any folder. What a link of an environment names is
    another environment's, so links stay."""
    named = os.environ.get(VARIABLE, "")
    return str(Path(named).expanduser().absolute()) if os.sep in named else named


@lru_cache(maxsize=8)
def _release(named: str) -> str:
    """Of the Python `named`, of this one where it is empty."""
    if not named and importlib.util.find_spec("auto_round") is None:
        return ""
    command, scratch = [named or sys.executable, "-c", _ASKED], tempfile.gettempdir()
    environment = {k: v for k, v in os.environ.items() if not named or k != "PYTHONPATH"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=scratch)  # noqa: S603
    except OSError as error:
        raise UserError(f"{VARIABLE}: {named} cannot be run ({error.strerror})") from None
    return f"AutoRound {done.stdout.split()[-1]}" if done.stdout.startswith("release:") else ""
