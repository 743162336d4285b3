"""The README's tables of sparsity, from a store of finished runs.

`python benchmarks/sparsity.py STORE RUN...`: for each sparsity, a line for every run with its held-out FDT, KL and PPL
(with training, the trained model's); then what became of each layer and kind in the last round of each run.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from dtmsearch.core.schemes import parse_scheme
from dtmsearch.store.store import ResultStore

_ALMOST_ALL = 0.9
_COLUMNS = ["run", "label", "plan_id", "purpose", "fdt_mean", "sdt_mean", "kl", "ppl", "status"]


def held_out(store: ResultStore, run: str) -> list[dict]:
    """Rows of a run's held-out evaluations, one for every model that it came to."""
    rows = store.table("evaluations", _COLUMNS, run).to_pylist()
    return [row for row in rows if row["purpose"] == "validation" and row["status"] == "ok"]


def pruned(store: ResultStore, plan_id: str, run: str) -> tuple[float, dict[str, float]]:
    """The share of all its weights that a plan prunes, and each component's."""
    plan = store.plan(plan_id, run)
    assert plan is not None
    record = store.run(run)
    components = store.table("components").to_pylist()
    mine = {c["component"]: c for c in components if record is not None and c["manifest_id"] == record.manifest_id}
    counts = {
        name: parse_scheme(plan.scheme_of(name)).pruned_weights((c["rows"], c["cols"])) for name, c in mine.items()
    }
    shares = {name: counts[name] / c["num_weights"] for name, c in mine.items()}
    return sum(counts.values()) / sum(c["num_weights"] for c in mine.values()), shares


def print_quality(store: ResultStore, runs: list[str]) -> None:
    print("| sparsity | run | model | FDT | SDT | KL | PPL |\n|---|---|---|---|---|---|---|")
    lines = set()
    for number, run in enumerate(runs):
        for row in held_out(store, run):
            if row["label"] == "base":
                continue
            share, _ = pruned(store, row["plan_id"], run)
            last = (row["label"] or "").rpartition(":")[2]
            model = "trained" if last == "trained" else row["label"].partition(":")[0]
            figures = f"{row['fdt_mean']:.2f} | {row['sdt_mean']:.2f} | {row['kl']:.4f} | {row['ppl']:.3f}"
            lines.add((round(share, 3), number, f"| {share:.1%} | {run} | {model} | {figures} |"))
    for _, _, line in sorted(lines):
        print(line)


def print_components(store: ResultStore, run: str) -> None:
    """Shares in percent by layer and kind; a star above 90%, `gone` where nothing is left."""
    record = store.run(run)
    assert record is not None and record.final_plan_id is not None
    total, shares = pruned(store, record.final_plan_id, run)
    by_layer: dict[str, dict[str, str]] = defaultdict(dict)
    for component in store.table("components").to_pylist():
        share = shares.get(component["component"])
        if share is not None:
            text = "gone" if share >= 1.0 else f"{100 * share:.0f}" + ("*" if share > _ALMOST_ALL else "")
            by_layer[component["layer"]][component["kind"]] = text
    kinds = list(next(iter(by_layer.values())))
    print(f"\n{run}, {total:.1%} pruned: percent by layer and kind\n")
    print(f"| layer | {' | '.join(kinds)} |\n|{'---|' * (len(kinds) + 1)}")
    for layer, row in sorted(by_layer.items()):
        print(f"| {layer} | {' | '.join(row[kind] for kind in kinds)} |")


def main() -> None:
    store, runs = ResultStore(sys.argv[1]), sys.argv[2:]
    finished = [run for run in runs if (record := store.run(run)) is not None and record.status == "finished"]
    for run in runs:
        if run not in finished:
            record = store.run(run)
            print(f"{run}: {'not there' if record is None else f'{record.status}, {record.message}'}", file=sys.stderr)
    print_quality(store, finished)
    for run in finished:
        print_components(store, run)


if __name__ == "__main__":
    main()
