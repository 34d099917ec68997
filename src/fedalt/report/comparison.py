"""Figures and tables of a comparison, from ``comparison.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

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
    methods = comparison["methods"]
    blocks = list(methods.values())
    rows = [[c, task, *(f"{b['per_client'][c]:.1f}" for b in blocks)] for c, task in comparison["tasks"].items()]
    rows.append(["mean", "", *map(_mean, blocks)])
    rows.append(["worst client", "", *(f"{b['worst']:.1f}" for b in blocks)])
    rows.append(["10th percentile", "", *(f"{b['p10']:.1f}" for b in blocks)])
    if "local" in methods:
        rows.append(["gain over Local", "", *(f"{b['gain_over_local']:+.1f}" for b in blocks)])
    if any(b.get("harmed") is not None for b in blocks):
        rows.append(["harmed clients", "", *(_harmed(b.get("harmed")) for b in blocks)])
    return table(["client", "task", *titles.values()], rows, bold=len(comparison["tasks"]))


def against_table(comparison: Comparison, titles: Mapping[str, str]) -> str:
    """Every method's difference to the reference with its confidence interval and what follows; nothing if unknown."""
    rows = []
    for name, block in comparison["methods"].items():
        against = block.get("against")
        if not against:
            continue
        half = f" ± {against['ci95']:.1f}" if against.get("ci95") is not None else ""
        numbers = ["–" if against.get(key) is None else f"{against[key]:.3g}" for key in ("p", "p_adjusted")]
        rows.append([titles[name], f"{against['difference']:+.1f}{half}", *numbers, str(against.get("verdict") or "")])
    if not rows:
        return ""
    reference = str(comparison.get("reference"))
    head = paragraph(f"Difference to {titles[reference]} over clients and seeds") if reference in titles else ""
    return head + table(["method", "difference", "p", "p adjusted", "verdict"], rows, words=(0, 4))


def cost_table(comparison: Comparison, titles: Mapping[str, str]) -> str:
    """Bytes, seconds and memory of every method."""
    rows = [
        [titles[name], f"{b['mean']:.1f}", *(f"{of(b):.1f}" for of in _COSTS.values()), f"{b['peak_memory'] / 1e9:.2f}"]
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
    gains = "local" in methods
    names = [name for name in methods if name != "local"] or list(methods)
    columns = [_gains(methods[name], methods.get("local"), tasks) for name in names]
    form = "+.1f" if gains else ".1f"
    widest = max(ROOM, *(abs(column[c]) for column in columns for c in tasks))
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
        return Drawing("gain", "Scores by client and method", f"{comparison['metric']}.", figure)
    note = f"{comparison['metric']}, points. Blue: better than training alone; red: worse."
    return Drawing("gain", "Gain over Local", note, figure)


def score_bars(comparison: Comparison, titles: Mapping[str, str]) -> Drawing:
    """Scores by client, a bar per method."""
    tasks = comparison["tasks"]
    figure = go.Figure()
    for place, (name, block) in enumerate(comparison["methods"].items()):
        figure.add_bar(
            y=list(labels(tasks).values()),
            x=[block["per_client"][c] for c in tasks],
            name=titles[name],
            orientation="h",
            marker={"color": colour(place), "pattern": {"shape": again(place, PATTERNS)}, "line": {"width": 0}},
            hovertemplate="%{y}: %{x:.1f}",
        )
    count = len(comparison["methods"])
    styled(figure, comparison["metric"], height=100 + (16 + 9 * count) * len(tasks))
    figure.update_layout(bargap=0.3)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return Drawing("bars", "Scores by client", "On each client's own test rows, mean over seeds.", figure)


def cost_plot(comparison: Comparison, titles: Mapping[str, str]) -> Drawing:
    """Mean score against bytes and against seconds, a point per method."""
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.06)
    for place, (name, block) in enumerate(comparison["methods"].items()):
        for column, (label, cost) in enumerate(_COSTS.items(), 1):
            figure.add_scatter(
                x=[cost(block)],
                y=[block["mean"]],
                error_y=interval([block.get("ci95")]),
                name=titles[name],
                mode="markers",
                marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 12, "color": colour(place)},
                cliponaxis=False,
                legendgroup=name,
                row=1,
                col=column,
                hovertemplate=f"{label} %{{x:.1f}}<br>%{{y:.1f}}",
            )
    styled(figure)
    for column, (label, cost) in enumerate(_COSTS.items(), 1):
        most = max(map(cost, comparison["methods"].values()))
        figure.update_xaxes(title_text=label, range=[-0.05 * most, 1.1 * most or 1], nticks=5, row=1, col=column)
    figure.update_yaxes(range=score_range([block["mean"] for block in comparison["methods"].values()]))
    figure.update_yaxes(title_text=f"mean {comparison['metric']}", row=1, col=1)
    note = "Up and to the left is better. Bars: 95 % confidence." if _has(comparison, "ci95") else ""
    return Drawing("cost-plot", "Score against cost", note or "Up and to the left is better.", figure)


def _gains(block: Mapping[str, Any], local: Mapping[str, Any] | None, tasks: Sequence[str] | Mapping[str, str]) -> Any:
    known = block.get("gain_per_client")
    if known:
        return known
    reference = local["per_client"] if local else dict.fromkeys(tasks, 0.0)
    return {c: block["per_client"][c] - reference[c] for c in tasks}


def _mean(block: Mapping[str, Any]) -> str:
    half = block.get("ci95", None)
    if half is not None:
        return f"{block['mean']:.1f} ± {half:.1f}"
    return f"{block['mean']:.1f}" + (f" ± {block['sd']:.1f}" if block["sd"] else "")


def _harmed(value: Any) -> str:
    if value is None:
        return "–"
    return str(len(value)) if isinstance(value, list | dict) else str(value)


def _has(comparison: Comparison, key: str) -> bool:
    return any(block.get(key) is not None for block in comparison["methods"].values())
