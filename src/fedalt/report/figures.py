"""The figures of a run, from its events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from fedalt.evaluation.metrics import metric_of
from fedalt.report.theme import (
    DASHES,
    DIVERGING,
    SYMBOLS,
    Drawing,
    again,
    cells,
    colour,
    decimals,
    interval,
    labels,
    styled,
)
from fedalt.runs.events import Event


def loss_curves(events: Sequence[Event], tasks: Mapping[str, str]) -> Drawing:
    """Training loss of every client over rounds."""
    figure, names = go.Figure(), labels(tasks)
    for place, (client, task) in enumerate(tasks.items()):
        mine = [e for e in events if e["event"] == "client" and str(e["client"]) == client]
        figure.add_scatter(
            x=[e["round"] for e in mine],
            y=[e["loss"] for e in mine],
            name=names[client],
            meta=f"{client} {task}",
            mode="lines+markers",
            marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7},
            line={"color": colour(place), "dash": again(place, DASHES)},
            hovertemplate="%{meta}<br>round %{x}: %{y:.3f}<extra></extra>",
        )
    styled(figure, "round", "cross-entropy, nats")
    return Drawing("loss", "Training loss", "Mean over a client's round.", over_rounds(figure))


def score_curves(events: Sequence[Event], tasks: Mapping[str, str], metric: str) -> Drawing:
    """Test scores of every client over evaluated rounds; hollow markers are before aggregation."""
    figure, names, about = go.Figure(), labels(tasks), metric_of(metric)
    hollow = False
    for place, (client, task) in enumerate(tasks.items()):
        for point in ("after", "before"):
            mine = [e for e in _scores(events, point) if str(e["client"]) == client]
            if not mine:
                continue
            before = point == "before"
            hollow |= before
            suffix = " (before aggregation)" if before else ""
            figure.add_scatter(
                x=[e["round"] for e in mine],
                y=[e[metric] for e in mine],
                name=names[client] + suffix,
                meta=f"{client} {task}{suffix}",
                mode="markers" if before else "lines+markers",
                marker={"symbol": SYMBOLS[place % len(SYMBOLS)] + ("-open" if before else ""), "size": 8},
                line={"color": colour(place), "dash": again(place, DASHES)},
                legendgroup=client,
                hovertemplate=f"%{{meta}}<br>round %{{x}}: %{{y:.{about.digits}f}}<extra></extra>",
            )
    if about.points:
        figure.update_yaxes(range=[0, 103])
    styled(figure, "round", about.title)
    note = "On each client's own test rows" + ("; hollow: before aggregation." if hollow else ".")
    return Drawing("score-curves", "Scores over rounds", note, over_rounds(figure))


def alpha_map(events: Sequence[Event], tasks: Mapping[str, str], layers: int) -> Drawing:
    """Weight of the individual LoRA by client and layer at the end of the last round."""
    last = {str(e["client"]): e["alpha"] for e in events if e["event"] == "client" and e["alpha"]}
    rows, names = [client for client in tasks if client in last], labels(tasks)
    figure = cells(
        [last[client] for client in rows],
        list(map(str, range(layers))),
        [names[client] for client in rows],
        zmid=0.5,
        colorscale=DIVERGING,
        text=[[decimals(value) for value in last[client]] for client in rows],
        hovertemplate="%{y}<br>layer %{x}<br>α %{z:.3f}<extra></extra>",
    )
    figure.update_xaxes(title="adapted layer", type="category", nticks=12)
    note = "Mean over the tokens of each client's last step of training. Blue: the individual LoRA; red: the row."
    return Drawing("alpha", "Mixer weight α of the individual LoRA, by layer", note, figure)


def row_curves(events: Sequence[Event]) -> Drawing:
    """product_gap and row_lora_drift over rounds."""
    figure = go.Figure()
    rounds = [e for e in events if e["event"] == "round"]
    for place, name in enumerate(("product_gap", "row_lora_drift")):
        points = [(e["round"], e[name]) for e in rounds if e[name] is not None]
        xs, ys = zip(*points, strict=True) if points else ((), ())
        marker, line = {"symbol": SYMBOLS[place], "size": 7}, {"color": colour(place)}
        figure.add_scatter(x=xs, y=ys, name=name, mode="lines+markers", marker=marker, line=line)
    styled(figure, "round", height=260)
    figure.update_yaxes(rangemode="tozero")
    note = "product_gap: how far the mean of factors is from the mean of products; row_lora_drift: change of the row."
    return Drawing("row", "The RoW LoRA", note, over_rounds(figure))


def _scores(events: Sequence[Event], point: str) -> list[Event]:
    return [e for e in events if e["event"] == "scores" and e["point"] == point]


def over_rounds(figure: go.Figure) -> go.Figure:
    """Whole rounds on the horizontal axis, even when there is only one."""
    rounds = [x for trace in figure.data for x in trace.x or ()] or [1]
    first, last = min(rounds), max(rounds)
    margin = max(0.3, 0.03 * (last - first))
    figure.update_xaxes(range=[first - margin, last + margin], tickformat="d", dtick=max(1, last // 10))
    return figure


def sharing(advice: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, str]) -> Drawing:
    """What each client gains over its own LoRA alone by mixing, and by the shared one alone."""
    figure, names = go.Figure(), labels(tasks)
    for place, (gain, title) in enumerate({"mixing": "mixed", "sharing": "together"}.items()):
        figure.add_bar(
            x=[names[client] for client in advice],
            y=[one[gain]["mean"] for one in advice.values()],
            error_y=interval([one[gain]["ci95"] for one in advice.values()]),
            name=title,
            meta=title,
            marker={"color": colour(place)},
            hovertemplate="%{x}<br>%{meta}: %{y:.3f}<extra></extra>",
        )
    styled(figure, "client", "nats per answer token less than alone")
    note = "Above zero: answers on held-out rows are likelier than with the client's own LoRA alone."
    return Drawing("sharing", "Alone, mixed, together", note, figure)
