"""A newcomer's first hour as a script: README's commands, a model of his own, two mistakes on the way, a report, and an
export that plain transformers loads and generates with.

`python tests/newcomer.py` plays it with the `dtmsearch` on the path, in an empty folder with an empty home;
`python tests/newcomer.py --fresh` installs this checkout into a virtual environment of its own first. Says what each
command took, and ends with 1 where the way is longer or slower than it may be, or a message says less than it should.
tests/test_newcomer.py plays the same in one process, over a tiny model.
"""

# ruff: noqa: T201 - a script says what it did

from __future__ import annotations

import argparse
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_COMMANDS, MOST_SECONDS = 9, 360.0
# What a message tells a person to do begins with one of these.
_ADVICE = re.compile(r"did you mean|give |the least is|--help|bring |use |choose ")


@dataclass(frozen=True)
class Said:
    """What a command ended with."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Its message, which is one line that says what to do."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.code == 2 and len(lines) == 1 and self.err.rstrip().endswith(lines[0]), self
        assert _ADVICE.search(lines[0]) and "Traceback" not in self.err, self
        return lines[0]


def _cpu_of_processes() -> float:
    """Seconds of CPU of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


Type = Callable[[str], Said]


@dataclass
class Newcomer:
    """Who types commands by `type_in`, in a `folder` with nothing but a `model` of his own."""

    type_in: Type
    folder: Path
    model: Path
    commands: list[tuple[str, float, float]] = field(default_factory=list)
    """What was typed, the seconds that it took, and those of CPU of processes."""

    def types(self, command: str) -> Said:
        started, used = time.monotonic(), _cpu_of_processes()
        said = self.type_in(command)
        self.commands.append((command, time.monotonic() - started, _cpu_of_processes() - used))
        return said

    def succeeds(self, command: str) -> Said:
        said = self.types(command)
        assert said.code == 0, (command, said)
        return said

    def edits(self, old: str, new: str) -> None:
        file = self.folder / "search.yaml"
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1, (old, text)
        file.write_text(text.replace(old, new), encoding="utf-8")


def play(newcomer: Newcomer, with_demo: bool, smaller: tuple[tuple[str, str], ...] = ()) -> Path:
    """The whole way; the folder of the export. `smaller` are edits of the search file that make it quicker."""
    if with_demo:
        said = newcomer.succeeds("dtmsearch demo")
        assert "better than the best uniform plan" in said.out and "dtmsearch init" in said.out, said
    newcomer.succeeds(f"dtmsearch init {newcomer.model} --out search.yaml")
    for old, new in smaller:
        newcomer.edits(old, new)
    newcomer.edits("  rank_by:", "  rank_bye:")
    assert "'search.rank_by'" in newcomer.types("dtmsearch validate search.yaml").error
    newcomer.edits("  rank_bye:", "  rank_by:")
    newcomer.edits("bits_per_weight: 4.5", "bits_per_weight: 1.5")
    assert "bits_per_weight: 1.5 is out of reach" in newcomer.types("dtmsearch run search.yaml --in-process").error
    newcomer.edits("bits_per_weight: 1.5", "bits_per_weight: 4.5")
    said = newcomer.succeeds("dtmsearch run search.yaml --in-process")
    run = re.search(r"^run (\S+): finished", said.out, re.MULTILINE)
    assert run is not None, said
    verdict = newcomer.succeeds(f"dtmsearch status {run[1]}").out.strip().splitlines()[-1]
    assert re.match(r"On \d+ held-out prompts the plan \(", verdict), verdict
    newcomer.succeeds(f"dtmsearch report {run[1]}")
    assert (newcomer.folder / f"{run[1]}.html").is_file()
    export = newcomer.succeeds(f"dtmsearch export {run[1]} --to compressed-tensors --out mine")
    assert "as recorded" in export.out, export
    assert len(newcomer.commands) <= MOST_COMMANDS, newcomer.commands
    return newcomer.folder / "mine"


def write_texts(folder: Path) -> None:
    """Two texts that every Python comes with."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for name, modules in (("calibration", ("argparse", "difflib")), ("validation", ("inspect", "tarfile"))):
        text = "\n".join((library / f"{module}.py").read_text(encoding="utf-8") for module in modules)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def generated(python: str, folder: Path) -> str:
    """What a model of plain transformers goes on with, in a process that knows nothing of dtmsearch."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(folder)!r}\n"
        "model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))\n"
        "ids = tokenizer('def main(', return_tensors='pt')['input_ids']\n"
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0]))\n"
        "assert 'dtmsearch' not in sys.modules"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _installed(folder: Path) -> Path:
    """A virtual environment with this checkout in it; its programs."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    programs = folder / "bin"
    wanted = ["-c", str(ROOT / "constraints.txt"), f"{ROOT}[report,export]"]
    subprocess.run([str(programs / "pip"), "install", "--quiet", *wanted], check=True)
    print(f"installed in {time.monotonic() - started:.0f} s")
    return programs


def main() -> int:
    parser = argparse.ArgumentParser(description="Play a newcomer's first hour.")
    parser.add_argument("--fresh", action="store_true", help="install this checkout into an environment of its own")
    fresh = parser.parse_args().fresh
    with tempfile.TemporaryDirectory() as place:
        folder, home = Path(place) / "work", Path(place) / "home"
        folder.mkdir()
        home.mkdir()
        programs = _installed(Path(place) / "environment") if fresh else Path(sys.executable).parent
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DTMSEARCH_", "PYTHON"))
        }
        if not fresh and "PYTHONPATH" in os.environ:
            kept["PYTHONPATH"] = os.environ["PYTHONPATH"]
        environment = kept | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": f"{programs}{os.pathsep}{kept['PATH']}"}

        def type_in(command: str) -> Said:
            done = subprocess.run(
                shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            return Said(done.returncode, done.stdout, done.stderr)

        model = folder / "own-model"
        shutil.copytree(ROOT / "dtmsearch" / "demo" / "model", model)
        write_texts(folder)
        newcomer = Newcomer(type_in, folder, model)
        started = time.monotonic()
        export = play(newcomer, with_demo=True)
        print(f"transformers goes on with: {generated(str(programs / 'python'), export)!r}")
        seconds = time.monotonic() - started
        for command, took, cpu in newcomer.commands:
            print(f"{took:6.1f} s, {cpu:5.1f} s of CPU  {command.replace(str(folder), '.')}")
        print(f"{seconds:6.1f} s in all, {len(newcomer.commands)} commands")
        return 0 if seconds <= MOST_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
