"""A store with a whole run in it, made without a model: a beam search over the toy model, validated, with texts."""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import fakes
import numpy as np
import yaml
from fakes import CONTINUATION_TOKENS, MODE, FakeEvaluator, toy_components, toy_manifest

from dtmsearch.analysis.model_comparison import ComparedModel, ModelComparison, compared
from dtmsearch.core.evaluation import Continuation, EvalRequest, Reference, Writing
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.positions import Positions
from dtmsearch.core.prices import PriceBlock, PriceKind, PriceRequest
from dtmsearch.core.records import ContinuationRecord, RunRecord
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.core.strategy_settings import FisherSettings, TreeSettings
from dtmsearch.search.loop import measure, search
from dtmsearch.search.protocols import Silent
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.priced import Fisher
from dtmsearch.search.strategies.probe import Probe
from dtmsearch.search.strategies.task import Task
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.validate import validation_plans

P = ParamSpec("P")
NUM_LAYERS = 3
NUM_PROMPTS = 8
SCHEMES = ("int8-channel", "int4-channel")
# What a page must show as text, wherever it comes from.
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;"
CONFIG = {
    "run": "toy",
    "model": {"path": HOSTILE},
    "search": {"strategy": "beam", "rank_by": "kl", "width": 2, "stop": {"share": 0.6}},
}


_MADE = tempfile.TemporaryDirectory(prefix="dtm-reported-")
_PLACES: dict[tuple[object, ...], Path] = {}


def once(make: Callable[Concatenate[Path, P], ResultStore]) -> Callable[Concatenate[Path, P], ResultStore]:
    """Stores of one kind are made once, and copied where a folder is to hold nothing else."""

    @functools.wraps(make)
    def made(folder: Path, *arguments: P.args, **changes: P.kwargs) -> ResultStore:
        if folder.exists() and any(folder.iterdir()):
            return make(folder, *arguments, **changes)
        key = (make.__name__, arguments, *sorted(changes.items()))
        if key not in _PLACES:
            place = Path(_MADE.name) / str(len(_PLACES))
            make(place, *arguments, **changes)
            _PLACES[key] = place
        shutil.copytree(_PLACES[key], folder, dirs_exist_ok=True)
        return ResultStore(folder)

    return made


@once
def make_run(
    folder: Path,
    run: str = "toy",
    share: float = 0.6,
    width: int = 2,
    status: str = "finished",
    failing: bool = False,
    schemes: tuple[str, ...] = SCHEMES,
    num_layers: int = NUM_LAYERS,
    message: str = HOSTILE,
) -> ResultStore:
    """A recorded run; one that is not finished has neither plan nor validation."""
    store = ResultStore(folder)
    finished = status == "finished"
    references = [reference("search", num_layers), reference("held out", num_layers)]
    with store.writer(run) as writer:
        manifest, components = toy_manifest(num_layers), toy_components(num_layers)
        writer.put_components(manifest, components)
        for one in references:
            writer.share(one)
        space = SearchSpace(components, schemes, budget=Budget(share=share))
        beam = Beam(
            Task(space, lambda plan, parent: request(plan, references[0], parent), "kl"), TreeSettings(width=width)
        )
        answers = fakes.failing({"layers.1.mlp": "nonfinite"}) if failing else fakes.evaluate
        plan = search(beam, FakeEvaluator(answers, per_poll=8), writer, Silent())
        assert plan is not None
        if finished:
            plans = validation_plans(space, plan)
            requests = {label: request(other, references[1]) for label, other in plans.items()}
            measure(requests, FakeEvaluator(fakes.evaluate, per_poll=8), writer, "validation")
            writer.add([ContinuationRecord(references[1].id, plan.id, written(prompt)) for prompt in range(3)])
        writer.put_run(
            RunRecord(
                run=run,
                status=status,  # type: ignore[arg-type]
                config=yaml.safe_dump(CONFIG | {"run": run}),
                config_folder="/",
                manifest_id=manifest.id,
                reference_id=references[0].id,
                validation_reference_id=references[1].id if finished else None,
                final_plan_id=plan.id if finished else None,
                created_at=1.7e9,
                finished_at=1.7e9 + 60 if finished else None,
                version="0.1.0",
                message=message if status == "failed" else None,
            )
        )
    return store


@once
def make_probe_run(folder: Path, run: str = "probe") -> ResultStore:
    """A finished probe: a ranking, no plan."""
    store, one = ResultStore(folder), reference("search", NUM_LAYERS)
    manifest, components = toy_manifest(NUM_LAYERS), toy_components(NUM_LAYERS)
    with store.writer(run) as writer:
        writer.put_components(manifest, components)
        writer.share(one)
        task = Task(
            SearchSpace(components, SCHEMES),
            lambda plan, parent: request(plan, one, parent),
            rank_by="kl",
            continuation_tokens=CONTINUATION_TOKENS,
        )
        search(Probe(task), FakeEvaluator(fakes.evaluate, per_poll=8), writer, Silent())
        config = {"run": run, "model": {"path": "toy"}, "search": {"strategy": "probe", "rank_by": "kl"}}
        writer.put_run(
            RunRecord(
                run=run,
                status="finished",
                config=yaml.safe_dump(config),
                config_folder="/",
                manifest_id=manifest.id,
                reference_id=one.id,
                validation_reference_id=None,
                final_plan_id=None,
                created_at=1.7e9,
                finished_at=1.7e9 + 60,
                version="0.1.0",
            )
        )
    return store


@once
def make_priced_run(folder: Path, run: str = "priced", num_samples: int = 32) -> ResultStore:
    """A finished search by prices, whose options' products are drawn from their names."""
    store = ResultStore(folder)
    schemes = ("int2-channel", "int4-channel", "int8-channel")
    references = [reference("search", NUM_LAYERS), reference("held out", NUM_LAYERS)]
    manifest, components = toy_manifest(NUM_LAYERS), toy_components(NUM_LAYERS)
    names = tuple(component.name for component in components)
    with store.writer(run) as writer:
        writer.put_components(manifest, components)
        for one in references:
            writer.share(one)

        def take(kind: PriceKind, around: Plan, samples: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.float32]]:
            random = np.random.default_rng(0)
            scale = np.array([[4.0 - parse_scheme(scheme).bits / 3 for scheme in schemes] for _ in names])
            products = random.normal(size=(samples[1] - samples[0], len(names), len(schemes))) * scale
            asked = PriceRequest(references[0].id, samples, names, schemes, kind=kind, around=around)
            writer.add([PriceBlock(asked, products.astype(np.float32), 640, 2.0)])
            return products.astype(np.float32)

        space = SearchSpace(components, schemes, budget=Budget(bits_per_weight=5.0))
        task = Task(
            space,
            lambda plan, parent: request(plan, references[0], parent),
            rank_by="kl",
            continuation_tokens=CONTINUATION_TOKENS,
        )
        strategy = Fisher(task, take, FisherSettings(num_samples))
        plan = search(strategy, FakeEvaluator(fakes.evaluate, per_poll=8), writer, Silent())
        assert plan is not None
        plans = validation_plans(space, plan)
        requests = {label: request(other, references[1]) for label, other in plans.items()}
        measure(requests, FakeEvaluator(fakes.evaluate, per_poll=8), writer, "validation")
        stop = {"bits_per_weight": 5.0}
        search_section = {"strategy": "fisher", "rank_by": "kl", "schemes": list(schemes), "stop": stop}
        prompts = {"files": ["text"], "count": NUM_PROMPTS, "continuation_tokens": CONTINUATION_TOKENS}
        config = {"run": run, "model": {"path": "toy"}, "prompts": prompts, "search": search_section}
        writer.put_run(
            RunRecord(
                run=run,
                status="finished",
                config=yaml.safe_dump(config),
                config_folder="/",
                manifest_id=manifest.id,
                reference_id=references[0].id,
                validation_reference_id=references[1].id,
                final_plan_id=plan.id,
                created_at=1.7e9,
                finished_at=1.7e9 + 60,
                version="0.1.0",
            )
        )
    return store


def request(plan: Plan, against: Reference, parent: Plan = Plan()) -> EvalRequest:
    return EvalRequest(plan, against.id, (0, NUM_PROMPTS), ("kl", "ppl"), parent)


def reference(name: str, num_layers: int) -> Reference:
    tokens = np.arange(NUM_PROMPTS * (10 + CONTINUATION_TOKENS), dtype=np.int32).reshape(NUM_PROMPTS, -1)
    agrees = np.ones((NUM_PROMPTS, CONTINUATION_TOKENS), np.bool_)
    agrees[0, 5] = False
    manifest_id = toy_manifest(num_layers).id
    return Reference(name, manifest_id, MODE, tokens, tokens[:, 10:].copy(), agrees, (0,))


def written(prompt: int) -> Continuation:
    """Texts that part at token `prompt`, one piece of which is hostile."""
    base = tuple(range(20))
    own = (*base[:prompt], *(token + 1000 for token in base[prompt:]))
    pieces = (HOSTILE, *(f" {token}" for token in base[1:]))
    margins = tuple(0.25 for _ in base)
    return Continuation(
        prompt, f"{HOSTILE} \N{REPLACEMENT CHARACTER}", Writing(base, pieces, margins), Writing(own, pieces, margins)
    )


def model_comparison(num_prompts: int = 12, length: int = 20) -> ModelComparison:
    """Two models compared, made of random numbers: OTHER is served, and ends early once."""
    random = np.random.default_rng(0)
    text = random.integers(0, 99, (num_prompts, length + 10), dtype=np.int32)
    continuation = random.integers(0, 99, (num_prompts, length), dtype=np.int32)
    agrees = random.random(continuation.shape) > 0.02
    made = Reference("compared", "toy", MODE, text, continuation, agrees, ())
    nats = random.exponential(0.5, (4, num_prompts, length)).astype(np.float32)
    found = Positions(random.random(agrees.shape) > 0.8, nats[0], nats[1] / 10, np.full_like(nats[2], 0.98), nats[3])
    models = ComparedModel(HOSTILE, "bfloat16 safetensors", "on CPU"), ComparedModel("b", "served", HOSTILE)
    whole = compared(*models, made, found, nats[2], 0, (HOSTILE,))
    base = Writing((1, 2, 3), ("a", HOSTILE, " c"), (0.1, 0.2, 0.3))
    sides = (Writing((1, 5, 3), ("a", "\n", " d"), (math.nan,) * 3), Writing((1,), ("a",), (math.nan,)))
    texts = tuple(Continuation(prompt, f"prompt {HOSTILE}", base, side) for prompt, side in enumerate(sides))
    return replace(whole, texts=texts)
