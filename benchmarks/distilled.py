"""What recovery training gives back of a smaller model, and what distillation and repair have in it.

    python benchmarks/distilled.py MODEL --search TEXT --judge TEXT --train TEXT --parameters 0.7 --tokens 20e6

`auto` finds a plan of so many of the layers' weights: blocks dropped, channels and heads cut. Then the plan is trained
(`dtmsearch.model.training`, as `dtmsearch recover` does) in several ways, each from the same start: by the text, by the
base model's logits, by these and hidden states, and by logits from units that were not repaired. Loss per token of
held-out text in windows of as many tokens as a training's sequences, its ratio to the base model's, and KL to the base
model. `--only` names some of the ways, so that processes may share them; with `--plan FILE` there is no search (one
that `--plan-out` wrote).
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import click
import pyarrow as pa
import torch
from safetensors.torch import load_file
from structured import CONTINUATION, PROMPT, Measuring, take_share
from widths import RULES, WIDTHS, found_by, named

from dtmsearch.core.evaluation import ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.variant import Variant
from dtmsearch.model.modules.loading import load_model
from dtmsearch.model.replica.replica import Replica
from dtmsearch.model.training.recipe import Recipe
from dtmsearch.model.training.train_loop import Training, train
from dtmsearch.model.weights.trained import START_FILE
from dtmsearch.search.space import SearchSpace

SEQUENCE = 512
# Name -> what of the recipe differs, and whether units that stay were repaired before.
WAYS: dict[str, tuple[dict[str, float], bool]] = {
    "text": ({"distill": 0.0}, True),
    "logits": ({"distill": 1.0}, True),
    "logits and text": ({"distill": 0.5}, True),
    "logits, hidden states": ({"distill": 1.0, "distill_hidden": 1.0}, True),
    "logits, hidden states x 0.1": ({"distill": 1.0, "distill_hidden": 0.1}, True),
    "text, no repair": ({"distill": 0.0}, False),
    "logits, no repair": ({"distill": 1.0}, False),
}


def without_repair(plan: Plan) -> Plan:
    return Plan.of({name: scheme.removesuffix("-repair") for name, scheme in plan.entries})


def text_of(path: str) -> str:
    compression = "zstd" if path.endswith(".zst") else None
    with pa.input_stream(path, compression=compression) as stream:
        return bytes(stream.read()).decode()


@torch.inference_mode()
def judged(model: Any, base: Any, windows: torch.Tensor) -> tuple[float, float]:
    """Loss per token, and KL from the base model, over windows [number, tokens]."""
    losses, divergences = [], []
    for rows in windows.split(8):
        own, wanted = (
            each(input_ids=rows, use_cache=False).logits[:, :-1].float().log_softmax(-1) for each in (model, base)
        )
        losses.append(-own.gather(2, rows[:, 1:, None]).squeeze(2))
        divergences.append((wanted.exp() * (wanted - own)).sum(-1))
    return float(torch.cat(losses).mean()), float(torch.cat(divergences).mean())


def search(
    replica: Replica, text: str, parameters: float, prompts: int, few: int, rows: int, seed: int
) -> tuple[Plan, str]:
    """The plan that `auto` finds, and its calibration."""
    manifest = replica.manifest()
    cut, _ = replica.cut_prompts([text], prompts, PROMPT, CONTINUATION, seed)
    reference = replica.make_reference(cut)
    replica.use(reference)
    groups = replica.model.config.num_key_value_heads
    rules = [f"{rule}-repair" for rule in RULES if rule in ("wanda", "ziplm")]
    cuts = [named(share, rule) for share in WIDTHS for rule in rules]
    cuts += [f"heads-{kept}:{groups}-{rule}" for kept in range(1, groups) for rule in rules]
    blocks = manifest.droppable(("attention", "mlp"), manifest.components)
    space = SearchSpace(
        manifest.components, (), dense_bits=manifest.dense_bits, budget=Budget(parameters=parameters),
        manifest=manifest, blocks=blocks, cut=manifest.cuttable(cuts, manifest.components), cuts=tuple(cuts),
    )  # fmt: skip
    calibration = replica.cut_calibration([text], rows, PROMPT + CONTINUATION, seed + 1000)
    replica.use_calibration(calibration)
    plan, _ = found_by("auto", Measuring(replica), space, reference, prompts, few, calibration.id, {})
    return plan, calibration.id


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.option("--search", "search_text", required=True, type=click.Path(exists=True))
@click.option("--judge", "judge_text", required=True, type=click.Path(exists=True))
@click.option("--train", "train_text", required=True, type=click.Path(exists=True))
@click.option("--parameters", default=0.7, help="of the layers' weights that are left")
@click.option("--tokens", default=20e6, help="of a training; 0: the plan alone")
@click.option("--batch-tokens", default=32_768)
@click.option("--lr", default=1e-3)
@click.option("--precision", default="auto", type=click.Choice(["auto", "float32", "bfloat16"]), help="of a training")
@click.option("--only", default="", help="ways, separated by semicolons")
@click.option("--prompts", default=64)
@click.option("--few", default=16)
@click.option("--rows", default=512, help="of calibration text")
@click.option("--windows", default=256, help="held out")
@click.option("--seed", default=0)
@click.option("--plan", "plan_file", type=click.Path(), default="", help="instead of a search")
@click.option("--plan-out", type=click.Path(), default="")
@click.option("--out", type=click.Path(), default="")
def main(
    model: str, search_text: str, judge_text: str, train_text: str, parameters: float, tokens: float,
    batch_tokens: int, lr: float, precision: Literal["auto", "float32", "bfloat16"], only: str, prompts: int, few: int,
    rows: int, windows: int, seed: int, plan_file: str, plan_out: str, out: str,
) -> None:  # fmt: skip
    """Train what a plan leaves of MODEL."""
    take_share()
    began = time.perf_counter()
    replica = Replica(ModelSpec(model, dtype="float32", compile="never"), ReplicaSettings())
    manifest, text = replica.manifest(), text_of(search_text)
    if plan_file:
        plan = Plan.of(json.loads(Path(plan_file).read_text()))
        calibration = replica.cut_calibration([text], rows, PROMPT + CONTINUATION, seed + 1000)
        replica.use_calibration(calibration)
        calibration_id = calibration.id
    else:
        plan, calibration_id = search(replica, text, parameters, prompts, few, rows, seed)
    if plan_out:
        Path(plan_out).write_text(json.dumps(plan.schemes, indent=1))
    size = SearchSpace(manifest.components, ("int8-channel",)).size(plan)
    click.echo(f"{time.perf_counter() - began:.1f} s: {size.parameters:.2%} of the layers' weights left", err=True)
    device = next(replica.model.parameters()).device
    held = replica.cut_calibration([text_of(judge_text)], windows, SEQUENCE, 0)
    ids = torch.from_numpy(held.tokens).long().to(device)
    found: list[dict[str, Any]] = []
    spec = ModelSpec(model, dtype="float32")
    base = load_model(Path(model), spec, device)

    def note(way: str, file: Path | None, start: Path | None, seconds: float, steps: int) -> None:
        loaded = load_model(Path(model), spec, device)
        named_ = dict(loaded.named_parameters())
        with torch.no_grad():
            for path in (start, file):
                for name, tensor in load_file(path).items() if path is not None else ():
                    named_[name].copy_(tensor)
        loss, kl = judged(loaded, base, ids)
        found.append({"way": way, "loss": loss, "kl": kl, "seconds": seconds, "steps": steps, "lr": lr})
        click.echo(
            f"{time.perf_counter() - began:7.1f} s  {way:<28} loss {loss:.4f}, {loss / found[0]['loss']:.4f} of the "
            f"base's, KL {kl:.4f}, {seconds:.0f} s"
        )
        if out:
            what = {"model": model, "parameters": size.parameters, "plan": plan.schemes, "tokens": tokens}
            Path(out).write_text(json.dumps(what | {"rows": found}, indent=1))

    note("base", None, None, 0.0, 0)
    if not tokens:
        return
    texts = [text_of(train_text)]
    steps = max(1, round(tokens / batch_tokens))
    with tempfile.TemporaryDirectory() as scratch:
        for way in only.split(";") if only else WAYS:
            settings, repaired = WAYS[way]
            folder = Path(scratch) / way.replace(" ", "-") / "t"
            folder.mkdir(parents=True)
            variant = Variant(plan if repaired else without_repair(plan), "", calibration_id)
            replica.save_pruned(variant, str(folder))
            note(f"cut{'' if repaired else ', no repair'}", None, folder / START_FILE, 0.0, 0)
            training = Training(spec, folder, folder.parent / "weights")
            recipe = Recipe(
                ("text",), steps, 0, batch_tokens=batch_tokens, sequence_tokens=SEQUENCE, lr=lr, seed=seed,
                precision=precision, checkpoint_steps=10**6, **settings,
            )  # fmt: skip
            done = train(training, texts, recipe)
            file = training.weights_folder / f"{done['weights_id']}.safetensors"
            note(way, file, folder / START_FILE, done["seconds"], steps)


if __name__ == "__main__":
    main()
