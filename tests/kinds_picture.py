"""The picture of what the test suite takes, by kind: `pytest --kinds FILE.svg` draws it at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

# What a test of each kind uses that makes it so.
MEANING = {
    "unit": "neither torch nor processes",
    "model": "torch, in the test's own process",
    "process": "commands and drivers in processes of their own",
    "cluster": "Ray",
    "browser": "Chromium",
}
_ROW, _LEFT, _WIDTH = 44, 12, 720


def picture(seconds: Mapping[str, float], tests: Mapping[str, int], said: str) -> str:
    """An SVG with a bar a kind, the longest first. `said` stands below: when and where it was measured."""
    longest = max(seconds.values(), default=1.0)
    kinds = sorted(seconds, key=lambda kind: -seconds[kind])
    height = _ROW * len(kinds) + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="13"><title>Seconds of the test suite, by kind</title>',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for number, kind in enumerate(kinds):
        top = _ROW * number + 8
        width = max(2.0, (_WIDTH - 2 * _LEFT) * seconds[kind] / longest)
        text = f"{kind}: {seconds[kind]:,.0f} s in {tests[kind]:,} tests ({MEANING[kind]})"
        lines.append(f'<text x="{_LEFT}" y="{top + 12}">{escape(text)}</text>')
        lines.append(f'<rect x="{_LEFT}" y="{top + 18}" width="{width:.0f}" height="12" fill="#3b6ea8"/>')
    lines.append(f'<text x="{_LEFT}" y="{height - 10}" fill="#555">{escape(said)}</text></svg>')
    return "\n".join(lines) + "\n"
