"""What schemes do and take, uniform over a model: KL on held-out prompts, differences paired by prompt; the time of a
probe under each, beside that under the first; and how far products in bfloat16, which a search measures, are from
exact ones of the codes, which kernels for them come to.

    python benchmarks/scheme_values.py kl MODEL HELD_OUT CALIBRATION int4-g64,awq-int4-g64
    python benchmarks/scheme_values.py seconds TOKENIZER_FOLDER TEXT int8-channel nvfp4 fp8-tensor --layers 8
    python benchmarks/scheme_values.py products fp8-channel nvfp4 w8a8-channel

Of several schemes with commas between them each is held against the first, over the components that fit all of them.
`seconds` probes every seventh component of
a random Llama of 4,096 x 11,008.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, Reference, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.core.statistics import paired_difference
from dtmsearch.model.compress.number_rounding import calibrated_scale, largest_of, round_inputs, spread, weight_codes
from dtmsearch.model.replica.in_memory import InMemoryReplica
from dtmsearch.model.replica.replica import Replica

SEED = 0
CALIBRATION_ROWS, CALIBRATION_TOKENS = 64, 128


def referenced(replica: Replica, text: Path, prompts: int, tokens: int) -> Reference:
    """A reference of the replica's model, in use."""
    cut, _ = replica.cut_prompts([text.read_text(encoding="utf-8")], prompts, tokens, tokens, SEED)
    reference = replica.make_reference(cut)
    replica.use(reference)
    return reference


def calibrated(replica: Replica, text: Path, plans: Sequence[Plan], rows: int) -> str:
    """The id of a calibration by which the plans may be applied."""
    found = replica.cut_calibration([text.read_text(encoding="utf-8")], rows, CALIBRATION_TOKENS, SEED)
    replica.use_calibration(found)
    replica.gather_statistics(found)
    for plan in plans:
        replica.solve(found.id, plan.entries)
    return found.id


def kl(args: argparse.Namespace) -> None:
    spec = ModelSpec(args.model, dtype=args.dtype, scale_dtype=args.dtype, compile="never")
    replica = Replica(spec, ReplicaSettings(batch_tokens=args.batch_tokens))
    reference = referenced(replica, args.text, args.prompts, args.tokens)
    lines = [line.split(",") for line in args.schemes]
    parsed = [parse_scheme(name) for line in lines for name in line]
    components = [c for c in replica.manifest().components if all(s.misfit(c.shape) is None for s in parsed)]
    plans = {name: Plan.uniform(components, name) for line in lines for name in line}
    known = calibrated(replica, args.calibration, list(plans.values()), args.rows)
    of = f"{len(components)} components, {reference.num_prompts} prompts of 2 x {args.tokens} tokens"
    print(f"{Path(args.model).name}, {args.dtype}, {of}")
    found: dict[str, EvalResult] = {}
    for name, plan in plans.items():
        began = time.perf_counter()
        request = EvalRequest(plan, reference.id, (0, reference.num_prompts), ("kl",), calibration_id=known)
        (outcome,) = replica.evaluate([request])
        assert isinstance(outcome, EvalResult), outcome
        found[name] = outcome
        first = next(line[0] for line in lines if name in line)
        own, other = outcome.kl, found[first].kl
        assert own is not None and other is not None
        said = f"{name:24} KL {own.mean():.5f}  FDT {outcome.fdt.mean():6.2f}  {time.perf_counter() - began:6.1f} s"
        if name != first:
            apart = paired_difference(own, other, SEED)
            interval = f"{apart.mean:+.5f} ({apart.low:+.5f} to {apart.high:+.5f})"
            said += f"  {own.mean() / other.mean():.3f} of {first}'s; {interval}"
        print(said, flush=True)


def seconds(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 43 // 16,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 128,
        num_key_value_heads=args.hidden // 128,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    replica = InMemoryReplica(model, tokenizer)
    reference = referenced(replica, args.text, args.prompts, args.tokens)
    components = replica.manifest().components[:: args.every]
    plans = {name: [Plan.of({c.name: name}) for c in components] for name in args.schemes}
    known = calibrated(replica, args.text, [p for several in plans.values() for p in several], args.rows)
    print(f"{len(components)} components of {args.layers} layers of {args.hidden}, {args.prompts} prompts, {device}")
    fastest: dict[str, float] = {}
    for turn in range(args.turns + 1):
        for name, several in plans.items():
            requests = [
                EvalRequest(plan, reference.id, (0, args.prompts), ("kl",), calibration_id=known) for plan in several
            ]
            began = time.perf_counter()
            outcomes = replica.evaluate(requests)
            took = time.perf_counter() - began
            assert all(isinstance(outcome, EvalResult) for outcome in outcomes), outcomes
            if turn:  # the first warms up
                fastest[name] = min(took, fastest.get(name, took))
    base = fastest[args.schemes[0]]
    for name, took in fastest.items():
        print(f"{name:24} {took:7.3f} s  {took / base:.3f} of {args.schemes[0]}'s")


def products(schemes: Sequence[str]) -> None:
    """Of random numbers [128, 2048] and weights [256, 2048] in bfloat16; errors are parts of the outputs' norm."""
    torch.manual_seed(SEED)
    inputs, weight = torch.randn(128, 2048).bfloat16(), (0.02 * torch.randn(256, 2048)).bfloat16()
    whole = inputs.double() @ weight.double().T
    print(f"{'scheme':16} {'rounding itself':>16} {'as measured':>12} {'exact, in bfloat16':>19}")
    for name in schemes:
        scheme = parse_scheme(name)
        assert scheme.weights is not None and scheme.activations is not None, f"{name} rounds no inputs"
        rounding = scheme.activations
        calibrated = calibrated_scale(inputs.abs().amax().float(), rounding) if rounding.static else None
        codes = weight_codes(weight, scheme.weights, largest_of(weight))
        factors = codes.scales / codes.tensor_scale if scheme.weights.has_tensor_scale else codes.scales
        exact = (
            round_inputs(inputs.float(), rounding, calibrated).double()
            @ (codes.values.double() * spread(factors, scheme.weights, weight.shape[1]).double()).T
        )
        measured = torch.nn.functional.linear(round_inputs(inputs, rounding, calibrated), codes.dense(torch.bfloat16))
        found = [
            float((one.double() - other).norm() / other.norm())
            for one, other in ((exact, whole), (measured, exact), (exact.bfloat16(), exact))
        ]
        print(f"{name:16} {found[0]:16.4f} {found[1]:12.5f} {found[2]:19.5f}")


def main() -> None:
    if sys.argv[1:2] == ["products"]:
        products(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kl", "seconds"))
    parser.add_argument("model", help="a model's folder; of `seconds` that of a tokenizer")
    parser.add_argument("text", type=Path)
    parser.add_argument("calibration_and_schemes", nargs="+", help="of `kl` first the calibration text")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rows", type=int, default=CALIBRATION_ROWS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-tokens", type=int, default=0)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--every", type=int, default=7)
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    if args.what == "kl":
        args.calibration, args.schemes = Path(args.calibration_and_schemes[0]), args.calibration_and_schemes[1:]
        kl(args)
    else:
        args.schemes = args.calibration_and_schemes
        seconds(args)


if __name__ == "__main__":
    main()
