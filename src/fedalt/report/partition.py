"""partition.html: who has which labels, in one file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedalt.config.data import PartitionConfig
from fedalt.data.federation import SPLITS
from fedalt.data.record import in_order
from fedalt.files import write_text
from fedalt.report.insights import partition_bars
from fedalt.report.page import Section, page, table
from fedalt.report.theme import SEQUENTIAL, Drawing, cells, short

_MOST = 100
"""Clients in the pictures."""


def write_page(path: Path, written: Mapping[str, Any]) -> Path:
    """Draw the content of a partition.json: labels by client, rows by split, sizes."""
    kind, counts = written["counted_by"], dict(list(written["counts"].items())[:_MOST])
    names = {client: "held out" if client in written["held_out"] else "" for client in counts}
    splits = [split for split in SPLITS if any(mine[split] for mine in counts.values())]
    shown = {client: {split: mine[split] for split in splits} for client, mine in counts.items()}
    bars = partition_bars({"clients": list(counts), "partition": shown}, names)
    sections = [
        Section("labels", f"{kind.capitalize()}s by client", [_map(shown, names, kind)]),
        Section("splits", "Rows by split", [replace(bars, note=f"By {kind} and split.")]),
        Section("sizes", "Rows", [_sizes(shown, names, splits)]),
    ]
    bars.plot.update_yaxes(type="category")  # 0, 1 and "2 held out" are all names
    settings, usual = written["settings"]["partition"], PartitionConfig().model_dump()
    seed = written["settings"]["seed"] if settings["seed"] is None else settings["seed"]
    about = f"{len(written['counts'])} clients, seed {seed}"
    options = ", ".join(f"{name}: {value}" for name, value in settings.items() if value not in (None, usual[name]))
    few = f"the first {_MOST} of them are shown" if len(written["counts"]) > _MOST else ""
    write_text(path, page(f"Partition of {written['source']}", [about, options, few], sections))
    return path


def _map(counts: Mapping[str, Mapping[str, Mapping[str, int]]], names: Mapping[str, str], kind: str) -> Drawing:
    labels = in_order({label for mine in counts.values() for label in mine["train"]})
    values = [[mine["train"].get(label, 0) for label in labels] for mine in counts.values()]
    figure = cells(
        values,
        list(map(str, range(len(labels)))),
        list(map(str, range(len(counts)))),
        colorscale=SEQUENTIAL,
        zmin=0,
        text=[[str(value) for value in row] for row in values],
        customdata=[[f"client {client}, {label or 'none'}" for label in labels] for client in counts],
        hovertemplate="%{customdata}<br>%{z} training rows<extra></extra>",
    )
    figure.update_xaxes(title=kind, **_ticks([short(label) or "none" for label in labels]))
    figure.update_yaxes(title="client", **_ticks([f"{client} {names[client]}".strip() for client in counts]))
    return Drawing("labels-by-client", f"Training rows by {kind} and client", "Brighter: more rows.", figure)


def _ticks(texts: list[str]) -> dict[str, Any]:
    """As many names as there is room for; places are numbers, because two names may be cut to the same."""
    step = -(-len(texts) // 30)
    return {"type": "category", "tickvals": list(range(0, len(texts), step)), "ticktext": texts[::step]}


def _sizes(counts: Mapping[str, Mapping[str, Mapping[str, int]]], names: Mapping[str, str], splits: list[str]) -> str:
    rows = [
        [f"{c} {names[c]}".strip(), *(f"{sum(mine[s].values()):,}" for s in splits), str(len(mine["train"]))]
        for c, mine in counts.items()
    ]
    return table(["client", *splits, "labels"], rows, words=(0,))
