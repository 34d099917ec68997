"""The run across sites inside Flower's simulation: the same server, and sites in Ray actors with a base each."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedalt.config import RunConfig
from fedalt.errors import UserError
from fedalt.experiment.events import Sink
from fedalt.experiment.folder import IfExists, RunFolder
from fedalt.experiment.members import Bases
from fedalt.flower.consent import Consent
from fedalt.flower.messages import request_in, to_server
from fedalt.flower.requests import Reply
from fedalt.flower.server_app import checked, serve
from fedalt.flower.site import Site

SITES = "sites"
"""Folder of a simulated run with the state of every site; results and models are in the run's own folder."""
_EVERYTHING = Consent(frozenset(("mixer", "heads")), allow_two=True)


def simulate(
    config: RunConfig, if_exists: IfExists, sink: Sink = lambda event: None, actors: int | None = None
) -> dict[str, Any]:
    """Run on this machine, or on the Ray cluster that ``RAY_ADDRESS`` names.

    Args:
        config: Settings; rows are dealt as for a run on one machine.
        if_exists: What to do with a run that is there already.
        sink: Called with every event.
        actors: Processes with a base each; the cores, and no more than clients, when not given.

    Returns:
        The content of ``final_scores.json``.

    Raises:
        UserError: As for a run across sites.
    """
    config, method = checked(config)
    config = config.model_copy(update={"out": str(config.folder.absolute())})
    outcome: dict[str, Any] = {}
    server, client = ServerApp(), ClientApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            outcome["scores"] = serve(grid, config.model_dump(mode="json"), if_exists, sink)
        except UserError as error:
            outcome["error"] = error

    state = config.folder / SITES

    @client.query()
    @client.train()
    @client.evaluate()
    def handle(message: Message, context: Context) -> Message:
        request, number = request_in(message), int(context.node_config["partition-id"])
        if request.do == "who":
            return to_server(Reply({"client": number}), message)
        return to_server(_site(state, number).answer(request), message)

    actors = min(method.clients, actors or os.cpu_count() or 1)
    resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": actors}}
    run_simulation(server, client, num_supernodes=method.clients, backend_config=resources)
    if "error" in outcome:
        raise outcome["error"]
    if "scores" not in outcome:
        raise RuntimeError("Flower's simulation ended before the run did; its log says why")
    return dict(outcome["scores"])


@cache
def _bases() -> Bases:
    import torch

    torch.set_num_threads(1)
    return Bases()


@cache
def _site(state: Path, client: int) -> Site:
    """A site in an actor; whichever actor is asked finds its state on the disk."""
    return Site(client, state / str(client), _bases(), consent=_EVERYTHING, results=_run_folder)


def _run_folder(own: RunFolder, config: RunConfig) -> RunFolder:
    return RunFolder(config.folder)
