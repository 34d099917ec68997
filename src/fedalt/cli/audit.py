"""``fedalt audit``: what a finished run's LoRAs tell of training rows."""

from __future__ import annotations

import math
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
    as_json: Json = False,
) -> None:
    """Attack a run: how well are training rows told from others by uploads, their means and personal models?"""
    from fedalt.personal.audit import VIEWS, means
    from fedalt.personal.audit import audit as attack

    leaks = attack(run, client, rows)
    overall = means(leaks)
    if as_json:
        print_json({"run": str(run), "leaks": [asdict(leak) for leak in leaks]})
        return
    table = Table("client", "rows", *(VIEWS[view] for view in overall), title="AUC of the attack; 0.5 is guessing")
    for one in dict.fromkeys(leak.client for leak in leaks):
        mine = {leak.view: leak for leak in leaks if leak.client == one}
        some = next(iter(mine.values()))
        cells = (_cell(mine[view].auc, mine[view].low, mine[view].high) if view in mine else "–" for view in overall)
        table.add_row(str(one), f"{some.members} + {some.others}", *cells)
    if len({leak.client for leak in leaks}) > 1:
        table.add_section()
        table.add_row("mean", "", *(f"{mean:.2f} ± {half:.2f}" for mean, half in overall.values()))
    show.out.print(table)
    for leak in leaks:
        if leak.promised is not None:
            say(
                f"client {leak.client}, {VIEWS[leak.view]}: epsilon is at least {leak.epsilon:.2f} by this attack, "
                f"at most {leak.promised:.2f} by the run's account"
            )
    for view, (mean, half) in overall.items():
        say(_sentence(VIEWS[view], mean, 0.0 if math.isnan(half) else half, [x.found for x in leaks if x.view == view]))


def _cell(auc: float, low: float, high: float) -> str:
    return f"{auc:.2f} ({low:.2f}–{high:.2f})"


def _sentence(view: str, mean: float, half: float, found: list[float]) -> str:
    surely = "" if mean - half > 0.5 else ", which may be chance"
    return (
        f"{view}: a training row has the higher score in {100 * mean:.0f} of 100 pairs with another row{surely}; "
        f"with 1 % false alarms {100 * sum(found) / len(found):.0f} % of training rows are found"
    )
