"""``fedalt partition``: who would get which rows, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedalt.cli import show
from fedalt.cli.flags import settings
from fedalt.cli.show import print_json, say
from fedalt.config import RunConfig
from fedalt.data.federation import SPLITS
from fedalt.data.record import in_order
from fedalt.report.theme import COLOURS, MOST, short

_NOT_ROWS = ["model", "method", "rounds", "epochs", "batch_size", "lr", "rank", "targets", "dtype", "out", "devices"]


@settings(*_NOT_ROWS, starts=False)
def partition(
    config: RunConfig,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="folder for partition.json and partition.html, one file without network"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout, for machines")] = False,
) -> None:
    """Deal the rows to clients and show who gets what: labels by client, as table and picture."""
    from fedalt.data.load import load_both
    from fedalt.data.record import record

    taken, held_out = load_both(config.data, config.seed)
    written = record(config.data, config.seed, taken, held_out)
    paths = _write(out, written) if out else {}
    if as_json:
        shown = {name: value for name, value in written.items() if name not in ("digest", "clients", "held_out")}
        clients = {"clients": list(taken.ids), "held_out": list(held_out.ids)}
        print_json({**shown, **clients, "notes": taken.notes, **{name: str(path) for name, path in paths.items()}})
        return
    show.say_notes(taken.notes)
    show.out.print(_table(written))
    for name, path in paths.items():
        say(f"{name:<9} {path}")


def _write(out: Path, written: dict[str, Any]) -> dict[str, Path]:
    from fedalt.files import write_json
    from fedalt.report.partition import write_page

    write_json(out / "partition.json", written)
    return {"partition": out / "partition.json", "picture": write_page(out / "partition.html", written)}


def _table(written: dict[str, Any]) -> Any:
    return partition_table(written, show.out.width)


_EDGE = 3
"""A column's line and the blanks beside it."""
_BAR, _LONGEST = 6, 24
OTHERS = "others"


def partition_table(written: Mapping[str, Any], width: int) -> Table:
    """Clients by labels of their training rows, the most frequent first, as many as there are colours and room."""
    counts, kind = written["counts"], written["counted_by"]
    sizes = {client: {s: sum(mine[s].values()) for s in SPLITS} for client, mine in counts.items()}
    splits = [split for split in SPLITS if any(mine[split] for mine in sizes.values())]
    names = {client: f"{client} (held out)" if client in written["held_out"] else client for client in counts}
    most = max(mine["train"] for mine in sizes.values())
    beside = [["client", *names.values()], *([s, *(str(mine[s]) for mine in sizes.values())] for s in splits)]
    room = width - 1 - sum(map(_width, beside)) - _EDGE
    ranked = _ranked(counts)
    widths = [
        _width([_heading(name), *(str(mine["train"].get(name, 0)) for mine in counts.values())]) for name in ranked
    ]
    named, left = _fitting(ranked, widths, _width([OTHERS, str(most)]), room - _BAR)
    columns = [*in_order(named), *([OTHERS] if len(named) < len(ranked) else [])]
    table = _headed(f"training rows by {kind}", splits, columns)
    for client, mine in list(counts.items())[:MOST]:
        numbers = _numbers(mine["train"], columns)
        shown = (str(n) if n else "·" for n in numbers)
        bar = _bar(numbers, most, min(_BAR + left, _LONGEST))
        table.add_row(names[client], *(str(sizes[client][s]) for s in splits), *shown, bar)
    table.caption = _caption(len(counts), len(ranked), len(named), kind)
    return table


def _headed(title: str, splits: list[str], columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("client", no_wrap=True)
    for split in splits:
        table.add_column(split, justify="right", no_wrap=True)
    for place, name in enumerate(columns):
        table.add_column(Text(_heading(name), style=COLOURS[place]), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    return table


def _ranked(counts: Mapping[str, Any]) -> list[str]:
    totals = Counter[str]()
    for mine in counts.values():
        totals.update(mine["train"])
    return [label for label, _ in sorted(totals.items(), key=lambda item: (-item[1], item[0]))]


def _heading(name: str) -> str:
    return short(name) or "none"


def _width(cells: Sequence[str]) -> int:
    return max(map(len, cells)) + _EDGE


def _fitting(ranked: list[str], widths: list[int], others: int, room: int) -> tuple[list[str], int]:
    """The first labels, all or with a column of others beside them, and the room that they leave."""
    for count in range(min(len(ranked), len(COLOURS)), 0, -1):
        rest = count < len(ranked)
        left = room - sum(widths[:count]) - rest * others
        if count + rest <= len(COLOURS) and left >= 0:
            return ranked[:count], left
    return ranked[:1], 0


def _caption(clients: int, labels: int, named: int, kind: str) -> str | None:
    lines = [f"the first {MOST} of {clients} clients"] if clients > MOST else []
    if named < labels:
        lines.append(f"{labels - named} of {labels} {escape(kind)}s are {OTHERS}")
    return "; ".join(lines) or None


def _numbers(counts: Mapping[str, int], columns: list[str]) -> list[int]:
    rest = sum(count for label, count in counts.items() if label not in columns)
    return [rest if name == OTHERS and name not in counts else counts.get(name, 0) for name in columns]


def _bar(numbers: list[int], most: int, width: int) -> Text:
    """Blocks in the labels' colours; the bar of the client with most rows is full."""
    bar, done, drawn = Text(), 0, 0
    for place, number in enumerate(numbers):
        done += number
        end = round(width * done / most)
        bar.append("█" * (end - drawn), style=COLOURS[place])
        drawn = end
    return bar
