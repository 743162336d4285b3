"""What a study found as one page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dtmsearch.analysis.findings import Findings
from dtmsearch.report.charts import Figure, save
from dtmsearch.report.charts.pictures import drawn
from dtmsearch.report.writing import page_data, places, render


def study_page(title: str, asks: str, findings: Findings, runs: Sequence[str], store: str) -> tuple[str, list[Figure]]:
    """The HTML text of a study, and its figures. `runs` are the searches that it rests on."""
    figures = [drawn(picture) for picture in findings.pictures]
    context = {
        "title": title,
        "asks": asks,
        "findings": findings,
        "runs": runs,
        "places": places(figures),
        "store": store,
        "live": None,
    }
    return render("study.html", context, page_data(figures)), figures


def write_study(
    out: Path, figures_folder: Path | None, title: str, asks: str, findings: Findings, runs: Sequence[str], store: str
) -> list[Path]:
    """Write a study's page to `out`, and its figures into a folder; the files written."""
    text, figures = study_page(title, asks, findings, runs, store)
    out.write_text(text, encoding="utf-8")
    return [out] + ([] if figures_folder is None else save(figures, figures_folder))
