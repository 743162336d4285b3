"""Which blocks of a model to drop: `floating` against rules and searches that others use, on one model.

    python benchmarks/structured.py MODEL --search TEXT --judge TEXT --blocks 4,8,12 --seeds 3 --out structured.json

Rivals, made anew from their description, on the same prompts and continuations:

- `last layers`: the last layers go, half as many as blocks are asked for; `last but the final` keeps the final one
  (Gromov et al., arXiv 2403.17887).
- `cosine, layers`: those go whose output is most like their input (ShortGPT, arXiv 2403.03853); `cosine, blocks`: the
  same of attention and MLP blocks.
- `EvoPress` (arXiv 2410.14649): as many attention as MLP blocks, in its default budget: k (n - k) / 1.5 generations of
  32 children for k of n layers' blocks, 2,048 tokens for each child, 32,768 for the best two; KL to the base model at
  the positions that are judged.

`floating` drops any blocks of the same number, and `floating, same size` any that leave no more weights than EvoPress's
plan does. KL on held-out prompts, against the base model's own continuations; tokens forwarded, a reference apart.
With `--repair-tokens` plans of `floating` and EvoPress are measured once more with what is left fitted to so many
tokens of the search's text (`recovery.repair_tokens`).
"""

from __future__ import annotations

import copy
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, Outcome, Reference, ReplicaSettings
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.schemes import DROP
from dtmsearch.core.statistics import paired_difference
from dtmsearch.core.strategy_settings import FloatingSettings
from dtmsearch.core.variant import Variant
from dtmsearch.model.replica.replica import Replica
from dtmsearch.model.training.recipe import Recipe
from dtmsearch.model.training.train_loop import Training, train
from dtmsearch.search.protocols import Strategy
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.floating import Floating
from dtmsearch.search.strategies.task import Task

PROMPT, CONTINUATION = 100, 100
ROW = PROMPT + CONTINUATION
# EvoPress's defaults for depth.
CHILDREN, FIRST_TOKENS, SECOND_TOKENS, INITIAL, CALIBRATION_TOKENS = 32, 2_048, 32_768, 64, 131_072
MOST_MUTATIONS = 3
# Whose plans are repaired; and how often a repair reads its text at most: in each model, and again what it fits.
REPAIRED, PASSES = ("floating", "floating, same size", "EvoPress"), 3
# Logits that are held at once.
MOST_LOGITS = 1 << 30


def take_share() -> None:
    """Keep to a part of the GPU's memory (the variable GPU_SHARE), where several such processes have one GPU: what is
    free at the start is no measure then."""
    if torch.cuda.is_available() and (share := float(os.environ.get("GPU_SHARE", "0"))):
        torch.cuda.set_per_process_memory_fraction(share)


@dataclass
class Measuring:
    """A replica, what it has measured by request, and the tokens of what was asked of it, `row` for each prompt."""

    replica: Replica
    known: dict[str, Outcome] = field(default_factory=dict)
    tokens: int = 0
    row: int = ROW

    def answers(self, requests: Sequence[EvalRequest]) -> list[Outcome]:
        new = [r for r in requests if r.id not in self.known]
        self.known |= {r.id: o for r, o in zip(new, self.replica.evaluate(new), strict=True)}
        self.tokens += sum((r.prompts[1] - r.prompts[0]) * self.row for r in requests)
        return [self.known[r.id] for r in requests]


def kl_of(
    measuring: Measuring, plan: Plan, reference: Reference, calibration: str = "", weights: str = ""
) -> np.ndarray:
    """KL by prompt, of all prompts of a reference."""
    request = EvalRequest(plan, reference.id, (0, reference.num_prompts), ("kl",), plan, calibration, weights)
    (outcome,) = measuring.answers([request])
    assert isinstance(outcome, EvalResult) and outcome.kl is not None, outcome
    return outcome.kl


def searched(strategy: Strategy, measuring: Measuring) -> tuple[Plan, int]:
    """The plan that a strategy finds, and the tokens that it forwarded."""
    before = measuring.tokens
    while not strategy.done:
        requests = [ask.request for ask in strategy.ask()]
        for request, outcome in zip(requests, measuring.answers(requests), strict=True):
            strategy.tell(request.id, outcome)
    assert strategy.best is not None
    return strategy.best, measuring.tokens - before


def dropping(names: Sequence[str]) -> Plan:
    return Plan.of(dict.fromkeys(names, DROP))


def floating(
    measuring: Measuring,
    manifest: ModelManifest,
    reference: Reference,
    budget: Budget,
    prompts: int,
    settings: FloatingSettings,
) -> tuple[Plan, int]:
    """The plan of our search and the tokens that it forwarded."""
    blocks = manifest.droppable(("attention", "mlp"), manifest.components)
    space = SearchSpace(manifest.components, (), dense_bits=manifest.dense_bits, budget=budget, blocks=blocks)

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, reference.id, (0, prompts), ("kl",), parent)

    return searched(Floating(Task(space, request_for, "kl"), settings), measuring)


def repaired(
    replica: Replica, spec: ModelSpec, plan: Plan, texts: Sequence[str], tokens: int, seed: int, folder: Path
) -> str:
    """The weights that are left of a plan once they are fitted to so many tokens of texts; their files lie in
    `folder`, where the replica finds them."""
    start = folder / f"{plan.id}-{seed}"
    start.mkdir(exist_ok=True)
    replica.save_pruned(Variant(plan, "", ""), str(start))
    recipe = Recipe(("text",), 0, 0, sequence_tokens=ROW, repair_tokens=tokens, seed=seed)
    return str(train(Training(spec, start, folder), texts, recipe)["weights_id"])


class Gated:
    """A model whose attention and MLP blocks can be closed row by row: many candidates in one pass. `rows` [rows,
    tokens] are prompts of `prompt` tokens with their continuations."""

    def __init__(self, model: Any, blocks: Sequence[Component], rows: torch.Tensor, prompt: int) -> None:
        self.model = copy.deepcopy(model)
        if next(model.parameters()).is_cuda:
            self.model.half()
        self.blocks, self.rows, self._prompt = blocks, rows, prompt
        self._open: torch.Tensor | None = None
        for index, block in enumerate(blocks):
            self.model.get_submodule(block.name).register_forward_hook(self._gate(index))

    def _gate(self, index: int) -> Callable[..., Any]:
        def gate(module: Any, arguments: Any, output: Any) -> Any:
            if self._open is None:
                return None
            own = self._open[index].view(-1, 1, 1)
            if isinstance(output, tuple):
                return (output[0] * own, *output[1:])
            return output * own

        return gate

    @torch.inference_mode()
    def kl(self, closed: Sequence[frozenset[int]], rows: Sequence[int]) -> np.ndarray:
        """Mean KL of each candidate over rows, at the predicted positions."""
        tokens = self.rows[list(rows)]
        base = self._hidden(tokens, None)
        continued = tokens.shape[1] - self._prompt
        together = max(1, MOST_LOGITS // (len(rows) * continued * self.model.config.vocab_size))
        found = []
        for start in range(0, len(closed), together):
            part = closed[start : start + together]
            gates = torch.ones(len(self.blocks), len(part), device=tokens.device, dtype=base.dtype)
            for at, candidate in enumerate(part):
                gates[sorted(candidate), at] = 0
            hidden = self._hidden(tokens.repeat(len(part), 1), gates.repeat_interleave(len(rows), dim=1))
            own = self._log(base)
            for each in hidden.view(len(part), len(rows), continued, -1):
                found.append(float((own.exp() * (own - self._log(each))).sum(-1).mean()))
        return np.array(found)

    def _hidden(self, tokens: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
        self._open = gates
        try:
            hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        finally:
            self._open = None
        return hidden[:, self._prompt - 1 : -1]

    def _log(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.model.lm_head(hidden).float(), dim=-1)


def evopress(gated: Gated, removed: int, seed: int, generations: int | None, until: float) -> tuple[list[str], int]:
    """Blocks that EvoPress drops, `removed` attentions and as many MLPs, and the tokens that it forwarded."""
    chance = random.Random(seed)  # noqa: S311  (a search, no secret)
    kinds = [[i for i, block in enumerate(gated.blocks) if block.kind == kind] for kind in ("attention", "mlp")]
    tokens = 0

    def best(candidates: list[frozenset[int]], keep: int, budget: int) -> list[frozenset[int]]:
        nonlocal tokens
        row = gated.rows.shape[1]
        count = min(-(-budget // row), len(gated.rows))
        rows = chance.sample(range(len(gated.rows)), count)
        tokens += len(candidates) * count * row
        order = np.argsort(gated.kl(candidates, rows), kind="stable")
        return [candidates[at] for at in order[:keep]]

    first = [frozenset(i for own in kinds for i in chance.sample(own, removed)) for _ in range(INITIAL)]
    (parent,) = best(list(dict.fromkeys(first)), 1, FIRST_TOKENS)
    layers = len(kinds[0])
    wanted = generations or int(removed * (layers - removed) / 1.5)
    for _ in range(wanted):
        children: list[frozenset[int]] = []
        for _ in range(100 * CHILDREN):  # of a small model there are not so many
            if len(children) == CHILDREN:
                break
            child = set(parent)
            for _ in range(min(chance.randint(1, MOST_MUTATIONS), chance.randint(1, MOST_MUTATIONS))):
                own = chance.choice(kinds)
                out = [i for i in own if i in child]
                child.remove(gone := chance.choice(out))
                child.add(chance.choice([i for i in own if i not in child and i != gone]))
            if frozenset(child) not in (parent, *children):
                children.append(frozenset(child))
        # The parent defends its place on the tokens of the last stage.
        (parent,) = best([*best(children, 2, FIRST_TOKENS), parent], 1, SECOND_TOKENS)
        if time.perf_counter() > until:
            raise TimeoutError
    return [gated.blocks[i].name for i in sorted(parent)], tokens


@torch.inference_mode()
def likeness(model: Any, blocks: Sequence[Component], tokens: torch.Tensor) -> dict[str, float]:
    """How like its input the output of each layer, and of the stream after each block, is: mean cosine."""
    sums: dict[str, float] = {}
    seen: dict[str, torch.Tensor] = {}
    with hooked(model, blocks, seen):
        for part in tokens.split(8):
            model(input_ids=part, use_cache=False)
            for block in blocks:
                if block.kind == "layer":
                    before, after = seen[f"{block.name}<"], seen[block.name]
                elif block.kind == "attention":
                    before = seen[f"{block.layer_name}<"]
                    after = before + seen[block.name]
                else:
                    after = seen[block.layer_name]
                    before = after - seen[block.name]
                cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
                sums[block.name] = sums.get(block.name, 0.0) + float(cosine.sum()) / tokens.numel()
    return sums


@contextmanager
def hooked(model: Any, blocks: Sequence[Component], seen: dict[str, torch.Tensor]) -> Iterator[None]:
    def note(name: str, whole: bool) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output
            if whole:
                seen[f"{name}<"] = args[0] if args else kwargs["hidden_states"]

        return hook

    hooks = [
        model.get_submodule(b.name).register_forward_hook(note(b.name, b.kind == "layer"), with_kwargs=True)
        for b in blocks
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def by_rules(
    likes: dict[str, float], manifest: ModelManifest, tokens: torch.Tensor, count: int
) -> dict[str, tuple[list[str], int]]:
    """What rules drop, by how alike tokens were found to be before and after each block, and the tokens that they
    forward."""
    layers = [block.name for block in manifest.blocks if block.kind == "layer"]
    alike = sorted(layers, key=lambda name: -likes[name])[: count // 2]
    parts = [block.name for block in manifest.blocks if block.kind != "layer"]
    return {
        "last layers": (layers[-(count // 2) :], 0),
        "last but the final": (layers[-(count // 2) - 1 : -1], 0),
        "cosine, layers": (alike, tokens.numel()),
        "cosine, blocks": (sorted(parts, key=lambda name: -likes[name])[:count], tokens.numel()),
    }


def budgets_of(manifest: ModelManifest, count: int) -> tuple[Budget, Budget]:
    """So many blocks, and the size of as many attention as MLP blocks, half of them each."""
    pair = sum({block.kind: block.num_weights for block in manifest.blocks if block.kind != "layer"}.values())
    whole = sum(component.num_weights for component in manifest.components)
    return Budget(blocks=count), Budget(parameters=1.0 - count // 2 * pair / whole)


def left_by(manifest: ModelManifest, plan: Plan) -> float | None:
    """The share of the layers' weights that a plan leaves."""
    return SearchSpace(manifest.components, ("int8-channel",)).size(plan).parameters


def rows_of(
    replica: Replica, texts: list[str], lengths: tuple[int, int, int], seed: int
) -> tuple[Reference, torch.Tensor]:
    """The reference of prompts of texts, in use, and its rows, prompt and continuation, [prompts, tokens], where the
    model is. `lengths`: prompts, tokens of each, tokens of its continuation."""
    cut, _ = replica.cut_prompts(texts, *lengths, seed)
    reference = replica.make_reference(cut)
    replica.use(reference)
    tokens = np.concatenate([cut.tokens[:, : lengths[1]], reference.continuation], axis=1)
    return reference, torch.from_numpy(tokens).long().to(next(replica.model.parameters()).device)


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.option("--search", "search_text", required=True, type=click.Path(exists=True))
@click.option("--judge", "judge_text", required=True, type=click.Path(exists=True))
@click.option("--blocks", default="4,8,12")
@click.option("--seeds", default=3)
@click.option("--first-seed", default=0)
@click.option("--prompt-tokens", default=PROMPT, help="of the rows that are searched by")
@click.option("--continuation-tokens", default=CONTINUATION, help="of the same")
@click.option("--prompts", default=64, help="that our search compares its last plans on")
@click.option("--few", default=24, help="by which it chooses blocks")
@click.option("--first", default=FloatingSettings().first_prompts, help="on which it measures a plan first")
@click.option("--judged", default=FloatingSettings().exchange_prompts, help="by which it judges exchanges")
@click.option("--patience", default=FloatingSettings().patience, help="rounds of exchanges in a row that gain nothing")
@click.option("--held-out", default=512)
@click.option("--generations", default=0, help="of EvoPress; 0: its default")
@click.option("--evopress-seeds", default=99, help="in how many of the seeds EvoPress runs")
@click.option("--ours/--no-ours", default=True, help="none of our searches: EvoPress and the rules alone")
@click.option("--calibration-tokens", default=CALIBRATION_TOKENS, help="that EvoPress draws from")
@click.option("--repair-tokens", default=0, help="by which plans of ours and EvoPress are repaired; 0: not")
@click.option("--seconds", default=1e9, help="after which nothing more is begun")
@click.option("--out", type=click.Path(), default="")
def main(
    model: str, search_text: str, judge_text: str, blocks: str, seeds: int, first_seed: int, prompt_tokens: int,
    continuation_tokens: int, prompts: int, few: int, first: int, judged: int, patience: int, held_out: int,
    generations: int, evopress_seeds: int, ours: bool, calibration_tokens: int, repair_tokens: int,
    seconds: float, out: str,
) -> None:  # fmt: skip
    """Compare what is dropped of MODEL."""
    take_share()
    began = time.perf_counter()
    until = began + seconds
    settings = FloatingSettings(prompts=few, first_prompts=first, exchange_prompts=judged, patience=patience)
    row = prompt_tokens + continuation_tokens
    spec = ModelSpec(model, dtype="float32", compile="never")
    folder = Path(click.get_current_context().with_resource(tempfile.TemporaryDirectory()))
    replica = Replica(spec, ReplicaSettings(weights_folder=str(folder)))
    manifest = replica.manifest()
    texts = {name: [Path(path).read_text()] for name, path in (("search", search_text), ("judge", judge_text))}
    counts = [int(part) for part in blocks.split(",")]
    rows: list[dict[str, Any]] = []
    values: dict[tuple[int, int, str], np.ndarray] = {}

    def note(text: str) -> None:
        click.echo(f"{time.perf_counter() - began:7.1f} s  {text}", err=True)

    held, _ = replica.cut_prompts(texts["judge"], held_out, PROMPT, CONTINUATION, 0)
    judge = replica.make_reference(held)
    replica.use(judge)
    note(f"{judge.num_prompts} held-out prompts")
    judging = Measuring(replica)
    parts = [block for block in manifest.blocks if block.kind != "layer"]
    for seed in range(first_seed, first_seed + seeds):
        if time.perf_counter() > until:
            break
        lengths = calibration_tokens // row, prompt_tokens, continuation_tokens
        reference, tokens = rows_of(replica, texts["search"], lengths, seed)
        note(f"seed {seed}: {reference.num_prompts} prompts")
        # Now, for later a plan stands in the model.
        likes = likeness(replica.model, manifest.blocks, tokens[:prompts])
        gated = Gated(replica.model, parts, tokens, prompt_tokens) if seed < first_seed + evopress_seeds else None
        for count in counts:
            plans: dict[str, tuple[Plan, int]] = {}
            for name, (names, spent) in by_rules(likes, manifest, tokens[:prompts], count).items():
                plans[name] = dropping(names), spent
            budgets = zip(("floating", "floating, same size"), budgets_of(manifest, count), strict=True)
            for name, budget in budgets if ours else ():
                measuring = Measuring(replica, judging.known, row=row)
                plans[name] = floating(measuring, manifest, reference, budget, prompts, settings)
            note(f"seed {seed}, {count} blocks: rules and ours")
            if gated is not None:
                try:
                    found, spent = evopress(gated, count // 2, seed, generations or None, until)
                    plans["EvoPress"] = dropping(found), spent
                    note(f"seed {seed}, {count} blocks: EvoPress")
                except TimeoutError:
                    note(f"seed {seed}, {count} blocks: EvoPress was not finished")
            weights: dict[str, str] = {}
            for name in [name for name in REPAIRED if name in plans and repair_tokens]:
                plan, spent = plans[name]
                again = f"{name}, repaired"
                weights[again] = repaired(replica, spec, plan, texts["search"], repair_tokens, seed, folder)
                plans[again] = plan, spent + PASSES * repair_tokens
            for name, (plan, spent) in plans.items():
                kl = values[seed, count, name] = kl_of(judging, plan, judge, weights=weights.get(name, ""))
                said = {"seed": seed, "blocks": count, "rule": name, "kl": float(kl.mean()), "tokens": spent}
                rows.append(said | {"parameters": left_by(manifest, plan), "dropped": sorted(plan.dropped)})
            note(f"seed {seed}, {count} blocks: judged")
            if out:
                Path(out).write_text(json.dumps({"model": model, "held_out": held_out, "rows": rows}, indent=1))
    show(rows, values)


def _interval(ours: np.ndarray, theirs: np.ndarray) -> str:
    """By how much our KL is less, with its interval, and the ratio of the means."""
    found = paired_difference(ours, theirs, seed=0)
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}] x {ours.mean() / theirs.mean():.2f}"


def show(rows: Sequence[dict[str, Any]], values: dict[tuple[int, int, str], np.ndarray]) -> None:
    """A line for each number of blocks and rule: KL (mean over seeds), its ratio to EvoPress's, tokens."""
    click.echo(
        f"{'blocks':>6}  {'rule':<29}  {'KL':>8}  {'least':>7}  {'most':>7}  {'left':>6}  {'Mtokens':>8}  ours less"
    )
    known = {row["rule"] for row in rows}
    for count in dict.fromkeys(row["blocks"] for row in rows):
        for rule in dict.fromkeys(row["rule"] for row in rows):
            own = [row for row in rows if (row["blocks"], row["rule"]) == (count, rule)]
            if not own:
                continue
            kls = [row["kl"] for row in own]
            ours = "floating, same size" if rule == "EvoPress" else "floating"
            pairs = [(values[r["seed"], count, ours], values[r["seed"], count, rule]) for r in own if ours in known]
            interval = ""
            if pairs and rule != ours:
                interval = _interval(*(np.concatenate([pair[at] for pair in pairs]) for at in (0, 1)))
            click.echo(
                f"{count:>6}  {rule:<29}  {np.mean(kls):8.4f}  {min(kls):7.4f}  {max(kls):7.4f}  "
                f"{np.mean([r['parameters'] for r in own]):6.1%}  {np.mean([r['tokens'] for r in own]) / 1e6:8.3f}  "
                f"{interval}"
            )


if __name__ == "__main__":
    main()
