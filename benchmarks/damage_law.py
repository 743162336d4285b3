"""Where damage(component, scheme) = alpha(component) x error(scheme) holds: residuals by family and kind of error.

    python benchmarks/damage_law.py MODEL TEXT --out FOLDER [--prompts 32]

Every component alone under every scheme; the KL's ratio to that under the family's middle scheme, against the ratio of
the errors, both as logarithms. `drift` is the mean residual, `spread` its standard deviation over components: the law
holds where both are near zero. Then the share of divergent tokens over the square root of KL, for uniform plans.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import numpy as np
from search_quality import CONTINUATION, Bench

from dtmsearch.core.calibration import WeightError
from dtmsearch.core.evaluation import EvalFailure, EvalRequest
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.core.schemes import parse_scheme

_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
# family -> its schemes, the one that the others are compared with first.
FAMILIES: dict[str, tuple[str, ...]] = {
    "rounding": ("int3-g32-asym", "int2-g32-asym", "int4-g32-asym", "int5-g32-asym"),
    "rounding, other groups": ("int3-g32-asym", "int3-g64-asym", "int3-g128", "int3-channel", "int4-channel"),
    "gptq": ("gptq-int3-g32-asym", "gptq-int2-g32-asym", "gptq-int4-g32-asym"),
    "gptq by rounding's alpha": ("int3-g32-asym", "gptq-int3-g32-asym"),
    "magnitude": ("magnitude-0.5", *(f"magnitude-{s}" for s in _SHARES if s != 0.5)),
    "wanda": ("wanda-0.5", *(f"wanda-{s}" for s in _SHARES if s != 0.5)),
    "sparsegpt": ("sparsegpt-0.5", "sparsegpt-0.3", "sparsegpt-0.7"),
    "N:M": ("wanda-0.5", "wanda-2:4", "wanda-4:8", "magnitude-2:4"),
    "w8a8": ("int8-channel", "w8a8", "llm-int8"),
    "pairs": ("wanda-0.5", "int4-g32-asym+wanda-0.5", "int3-g32-asym+wanda-0.5"),
    "pruning by rounding's alpha": ("int3-g32-asym", "wanda-0.5", "magnitude-0.5"),
}
_KINDS = ("plain", "weighted_by_inputs", "weighted_by_hessian")


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--prompts", default=32, show_default=True)
@click.option("--every", default=1, show_default=True, help="Take every Nth component.")
@click.option("--dtype", default="float32", show_default=True)
def main(model: Path, text: Path, out: Path, prompts: int, every: int, dtype: str) -> None:
    bench = Bench(model, text, text, prompts, prompts, dtype)
    components = [c.name for c in bench.replica.manifest().components][::every]
    schemes = list(dict.fromkeys(s for members in FAMILIES.values() for s in members))
    damages: dict[tuple[str, str], float] = {}
    errors: dict[tuple[str, str], WeightError] = {}
    for scheme in schemes:
        damages |= _damages(bench, components, scheme, prompts)
        found = bench.replica.weight_errors(components, [scheme], bench.calibrate(), True)
        errors |= {(e.component, e.scheme): e for e in found}
    lines = [line for family in FAMILIES for line in _residuals(family, components, damages, errors)]
    lines += ["", *_square_root(bench, schemes)]
    print("\n".join(lines))
    out.mkdir(parents=True, exist_ok=True)
    content = [[*key, value, *(getattr(errors[key], kind) for kind in _KINDS)] for key, value in damages.items()]
    (out / "damage_law.json").write_text(json.dumps({"rows": content, "table": lines}))


def _damages(bench: Bench, components: Sequence[str], scheme: str, prompts: int) -> dict[tuple[str, str], float]:
    """KL of each component alone; those that cannot be measured are left out."""
    plans = [Plan().with_(Perturbation(component, scheme)) for component in components]
    requests = [bench.named(EvalRequest(plan, bench.held_out.id, (0, prompts), ("kl",))) for plan in plans]
    outcomes = bench.replica.evaluate(requests)
    return {
        (component, scheme): float(outcome.kl.mean())
        for component, outcome in zip(components, outcomes, strict=True)
        if not isinstance(outcome, EvalFailure) and outcome.kl is not None
    }


def _residuals(
    family: str,
    components: Sequence[str],
    damages: Mapping[tuple[str, str], float],
    errors: Mapping[tuple[str, str], WeightError],
) -> list[str]:
    """Lines of the table: drift and spread for each kind of error."""
    middle, *others = FAMILIES[family]
    lines = []
    for scheme in others:
        cells = []
        for kind in _KINDS:
            values = [
                np.log(damages[c, scheme] / damages[c, middle])
                - np.log(getattr(errors[c, scheme], kind) / getattr(errors[c, middle], kind))
                for c in components
                if min(damages.get((c, s), 0.0) for s in (scheme, middle)) > 0.0
                and min(getattr(errors[c, s], kind) for s in (scheme, middle)) > 0.0
            ]
            cells.append(f"{np.mean(values):+6.2f} {np.std(values):5.2f}" if values else "     -     -")
        lines.append(f"{family:28s} {scheme:26s} {'   '.join(cells)}")
    return lines


def _square_root(bench: Bench, schemes: Sequence[str]) -> list[str]:
    """SDT over the square root of KL for every scheme on all components."""
    lines = []
    for scheme in schemes:
        plan = Plan.uniform(bench.replica.manifest().components, scheme)
        result = bench.measure(plan, ("kl",))
        assert result.kl is not None
        kl, share = float(result.kl.mean()), float(result.sdt.mean()) / CONTINUATION
        bits = parse_scheme(scheme).bits
        lines.append(
            f"{scheme:28s} {bits:2d} bits  KL {kl:8.4f}  SDT share {share:6.4f}  over sqrt(KL) {share / kl**0.5:5.3f}"
            f"  FDT {result.fdt.mean():6.2f}"
        )
    return lines


if __name__ == "__main__":
    main()
