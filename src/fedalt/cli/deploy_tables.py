"""The tables of ``fedalt status``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

_COLOURS = {
    "online": "green",
    "offline": "yellow",
    "registered": "blue",
    "running": "blue",
    "finished:completed": "green",
    "finished:failed": "red",
}


def node_table(nodes: Sequence[Mapping[str, Any]]) -> Table:
    """Sites: a registered one has a key here and has never been online."""
    table = Table(title="sites (Flower: SuperNodes)", title_justify="left")
    for name in ("site", "node id", "status", "since"):
        table.add_column(name)
    for node in nodes:
        table.add_row(Text(node["site"] or ""), node["node"], _coloured(node["status"]), node["since"] or "")
    if not nodes:
        table.caption = "none"
    return table


def run_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Runs, the latest first."""
    table = Table(title="runs", title_justify="left")
    for name in ("run id", "status", "details", "started"):
        table.add_column(name)
    for name in ("seconds", "MB in", "MB out"):
        table.add_column(name, justify="right")
    for run in runs:
        numbers = (f"{run['seconds']:.0f}", f"{run['bytes_in'] / 1e6:.2f}", f"{run['bytes_out'] / 1e6:.2f}")
        table.add_row(run["run"], _coloured(run["status"]), Text(run["details"]), run["started"] or "", *numbers)
    if not runs:
        table.caption = "none"
    return table


def _coloured(status: str) -> Text:
    return Text(status, style=_COLOURS.get(status, ""))
