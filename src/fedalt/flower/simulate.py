"""Runs across sites inside Flower's simulation: the same server, and sites in Ray actors with a base each."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedalt.config import RunConfig
from fedalt.errors import UserError
from fedalt.flower.consent import PRIVATE, Consent
from fedalt.flower.messages import request_in, to_server
from fedalt.flower.requests import Reply
from fedalt.flower.server_app import checked, serve
from fedalt.flower.site import Site
from fedalt.registry import hold_plugins
from fedalt.runs.events import Sink
from fedalt.runs.folder import IfExists, RunFolder
from fedalt.runs.setup import Bases
from fedalt.runtime import usual_priority

SITES = "sites"
"""Folder of a simulated run with the state of every site; results and models are in the run's own folder."""
_CLUSTER = "RAY_ADDRESS"
_log = logging.getLogger("flwr")
_EVERYTHING = Consent(frozenset(PRIVATE), allow_two=True)


def simulate(
    configs: Sequence[RunConfig], if_exists: IfExists, sink: Sink = lambda event: None
) -> list[dict[str, Any]]:
    """Run one after another, on this machine or on the Ray cluster that ``RAY_ADDRESS`` names; every final score.

    On this machine there is an actor per core, with a base each, and no more than clients; on a cluster as many as its
    cores, or its GPUs by ``flower.client_gpus``, have room for. All runs have the same number of clients.
    """
    known = (checked(config)[0] for config in configs)
    runs = [one.model_copy(update={"out": str(one.folder.absolute())}) for one in known]  # where actors find it, too
    hold_plugins([place for run in runs for place in run.plugins])
    clients = checked(configs[0])[1].clients
    scores: list[dict[str, Any]] = []
    errors: list[UserError] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            scores.extend(serve(grid, run.portable(), if_exists, sink) for run in runs)
        except UserError as error:
            errors.append(error)

    usual_priority()
    each: Any = {"num_cpus": 1, "num_gpus": configs[0].flower.client_gpus}
    here: Any = {} if os.environ.get(_CLUSTER) else {"num_cpus": min(clients, os.cpu_count() or 1)}
    run_simulation(server, app, num_supernodes=clients, backend_config={"client_resources": each, "init_args": here})
    if errors:
        raise errors[0]
    if len(scores) < len(runs):
        raise RuntimeError("Flower's simulation ended before the runs did; its log says why")
    return scores


app = ClientApp()


@app.query()
@app.train()
@app.evaluate()
def handle(message: Message, context: Context) -> Message:
    """Answer for whichever client this actor is now; the state of all is on the disk."""
    request, client = request_in(message), int(context.node_config["partition-id"])
    if request.do == "who":
        return to_server(Reply.to(request, client), message)
    return to_server(_site(Path(json.loads(request.settings)["out"]) / SITES, client).answer(request), message)


@cache
def _bases() -> Bases:
    import torch

    torch.set_num_threads(1)
    return Bases()


@cache
def _site(state: Path, client: int) -> Site:
    """A site in an actor; whichever actor is asked finds its state on the disk."""
    note = partial(_log.info, "client %d: %s", client)
    results = lambda own, config: RunFolder(config.folder)  # noqa: E731
    return Site(client, state / str(client), _bases(), consent=_EVERYTHING, results=results, alone=True, note=note)
