"""The table of ``fedalt partition``: rows of every client by label, and a coloured bar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedalt.data.record import in_order
from fedalt.data.rows import SPLITS
from fedalt.report.shown import MOST
from fedalt.report.theme import COLOURS, short

_LABELS = len(COLOURS) - 1
"""Labels with a column and a colour of their own; the last colour is the others'."""
_WIDTH = 24
OTHERS = "others"


def partition_table(written: Mapping[str, Any]) -> Table:
    """Clients by labels of their training rows, the most frequent labels first.

    Args:
        written: The content of partition.json.
    """
    counts, held_out = written["counts"], written["held_out"]
    totals = Counter[str]()
    for mine in counts.values():
        totals.update(mine["train"])
    ranked = [label for label, _ in sorted(totals.items(), key=lambda item: (-item[1], item[0]))]
    named = ranked if len(ranked) <= len(COLOURS) else ranked[:_LABELS]
    columns = [*in_order(named), *([OTHERS] if len(named) < len(ranked) else [])]
    most = max(sum(mine["train"].values()) for mine in counts.values())
    table = Table(title=f"training rows by {written['counted_by']}", title_justify="left")
    table.add_column("client")
    for name in SPLITS:
        table.add_column(name, justify="right")
    for place, name in enumerate(columns):
        table.add_column(Text(short(name) or "none", style=COLOURS[place]), justify="right")
    table.add_column("", no_wrap=True)
    for client, mine in list(counts.items())[:MOST]:
        numbers = _numbers(mine["train"], columns)
        name = f"{client} (held out)" if client in held_out else client
        sizes = [str(sum(mine[split].values())) for split in SPLITS]
        table.add_row(name, *sizes, *(str(n) if n else "·" for n in numbers), _bar(numbers, most))
    if len(counts) > MOST:
        table.caption = f"the first {MOST} of {len(counts)} clients"
    if len(ranked) > len(columns):
        rest = f"{len(ranked) - len(named)} of {len(ranked)} {escape(written['counted_by'])}s are {OTHERS}"
        table.caption = f"{table.caption}; {rest}" if table.caption else rest
    return table


def _numbers(counts: Mapping[str, int], columns: list[str]) -> list[int]:
    rest = sum(count for label, count in counts.items() if label not in columns)
    return [rest if name == OTHERS and name not in counts else counts.get(name, 0) for name in columns]


def _bar(numbers: list[int], most: int) -> Text:
    """Blocks in the labels' colours; the bar of the client with most rows is full."""
    bar, done, drawn = Text(), 0, 0
    for place, number in enumerate(numbers):
        done += number
        end = round(_WIDTH * done / most)
        bar.append("█" * (end - drawn), style=COLOURS[place])
        drawn = end
    return bar
