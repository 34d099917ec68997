"""``fedalt data show``: what is made of rows, down to the tokens that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from fedalt.cli import show
from fedalt.cli.command import Command
from fedalt.cli.flags import any_setting
from fedalt.cli.recipes import config_path
from fedalt.cli.show import print_json, say
from fedalt.config import load_config, parse_override
from fedalt.report.theme import MOST

if TYPE_CHECKING:  # it imports torch, which `--help` need not wait for
    from fedalt.runs.preview import Preview, PreviewRow

data = typer.Typer(help="Look at rows as a run will read them.", no_args_is_help=True)
_BARS, _BINS = " ▁▂▃▄▅▆▇█", 10
"""Heights of a histogram's columns, and how many columns it has."""


@data.callback()
def _group() -> None:
    """Look at rows as a run will read them."""


@data.command("show", cls=Command, epilog="Example: fedalt data show my_rows --client 3 --model my/llama")
def show_rows(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="rows, as --data takes them, or the YAML file of a run")
    ],
    *,
    client: Annotated[int, typer.Option("--client", metavar="N", help="whose rows")] = 0,
    rows: Annotated[int, typer.Option("--rows", min=0, metavar="N", help="how many training rows are shown")] = 3,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="whose tokenizer reads them (default: tiny-base)")
    ] = None,
    clients: Annotated[
        int | None, typer.Option("--clients", metavar="N", help="clients that rows are dealt to")
    ] = None,
    sets: Annotated[list[str] | None, any_setting("data.template=chat")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout, for machines")] = False,
) -> None:
    """Show what was understood of rows: prompts, answers, trained tokens, lengths by client, what is cut or skipped."""
    from fedalt.runs.preview import preview

    file = source.endswith((".yaml", ".yml"))
    given = {"data.source": None if file else source, "model.name": model, "data.clients": clients}
    overrides = [(key, value) for key, value in given.items() if value is not None]
    overrides += [parse_override(text) for text in sets or ()]
    found = preview(load_config(config_path(Path(source)) if file else None, overrides), client, rows)
    if as_json:
        print_json(asdict(found))
        return
    show.say_notes(found.notes)
    for place, row in enumerate(found.rows):
        _print_row(row, f"client {client}, training row {place} of {found.train[client]}")
    show.out.print(_lengths(found))


def _print_row(row: PreviewRow, title: str) -> None:
    show.out.rule(title, align="left")
    for name, text in (("prompt", row.prompt), ("answer", row.answer)):
        say(f"[{name}]")
        say(text)
    if row.tokens:
        marked = Text(f"[{len(row.tokens)} tokens, {sum(row.trained)} trained: those in «»]\n")
        for place, (token, trained) in enumerate(zip(row.tokens, row.trained, strict=True)):
            before = place and row.trained[place - 1]
            after = place + 1 < len(row.tokens) and row.trained[place + 1]
            written = f"{'«' if trained and not before else ''}{_visible(token)}{'»' if trained and not after else ''}"
            marked.append(written, style="black on green" if trained else "dim" if place % 2 else "")
            marked.append("·", style="dim")
        show.out.print(marked, soft_wrap=True)
    if row.cut:
        say(f"[{row.cut} tokens cut]" if row.tokens else "[skipped: its prompt fills data.cutoff]")


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "→")


_LEAST = {"client": 6, "task": 4, "skipped": 7, "cut": 3}
"""Width of columns that need not hold as much as the others."""


def _lengths(found: Preview) -> Table:
    """Rows of every client, and how long its training rows are."""
    most = max((max(mine, default=0) for mine in found.lengths.values()), default=0)
    table = Table(title="rows: train/validation/test; tokens: shortest, median, longest", title_justify="left")
    for name in ("client", "task", "rows", "tokens", "skipped", "cut", "histogram"):
        side: Literal["left", "right"] = "left" if name in ("task", "histogram") else "right"
        table.add_column(name, justify=side, no_wrap=True, min_width=_LEAST.get(name, 10))
    for client, mine in list(found.lengths.items())[:MOST]:
        ordered = sorted(mine) or [0]
        sizes = "/".join(str(counts[client]) for counts in (found.train, found.validation, found.test))
        tokens = f"{ordered[0]} {ordered[len(ordered) // 2]} {ordered[-1]}"
        left_out = (str(found.skipped[client]), str(found.cut[client]))
        table.add_row(str(client), Text(found.tasks[client]), sizes, tokens, *left_out, _histogram(mine, most))
    first = f"the first {MOST} of {len(found.lengths)} clients; " if len(found.lengths) > MOST else ""
    table.caption = f"{first}training rows of 0 to {most} tokens; data.cutoff={found.cutoff}"
    return table


def _histogram(lengths: Sequence[int], most: int) -> str:
    bins = [0] * _BINS
    for length in lengths:
        bins[min(_BINS - 1, length * _BINS // max(1, most))] += 1
    top = max(bins)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // max(1, top))] for count in bins)
