"""Search strategies on identical weights, prompts and budgets: what each finds, for how many tokens forwarded.

    python benchmarks/search_quality.py MODEL TEXT HELD_OUT --out FOLDER [--cases bits-3,bits-4] [--strategies auto,...]

Every strategy runs with each seed, which cuts the search's prompts and draws its chances; all plans are measured on the
same held-out prompts. Tokens are counted whole, prompt and continuation of every evaluation, without what shared
prefixes save. Writes FOLDER/search_quality.json and, last, one table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, Outcome, Reference, ReplicaSettings
from dtmsearch.core.metrics import summarize
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.prices import PriceBlock, PriceKind, PriceRequest, priced_schemes
from dtmsearch.core.statistics import paired_difference
from dtmsearch.core.strategy_settings import (
    AutoSettings,
    EvolutionSettings,
    FisherSettings,
    KnapsackSettings,
    LocalSettings,
)
from dtmsearch.model.replica.replica import LoadedModel, Replica
from dtmsearch.model.weights.checkpoint import Checkpoint
from dtmsearch.search.loop import search
from dtmsearch.search.protocols import Decision, Progress
from dtmsearch.search.solver.damage_model import WeightErrors
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.priced import TakePrices
from dtmsearch.search.strategies.strategy_registry import STRATEGIES, SolverSettings, make_strategy

CONTINUATION = 100  # tokens, and as many of a prompt, unless said
HELD_OUT_SEED = 1_000
PRICE_BLOCK = 192  # samples taken at once
CALIBRATION_ROWS, CALIBRATION_TOKENS = 64, 256
_LEVELS = tuple(f"int{bits}-g32-asym" for bits in range(2, 7))
_SHARES = tuple(f"magnitude-{share / 100:.2f}".rstrip("0") for share in range(10, 100, 5))
_TENTHS = tuple(f"magnitude-0.{share}" for share in range(1, 10))
_LEVELS_64 = tuple(f"int{bits}-g64-asym" for bits in range(2, 7))
_LEVELS_128 = tuple(f"int{bits}-g128" for bits in (2, 3, 4, 6, 8))
_MIXED = tuple(
    f"{gptq}int{bits}-g{group}{asym}"
    for gptq in ("", "gptq-")
    for bits in range(2, 7)
    for group in (32, 64, 128)
    for asym in ("", "-asym")
)


@dataclass(frozen=True)
class Case:
    """A set of schemes and the uniform plan whose size (or sparsity) is the budget. What is found is held against the
    uniform plan within the budget that is best on the held-out prompts."""

    name: str
    schemes: tuple[str, ...]
    uniform: str
    sparsity: float | None = None
    bits: float | None = None  # of a weight, in place of the uniform plan's

    def budget(self, space: SearchSpace) -> Budget:
        if self.bits is not None:
            return Budget(bits_per_weight=self.bits)
        if self.sparsity is not None:
            return Budget(sparsity=self.sparsity)
        return Budget(bits_per_weight=space.size(space.uniform(self.uniform)).bits_per_weight)


CASES = (
    Case("bits-3", _LEVELS, "int3-g32-asym"),
    Case("bits-4", _LEVELS, "int4-g32-asym"),
    Case("prune-50", _SHARES, "magnitude-0.5", 0.5),
    Case("prune-60", _SHARES, "magnitude-0.6", 0.6),
    Case("prune-70", _SHARES, "magnitude-0.7", 0.7),
    Case("mixed-3", _MIXED, "gptq-int3-g32-asym"),
    # On a model whose weights lie on a grid of 4 bits in groups of 32, these are not without loss.
    Case("bits-3-g64", _LEVELS_64, "int3-g64-asym"),
    Case("bits-4-g64", _LEVELS_64, "int4-g64-asym"),
    Case("tenths-30", _TENTHS, "magnitude-0.3", 0.3),
    Case("tenths-50", _TENTHS, "magnitude-0.5", 0.5),
    Case("eight", ("int8-channel", "int6-channel", "w8a8"), "int8-channel"),
    Case("bits-3-g128", _LEVELS_128, "int3-g128"),
    Case("bits-4-g128", _LEVELS_128[1:], "int4-g128"),
)
# Names of the table -> strategy and settings.
SETTINGS: dict[str, tuple[str, SolverSettings]] = {
    "fisher": ("fisher", SolverSettings()),
    "fisher-64": ("fisher", SolverSettings(fisher=FisherSettings(64))),
    "squared-gradients": ("squared_gradients", SolverSettings(fisher=FisherSettings(64))),
    "gradient-changes": ("gradient_changes", SolverSettings(fisher=FisherSettings(64))),
    "sensitivity": ("sensitivity", SolverSettings()),
    "auto": ("auto", SolverSettings()),
    "auto-long": ("auto", SolverSettings(auto=AutoSettings(probe_prompts=16, prompts=64, correction_prompts=50_000))),
    "lazy-greedy": ("lazy_greedy", SolverSettings()),
    "knapsack-64": ("knapsack", SolverSettings(knapsack=KnapsackSettings(64))),
    "spdy": ("spdy", SolverSettings()),
    # EvoPress's own settings for quantization: stages of a 256th, a 32nd and a quarter of its 524,288 tokens; here of
    # 256 prompts.
    "evopress": (
        "evolution",
        SolverSettings(evolution=EvolutionSettings(150, 128, prompts=(1, 8, 64), survivors=(16, 4))),
    ),
    "evolution-100": ("evolution", SolverSettings(evolution=EvolutionSettings(generations=100))),
    "evolution-400": ("evolution", SolverSettings(evolution=EvolutionSettings(generations=400))),
    "local": ("local", SolverSettings(local=LocalSettings(rounds=60))),
}


class Kept(Replica):
    """A replica that keeps the model's own weights beside a plan's: small models are read once."""

    def _load(self, spec: ModelSpec, settings: ReplicaSettings) -> LoadedModel:
        return replace(super()._load(spec, settings), checkpoint=Checkpoint([]))


@dataclass
class Counter:
    """An evaluator that counts; nothing is recorded."""

    replica: Replica
    row_tokens: int
    tokens: int = 0
    evaluations: int = 0
    _waiting: list[EvalRequest] = field(default_factory=list)

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        self._waiting += requests

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        requests, self._waiting = self._waiting, []
        self.evaluations += len(requests)
        self.tokens += self.row_tokens * sum(r.prompts[1] - r.prompts[0] for r in requests)
        return self.replica.evaluate(requests)


class Forgetful:
    """A log of nothing: every strategy measures for itself."""

    def replay(self) -> list[Outcome]:
        return []

    def recorded_elsewhere(self, request_ids: Sequence[str]) -> dict[str, tuple[str, Outcome]]:
        return {}

    def append(self, records: Sequence[object]) -> None:
        return None

    def decisions(self) -> list[Any]:
        return []

    def decide(self, steps: Sequence[object]) -> None:
        return None


@dataclass
class Watcher:
    """Notes the tokens forwarded when each decision was made."""

    counter: Counter
    path: list[tuple[int, Plan]] = field(default_factory=list)

    def on_progress(self, progress: Progress) -> None:
        return None

    def on_decision(self, decision: Decision, replayed: bool) -> None:
        self.path.append((self.counter.tokens, decision.plan))

    def on_note(self, text: str) -> None:
        return None


@dataclass
class Row:
    """A line of the table; `kl_vs_uniform` is the ratio of means, differences are paired over the held-out prompts."""

    case: str
    strategy: str
    seed: int
    megatokens: float
    evaluations: int
    seconds: float
    bits_per_weight: float
    sparsity: float
    kl: float
    kl_vs_uniform: float
    fdt: float
    sdt: float
    ppl: float
    path: list[tuple[float, float]] = field(default_factory=list)
    plan: dict[str, str] = field(default_factory=dict)


class Bench:
    """A model, its held-out reference, and what has been measured on it."""

    def __init__(
        self, model: Path, text: Path, held_out: Path, prompts: int, held_out_prompts: int, dtype: str,
        continuation: int = CONTINUATION,
    ) -> None:  # fmt: skip
        spec = ModelSpec(str(model), dtype=dtype, compile="never")
        self.replica = Kept(spec, ReplicaSettings(batch_tokens=0))
        self.num_prompts, self.continuation = prompts, continuation
        self._text = text.read_text(encoding="utf-8")
        self.held_out = self._reference(held_out.read_text(encoding="utf-8"), held_out_prompts, HELD_OUT_SEED)
        self._measured: dict[str, EvalResult] = {}
        self._references: dict[int, Reference] = {}
        self._priced: dict[tuple[str, tuple[int, int], tuple[str, ...]], PriceBlock] = {}
        self._calibration_id = ""

    def _reference(self, text: str, count: int, seed: int) -> Reference:
        tokens, _ = self.replica.cut_prompts([text], count, self.continuation, self.continuation, seed)
        made = self.replica.make_reference(tokens)
        self.replica.use(made)
        return made

    def reference(self, seed: int) -> Reference:
        if seed not in self._references:
            self._references[seed] = self._reference(self._text, self.num_prompts, seed)
        return self._references[seed]

    def calibrate(self) -> str:
        """The id of the calibration, over the search's own text."""
        if not self._calibration_id:
            calibration = self.replica.cut_calibration([self._text], CALIBRATION_ROWS, CALIBRATION_TOKENS, 0)
            self.replica.use_calibration(calibration)
            self._calibration_id = calibration.id
        return self._calibration_id

    def errors(self, case: Case, kind: str) -> WeightErrors:
        components = [c.name for c in self.replica.manifest().components]
        calibration_id = "" if kind == "plain" else self.calibrate()
        found = self.replica.weight_errors(components, case.schemes, calibration_id, kind == "hessian")
        values = {"plain": "plain", "inputs": "weighted_by_inputs", "hessian": "weighted_by_hessian"}
        return {(e.component, e.scheme): getattr(e, values[kind]) for e in found}

    def measure(self, plan: Plan, metrics: tuple[str, ...] = ("kl", "ppl")) -> EvalResult:
        if plan.id not in self._measured:
            request = EvalRequest(plan, self.held_out.id, (0, self.held_out.num_prompts), metrics, plan)
            (outcome,) = self.replica.evaluate([self.named(request)])
            assert isinstance(outcome, EvalResult), outcome
            self._measured[plan.id] = outcome
        return self._measured[plan.id]

    def named(self, request: EvalRequest) -> EvalRequest:
        """The request with the calibration named, where its plan needs one."""
        return replace(request, calibration_id=self.calibrate()) if request.plan.needs_calibration else request

    def run(self, case: Case, name: str, seed: int, space: SearchSpace, errors: WeightErrors, points: int = 8) -> Row:
        """A search, and what its plan and `points` of its decisions come to on the held-out prompts."""
        reference = self.reference(seed)
        strategy_name, settings = SETTINGS[name]

        def request_for(plan: Plan, parent: Plan) -> EvalRequest:
            return self.named(EvalRequest(plan, reference.id, (0, reference.num_prompts), (), parent))

        counter = Counter(self.replica, 2 * self.continuation)
        components = [component.name for component in space.components]
        if STRATEGIES[strategy_name].takes_prices and not self.replica.unpriceable(components):
            settings = replace(settings, take=self.taking(case, reference, counter, seed))
        strategy = make_strategy(
            strategy_name, space, request_for, "kl", solver=replace(settings, errors=errors), seed=seed,
            continuation_tokens=self.continuation,
        )  # fmt: skip
        watcher = Watcher(counter)
        started_at = time.perf_counter()
        plan = search(strategy, counter, Forgetful(), watcher)
        seconds = time.perf_counter() - started_at
        assert plan is not None
        size, found = space.size(plan), summarize(self.measure(plan))
        uniform = summarize(self.measure(self.best_uniform(space)))
        assert found.kl is not None and uniform.kl is not None and found.ppl is not None
        return Row(
            case.name, name, seed, counter.tokens / 1e6, counter.evaluations, seconds, size.bits_per_weight,
            size.sparsity, found.kl, found.kl / uniform.kl, found.fdt_mean, found.sdt_mean, found.ppl,
            path=self._path(watcher.path, points), plan=plan.schemes,
        )  # fmt: skip

    def taking(self, case: Case, reference: Reference, counter: Counter, seed: int) -> TakePrices:
        """What takes prices of a case's options, and counts; prices that another search took are counted, not taken."""
        components = tuple(component.name for component in self.replica.manifest().components)
        calibration_id = self.calibrate() if Plan.of({components[0]: case.schemes[-1]}).needs_calibration else ""

        def take(kind: PriceKind, around: Plan, samples: tuple[int, int]) -> NDArray[np.float32]:
            parts, schemes = [], priced_schemes(kind, case.schemes)
            for first in range(*samples, PRICE_BLOCK):
                part = first, min(first + PRICE_BLOCK, samples[1])
                request = PriceRequest(reference.id, part, components, schemes, seed, kind, around, calibration_id)
                block = self._priced.get((request.id, part, schemes)) or self.replica.price(request)
                if kind == "fisher":
                    self._priced[request.id, part, schemes] = block
                counter.tokens += block.tokens
                parts.append(block.products)
            return np.concatenate(parts)

        return take

    def _path(self, decisions: list[tuple[int, Plan]], points: int) -> list[tuple[float, float]]:
        """(megatokens, held-out KL) of some of a search's decisions, the last among them."""
        at = np.unique(np.linspace(0, len(decisions) - 1, points).round().astype(int)) if decisions and points else []
        chosen = [decisions[i] for i in at]
        return [(tokens / 1e6, float(summarize(self.measure(plan)).kl or 0.0)) for tokens, plan in chosen]

    def best_uniform(self, space: SearchSpace) -> Plan:
        plans = [space.uniform(scheme) for scheme in space.schemes]
        fitting = [plan for plan in plans if space.budget.reached(space.size(plan))]
        return min(fitting, key=lambda plan: summarize(self.measure(plan)).kl or np.inf)

    def uniform_row(self, case: Case, space: SearchSpace) -> Row:
        plan = self.best_uniform(space)
        size, found = space.size(plan), summarize(self.measure(plan))
        assert found.kl is not None and found.ppl is not None
        (scheme,) = set(plan.schemes.values())
        return Row(
            case.name, f"uniform {scheme}", 0, 0.0, 0, 0.0, size.bits_per_weight, size.sparsity, found.kl, 1.0,
            found.fdt_mean, found.sdt_mean, found.ppl, plan=plan.schemes,
        )  # fmt: skip

    def compare(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """`auto` less every other strategy of the same case and seed, paired over the held-out prompts."""
        found = []
        for ours in (row for row in rows if row.strategy.startswith("auto")):
            for other in rows:
                if other.case == ours.case and other.strategy != ours.strategy and other.seed in (ours.seed, 0):
                    if other.seed != ours.seed and not other.strategy.startswith("uniform"):
                        continue
                    a, b = self.measure(Plan.of(ours.plan)), self.measure(Plan.of(other.plan))
                    assert a.kl is not None and b.kl is not None
                    kl, fdt = paired_difference(a.kl, b.kl, 0), paired_difference(a.fdt, b.fdt, 0)
                    found.append(
                        {"case": ours.case, "seed": ours.seed, "ours": ours.strategy, "other": other.strategy}
                        | {"kl": [kl.mean, kl.low, kl.high], "fdt": [fdt.mean, fdt.low, fdt.high]}
                    )
        return found


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("held_out", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--cases", default="bits-3,bits-4,prune-50,prune-60", show_default=True)
@click.option("--strategies", default="sensitivity,auto,auto-long,knapsack-64,spdy,evolution-100,local",
              show_default=True, help="NAME or NAME:CASE+CASE for some of the cases.")  # fmt: skip
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--prompts", default=512, show_default=True)
@click.option("--held-out-prompts", default=256, show_default=True)
@click.option("--tokens", default=CONTINUATION, show_default=True, help="Of a prompt, and of its continuation.")
@click.option("--errors", "kind", type=click.Choice(["plain", "inputs", "hessian"]), default="plain", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--seconds", default=1e9, help="Begin no search after so many seconds.")
def main(
    model: Path, text: Path, held_out: Path, out: Path, cases: str, strategies: str, seeds: str, prompts: int,
    held_out_prompts: int, tokens: int, kind: str, dtype: str, seconds: float,
) -> None:  # fmt: skip
    started_at = time.perf_counter()
    torch.set_float32_matmul_precision("high")
    bench = Bench(model, text, held_out, prompts, held_out_prompts, dtype, tokens)
    rows: list[Row] = []
    left_out: list[str] = []
    jobs = [(c, int(s)) for s in seeds.split(",") for c in CASES if c.name in cases.split(",")]
    spaces: dict[str, tuple[SearchSpace, WeightErrors]] = {}
    for entry in strategies.split(","):
        name, _, only = entry.partition(":")
        for case, seed in jobs:
            if only and case.name not in only.split("+"):
                continue
            if time.perf_counter() - started_at > seconds:
                left_out.append(f"{name} {case.name} seed {seed}")
                continue
            if case.name not in spaces:
                spaces[case.name] = space_of(bench, case), bench.errors(case, kind)
                rows.append(bench.uniform_row(case, spaces[case.name][0]))
            rows.append(bench.run(case, name, seed, *spaces[case.name]))
            print(_line(rows[-1]), flush=True)
            _write(out, model.name, rows, [], left_out)
    _write(out, model.name, rows, bench.compare(rows), left_out)
    _print_table(rows, left_out)


def space_of(bench: Bench, case: Case) -> SearchSpace:
    manifest = bench.replica.manifest()

    def space(budget: Budget) -> SearchSpace:
        return SearchSpace(manifest.components, case.schemes, dense_bits=manifest.dense_bits, budget=budget)

    return space(case.budget(space(Budget())))


def _write(out: Path, model: str, rows: Sequence[Row], comparisons: list[dict[str, Any]], left_out: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = {"model": model, "rows": [asdict(row) for row in rows], "comparisons": comparisons, "left_out": left_out}
    (out / "search_quality.json").write_text(json.dumps(content, indent=1))


def _line(row: Row) -> str:
    return (
        f"{row.case:9s} {row.strategy:27s} {row.seed:4d} {row.megatokens:8.3f} {row.evaluations:6d} {row.seconds:7.1f}"
        f" {row.bits_per_weight:7.4f} {row.sparsity:7.4f} {row.kl:8.4f} {row.kl_vs_uniform:6.3f} {row.fdt:6.2f}"
        f" {row.sdt:6.2f} {row.ppl:8.3f}"
    )


def _print_table(rows: Sequence[Row], left_out: Sequence[str]) -> None:
    """Means over seeds."""
    print(
        "case      strategy                    seed  Mtokens  evals seconds  bits/w sparsity       KL  ratio    FDT"
        "    SDT      PPL"
    )
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.strategy), []).append(row)
    for group in sorted(groups.values(), key=lambda group: (group[0].case, group[0].megatokens)):
        numeric = [name for name, value in asdict(group[0]).items() if isinstance(value, float)]
        means = {name: float(np.mean([getattr(row, name) for row in group])) for name in numeric}
        print(_line(replace(group[0], seed=len(group), **means)))
    print(f"(seed: how many; left out for want of time: {', '.join(left_out) or 'none'})")


if __name__ == "__main__":
    main()
