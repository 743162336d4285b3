"""A mixture of experts trained here, and what searches find on it at equal stored bits and at equal bits that a token
reads: `auto` with the experts of a layer tied and untied, the best uniform plan, and the allocation of MC-MoE.

    python benchmarks/mixture.py TRAIN TEXT HELD_OUT --tokenizer FOLDER --out FOLDER [--train-seconds 120]

Trains a Qwen3-MoE of 16 experts a layer, of which a token is given to 2, on TRAIN (.zst is unpacked), and saves it to
OUT/model; what is there already is taken. Searches read TEXT, plans are compared on HELD_OUT. A case is a uniform plan,
whose stored bits are one budget and whose bits read by a token another. Writes OUT/mixture.json after every row and,
last, one table.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import torch
from search_quality import SETTINGS, Bench, Case
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from dtmsearch.core.components import Experts
from dtmsearch.core.metrics import summarize
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.statistics import paired_difference
from dtmsearch.core.strategy_settings import McMoeSettings
from dtmsearch.search.solver.damage_model import WeightErrors
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.mc_moe import mc_moe_plan

_LEVELS = tuple(f"int{bits}-g32-asym" for bits in range(2, 7))
_SEED = 0


@dataclass(frozen=True)
class Shape:
    """Of the mixture: every size is a multiple of 32, so that groups divide all matrices."""

    hidden: int = 384
    layers: int = 6
    heads: int = 6
    experts: int = 16
    chosen: int = 2
    inner: int = 320

    def config(self, vocabulary: int, end: int) -> Qwen3MoeConfig:
        return Qwen3MoeConfig(  # type: ignore[call-arg] # `head_dim` is read, if not declared
            vocab_size=vocabulary, hidden_size=self.hidden, num_hidden_layers=self.layers, head_dim=64,
            num_attention_heads=self.heads, num_key_value_heads=max(self.heads // 3, 1), intermediate_size=self.inner,
            moe_intermediate_size=self.inner, num_experts=self.experts, num_experts_per_tok=self.chosen,
            norm_topk_prob=True, max_position_embeddings=1024, router_aux_loss_coef=0.01, bos_token_id=None,
            eos_token_id=end, pad_token_id=None, tie_word_embeddings=False,
        )  # fmt: skip


@dataclass
class Row:
    """A plan within a budget: `stored` and `active` are its bits per weight, of all and of what a token reads;
    `difference` is its KL less that of the best uniform plan, with its interval, paired over the held-out prompts."""

    case: str
    budget: str
    plan_of: str
    stored: float
    active: float
    kl: float
    vs_uniform: float
    difference: list[float]
    fdt: float
    evaluations: int
    seconds: float
    plan: dict[str, str]


# --- the mixture ---


def read_text(path: Path, most: int) -> str:
    """At most so many bytes of a text, unpacked if its name ends in .zst."""
    with pa.input_stream(str(path), compression="zstd" if path.suffix == ".zst" else None) as stream:
        content: bytes = stream.read(most)
    return content.decode("utf-8", errors="ignore")


def tokens_of(text: str, tokenizer: Any, end: int) -> Tensor:
    """All tokens of a text [tokens], in pieces that the tokenizer takes side by side."""
    pieces = [text[at : at + 20_000] for at in range(0, len(text), 20_000)]
    ids = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for piece in ids for token in (*piece, end)])


def batches(tokens: Tensor, rows: int, length: int) -> Iterator[Tensor]:
    """Windows [rows, length] from random places, for ever."""
    random = np.random.default_rng(_SEED)
    while True:
        starts = random.integers(0, len(tokens) - length, rows)
        yield torch.stack([tokens[start : start + length] for start in starts.tolist()])


def train(
    text: Path, tokenizer_folder: Path, folder: Path, shape: Shape, seconds: float, steps: int, rows: int, length: int
) -> None:
    """Train a mixture until so many steps or seconds have passed, and save it with its tokenizer in bfloat16."""
    started_at = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    end = int(tokenizer.eos_token_id)
    tokens = tokens_of(read_text(text, 40_000_000), tokenizer, end)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(_SEED)
    # Expert by expert: with weights of 32 bits grouped products are not everywhere to be had.
    config = shape.config(len(tokenizer), end)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").float().to(device).train()
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{weights / 1e6:.1f} million weights, {len(tokens) / 1e6:.1f} million tokens of text", flush=True)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), fused=device == "cuda")
    begun_at, losses = time.perf_counter(), []
    for step, batch in enumerate(batches(tokens, rows, length)):
        gone = max(step / steps, (time.perf_counter() - begun_at) / seconds)
        if gone >= 1.0:
            break
        rate = 2e-3 * min((step + 1) / 100, 1.0) * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * gone)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch.to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=batch, labels=batch, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % 200 == 0:
            print(f"step {step}: loss {float(losses[-1]):.3f}", flush=True)
    last = float(torch.stack(losses[-50:]).mean())
    print(f"{len(losses)} steps of {rows * length:,} tokens, loss {last:.3f}, {time.perf_counter() - started_at:.0f} s")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model, optimizer
    if device == "cuda":
        torch.cuda.empty_cache()


# --- the comparison ---


class Comparison:
    """Plans of one model, measured on its held-out prompts."""

    def __init__(self, bench: Bench, out: Path, strategy: str) -> None:
        self.bench, self._out, self._strategy = bench, out, strategy
        self.rows: list[Row] = []
        self._uses: dict[tuple[str, ...], Any] = {}

    def space(self, schemes: Sequence[str], budget: Budget, experts: Experts) -> SearchSpace:
        manifest = self.bench.replica.manifest()
        return SearchSpace(
            manifest.components, tuple(schemes), dense_bits=manifest.dense_bits, budget=budget, experts=experts
        )

    def case(self, case: Case, budgets: Sequence[str], plans: Sequence[str], errors: WeightErrors) -> None:
        free = self.space(case.schemes, Budget(), "expert")
        size = free.size(free.uniform(case.uniform))
        limits = {
            "stored": Budget(bits_per_weight=size.bits_per_weight),
            "active": Budget(active_bits_per_weight=size.active_bits_per_weight),
        }
        for name in budgets:
            uniform = self.bench.best_uniform(self.space(case.schemes, limits[name], "expert"))
            (scheme,) = set(uniform.schemes.values())
            self._add(case, name, f"uniform {scheme}", free, uniform, uniform)
            for plan_of in plans:
                space = self.space(case.schemes, limits[name], "layer" if plan_of == "tied" else "expert")
                started_at = time.perf_counter()
                if plan_of == "mc_moe":
                    plan, evaluations = self._mc_moe(space), 0
                else:
                    found = self.bench.run(case, self._strategy, _SEED, space, errors)
                    plan, evaluations = Plan.of(found.plan), found.evaluations
                seconds = time.perf_counter() - started_at
                self._add(case, name, plan_of, free, plan, uniform, evaluations, seconds)

    def _mc_moe(self, space: SearchSpace) -> Plan:
        if space.schemes not in self._uses:
            components = [component.name for component in space.components if component.mixture]
            self._uses[space.schemes] = self.bench.replica.expert_uses(
                components, space.schemes, self.bench.calibrate()
            )
        return mc_moe_plan(space, self._uses[space.schemes], McMoeSettings())

    def _add(
        self, case: Case, budget: str, plan_of: str, space: SearchSpace, plan: Plan, uniform: Plan,
        evaluations: int = 0, seconds: float = 0.0,
    ) -> None:  # fmt: skip
        own, other = self.bench.measure(plan), self.bench.measure(uniform)
        assert own.kl is not None and other.kl is not None
        size, found = space.size(plan), summarize(own)
        between = paired_difference(own.kl, other.kl, 0)
        self.rows.append(
            Row(
                case.name, budget, plan_of, size.bits_per_weight, size.active_bits_per_weight, float(own.kl.mean()),
                float(own.kl.mean() / other.kl.mean()), [between.mean, between.low, between.high], found.fdt_mean,
                evaluations, seconds, plan.schemes,
            )
        )  # fmt: skip
        print(line(self.rows[-1]), flush=True)
        self._out.write_text(json.dumps([asdict(row) for row in self.rows], indent=1))


HEAD = "case      budget  plan                    stored  active      KL  ratio  KL less uniform's          FDT  evals seconds"  # noqa: E501


def line(row: Row) -> str:
    mean, low, high = row.difference
    return (
        f"{row.case:9s} {row.budget:7s} {row.plan_of:22s} {row.stored:7.4f} {row.active:7.4f} {row.kl:7.4f} "
        f"{row.vs_uniform:6.3f}  {mean:+.4f} [{low:+.4f}, {high:+.4f}] {row.fdt:6.2f} {row.evaluations:6d} "
        f"{row.seconds:7.1f}"
    )


def used(bench: Bench) -> str:
    """How evenly held-out text uses the experts: the least and the most used of each layer against the mean."""
    routed = bench.replica.routed_tokens(bench.held_out.id)
    layers: dict[str, list[int]] = {}
    for component in bench.replica.manifest().components:
        if component.mixture and component.kind == "down":
            layers.setdefault(component.mixture, []).append(routed[component.name])
    shares = [(min(own), max(own), sum(own) / len(own)) for own in layers.values()]
    return ", ".join(f"{low / mean:.2f} to {high / mean:.2f}" for low, high, mean in shares)


@click.command()
@click.argument("train_text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("held_out", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--train-seconds", default=120.0, show_default=True)
@click.option("--train-steps", default=1500, show_default=True)
@click.option("--train-rows", default=64, show_default=True)
@click.option("--train-tokens", default=512, show_default=True, help="Of a row.")
@click.option("--cases", default="3,4", show_default=True, help="Widths of the uniform plans that are the budgets.")
@click.option("--budgets", default="stored,active", show_default=True)
@click.option("--plans", default="mc_moe,tied,untied", show_default=True)
@click.option("--strategy", default="auto", show_default=True, help="A name of search_quality.py's settings.")
@click.option("--prompts", default=512, show_default=True)
@click.option("--held-out-prompts", default=256, show_default=True)
@click.option("--tokens", default=100, show_default=True, help="Of a prompt, and of its continuation.")
@click.option("--toy", is_flag=True, help="A mixture of 4 experts, 2 layers and 32 features.")
def main(
    train_text: Path, text: Path, held_out: Path, tokenizer: Path, out: Path, train_seconds: float, train_steps: int,
    train_rows: int, train_tokens: int, cases: str, budgets: str, plans: str, strategy: str, prompts: int,
    held_out_prompts: int, tokens: int, toy: bool,
) -> None:  # fmt: skip
    assert strategy in SETTINGS, f"--strategy is one of {', '.join(SETTINGS)}"
    torch.set_float32_matmul_precision("high")
    out.mkdir(parents=True, exist_ok=True)
    model = out / "model"
    if not (model / "config.json").exists():
        shape = Shape(64, 2, 1, 4, 2, 32) if toy else Shape()
        train(train_text, tokenizer, model, shape, train_seconds, train_steps, train_rows, train_tokens)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    bench = Bench(model, text, held_out, prompts, held_out_prompts, dtype, tokens)
    print(f"use of experts, of the mean: {used(bench)}", flush=True)
    comparison = Comparison(bench, out / "mixture.json", strategy)
    schemes = _LEVELS
    errors = bench.errors(Case("all", schemes, schemes[0]), "plain")
    print(HEAD, flush=True)
    for bits in cases.split(","):
        case = Case(f"bits-{bits}", schemes, f"int{bits}-g32-asym")
        comparison.case(case, budgets.split(","), plans.split(","), errors)
    print("\n" + "\n".join([HEAD, *map(line, comparison.rows)]))


if __name__ == "__main__":
    main()
