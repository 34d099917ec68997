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
    for name in ("run id", "status", "started"):
        table.add_column(name, overflow="fold")
    table.add_column("seconds", justify="right")
    for run in runs:
        ended = _coloured(run["status"])
        if run["details"]:
            ended.append(f"\n{run['details']}", style="default")
        table.add_row(run["run"], ended, run["started"] or "", f"{run['seconds']:.0f}")
    if not runs:
        table.caption = "none"
    return table


def _coloured(status: str) -> Text:
    return Text(status, style=_COLOURS.get(status, ""))
