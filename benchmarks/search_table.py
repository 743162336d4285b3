"""One table of what runs of `search_quality.py` measured, and a plot of quality against tokens.

    python benchmarks/search_table.py FOLDER... [--plot docs/search-quality.svg]

Means over seeds; `vs auto` counts the seeds in which the 95% interval of the paired difference in held-out KL excludes
that `auto` is better (+), or that it is worse (-). The plot needs the extra `report`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair
import click
import numpy as np

_COLUMNS = ("megatokens", "evaluations", "seconds", "bits_per_weight", "sparsity", "kl", "kl_vs_uniform", "fdt", "sdt", "ppl")  # fmt: skip # noqa: E501
_FORMATS = ("8.3f", "6.0f", "7.1f", "7.4f", "7.4f", "8.4f", "6.3f", "6.2f", "6.2f", "8.3f")
Rows = list[dict[str, Any]]


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path))
def main(folders: tuple[Path, ...], plot: Path | None) -> None:
    contents = [json.loads((folder / "search_quality.json").read_text()) for folder in folders]
    rows = [row for content in contents for row in content["rows"]]
    comparisons = [each for content in contents for each in content["comparisons"]]
    for content in contents:  # cases of several models are told apart
        for each in (*content["rows"], *content["comparisons"]):
            each["case"] = f"{content.get('model', '')} {each['case']}".strip()
    groups: dict[tuple[str, str], Rows] = {}
    for row in rows:
        groups.setdefault((row["case"], row["strategy"]), []).append(row)
    print("| case | strategy | seeds | " + " | ".join(_COLUMNS) + " | vs auto |")
    print("|" + "---|" * (len(_COLUMNS) + 4))
    for (case, strategy), group in sorted(groups.items(), key=lambda item: (item[0][0], item[1][0]["megatokens"])):
        print(_line(case, strategy, group, comparisons))
    if plot is not None:
        _draw(groups, plot)


def _line(case: str, strategy: str, group: Rows, comparisons: Rows) -> str:
    seeds = len({row["seed"] for row in group})
    means = [
        format(float(np.mean([row[name] for row in group])), f) for name, f in zip(_COLUMNS, _FORMATS, strict=True)
    ]
    found = Counter(
        "+" if each["kl"][1] > 0 else "-" if each["kl"][2] < 0 else "0"
        for each in comparisons
        if (each["case"], each["ours"], each["other"]) == (case, "auto", strategy)
    )
    # The difference is auto's KL less the other's: below zero auto is better.
    against = f"better {found['-']}, alike {found['0']}, worse {found['+']}" if found else ""
    return f"| {case} | {strategy} | {seeds} | {' | '.join(m.strip() for m in means)} | {against} |"


def _draw(groups: dict[tuple[str, str], Rows], path: Path) -> None:
    """A panel for each case: held-out KL over uniform's against tokens, a line for each search."""
    points = [
        {"case": case, "strategy": strategy, "search": f"{strategy} {row['seed']}", "tokens": tokens, "ratio": ratio}
        for (case, strategy), group in groups.items()
        for row in group
        for tokens, ratio in _course(row)
    ]
    base = altair.Chart(altair.Data(values=points)).encode(
        x=altair.X(
            "tokens:Q",
            scale=altair.Scale(type="log"),
            axis=altair.Axis(values=[0.01, 0.1, 1, 10, 100]),
            title="million tokens forwarded",
        ),
        y=altair.Y("ratio:Q", scale=altair.Scale(zero=False), title="held-out KL over the uniform plan's"),
        color=altair.Color("strategy:N", title=None),
        detail="search:N",
    )
    panels = (base.mark_line(opacity=0.6) + base.mark_point(size=14, filled=True)).properties(width=230, height=230)
    chart = panels.facet(altair.Facet("case:N", title=None), columns=3).resolve_scale(x="independent", y="independent")
    chart.configure(background="white").save(str(path))


def _course(row: dict[str, Any]) -> Sequence[tuple[float, float]]:
    """(million tokens, KL over uniform's) of a search's decisions; none of a uniform plan."""
    if not row["megatokens"]:
        return []
    scale = row["kl_vs_uniform"] / row["kl"]
    return [(tokens, kl * scale) for tokens, kl in [*row["path"], (row["megatokens"], row["kl"])]]


if __name__ == "__main__":
    main()
