"""KL against milliseconds: what `auto` finds under budgets of decode_ms, blocks dropped and cut, and what that takes.

    python benchmarks/front.py MODEL --search TEXT --judge TEXT --shares 0.9,0.8,0.7,0.6,0.5 --out front.json

The table of times is measured first, as `dtmsearch profile --cut` does. A share is of the table's own time for all
layers. Then the model, with its blocks really smaller or gone, decodes tokens and reads a prompt in turns with the base
model: what was foretold is the base's time less what the table has for the difference. `one width` are plans by a rule,
without a search: all MLPs alike, of shares of the channels that go. `--rounds 0` leaves the times out, and `--plans`
has those of another call's plans taken, with their KL: a front by the table of one device may be searched on another.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from exported_times import Runs
from structured import CONTINUATION, PROMPT, Measuring, kl_of, take_share
from widths import found_by, named, one_width

from dtmsearch.config.stop_section import TimesSection
from dtmsearch.core.evaluation import ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.variant import Variant
from dtmsearch.model.replica.replica import Replica
from dtmsearch.search.space import SearchSpace
from dtmsearch.workflows.profile import profile

SHARES_CUT = (0.1, 0.2, 0.35, 0.5, 0.7)


@torch.inference_mode()
def measured(replica: Replica, plan: Plan, calibration: str, prompt: torch.Tensor, rounds: int) -> list[float]:
    """Milliseconds of a token and of the prompt: of the base model, and under the plan."""
    found: dict[str, list[tuple[float, float]]] = {"base": [], "plan": []}
    for number in range(rounds + 1):
        for label, held in (("base", Plan()), ("plan", plan)):
            with replica.under(Variant(held, "", calibration)) as model:
                taken = Runs(model, prompt, 16, eager=False).once()
            if number:  # the first is a warm-up
                found[label].append(taken)
    return [statistics.median(each[at] for each in found[label]) for label in ("base", "plan") for at in (0, 1)]


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.option("--search", "search_text", required=True, type=click.Path(exists=True))
@click.option("--judge", "judge_text", required=True, type=click.Path(exists=True))
@click.option("--shares", default="0.9,0.8,0.7,0.6,0.5", help="of the milliseconds that the table has for a token")
@click.option("--rule", default="wanda-repair")
@click.option("--drop/--no-drop", default=True, help="blocks may go whole, too")
@click.option("--prompts", default=64)
@click.option("--few", default=16)
@click.option("--rows", default=128, help="of calibration text")
@click.option("--held-out", default=512)
@click.option("--prefill-tokens", default=512)
@click.option("--rounds", default=9)
@click.option("--times", "times_file", type=click.Path(), default="", help="a table that was measured before")
@click.option("--plans", "plans_file", type=click.Path(), default="", help="what another call wrote")
@click.option("--seed", default=0)
@click.option("--seconds", default=1e9, help="after which nothing more is begun")
@click.option("--out", type=click.Path(), default="")
def main(
    model: str, search_text: str, judge_text: str, shares: str, rule: str, drop: bool, prompts: int, few: int,
    rows: int, held_out: int, prefill_tokens: int, rounds: int, times_file: str, plans_file: str, seed: int,
    seconds: float, out: str,
) -> None:  # fmt: skip
    """The front of MODEL."""
    take_share()
    began = time.perf_counter()
    cuts = tuple(named(share, rule) for share in SHARES_CUT)
    if times_file:
        section = TimesSection.model_validate(json.loads(Path(times_file).read_text()))
    else:
        content = profile(model, ["dense"], "", "float32", prefill_tokens, cuts=cuts).content()
        section = TimesSection.model_validate(content)
    replica = Replica(ModelSpec(model, dtype="float32", compile="never"), ReplicaSettings())
    manifest = replica.manifest()
    texts = {name: [Path(path).read_text()] for name, path in (("search", search_text), ("judge", judge_text))}
    held, _ = replica.cut_prompts(texts["judge"], held_out if not plans_file else 1, PROMPT, CONTINUATION, 0)
    judge = replica.make_reference(held)
    replica.use(judge)
    cut, _ = replica.cut_prompts(texts["search"], prompts if not plans_file else 1, PROMPT, CONTINUATION, seed)
    reference = replica.make_reference(cut)
    replica.use(reference)
    calibration = replica.cut_calibration(texts["search"], rows, PROMPT + CONTINUATION, seed + 1000)
    replica.use_calibration(calibration)
    space = SearchSpace(
        manifest.components, (), dense_bits=manifest.dense_bits, times=section.table, manifest=manifest,
        blocks=manifest.droppable(("attention", "mlp"), manifest.components) if drop else (),
        cut=manifest.cuttable(cuts, manifest.components), cuts=cuts,
    )  # fmt: skip
    whole = space.size(Plan())
    assert whole.decode_ms is not None and whole.prefill_ms is not None
    device = next(replica.model.parameters()).device
    prompt = torch.randint(5, replica.model.config.vocab_size, (1, section.prefill_tokens), device=device)
    judging, found = Measuring(replica), list[dict[str, Any]]()
    rivals = [("one width", share, one_width(manifest, share, rule)) for share in SHARES_CUT]
    asked: list[tuple[str, float, Plan | None]] = [("auto", share, None) for share in map(float, shares.split(","))]
    before = json.loads(Path(plans_file).read_text())["rows"] if plans_file else []
    kls = {(row["plan"], row["share"]): row["kl"] for row in before}
    every = [(row["plan"], row["share"], Plan.of(row["cut"])) for row in before] or [*asked, *rivals]
    for label, share, known in every:
        if time.perf_counter() - began > seconds:
            break
        plan, tokens = known, 0
        if plan is None:
            within = replace(space, budget=Budget(decode_ms=share * whole.decode_ms))
            plan, tokens = found_by("auto", Measuring(replica), within, reference, prompts, few, calibration.id, {})
        size = space.size(plan)
        kl = kls.get((label, share)) or float(kl_of(judging, plan, judge, calibration.id).mean())
        assert size.decode_ms is not None and size.prefill_ms is not None
        row: dict[str, Any] = {"share": share, "plan": label, "kl": kl, "tokens": tokens}
        row |= {"parameters": size.parameters, "cut": plan.schemes}
        if rounds:
            taken = measured(replica, plan, calibration.id, prompt, rounds)
            row |= dict(zip(("base_decode", "base_prefill", "decode", "prefill"), taken, strict=True))
            row["foretold_decode"] = row["base_decode"] - whole.decode_ms + size.decode_ms
            row["foretold_prefill"] = row["base_prefill"] - whole.prefill_ms + size.prefill_ms
        found.append(row)
        click.echo(f"{time.perf_counter() - began:7.1f} s  {_line(row)}", err=True)
        if out:
            Path(out).write_text(json.dumps({"model": model, "times": section.model_dump(), "rows": found}))
    for row in found:
        click.echo(_line(row))


def _line(row: dict[str, Any]) -> str:
    said = f"{row['plan']:<10} {row['share']:.2f}  KL {row['kl']:.4f}  {row['parameters']:7.2%} left"
    if "decode" not in row:
        return said
    return (
        f"{said}  decode {row['decode']:.3f} of {row['base_decode']:.3f} ms, over foretold "
        f"{row['decode'] / row['foretold_decode']:.3f}; prefill {row['prefill']:.2f} of {row['base_prefill']:.2f} ms, "
        f"over foretold {row['prefill'] / row['foretold_prefill']:.3f}"
    )


if __name__ == "__main__":
    main()
