"""``fedalt advise``: who should share and who should not, by the losses on held-out rows that a run has kept."""

from __future__ import annotations

from rich.table import Table

from fedalt.cli import show
from fedalt.cli.out import RunPath
from fedalt.cli.show import Json, print_json, say
from fedalt.errors import UserError


def advise(
    run: RunPath,
    as_json: Json = False,
) -> None:
    """Say in plain words, client by client: train alone, mix, or share."""
    from fedalt.comparisons.advice import ABOUT, WORDS, advice
    from fedalt.runs.folder import finished_run

    folder, config = finished_run(run)
    found = advice(folder)
    told = {client: one for client, one in found.items() if one}
    if not told:
        raise UserError(
            f"{run}: {config.method} keeps no losses on held-out rows; select, fedalt_calibrated and fedalt_joint do"
        )
    if as_json:
        print_json({"run": str(run), "method": config.method, "clients": told})
        return
    table = Table(title=f"{run}: who should share", title_justify="left")
    for name in ("client", "rows", "alone", "mixed", "together", "gain of sharing", "gain of mixing", "advice"):
        table.add_column(name, justify="left" if name == "advice" else "right")
    for client, one in told.items():
        numbers = (f"{one[name]:.3f}" for name in ("alone", "mixed", "together"))
        gains = (_gain(one[name]) for name in ("sharing", "mixing"))
        table.add_row(str(client), str(one["rows"]), *numbers, *gains, one["words"])
    show.out.print(table)
    for verdict in WORDS:
        who = [str(client) for client, one in told.items() if one["advice"] == verdict]
        if who:
            say(f"{verdict:<10} {len(who)} of {len(told)} clients: {', '.join(who)}")
    for client in found.keys() - told.keys():
        say(f"client {client} has no held-out rows")
    say(ABOUT)


def _gain(gain: dict[str, float | None]) -> str:
    width = gain["ci95"]
    return f"{gain['mean']:+.3f}" + (f" ± {width:.3f}" if width is not None else "")
