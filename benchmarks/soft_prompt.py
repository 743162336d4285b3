"""Does a soft prompt that is trained for a compressed model buy back what it lost, beside the same bytes of bits?

    python benchmarks/soft_prompt.py MODEL TRAIN.txt HELD-OUT.txt [--scheme int3-g64] [--wider int4-g64] [--tokens 16]

A few vectors in front of every text are trained by the log loss of text, all weights as they are ("Compress, Then
Prompt", arXiv 2305.11186), for the compressed model and, to tell what the prompt does for any model on such text, for
the base model. Beside it: the components whose wider scheme takes the same bytes, chosen by what each does alone, and
how many bytes of wider components it takes to come to the prompt's perplexity. Perplexity and KL(base || model) on
held-out windows of text, the same positions for all.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtmsearch.core.components import Component
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.model.replica.in_memory import manifest_of, weights_of


def windows_of(tokenizer: Any, text: str, length: int, most: int) -> Tensor:
    """[windows, length] of a text, one behind the other."""
    ids = tokenizer(text[: most * length * 8], add_special_tokens=False)["input_ids"]
    count = min(most, len(ids) // length)
    return torch.tensor(ids[: count * length]).reshape(count, length)


def logits_of(model: Any, rows: Tensor, prompt: Tensor | None) -> Tensor:
    """[rows, tokens - 1, vocabulary]: what predicts each token but the first."""
    if prompt is None:
        return model(input_ids=rows, use_cache=False).logits[:, :-1].float()
    embedded = model.get_input_embeddings()(rows)
    front = prompt.to(embedded.dtype).expand(len(rows), -1, -1)
    states = torch.cat([front, embedded], dim=1)
    return model(inputs_embeds=states, use_cache=False).logits[:, len(prompt) : -1].float()


def nats_of(logits: Tensor, rows: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.inference_mode()
def judged(model: Any, rows: Tensor, prompt: Tensor | None = None, base: Any = None) -> tuple[float, float]:
    """Perplexity, and KL(base || model) in nats per token (0 without a base model)."""
    nats, distance = [], []
    for part in rows.split(8):
        logits = logits_of(model, part, prompt)
        nats.append(float(nats_of(logits, part)) * len(part))
        if base is not None:
            theirs = logits_of(base, part, None).log_softmax(dim=2)
            own = logits.log_softmax(dim=2)
            distance.append(float((theirs.exp() * (theirs - own)).sum(dim=2).mean()) * len(part))
    return math.exp(sum(nats) / len(rows)), sum(distance) / len(rows)


def trained(model: Any, rows: Tensor, tokens: int, steps: int, batch: int, rate: float) -> Tensor:
    """A soft prompt [tokens, hidden], begun as embeddings of the text's own tokens."""
    random = torch.Generator().manual_seed(0)
    first = rows.cpu().flatten()[torch.randint(rows.numel(), (tokens,), generator=random)].to(rows.device)
    prompt = model.get_input_embeddings()(first).detach().float().clone().requires_grad_(True)
    scale = float(prompt.detach().std())
    optimizer = torch.optim.Adam([prompt], lr=rate * scale)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate * scale, total_steps=steps)
    for _ in range(steps):
        chosen = rows[torch.randint(len(rows), (batch,), generator=random).to(rows.device)]
        loss = nats_of(logits_of(model, chosen, prompt), chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return prompt.detach()


def bytes_of(component: Component, scheme: str) -> float:
    return parse_scheme(scheme).stored_bits(component.shape, 16) / 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--scheme", default="int3-g64")
    parser.add_argument("--wider", default="int4-g64")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.1, help="of the spread of embeddings, per step of Adam")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--probe-windows", type=int, default=16)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    load = AutoModelForCausalLM.from_pretrained
    base, model = (load(given.model, dtype=torch.float32).to(device).eval().requires_grad_(False) for _ in "12")
    train = windows_of(tokenizer, given.train.read_text(errors="replace"), given.length, 4_000).to(device)
    held_out = windows_of(tokenizer, given.held_out.read_text(errors="replace"), given.length, given.windows).to(device)
    probes = train[: given.probe_windows]
    components = manifest_of(model).components
    weights, narrow = weights_of(model), Plan.uniform(components, given.scheme)

    def tell(what: str, extra_bytes: float, prompt: Tensor | None = None, own: Any = model) -> float:
        perplexity, distance = judged(own, held_out, prompt, base)
        print(f"{what:44} {extra_bytes / 1000:9.1f} kB  PPL {perplexity:8.3f}  KL {distance:.4f}", flush=True)
        return perplexity

    print(f"{given.model}: {len(held_out)} held-out windows of {given.length} tokens, {len(train)} to train on")
    tell("base model", 0.0, None, base)
    weights.become(narrow)
    tell(given.scheme, 0.0)
    began = time.perf_counter()
    prompt = trained(model, train, given.tokens, given.steps, given.batch, given.rate)
    budget = prompt.numel() * 2.0
    wanted = tell(f"{given.scheme}, {given.tokens} trained vectors", budget, prompt)
    print(f"  (trained in {time.perf_counter() - began:.1f} s)")
    own = trained(base, train, given.tokens, given.steps, given.batch, given.rate)
    tell(f"base model, {given.tokens} trained vectors of its own", budget, own, base)

    def lifted(names: Sequence[str]) -> Plan:
        return Plan.of(dict(narrow.schemes) | dict.fromkeys(names, given.wider))

    cost = {c.name: bytes_of(c, given.wider) - bytes_of(c, given.scheme) for c in components}
    at_first = math.log(judged(model, probes)[0])
    gain = {}
    for component in components:
        weights.become(lifted([component.name]))
        gain[component.name] = (at_first - math.log(judged(model, probes)[0])) / cost[component.name]
    order = sorted(gain, key=lambda name: -gain[name])
    same: list[str] = []
    for name in order:
        if gain[name] > 0.0 and sum(cost[each] for each in [*same, name]) <= budget:
            same.append(name)
    weights.become(lifted(same))
    tell(f"{len(same)} components in {given.wider}", sum(cost[name] for name in same))
    low, high = 0, len(order)
    while high - low > 1:  # the fewest of the order that come to the prompt's perplexity
        middle = (low + high) // 2
        weights.become(lifted(order[:middle]))
        low, high = (low, middle) if judged(model, held_out)[0] <= wanted else (middle, high)
    weights.become(lifted(order[:high]))
    needed = sum(cost[name] for name in order[:high])
    reached = tell(f"{high} components in {given.wider}", needed)
    what = "comes to" if reached <= wanted else "does not come to"
    print(f"that {what} the trained vectors' perplexity, in {needed / budget:.0f} times their bytes")


if __name__ == "__main__":
    main()
