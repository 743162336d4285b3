"""Search for what a language model can spare, judged by where its text first diverges.

The verbs of the command line are functions here: `import dtmsearch as dtm`, then `dtm.run("search.yaml", "dtm-store")`.
Every verb takes a search file as a path, a mapping or an object, and a store as a folder, a URL or an object; `measure`
and `apply` work on a model in memory. What a verb needs is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtmsearch.analysis.model_comparison import ModelComparison
    from dtmsearch.analysis.summary import RunOverview, RunSummary
    from dtmsearch.cluster.pool_settings import PoolSettings as Where
    from dtmsearch.config import SearchFile, load
    from dtmsearch.config.sweep_file import load_sweep
    from dtmsearch.core.components import Component, ModelManifest
    from dtmsearch.core.decoding import Decoding
    from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, Reference
    from dtmsearch.core.metrics import Summary
    from dtmsearch.core.plan import Budget, Perturbation, Plan, PlanSize
    from dtmsearch.core.schemes import Scheme, parse_scheme
    from dtmsearch.core.variant import Variant
    from dtmsearch.errors import (
        ClusterLost,
        ClusterUnreachable,
        DtmError,
        ExportFailed,
        RecoveryDiverged,
        ReplicasFailed,
        RunLocked,
        SearchFailed,
        SearchStopped,
        ServerUnreachable,
        StoreError,
        StoreFull,
        StoreReadOnly,
        UserError,
    )
    from dtmsearch.report.writing import write_report as report
    from dtmsearch.search.evaluator import ModelEvaluator
    from dtmsearch.studies.catalogue import Answer, study
    from dtmsearch.workflows.api import (
        Rows,
        Run,
        Store,
        ask,
        demo,
        estimate,
        evaluate,
        ls,
        open_store,
        pareto,
        query,
        resume,
        run,
        search_file,
        status,
        stop,
        validate,
    )
    from dtmsearch.workflows.compare import compare
    from dtmsearch.workflows.doctor import examine as doctor
    from dtmsearch.workflows.evaluate import PlanMeasurement, RecoveredModel, recover
    from dtmsearch.workflows.export import export
    from dtmsearch.workflows.in_process import Measurement, apply, measure
    from dtmsearch.workflows.profile import profile
    from dtmsearch.workflows.score import score
    from dtmsearch.workflows.serve_check import serve_check
    from dtmsearch.workflows.submit import submit
    from dtmsearch.workflows.sweep import sweep

__all__ = [
    "Answer",
    "Budget",
    "ClusterLost",
    "ClusterUnreachable",
    "Component",
    "Decoding",
    "DtmError",
    "EvalFailure",
    "EvalRequest",
    "EvalResult",
    "ExportFailed",
    "Measurement",
    "ModelComparison",
    "ModelEvaluator",
    "ModelManifest",
    "Perturbation",
    "Plan",
    "PlanMeasurement",
    "PlanSize",
    "RecoveredModel",
    "RecoveryDiverged",
    "Reference",
    "ReplicasFailed",
    "Rows",
    "Run",
    "RunLocked",
    "RunOverview",
    "RunSummary",
    "Scheme",
    "SearchFailed",
    "SearchFile",
    "SearchStopped",
    "ServerUnreachable",
    "Store",
    "StoreError",
    "StoreFull",
    "StoreReadOnly",
    "Summary",
    "UserError",
    "Variant",
    "Where",
    "__version__",
    "apply",
    "ask",
    "compare",
    "demo",
    "doctor",
    "estimate",
    "evaluate",
    "export",
    "load",
    "load_sweep",
    "ls",
    "measure",
    "open_store",
    "pareto",
    "parse_scheme",
    "profile",
    "query",
    "recover",
    "report",
    "resume",
    "run",
    "score",
    "search_file",
    "serve_check",
    "status",
    "stop",
    "study",
    "submit",
    "sweep",
    "validate",
]
__version__ = "0.1.0"

# name here -> module, name there
_LAZY = {
    "Answer": ("dtmsearch.studies.catalogue", "Answer"),
    "Budget": ("dtmsearch.core.plan", "Budget"),
    "ClusterLost": ("dtmsearch.errors", "ClusterLost"),
    "ClusterUnreachable": ("dtmsearch.errors", "ClusterUnreachable"),
    "Component": ("dtmsearch.core.components", "Component"),
    "Decoding": ("dtmsearch.core.decoding", "Decoding"),
    "DtmError": ("dtmsearch.errors", "DtmError"),
    "EvalFailure": ("dtmsearch.core.evaluation", "EvalFailure"),
    "EvalRequest": ("dtmsearch.core.evaluation", "EvalRequest"),
    "EvalResult": ("dtmsearch.core.evaluation", "EvalResult"),
    "ExportFailed": ("dtmsearch.errors", "ExportFailed"),
    "Measurement": ("dtmsearch.workflows.in_process", "Measurement"),
    "ModelComparison": ("dtmsearch.analysis.model_comparison", "ModelComparison"),
    "ModelEvaluator": ("dtmsearch.search.evaluator", "ModelEvaluator"),
    "ModelManifest": ("dtmsearch.core.components", "ModelManifest"),
    "Perturbation": ("dtmsearch.core.plan", "Perturbation"),
    "Plan": ("dtmsearch.core.plan", "Plan"),
    "PlanMeasurement": ("dtmsearch.workflows.evaluate", "PlanMeasurement"),
    "PlanSize": ("dtmsearch.core.plan", "PlanSize"),
    "RecoveredModel": ("dtmsearch.workflows.evaluate", "RecoveredModel"),
    "RecoveryDiverged": ("dtmsearch.errors", "RecoveryDiverged"),
    "Reference": ("dtmsearch.core.evaluation", "Reference"),
    "ReplicasFailed": ("dtmsearch.errors", "ReplicasFailed"),
    "Rows": ("dtmsearch.workflows.api", "Rows"),
    "Run": ("dtmsearch.workflows.api", "Run"),
    "RunLocked": ("dtmsearch.errors", "RunLocked"),
    "RunOverview": ("dtmsearch.analysis.summary", "RunOverview"),
    "RunSummary": ("dtmsearch.analysis.summary", "RunSummary"),
    "Scheme": ("dtmsearch.core.schemes", "Scheme"),
    "SearchFailed": ("dtmsearch.errors", "SearchFailed"),
    "SearchFile": ("dtmsearch.config", "SearchFile"),
    "SearchStopped": ("dtmsearch.errors", "SearchStopped"),
    "ServerUnreachable": ("dtmsearch.errors", "ServerUnreachable"),
    "Store": ("dtmsearch.workflows.api", "Store"),
    "StoreError": ("dtmsearch.errors", "StoreError"),
    "StoreFull": ("dtmsearch.errors", "StoreFull"),
    "StoreReadOnly": ("dtmsearch.errors", "StoreReadOnly"),
    "Summary": ("dtmsearch.core.metrics", "Summary"),
    "UserError": ("dtmsearch.errors", "UserError"),
    "Variant": ("dtmsearch.core.variant", "Variant"),
    "Where": ("dtmsearch.cluster.pool_settings", "PoolSettings"),
    "apply": ("dtmsearch.workflows.in_process", "apply"),
    "ask": ("dtmsearch.workflows.api", "ask"),
    "compare": ("dtmsearch.workflows.compare", "compare"),
    "demo": ("dtmsearch.workflows.api", "demo"),
    "doctor": ("dtmsearch.workflows.doctor", "examine"),
    "estimate": ("dtmsearch.workflows.api", "estimate"),
    "evaluate": ("dtmsearch.workflows.api", "evaluate"),
    "export": ("dtmsearch.workflows.export", "export"),
    "load": ("dtmsearch.config", "load"),
    "load_sweep": ("dtmsearch.config.sweep_file", "load_sweep"),
    "ls": ("dtmsearch.workflows.api", "ls"),
    "measure": ("dtmsearch.workflows.in_process", "measure"),
    "open_store": ("dtmsearch.workflows.api", "open_store"),
    "pareto": ("dtmsearch.workflows.api", "pareto"),
    "parse_scheme": ("dtmsearch.core.schemes", "parse_scheme"),
    "profile": ("dtmsearch.workflows.profile", "profile"),
    "query": ("dtmsearch.workflows.api", "query"),
    "recover": ("dtmsearch.workflows.evaluate", "recover"),
    "report": ("dtmsearch.report.writing", "write_report"),
    "resume": ("dtmsearch.workflows.api", "resume"),
    "run": ("dtmsearch.workflows.api", "run"),
    "score": ("dtmsearch.workflows.score", "score"),
    "search_file": ("dtmsearch.workflows.api", "search_file"),
    "serve_check": ("dtmsearch.workflows.serve_check", "serve_check"),
    "status": ("dtmsearch.workflows.api", "status"),
    "stop": ("dtmsearch.workflows.api", "stop"),
    "study": ("dtmsearch.studies.catalogue", "study"),
    "submit": ("dtmsearch.workflows.submit", "submit"),
    "sweep": ("dtmsearch.workflows.sweep", "sweep"),
    "validate": ("dtmsearch.workflows.api", "validate"),
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
