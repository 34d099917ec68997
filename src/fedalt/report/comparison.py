"""Figures and tables of a comparison, from ``comparison.json``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fedalt.comparisons.statistics import half_width
from fedalt.evaluation.metrics import Metric, metric_of
from fedalt.methods.registry import Variant, title_of
from fedalt.registry import METHODS
from fedalt.report.figures import over_rounds
from fedalt.report.page import glossary, linked, table
from fedalt.report.theme import (
    DASHES,
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
from fedalt.runs.events import read_events
from fedalt.runs.folder import RunFolder

Comparison = Mapping[str, Any]
_COSTS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "sent, MB": lambda block: float(block["bytes_up"] + block["bytes_down"]) / 1e6,
    "training, s": lambda block: float(block["seconds"]),
}


def score_table(comparison: Comparison, titles: Mapping[str, str]) -> str:
    """Client × method, with mean, worst client, 10th percentile, gain over Local and clients that are worse off."""
    methods, text = comparison["methods"], metric_of(comparison["metric"]).text
    blocks = [*methods.values(), *([comparison["majority"]] if comparison.get("majority") else [])]
    tasks = comparison["tasks"].items()
    rows = [[f"{c} {task}".strip(), *(text(b["per_client"][c]) for b in blocks)] for c, task in tasks]
    rows.append(["average", *(_mean(b, text) for b in blocks)])
    rows.append(["worst client", *(text(b["worst"]) for b in blocks)])
    rows.append(["10th percentile", *(text(b["p10"]) for b in blocks)])
    if "local" in methods:
        rows.append(["gain over Local", *(text(b["gain_over_local"], sign=True) for b in blocks)])
    if any(b.get("harmed") is not None for b in blocks):
        rows.append(["clients harmed", *(_harmed(b.get("harmed")) for b in blocks)])
    head = ["client", *titles.values(), *(b["title"] for b in blocks[len(methods) :])]
    return table(head, rows, bold=len(comparison["tasks"]), words=(0,))


def method_curves(comparison: Comparison, titles: Mapping[str, str]) -> Drawing | str:
    """Average test score by round, mean over runs; nothing where one round alone was scored."""
    metric, figure, rounds = metric_of(comparison["metric"]), go.Figure(), set[int]()
    for place, (name, block) in enumerate(comparison["methods"].items()):
        seen = defaultdict[int, list[float]](list)
        for run in block["runs"]:
            for event in read_events(RunFolder(Path(run)).events):
                if event["event"] == "scores" and event["point"] == "after" and metric.name in event:
                    seen[event["round"]].append(event[metric.name])
        rounds |= seen.keys()
        figure.add_scatter(
            x=list(seen),
            y=[fmean(values) for values in seen.values()],
            name=titles[name],
            mode="lines+markers",
            marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7},
            line={"color": colour(place), "dash": again(place, DASHES)},
            hovertemplate=f"round %{{x}}: %{{y:.{metric.digits}f}}",
        )
    styled(figure, "round", f"average {metric.title}")
    note = "On each client's own test rows, mean over clients and runs."
    return Drawing("method-curves", "Scores over rounds", note, over_rounds(figure)) if len(rounds) > 1 else ""


def words(comparison: Comparison, titles: Mapping[str, str]) -> str:
    """What the methods are, and the words of the page."""
    found = {titles[name]: _about(name) for name in comparison["methods"]}
    if comparison.get("majority"):
        found["majority"] = "always each client's most frequent training answer; computed, not trained"
    return glossary({**found, **WORDS})


def _about(name: str) -> str:
    known = METHODS.get(name) if name in METHODS else None
    if isinstance(known, Variant):
        settings = ", ".join(f"{key.rpartition('.')[2]} = {value}" for key, value in known.settings.items())
        return f"{title_of(known.method)} with {settings}"
    return ((known and known.__doc__) or name).split("\n", maxsplit=1)[0]


WORDS = {
    "client": "one party with rows of its own; the unit of every test",
    "average": "mean over clients, of all seeds and draws",
    "seed, draw": "a seed fixes start values and the order of rows; a draw, which rows each client has",
    "±": "half of a 95 % interval: of an average over seeds (or draws), of a difference over clients",
    "better, worse": "a paired t test over clients finds a difference (p < .05, Holm over the table)",
    "equivalent": "two one-sided tests find the difference to be smaller than the margin, either way",
    "not worse": "surely not worse by the margin, and nothing more is known",
    "undecided": "the data do not tell",
    "beyond these": "95 % interval for other clients, rows and seeds, by a hierarchical bootstrap",
    "gain over Local, harmed": "difference to training alone; clients for which it is negative",
}


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
    columns = [_gains(methods[name], methods.get("local"), metric) for name in names]
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
        return Drawing("gain", "Scores by client and method", f"{metric.title}.", figure, 130 + 46 * len(names))
    note = f"{metric.title}{', points' if metric.points else ''}. Blue: better than training alone; red: worse."
    return Drawing("gain", "Gain over Local", note, figure, 130 + 46 * len(names))


def score_bars(comparison: Comparison, titles: Mapping[str, str]) -> Drawing:
    """Scores by client, a bar per method."""
    tasks, metric = comparison["tasks"], metric_of(comparison["metric"])
    figure = go.Figure()
    for place, (name, block) in enumerate(comparison["methods"].items()):
        figure.add_bar(
            y=list(labels(tasks).values()),
            x=[block["per_client"][c] for c in tasks],
            error_x=interval([half_width([run[c] for run in block["per_seed"].values()]) for c in tasks]),
            name=titles[name],
            orientation="h",
            marker={"color": colour(place), "pattern": {"shape": again(place, PATTERNS)}, "line": {"width": 0}},
            hovertemplate=f"%{{y}}: %{{x:.{metric.digits}f}}",
        )
    count = len(comparison["methods"])
    styled(figure, metric.title, height=100 + (16 + 9 * count) * len(tasks))
    figure.update_layout(bargap=0.3)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    note = "On each client's own test rows, mean over runs."
    several = any(len(block["per_seed"]) > 1 for block in comparison["methods"].values())
    note += " Bars: 95 % intervals over runs." if several else ""
    return Drawing("bars", "Scores by client", note, figure)


def cost_plot(comparison: Comparison, titles: Mapping[str, str]) -> Drawing:
    """Mean score against bytes and against seconds, a point per method."""
    metric = metric_of(comparison["metric"])
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
                hovertemplate=f"{label} %{{x:.1f}}<br>%{{y:.{metric.digits}f}}",
            )
    styled(figure)
    for column, (label, cost) in enumerate(_COSTS.items(), 1):
        most = max(map(cost, comparison["methods"].values()))
        figure.update_xaxes(title_text=label, range=[-0.05 * most, 1.1 * most or 1], nticks=5, row=1, col=column)
    figure.update_yaxes(range=score_range([block["mean"] for block in comparison["methods"].values()], metric.points))
    figure.update_yaxes(title_text=f"average {metric.title}", row=1, col=1)
    note = f"{'Up' if metric.higher_is_better else 'Down'} and to the left is better."
    note += " Bars: 95 % intervals." if _has(comparison, "ci95") else ""
    return Drawing("cost-plot", "Score against cost", note, figure)


def _gains(block: Mapping[str, Any], local: Mapping[str, Any] | None, metric: Metric) -> Mapping[str, float]:
    """Gains over Local; the scores themselves where there is no Local."""
    scores: Mapping[str, float] = block["per_client"]
    known: Mapping[str, float] | None = block.get("gain_per_client")
    if known or not local:
        return known or scores
    return {c: metric.gain(score, local["per_client"][c]) for c, score in scores.items()}


def _mean(block: Mapping[str, Any], text: Callable[[float], str]) -> str:
    half = block.get("ci95")
    return text(block["mean"]) + (f" ± {text(half)}" if half is not None else "")


def _harmed(value: Any) -> str:
    if value is None:
        return "–"
    return str(len(value)) if isinstance(value, list | dict) else str(value)


def _has(comparison: Comparison, key: str) -> bool:
    return any(block.get(key) is not None for block in comparison["methods"].values())
