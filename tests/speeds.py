"""The tests that find something at work and stop or kill it, as on machines of other speeds:

    python tests/speeds.py [SPEED ...]

runs them once at each speed (0.25, 4 and inf unless told), in parts of this machine's; see tests/gate.py. They are
those of the files that have a gate. Ends with 0 where all passed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from gate import SPEED_VARIABLE

HERE = Path(__file__).parent
SPEEDS = ("0.25", "4", "inf")


def gated_files() -> list[Path]:
    """The files of tests that hold what they test by a `Gate`."""
    return [path for path in sorted(HERE.glob("test_*.py")) if re.search(r"^from gate import", path.read_text(), re.M)]


def main(speeds: tuple[str, ...]) -> int:
    files = [str(path) for path in gated_files()]
    failed = []
    for speed in speeds:
        began = time.monotonic()
        environment = os.environ | {SPEED_VARIABLE: speed}
        # At a quarter of the speed a test may take four times as long.
        command = [sys.executable, "-m", "pytest", "-q", "--timeout=2400", *files]
        code = subprocess.run(command, env=environment, check=False).returncode
        said = "passed" if code == 0 else "FAILED"
        sys.stdout.write(f"speed {speed}: {said} in {time.monotonic() - began:.0f} s\n")
        sys.stdout.flush()
        failed += [speed] if code else []
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:]) or SPEEDS))
