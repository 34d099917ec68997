"""``fedalt onboard``: clients that join after a run has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedalt.cli import complete, show
from fedalt.cli.show import print_json, say
from fedalt.evaluation.metrics import metric_of

EPOCHS = 5


def onboard(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder", autocompletion=complete.runs)],
    *,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="DATA", help="the newcomers' rows; the run's data.held_out clients if not given"
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option("--epochs", min=0, metavar="N", help="epochs over their own rows; 0: none")
    ] = EPOCHS,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="where they go (default: RUN/newcomers)")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace newcomers that are there")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout, for machines")] = False,
) -> None:
    """Give new clients what a finished run has learnt, let them train a little, score them before and after."""
    from fedalt.personal.onboard import onboard as join

    joined = join(run, data, epochs, out, "overwrite" if overwrite else "ask")
    if as_json:
        print_json(joined)
        return
    show.out.print(_table(joined))
    say(f"models   {joined['folder']}")


def _table(joined: dict[str, Any]) -> Table:
    metric = metric_of(joined["metric"])
    table = Table(title=f"newcomers of {joined['run']}: {metric.title} on their own test rows", title_justify="left")
    for name in ("client", "task"):
        table.add_column(name)
    for name in ("rows", "at once", f"after {joined['epochs']} epochs"):
        table.add_column(name, justify="right")
    for client, one in joined["clients"].items():
        scores = (metric.text(one[point][metric.name]) for point in ("before", "after"))
        table.add_row(client, one["task"], str(one["rows"]), *scores)
    table.add_section()
    for title, key in (("mean", "mean"), ("worst", "worst"), ("10th percentile", "p10")):
        values = (metric.text(joined[point][key]) for point in ("before", "after"))
        table.add_row(title, "", "", *values, style="bold" if key == "mean" else None)
    return table
