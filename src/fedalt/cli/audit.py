"""``fedalt audit``: what a finished run's LoRAs tell of training rows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from rich.table import Table

from fedalt.cli import show
from fedalt.cli.out import RunPath
from fedalt.cli.show import Json, option, print_json, say


def audit(
    run: RunPath,
    client: Annotated[int | None, option("N", "only this client")] = None,
    *,
    rows: Annotated[int, option("N", "most training rows of a client", min=2)] = 200,
    shadows: Annotated[
        int, option("N", "also train the run N times on other halves of its rows, for a stronger attack", min=0)
    ] = 0,
    as_json: Json = False,
) -> None:
    """Attack a run: how well are training rows told from others by uploads, their means and personal models?

    Secrets that data.canaries planted are looked for, too. The run's report shows what came out.
    """
    from fedalt.personal.audit import audit as attack
    from fedalt.personal.leaks import leak_table, sentences

    found = attack(run, client, rows, shadows, show.err.print)
    if as_json:
        print_json({"run": str(run), **asdict(found), "said": sentences(found)})
        return
    head, lines = leak_table(found)
    table = Table(*head, title="AUC of attacks; 0.5 is guessing", title_justify="left")
    for line in lines:
        table.add_row(*line)
    show.out.print(table)
    for sentence in sentences(found):
        say(sentence)
    say(f"its report shows this, too: fedalt report {run}")
