"""The figures of a report, from events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from fedalt.experiment.events import Event

_GREY = "#808080"
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#eeca3b")


def loss_curves(events: Sequence[Event], tasks: Mapping[str, str]) -> go.Figure:
    """Training loss of every client over rounds."""
    figure = go.Figure()
    for i, (client, task) in enumerate(tasks.items()):
        mine = [e for e in events if e["event"] == "client" and str(e["client"]) == client]
        figure.add_scatter(
            x=[e["round"] for e in mine],
            y=[e["loss"] for e in mine],
            name=f"{client} {task}",
            mode="lines+markers",
            line={"color": _COLOURS[i % len(_COLOURS)]},
        )
    return _over_rounds(_styled(figure, "Training loss (nats per answer token)", "round", "loss"))


def score_curves(events: Sequence[Event], tasks: Mapping[str, str], metric: str) -> go.Figure:
    """Test scores of every client over evaluated rounds; hollow markers are before aggregation."""
    figure = go.Figure()
    for i, (client, task) in enumerate(tasks.items()):
        for point, symbol, width in (("after", "circle", 2), ("before", "circle-open", 0)):
            mine = [e for e in _scores(events, point) if str(e["client"]) == client]
            if not mine:
                continue
            figure.add_scatter(
                x=[e["round"] for e in mine],
                y=[e[metric] for e in mine],
                name=f"{client} {task}" + (" (before aggregation)" if point == "before" else ""),
                mode="lines+markers" if width else "markers",
                marker={"symbol": symbol, "size": 8},
                line={"color": _COLOURS[i % len(_COLOURS)], "width": width},
                legendgroup=client,
                showlegend=point == "after",
            )
    figure.update_yaxes(range=[0, 102])
    return _over_rounds(_styled(figure, "Test scores (hollow: before aggregation)", "round", metric))


def alpha_map(events: Sequence[Event], tasks: Mapping[str, str], layers: int) -> go.Figure:
    """Weight of the individual LoRA by client and layer in the last round."""
    last = {str(e["client"]): e["alpha"] for e in events if e["event"] == "client" and e["alpha"]}
    rows = [client for client in tasks if client in last]
    figure = go.Figure(
        go.Heatmap(
            z=[last[client] for client in rows],
            x=list(range(layers)),
            y=[f"{client} {tasks[client]}" for client in rows],
            zmid=0.5,
            colorscale="RdBu",
            colorbar={"title": "α"},
            hovertemplate="%{y}<br>layer %{x}<br>α %{z:.3f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    return _styled(figure, "Mixer: weight of the individual LoRA (0.5 is even)", "adapted layer", "")


def row_curves(events: Sequence[Event]) -> go.Figure:
    """row_gap and row_drift over rounds."""
    figure = go.Figure()
    rounds = [e for e in events if e["event"] == "round"]
    for name, colour in (("row_gap", _COLOURS[0]), ("row_drift", _COLOURS[1])):
        points = [(e["round"], e[name]) for e in rounds if e[name] is not None]
        xs, ys = zip(*points, strict=True) if points else ((), ())
        figure.add_scatter(x=xs, y=ys, name=name, mode="lines+markers", line={"color": colour})
    title = "row_gap: factor mean against mean of products; row_drift: change of the row"
    return _over_rounds(_styled(figure, title, "round", ""))


def gain_map(comparison: Mapping[str, Any], titles: Mapping[str, str]) -> go.Figure:
    """Gain over Local by client and method, or the scores themselves when Local was not run."""
    methods, tasks = comparison["methods"], comparison["tasks"]
    reference = methods.get("local", {"per_client": dict.fromkeys(tasks, 0.0)})["per_client"]
    names = [name for name in methods if name != "local"] or list(methods)
    values = [[methods[name]["per_client"][c] - reference[c] for name in names] for c in tasks]
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=[titles[name] for name in names],
            y=[f"{client} {task}" for client, task in tasks.items()],
            zmid=0,
            colorscale="RdBu",
            text=[[f"{value:+.1f}" for value in row] for row in values],
            texttemplate="%{text}",
            hovertemplate="%{y}<br>%{x}<br>%{z:+.1f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    return _styled(figure, f"Gain over Local ({comparison['metric']}, points)", "", "")


def score_bars(comparison: Mapping[str, Any], titles: Mapping[str, str]) -> go.Figure:
    """Scores by client, a bar per method."""
    tasks = comparison["tasks"]
    figure = go.Figure()
    for i, (name, block) in enumerate(comparison["methods"].items()):
        figure.add_bar(
            x=[f"{c} {task}" for c, task in tasks.items()],
            y=[block["per_client"][c] for c in tasks],
            name=titles[name],
            marker_color=_COLOURS[i % len(_COLOURS)],
        )
    return _styled(figure, f"Test scores ({comparison['metric']})", "", "")


def _scores(events: Sequence[Event], point: str) -> list[Event]:
    return [e for e in events if e["event"] == "scores" and e["point"] == point]


def _over_rounds(figure: go.Figure) -> go.Figure:
    """Whole rounds on the horizontal axis, even when there is only one."""
    rounds = [x for trace in figure.data for x in trace.x or ()] or [1]
    figure.update_xaxes(range=[min(rounds) - 0.5, max(rounds) + 0.5], tickformat="d", dtick=max(1, max(rounds) // 10))
    return figure


def _styled(figure: go.Figure, title: str, x: str, y: str) -> go.Figure:
    figure.update_layout(
        title={"text": title, "font": {"size": 15}},
        xaxis_title=x,
        yaxis_title=y,
        height=420,
        margin={"l": 10, "r": 10, "t": 50, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": _GREY, "family": "system-ui, sans-serif"},
        legend={"orientation": "h", "y": -0.2},
    )
    figure.update_xaxes(gridcolor="rgba(128,128,128,.2)", automargin=True)
    figure.update_yaxes(gridcolor="rgba(128,128,128,.2)", automargin=True)
    return figure
