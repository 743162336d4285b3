"""How well prices foretell damage: the measured KL of single components over their prices from backward passes.

    PYTHONPATH=benchmarks python benchmarks/prices.py MODEL TEXT HELD_OUT [--schemes w8a8,llm-int8] [--samples 512]

For each scheme the mean and the spread of the logarithm of measured over foretold KL, over components, and the median
measured KL. Prices are of TEXT; KL is measured on prompts of HELD_OUT, whose noise is in the spread.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from search_quality import CONTINUATION, PRICE_BLOCK, Bench

from dtmsearch.core.evaluation import EvalRequest, EvalResult
from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import PriceRequest

SCHEMES = "int8-channel,w8a8,llm-int8,int4-g64-asym,int3-g64-asym,magnitude-0.3,magnitude-0.5,magnitude-0.8"


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("held_out", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--schemes", default=SCHEMES, show_default=True)
@click.option("--samples", default=512, show_default=True)
@click.option("--prompts", default=32, show_default=True, help="Measured.")
@click.option("--every", default=4, show_default=True, help="Take every Nth component.")
@click.option("--dtype", default="float32", show_default=True)
def main(
    model: Path, text: Path, held_out: Path, schemes: str, samples: int, prompts: int, every: int, dtype: str
) -> None:
    bench = Bench(model, text, held_out, samples, prompts, dtype)
    names = tuple(c.name for c in bench.replica.manifest().components)[::every]
    options = tuple(schemes.split(","))
    calibration_id = bench.calibrate()
    reference = bench.reference(0)
    parts = []
    for first in range(0, samples, PRICE_BLOCK):
        part = first, min(first + PRICE_BLOCK, samples)
        parts.append(
            bench.replica.price(PriceRequest(reference.id, part, names, options, calibration_id=calibration_id))
        )
    products = np.concatenate([block.products for block in parts]).astype(np.float64)
    foretold = (products**2).mean(axis=0) / (2 * CONTINUATION)  # [components, schemes]
    for at, scheme in enumerate(options):
        plans = [Plan.of({name: scheme}) for name in names]
        requests = [bench.named(EvalRequest(plan, bench.held_out.id, (0, prompts), ("kl",))) for plan in plans]
        outcomes = bench.replica.evaluate(requests)
        measured = np.array([o.kl.mean() if isinstance(o, EvalResult) and o.kl is not None else 0.0 for o in outcomes])
        usable = (measured > 0) & (foretold[:, at] > 0)
        ratio = np.log(measured[usable] / foretold[usable, at])
        click.echo(
            f"{scheme:20} measured/foretold {ratio.mean():+.2f} {ratio.std():5.2f}   KL {np.median(measured):.1e}   "
            f"{usable.sum()} of {len(names)} components"
        )


if __name__ == "__main__":
    main()
