"""Comparisons and sweeps in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedalt.cli.show import grouped
from fedalt.comparisons.tables import (
    Cell,
    Grid,
    average,
    conditions,
    difference,
    harmed,
    score_grid,
    seeds,
    verdict_grid,
)
from fedalt.evaluation.metrics import Metric, metric_of

_FEW = 4
"""Methods that fit beside each other."""
_TASKS = 10
"""Columns of tasks that fit, when methods are rows."""
_LINES = box.Box("    \n    \n ── \n    \n ── \n    \n    \n    \n")
"""A line under the heading and one above what is below."""
_NAME = 6
"""Letters of a task's name that fit above its scores."""


def compare_table(comparison: Mapping[str, Any]) -> Group:
    """Clients × methods for a few methods; methods × tasks, and a second table with tests and cost, for more."""
    if len(comparison["methods"]) <= _FEW and not comparison["below"]:
        return _by_client(comparison)
    scores = score_grid(comparison, _TASKS)
    return Group(grid_table(scores, _short(scores.head)), Text(), _brief(verdict_grid(comparison)))


def grid_table(grid: Grid, head: Sequence[str] | None = None, gap: int = 1) -> Group:
    """A grid as wide as its cells, the best of every column in green."""
    table = Table(title=escape(grid.title), title_justify="left", box=_LINES, pad_edge=False, padding=(0, gap, 0, 0))
    for i, name in enumerate(head or grid.head):
        table.add_column(escape(name), justify="right" if i else "left", vertical="bottom", no_wrap=i == 0)
    best = grid.best
    for row in grid.rows:
        table.add_row(*(_cell(cell, top) for cell, top in zip(row, best, strict=True)))
    if grid.below:
        table.add_section()
        for row in grid.below:
            table.add_row(*(_cell(cell, None) for cell in row), style="dim")
    return Group(table, *(Text(note, style="dim") for note in grid.notes))


def _brief(grid: Grid) -> Group:
    """The columns of tests and cost that fit, under headings of two lines."""
    without = {"scoring, s", "memory, GB" if "GPU, GB" in grid.head else ""}
    kept = [i for i, name in enumerate(grid.head) if name not in without]
    heads = [grid.head[i].replace("training", "train").replace(", ", "\n") for i in kept]
    heads = ["\n".join(head.rsplit(" ", 1)) for head in heads]

    def picked(rows: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
        return [[row[i] for i in kept] for row in rows]

    return grid_table(Grid(grid.title, heads, picked(grid.rows), picked(grid.below), grid.notes, grid.highest), gap=0)


def _by_client(comparison: Mapping[str, Any]) -> Group:
    methods, tasks = comparison["methods"], comparison["tasks"]
    blocks = list(methods.values())
    metric = metric_of(comparison["metric"])
    title = f"{metric.title} on each client's own test rows, {seeds(comparison)}"
    table = Table(title=title, title_justify="left")
    table.add_column("client")
    table.add_column("task")
    for block in blocks:
        table.add_column(escape(block["title"]), justify="right")
    clients = {c: [block["per_client"][c] for block in blocks] for c in tasks}
    for client in grouped(table, {c: sum(values) for c, values in clients.items()}, metric.higher_is_better):
        table.add_row(client, escape(tasks[client]), *_mark_best(clients[client], metric))
    table.add_section()
    table.add_row("mean", "", *(average(block, metric).text for block in blocks), style="bold")
    table.add_row("worst client", "", *(metric.text(block["worst"]) for block in blocks))
    table.add_row("10th percentile", "", *(metric.text(block["p10"]) for block in blocks))
    if "local" in methods:
        table.add_row("gain over Local", "", *(metric.text(b["gain_over_local"], sign=True) for b in blocks))
        table.add_row("clients harmed", "", *(harmed(block, len(tasks)) for block in blocks))
    if len(methods) > 1:
        apart, p, verdict = zip(*(difference(block["against"], metric) for block in blocks), strict=True)
        table.add_section()
        table.add_row(f"vs {escape(methods[comparison['reference']]['title'])}", "", *apart)
        table.add_row("p (Holm)", "", *p)
        table.add_row("verdict", "", *verdict)
    table.add_section()
    table.add_row("sent, MB", "", *(f"{(b['bytes_up'] + b['bytes_down']) / 1e6:.1f}" for b in blocks))
    table.add_row("training, s", "", *(f"{b['seconds']:.0f}" for b in blocks))
    notes = conditions(comparison)
    notes += verdict_grid(comparison).notes if len(methods) > 1 else []
    return Group(table, *(Text(note, style="dim") for note in notes))


def _short(head: Any) -> list[str]:
    """Names of tasks without a prefix that all share, cut to a few letters where they stay different."""
    first, *names, last = head
    prefix = names[0].split("_")[0] + "_" if names else ""
    if len(names) > 1 and all(name.startswith(prefix) and name != prefix for name in names):
        names = [name.removeprefix(prefix) for name in names]
    cut = [name if len(name) <= _NAME else name[: _NAME - 1] + "." for name in names]
    return [first, *(cut if len(set(cut)) == len(cut) else names), last]


def _cell(cell: Cell, top: float | None) -> str:
    if isinstance(cell, str):
        return escape(cell)
    return f"[green]{cell.text}[/]" if cell.value == top else cell.text


def _mark_best(values: list[float], metric: Metric) -> list[str]:
    best = metric.best(values)
    return [f"[green]{metric.text(value)}[/]" if value == best else metric.text(value) for value in values]
