"""What prices foresaw of plans, against what was measured of them."""

from __future__ import annotations

from dtmsearch.report.charts.drawing import FAINT, PALETTE, PLAN_COLOUR, PLOT_HEIGHT, Figure, decades, named, sized
from dtmsearch.report.extra import altair as alt
from dtmsearch.report.facts import RunFacts

# Fewer points than this are told in words.
_FEWEST = 3
_WIDE = 8


def foreseen_figures(facts: RunFacts) -> list[Figure]:
    """Damages foreseen against damages measured, a point a plan."""
    rows = [
        {**row, "whose": "this plan" if row["plan_id"] == facts.plan_id else "another plan"}
        for row in facts.story.foreseen
        if row["predicted"] > 0.0 and row["measured"] > 0.0
    ]
    if len({(row["predicted"], row["measured"]) for row in rows}) < _FEWEST:
        return []
    values = [row[f"{kind}_{end}"] for row in rows for kind in ("predicted", "measured") for end in ("low", "high")]
    low, high = min(values), max(values)
    # Within less than a decade a logarithmic axis has a tick or two.
    is_wide = high > _WIDE * low
    scale = alt.Scale(type="log" if is_wide else "linear", domain=[low, high], nice=False)
    axis = decades(values) if is_wide else alt.Axis(format="~f", tickCount=6)
    x = alt.X("predicted:Q", title="KL by prices (nats per token)", scale=scale, axis=axis)
    y = alt.Y("measured:Q", title="KL measured (nats per token)", scale=scale, axis=axis)
    whose = ["this plan", "another plan"]
    colour = alt.Color(
        "whose:N",
        scale=alt.Scale(domain=whose, range=[PLAN_COLOUR, PALETTE[0]]),
        legend=alt.Legend(title=None, orient="bottom", symbolOpacity=1),
    )
    shape = alt.Shape("whose:N", scale=alt.Scale(domain=whose, range=["diamond", "circle"]))
    tooltip = [
        alt.Tooltip("plan_id:N", title="plan"),
        alt.Tooltip("bits:Q", title="bits per weight", format=".2f"),
        alt.Tooltip("predicted:Q", title="KL by prices", format=".3~g"),
        alt.Tooltip("measured:Q", title="KL measured", format=".3~g"),
        alt.Tooltip("num_prompts:Q", title="prompts"),
    ]
    plans = named("foreseen")
    chart = alt.layer(
        named("equal")
        .mark_line(strokeDash=[4, 4], color=FAINT, strokeWidth=1, aria=False)
        .encode(x=alt.X("a:Q", scale=scale, axis=axis), y=alt.Y("a:Q", scale=scale, axis=axis)),
        plans.mark_rule(opacity=0.45, color=FAINT, aria=False).encode(
            x=alt.X("predicted_low:Q"), x2=alt.X2("predicted_high:Q"), y=y
        ),
        plans.mark_rule(opacity=0.45, color=FAINT, aria=False).encode(
            x=x, y=alt.Y("measured_low:Q"), y2=alt.Y2("measured_high:Q")
        ),
        plans.mark_point(filled=True, size=45, opacity=0.9).encode(
            x=x, y=y, color=colour, shape=shape, tooltip=tooltip
        ),
    )
    chart = sized(chart, PLOT_HEIGHT, "Measured KL of plans against what prices foresaw, with 95% intervals")
    return [Figure("foreseen", "foreseen", chart, {"foreseen": rows, "equal": [{"a": low}, {"a": high}]})]
