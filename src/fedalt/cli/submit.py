"""``fedalt submit``: the run that ``fedalt run`` does on one machine, across the sites of a server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fedalt.cli import show
from fedalt.cli.deploy import NEEDS, SERVER, Ca, Json, ServerAt, connection, teller
from fedalt.cli.flags import settings
from fedalt.cli.show import complain, print_json, say
from fedalt.config import RunConfig, with_settings
from fedalt.errors import UserError, needs
from fedalt.runs.folder import IfExists

_SLACK = 5.0
"""Seconds that a file server's clock may be late."""


@settings()
def submit(
    config: RunConfig,
    if_exists: IfExists,
    *,
    server: ServerAt = SERVER,
    ca: Ca = None,
    tls: Annotated[Path | None, typer.Option("--tls", metavar="DIR", help="the same as --ca DIR/ca.crt")] = None,
    allow_two: Annotated[
        bool, typer.Option("--allow-two", help="the same as --set flower.allow_two=true; all sites must agree, too")
    ] = False,
    simulation: Annotated[
        bool, typer.Option("--simulation", help="Flower's simulation on this machine instead of a server")
    ] = False,
    as_json: Json = False,
) -> None:
    """Hand a run to a server (flwr run), show its log, and wait until it has ended.

    The run folder is made where fedalt server runs, models stay at the sites.
    """
    with needs("flower", NEEDS):
        from fedalt.flower.deploy.submission import RunFailedError
        from fedalt.flower.deploy.submission import submit as hand_over
        from fedalt.flower.server_app import checked

    if ca and tls:
        raise UserError("--ca and --tls exclude each other")
    if allow_two:
        config = with_settings(config, {"flower.allow_two": True})
    checked(config)
    since = time.time()
    if simulation:
        _simulate(config, if_exists)
    else:
        try:
            hand_over(config, connection(server, tls / "ca.crt" if tls else ca), if_exists, teller(as_json))
        except RunFailedError as error:
            complain(str(error))
            raise typer.Exit(1) from None
    _show(config, since, as_json)


def _simulate(config: RunConfig, if_exists: IfExists) -> None:
    with needs("simulation", "Flower's simulations"):
        import ray  # noqa: F401

    from fedalt.flower.simulate import simulate

    with show.live(config.federation.rounds) as progress:
        simulate([config], if_exists, progress)


def _show(config: RunConfig, since: float, as_json: bool) -> None:
    """The table, where the run folder is one of this machine."""
    from fedalt.methods.registry import title_of
    from fedalt.runs.folder import RunFolder, final_scores
    from fedalt.runs.history import read_history

    folder = RunFolder(config.folder)
    if not folder.final_scores.is_file() or folder.final_scores.stat().st_mtime < since - _SLACK:
        say(f"the run folder is {folder.path}, where fedalt server runs")
        return
    scores = final_scores(folder)
    if as_json:
        print_json({"run": str(folder.path), "report": str(folder.report), **scores})
        return
    tasks = {str(client): task for client, task in read_history(folder.path).tasks.items()}
    show.out.print(show.run_table({"title": title_of(config.method), **scores}, tasks))
    say(f"report   {folder.report}")
    say(f"run      {folder.path}")
