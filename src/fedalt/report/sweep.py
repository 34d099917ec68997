"""report.html of a sweep: its table, score against the value, and score against what a client sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from fedalt.comparisons.sweep import grids, sent_up, values_of
from fedalt.comparisons.tables import average, seeds
from fedalt.evaluation.metrics import metric_of
from fedalt.files import write_text
from fedalt.report.page import Section, grid_table, linked, page, table
from fedalt.report.theme import DASHES, SYMBOLS, Drawing, again, colour, interval, score_range, styled

Sweep = Mapping[str, Any]
_BESIDE = 0.02
"""How far methods stand apart, where values are 1 apart."""
_LABELS = ("top center", "bottom center")
"""Where methods have their values by turns."""
_TICKS = 7
"""Numbers that fit below an axis on a phone."""


def write_sweep_report(out: Path, result: Sweep) -> Path:
    """Write the report of a sweep, from what ``sweep.json`` holds."""
    about = f"{metric_of(result['metric']).title} on each client's own test rows; {seeds(result)}"
    kept = f"settings other than {', '.join(result['keys'])} are the same at all points"
    if result["budget"]:
        kept = f"ranks are chosen for equal {result['budget']}"
    values: list[str | Drawing] = [value_plot(result)] if len(result["keys"]) == 1 else []
    sent: list[str | Drawing] = [sent_plot(result), sent_table(result)] if _sends(result) else []
    sections = [
        Section("scores", "Scores", [grid_table(grid) for grid in grids(result)]),
        Section("values", "Score by value", values),
        Section("sent", "Score against bytes", sent),
        Section("points", "Comparisons", [linked([point["name"] for point in result["points"]])]),
    ]
    path = out / "report.html"
    write_text(path, page(f"Sweep on {result['source']}", [about, kept], sections))
    return path


def value_plot(result: Sweep) -> Drawing:
    """Mean score of every method at each value of the one setting, in the order of the command.

    Methods stand a little beside each other, so that their intervals can be told apart.
    """
    figure, ends, metric = go.Figure(), list[float](), metric_of(result["metric"])
    methods, values = _methods(result), [values_of(point) for point in result["points"]]
    for place, name in enumerate(methods):
        blocks = _blocks(result, name)
        halves = [block["ci95"] for block in blocks]
        ends += [block["mean"] + sign * (block["ci95"] or 0) for block in blocks for sign in (-1, 1)]
        figure.add_scatter(
            x=[i + _BESIDE * (place - (len(methods) - 1) / 2) for i in range(len(values))],
            y=[block["mean"] for block in blocks],
            text=values,
            error_y=interval(halves),
            hovertemplate=f"%{{text}}: %{{y:.{metric.digits}f}}",
            **_look(result, place, name, "lines+markers"),
        )
    (key,) = result["keys"]
    styled(figure, key, f"average {metric.title}")
    figure.update_xaxes(tickvals=list(range(len(values))), ticktext=values, range=[-0.3, len(values) - 0.7])
    figure.update_yaxes(range=score_range(ends, metric.points))
    note = "Bars: 95 % intervals over seeds." if len(result["seeds"]) > 1 else f"{seeds(result)}, so no intervals."
    return Drawing("by-value", f"Score by {key}", note, figure)


def sent_plot(result: Sweep) -> Drawing:
    """Mean score against megabytes that a client sends in the whole run, a point per method and value.

    The horizontal axis is logarithmic, so who sends nothing stands at its left end, under a 0.
    """
    sent = {name: [sent_up(point, name) for point in result["points"]] for name in _methods(result)}
    known = [value for values in sent.values() for value in values if value]
    nothing = min(known) / 2
    silent = any(not value for values in sent.values() for value in values)
    figure, scores, metric = go.Figure(), list[float](), metric_of(result["metric"])
    for place, (name, values) in enumerate(sent.items()):
        blocks = _blocks(result, name)
        scores += [block["mean"] for block in blocks]
        figure.add_scatter(
            x=[value or nothing for value in values],
            y=[block["mean"] for block in blocks],
            text=[values_of(point) for point in result["points"]],
            textposition=_LABELS[place % 2] if any(values) else "middle right",
            textfont={"color": colour(place), "size": 11},
            customdata=[megabytes(value) for value in values],
            cliponaxis=False,
            hovertemplate=f"%{{text}}<br>%{{customdata}} MB<br>%{{y:.{metric.digits}f}}",
            **_look(result, place, name, "lines+markers+text" if len(result["keys"]) == 1 else "markers+text"),
        )
    styled(figure, "MB sent per client, logarithmic", f"average {metric.title}", height=380)
    ticks = _ticks(min(known), max(known))
    figure.update_xaxes(
        type="log",
        range=[log10((nothing if silent else min(known)) / 1.3), log10(max(known) * 1.3)],
        tickvals=[*([nothing] if silent else []), *ticks],
        ticktext=[*(["0"] if silent else []), *map(megabytes, ticks)],
    )
    figure.update_yaxes(range=score_range(scores, metric.points))
    way = "Up" if metric.higher_is_better else "Down"
    note = f"{way} and to the left is better. Numbers at points: {', '.join(result['keys'])}."
    return Drawing("by-bytes", "Score against what a client sends", note, figure)


def sent_table(result: Sweep) -> str:
    """What a client sends in the whole run and the score, a line per method and point."""
    metric = metric_of(result["metric"])
    rows = [
        [block["title"], values_of(point), megabytes(sent_up(point, name)), average(block, metric).text]
        for name in _methods(result)
        for point, block in zip(result["points"], _blocks(result, name), strict=True)
    ]
    return table(["method", ", ".join(result["keys"]), "MB sent per client", "average"], rows)


def megabytes(value: float) -> str:
    """Three digits, without an exponent for large numbers."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _methods(result: Sweep) -> list[str]:
    return list(result["points"][0]["methods"])


def _blocks(result: Sweep, name: str) -> list[Mapping[str, Any]]:
    return [point["methods"][name] for point in result["points"]]


def _sends(result: Sweep) -> bool:
    return any(block["bytes_up"] for name in _methods(result) for block in _blocks(result, name))


def _look(result: Sweep, place: int, name: str, mode: str) -> dict[str, Any]:
    """Name, marker and line of a method; dotted where it is only there for reference."""
    return {
        "name": _blocks(result, name)[0]["title"],
        "mode": mode,
        "marker": {"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 9, "color": colour(place)},
        "line": {"color": colour(place), "dash": "dot" if name in result["below"] else again(place, DASHES)},
    }


def _ticks(low: float, high: float) -> Sequence[float]:
    """1, 2 and 5 times powers of ten between two numbers, or powers alone; the numbers themselves where none is."""
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(found) <= _TICKS:
            return found or sorted({low, high})
    return found
