"""A picture of KL against measured milliseconds, of what `front.py` wrote.

    python benchmarks/front_plot.py FRONT.json LABEL [FRONT.json LABEL ...] --out docs/structured-front.svg

A line for each way to a plan, a panel for each file; the base model's own milliseconds are the vertical line. Needs the
extra `report`.
"""

from __future__ import annotations

import json
from pathlib import Path

import altair
import click


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path))
def main(files: tuple[str, ...], out: Path) -> None:
    panels = []
    for file, label in zip(files[::2], files[1::2], strict=True):
        rows = [row for row in json.loads(Path(file).read_text())["rows"] if "decode" in row]
        base = sorted(row["base_decode"] for row in rows)[len(rows) // 2]
        # Each plan was timed in turns with the base model: by their ratio.
        points = [
            {"plan": row["plan"], "ms": base * row["decode"] / row["base_decode"], "KL": row["kl"]} for row in rows
        ]
        lines = (
            altair.Chart(altair.Data(values=points))
            .mark_line(point=True)
            .encode(
                x=altair.X("ms:Q", title="milliseconds of a token").scale(zero=False),
                y=altair.Y("KL:Q", title="KL, nats per token").scale(type="log"),
                color=altair.Color("plan:N", title=None),
                strokeDash=altair.StrokeDash("plan:N", title=None),
            )
        )
        rule = altair.Chart(altair.Data(values=[{"ms": base}])).mark_rule(strokeDash=[2, 2]).encode(x="ms:Q")
        panels.append((lines + rule).properties(width=300, height=240, title=label))
    altair.hconcat(*panels).save(out)


if __name__ == "__main__":
    main()
