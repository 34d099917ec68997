"""Figures and tables of a comparison, from ``comparison.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fedalt.comparisons.tables import NOTHING, average, difference
from fedalt.evaluation.metrics import metric_of
from fedalt.report.page import linked, paragraph, table
from fedalt.report.theme import (
    DIVERGING,
    PATTERNS,
    ROOM,
    SEQUENTIAL,
    SYMBOLS,
    Drawing,
    again,
    cells,
    colour,
    interval,
    labels,
    score_range,
    styled,
)

Comparison = Mapping[str, Any]
_COSTS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "sent, MB": lambda block: float(block["bytes_up"] + block["bytes_down"]) / 1e6,
    "training, s": lambda block: float(block["seconds"]),
}


def score_table(comparison: Comparison, titles: Mapping[str, str]) -> str:
    """Client × method, with mean, worst client, 10th percentile, gain over Local and clients that are worse off."""
    methods, metric = comparison["methods"], metric_of(comparison["metric"])
    blocks, text = list(methods.values()), metric.text
    rows = [[c, task, *(text(b["per_client"][c]) for b in blocks)] for c, task in comparison["tasks"].items()]
    rows.append(["mean", "", *(average(b, metric).text for b in blocks)])
    rows.append(["worst client", "", *(text(b["worst"]) for b in blocks)])
    rows.append(["10th percentile", "", *(text(b["p10"]) for b in blocks)])
    if "local" in methods:
        rows.append(["gain over Local", "", *(text(b["gain_over_local"], sign=True) for b in blocks)])
    if any(b["harmed"] is not None for b in blocks):
        rows.append(["harmed clients", "", *(NOTHING if b["harmed"] is None else str(b["harmed"]) for b in blocks)])
    return table(["client", "task", *titles.values()], rows, bold=len(comparison["tasks"]))


def against_table(comparison: Comparison, titles: Mapping[str, str]) -> str:
    """Every method's difference to the reference with its confidence interval and what follows; nothing if unknown."""
    rows, metric = [], metric_of(comparison["metric"])
    for name, block in comparison["methods"].items():
        if against := block["against"]:
            numbers = [NOTHING if against[key] is None else f"{against[key]:.3g}" for key in ("p", "p_adjusted")]
            apart, _, verdict = difference(against, metric)
            rows.append([titles[name], apart, *numbers, verdict])
    if not rows:
        return ""
    head = paragraph(f"Difference to {titles[comparison['reference']]} over clients and seeds")
    return head + table(["method", "difference", "p", "p adjusted", "verdict"], rows, words=(0, 4))


def cost_table(comparison: Comparison, titles: Mapping[str, str]) -> str:
    """Bytes, seconds and memory of every method."""
    text = metric_of(comparison["metric"]).text
    rows = [
        [titles[name], text(b["mean"]), *(f"{of(b):.1f}" for of in _COSTS.values()), f"{b['peak_memory'] / 1e9:.2f}"]
        for name, b in comparison["methods"].items()
    ]
    return table(["method", "score", *_COSTS, "peak memory, GB"], rows, words=(0,))


def links(out: Path, comparison: Comparison) -> str:
    """The reports of the runs."""
    return linked(
        [str(Path(run).relative_to(out)) for block in comparison["methods"].values() for run in block["runs"]]
    )


def gain_map(comparison: Comparison, titles: Mapping[str, str]) -> Drawing:
    """Gain over Local by client and method, or the scores themselves when Local was not run."""
    methods, tasks = comparison["methods"], comparison["tasks"]
    gains, metric = "local" in methods, metric_of(comparison["metric"])
    names = [name for name in methods if name != "local"] or list(methods)
    columns = [methods[name]["gain_per_client"] or methods[name]["per_client"] for name in names]
    form = f"{'+' if gains else ''}.{metric.digits}f"
    widest = max(ROOM if metric.points else 10**-metric.digits, *(abs(column[c]) for column in columns for c in tasks))
    scale = {"zmin": -widest, "zmax": widest, "colorscale": DIVERGING} if gains else {"colorscale": SEQUENTIAL}
    figure = cells(
        [[column[c] for column in columns] for c in tasks],
        [titles[name] for name in names],
        list(labels(tasks).values()),
        text=[[format(column[c], form) for column in columns] for c in tasks],
        hovertemplate=f"%{{y}}<br>%{{x}}<br>%{{z:{form}}}<extra></extra>",
        **scale,
    )
    if not gains:
        return Drawing("gain", "Scores by client and method", f"{metric.title}.", figure)
    note = f"{metric.title}{', points' if metric.points else ''}. Blue: better than training alone; red: worse."
    return Drawing("gain", "Gain over Local", note, figure)


def score_bars(comparison: Comparison, titles: Mapping[str, str]) -> Drawing:
    """Scores by client, a bar per method."""
    tasks, metric = comparison["tasks"], metric_of(comparison["metric"])
    figure = go.Figure()
    for place, (name, block) in enumerate(comparison["methods"].items()):
        figure.add_bar(
            y=list(labels(tasks).values()),
            x=[block["per_client"][c] for c in tasks],
            name=titles[name],
            orientation="h",
            marker={"color": colour(place), "pattern": {"shape": again(place, PATTERNS)}, "line": {"width": 0}},
            hovertemplate=f"%{{y}}: %{{x:.{metric.digits}f}}",
        )
    count = len(comparison["methods"])
    styled(figure, metric.title, height=100 + (16 + 9 * count) * len(tasks))
    figure.update_layout(bargap=0.3)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return Drawing("bars", "Scores by client", "On each client's own test rows, mean over seeds.", figure)


def cost_plot(comparison: Comparison, titles: Mapping[str, str]) -> Drawing:
    """Mean score against bytes and against seconds, a point per method."""
    metric = metric_of(comparison["metric"])
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.06)
    for place, (name, block) in enumerate(comparison["methods"].items()):
        for column, (label, cost) in enumerate(_COSTS.items(), 1):
            figure.add_scatter(
                x=[cost(block)],
                y=[block["mean"]],
                error_y=interval([block["ci95"]]),
                name=titles[name],
                mode="markers",
                marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 12, "color": colour(place)},
                cliponaxis=False,
                legendgroup=name,
                row=1,
                col=column,
                hovertemplate=f"{label} %{{x:.1f}}<br>%{{y:.{metric.digits}f}}",
            )
    styled(figure)
    for column, (label, cost) in enumerate(_COSTS.items(), 1):
        most = max(map(cost, comparison["methods"].values()))
        figure.update_xaxes(title_text=label, range=[-0.05 * most, 1.1 * most or 1], nticks=5, row=1, col=column)
    figure.update_yaxes(range=score_range([block["mean"] for block in comparison["methods"].values()], metric.points))
    figure.update_yaxes(title_text=f"mean {metric.title}", row=1, col=1)
    note = f"{'Up' if metric.higher_is_better else 'Down'} and to the left is better."
    note += (
        " Bars: 95 % confidence." if any(block["ci95"] is not None for block in comparison["methods"].values()) else ""
    )
    return Drawing("cost-plot", "Score against cost", note, figure)
