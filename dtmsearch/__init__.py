"""Search for what a language model can spare, judged by where its text first diverges.

The verbs of the command line are functions here: `import dtmsearch as dtm`, then
`dtm.run(dtm.load(Path("search.yaml")), "dtm-store")`. What a verb needs is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtmsearch.cluster.sweep import sweep
    from dtmsearch.config import load
    from dtmsearch.doctor import examine as doctor
    from dtmsearch.exporting import export
    from dtmsearch.report.writing import write_report as report
    from dtmsearch.results.pareto import candidates as pareto
    from dtmsearch.results.query import query
    from dtmsearch.results.questions import ask
    from dtmsearch.results.summary import runs_overview as ls
    from dtmsearch.results.summary import summarize_run as status
    from dtmsearch.run import Where, demo, evaluate, open_store, recover, resume, run, stop
    from dtmsearch.scoring import score
    from dtmsearch.submission import submit
    from dtmsearch.sweepfile import load_sweep

__all__ = [
    "Where",
    "__version__",
    "ask",
    "demo",
    "doctor",
    "evaluate",
    "export",
    "load",
    "load_sweep",
    "ls",
    "open_store",
    "pareto",
    "query",
    "recover",
    "report",
    "resume",
    "run",
    "score",
    "status",
    "stop",
    "submit",
    "sweep",
]
__version__ = "0.1.0"

# name here -> module, name there
_LAZY = {
    "Where": ("dtmsearch.run", "Where"),
    "ask": ("dtmsearch.results.questions", "ask"),
    "demo": ("dtmsearch.run", "demo"),
    "doctor": ("dtmsearch.doctor", "examine"),
    "evaluate": ("dtmsearch.run", "evaluate"),
    "export": ("dtmsearch.exporting", "export"),
    "load": ("dtmsearch.config", "load"),
    "load_sweep": ("dtmsearch.sweepfile", "load_sweep"),
    "ls": ("dtmsearch.results.summary", "runs_overview"),
    "open_store": ("dtmsearch.run", "open_store"),
    "pareto": ("dtmsearch.results.pareto", "candidates"),
    "query": ("dtmsearch.results.query", "query"),
    "recover": ("dtmsearch.run", "recover"),
    "report": ("dtmsearch.report.writing", "write_report"),
    "resume": ("dtmsearch.run", "resume"),
    "run": ("dtmsearch.run", "run"),
    "score": ("dtmsearch.scoring", "score"),
    "status": ("dtmsearch.results.summary", "summarize_run"),
    "stop": ("dtmsearch.run", "stop"),
    "submit": ("dtmsearch.submission", "submit"),
    "sweep": ("dtmsearch.cluster.sweep", "sweep"),
}


class _Package(ModuleType):
    """This package. The import system would put the modules `run` and `doctor`, once they are loaded, in the place of
    the verbs of the same name; here the verbs keep it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, there = _LAZY[name]
        return getattr(importlib.import_module(module), there)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_LAZY})


sys.modules[__name__].__class__ = _Package
