"""One table of what runs of `search_quality.py` measured, and a plot of quality against tokens.

    python benchmarks/search_table.py FOLDER... [--plot docs/search-quality.svg]

Means over seeds; `vs auto` counts the seeds in which the 95% interval of the paired difference in held-out KL excludes
that `auto` is better (+), or that it is worse (-). The plot needs matplotlib.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    from matplotlib import pyplot

    cases = sorted({case for case, _ in groups})
    figure, axes = pyplot.subplots(1, len(cases), figsize=(4.5 * len(cases), 3.6), squeeze=False)
    colours = {name: f"C{i}" for i, name in enumerate(sorted({s for _, s in groups if not s.startswith("uniform")}))}
    for case, axis in zip(cases, axes[0], strict=True):
        for (_, strategy), group in ((key, group) for key, group in groups.items() if key[0] == case):
            _draw_strategy(axis, strategy, group, colours)
        axis.set(title=case, xlabel="million tokens forwarded", xscale="log")
    axes[0][0].set_ylabel("held-out KL, nats per token")
    handles = {h.get_label(): h for axis in axes[0] for h in axis.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), fontsize="small")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path)


def _draw_strategy(axis: Any, strategy: str, group: Rows, colours: dict[str, str]) -> None:
    if strategy.startswith("uniform"):
        axis.axhline(group[0]["kl"], color="grey", linestyle=":", label="uniform")
        return
    for number, row in enumerate(group):
        path: Sequence[Sequence[float]] = [*row["path"], (row["megatokens"], row["kl"])]
        tokens, kl = zip(*path, strict=True)
        label = None if number else strategy
        axis.plot(tokens, kl, marker="o", markersize=3, linewidth=1, color=colours[strategy], label=label)


if __name__ == "__main__":
    main()
