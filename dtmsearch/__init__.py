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
    from dtmsearch.analysis.named_queries import ask
    from dtmsearch.analysis.pareto_runs import candidates as pareto
    from dtmsearch.analysis.sql import query
    from dtmsearch.analysis.summary import runs_overview as ls
    from dtmsearch.analysis.summary import summarize_run as status
    from dtmsearch.config import load
    from dtmsearch.config.sweep_file import load_sweep
    from dtmsearch.report.writing import write_report as report
    from dtmsearch.workflows.doctor import examine as doctor
    from dtmsearch.workflows.export import export
    from dtmsearch.workflows.run import Where, demo, evaluate, open_store, recover, resume, run, stop
    from dtmsearch.workflows.score import score
    from dtmsearch.workflows.submit import submit
    from dtmsearch.workflows.sweep import sweep

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
    "Where": ("dtmsearch.workflows.run", "Where"),
    "ask": ("dtmsearch.analysis.named_queries", "ask"),
    "demo": ("dtmsearch.workflows.run", "demo"),
    "doctor": ("dtmsearch.workflows.doctor", "examine"),
    "evaluate": ("dtmsearch.workflows.run", "evaluate"),
    "export": ("dtmsearch.workflows.export", "export"),
    "load": ("dtmsearch.config", "load"),
    "load_sweep": ("dtmsearch.config.sweep_file", "load_sweep"),
    "ls": ("dtmsearch.analysis.summary", "runs_overview"),
    "open_store": ("dtmsearch.workflows.run", "open_store"),
    "pareto": ("dtmsearch.analysis.pareto_runs", "candidates"),
    "query": ("dtmsearch.analysis.sql", "query"),
    "recover": ("dtmsearch.workflows.run", "recover"),
    "report": ("dtmsearch.report.writing", "write_report"),
    "resume": ("dtmsearch.workflows.run", "resume"),
    "run": ("dtmsearch.workflows.run", "run"),
    "score": ("dtmsearch.workflows.score", "score"),
    "status": ("dtmsearch.analysis.summary", "summarize_run"),
    "stop": ("dtmsearch.workflows.run", "stop"),
    "submit": ("dtmsearch.workflows.submit", "submit"),
    "sweep": ("dtmsearch.workflows.sweep", "sweep"),
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
