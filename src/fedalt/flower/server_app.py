"""The ServerApp: the rounds of a run, with sites as its clients. It has neither rows nor base model."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedalt.config import RunConfig, parse_received
from fedalt.errors import UserError, shortened
from fedalt.evaluation.metrics import metric_of
from fedalt.federation.server import Server
from fedalt.files import only_one, read_json, write_json
from fedalt.flower.certs import TLS, PublicKey, client_keys
from fedalt.flower.consent import check_few, check_pooled, check_two
from fedalt.flower.deploy.folders import STATE, draining
from fedalt.flower.inflate import bound
from fedalt.flower.members import common_to, info_of, member_of, rule_of
from fedalt.flower.nodes import Nodes
from fedalt.flower.requests import Common, Member, Reply, strict
from fedalt.flower.sites import RemoteClients, joining
from fedalt.flower.waits import retry_soon
from fedalt.methods.base import Method
from fedalt.methods.registry import build, configured
from fedalt.runs.checkpoint import load_checkpoint, run_id
from fedalt.runs.events import Event, EventLog, Sink
from fedalt.runs.folder import IfExists, RunFolder, claim_folder
from fedalt.runs.rounds import find_checkpoint, frozen_settings, go, start

app = ServerApp()
RUN = "flower.json"
"""File in a run's folder for a server that resumes it: its name at the sites, of which settings it is, and what sites
have in common."""
GRID = "flwr.superlink.grid.http_grid"
LATE = 60.0
"""Seconds beyond the deadline in which a site may still be given what it was asked; then it is let go."""
_log = logging.getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the run that ``fedalt submit`` has sent."""
    given = context.run_config
    exists: IfExists = "resume" if given["resume"] else "overwrite" if given["overwrite"] else "ask"
    settings = json.loads(str(given["settings"]))
    _log.info("run %s: submitted by %s", context.run_id, shortened(str(given["by"])))
    bound(GRID, errors=True)
    retry_soon(GRID, "pull_objects", settings["flower"]["round_deadline"])
    try:
        folder = os.environ.get(TLS)
        serve(grid, settings, exists, _tell, client_keys(Path(folder)) if folder else None)
    except UserError as error:
        _log.error("error: %s", error)
        raise


def serve(
    grid: Grid,
    settings: dict[str, Any],
    if_exists: IfExists,
    sink: Sink,
    keys: Mapping[int, PublicKey] | None = None,
) -> dict[str, Any]:
    """Run the rounds to the end, in the run folder that the settings name; the content of ``final_scores.json``.

    ``keys``: client → the public key of its site, which must have signed what counts as the client's.
    """
    config, method = checked(parse_received(settings, "settings"))
    folder = claim_folder(config.folder, if_exists)
    folder.path.chmod(0o700)  # it will hold uploads
    with only_one(folder.path):
        log = EventLog(folder.events, sink)
        nodes = Nodes(grid, method.clients, keys, ttl=config.flower.round_deadline + LATE)
        nodes.note = lambda client, line: sink({"event": "node", "client": client, "text": line})
        refused = list[str]()
        nodes.refused = refused.append
        of = run_id(frozen_settings(config, method), "", "")
        name, common = _known(folder, of) or (f"{folder.path.name}-{secrets.token_hex(4)}", None)
        replies = _gather(nodes, config, name, method.clients)
        members = _members(replies)
        common = common or replace(common_to(members), method=rule_of(config, method))
        fitting = {client: member for client, member in members.items() if member.common == common}
        method = build(config, method.clients, common.layer_sizes)
        info = info_of(config, method, fitting, common)
        run_, checkpoint = find_checkpoint(info, folder)
        server = Server(method, config.federation, info.samples, info.shapes)
        sites = RemoteClients(info, name, nodes, folder, log, server, common)
        loop = start(info, sites, folder, log, run_, checkpoint=checkpoint, server=server)
        nodes.refused = lambda line: log.emit("note", round=server.round, text=line)
        for line in refused:
            nodes.refused(line)
        write_json(folder.path / RUN, {"run": name, "settings": of, "common": asdict(common)})
        for client, reply in replies.items():
            sites.admit(client, reply)
        if len(sites.members) < min(config.flower.min_sites, method.clients):
            why = next(iter(sites.refused.values()))[0]
            raise UserError(
                f"{len(sites.members)} sites joined, flower.min_sites asks for {config.flower.min_sites}: {why}"
            )
        scores = go(loop, _check_drain)
        from fedalt.report.html import write_report

        write_report(folder)
        return scores


def checked(config: RunConfig) -> tuple[RunConfig, Method]:
    """Settings that can be run across sites, and the method."""
    config = configured(config, config.method)
    clients = config.data.clients
    if clients is None:
        raise UserError("data.clients: say how many sites there are; their ids run from 0")
    if config.classifies and config.model.labels is None:
        raise UserError("model.labels: name the classes; no site knows all rows, so they cannot be collected")
    if config.report.insight:
        config = config.having("report", insight=0)
    method = build(config, clients)
    method.rank_of(0)  # refuses ranks where there is no rule for them
    method.remarks()  # refuses rules that so many clients are too few for
    check_pooled(method)
    check_two(method, config.flower.allow_two)
    if config.federation.secure:
        if not config.flower.allow_two:
            check_few(config, clients)
        if config.flower.wire != "fp32":
            raise UserError(f"flower.wire: {config.flower.wire} has no effect on a secure sum; leave it out")
    return config, method


def _known(folder: RunFolder, settings: str) -> tuple[str, Common] | None:
    """The name and what sites have in common, of a run that is resumed; nothing where it starts anew."""
    path = folder.path / RUN
    known = read_json(path) if path.is_file() else {}
    if known.get("settings") == settings:
        return known["run"], strict(Common, json.dumps(known["common"]))
    load_checkpoint(folder.checkpoints, settings)  # what finished is of other settings
    return None


def _gather(nodes: Nodes, config: RunConfig, name: str, clients: int) -> dict[int, Reply]:
    """Let sites join: all, or after the deadline as many as must be."""
    asked, deadline = joining(config, name, clients), time.monotonic() + config.flower.round_deadline
    least = min(config.flower.min_sites, clients)
    requests = dict.fromkeys(range(clients), asked)

    def until(got: int) -> float:
        _check_drain()
        return deadline if got >= least else float("inf")

    return dict(nodes.ask(requests, until))


def _check_drain() -> None:
    """Begin nothing at a server that is being drained."""
    if (state := os.environ.get(STATE)) and draining(Path(state)):
        raise UserError("this server is drained; finished rounds are safe, submit with --resume when it is back")


def _members(replies: dict[int, Reply]) -> dict[int, Member]:
    members, why = {}, ["none answered"]
    for client, reply in replies.items():
        try:
            members[client] = member_of(reply)
        except UserError as error:
            why.append(f"client {client}: {error}")
    if not members:
        raise UserError(f"no site could join: {why[-1]}")
    return members


def _tell(event: Event) -> None:
    """What happens, in the log that ``flwr log`` and ``fedalt submit`` show."""
    line = line_of(event)
    if line:
        _log.info("%s", line)


def line_of(event: Event) -> str:
    """An event in a line, or nothing for those that are not for people."""
    tell = _LINES.get(event["event"])
    return tell(event) if tell else ""


def _round(event: Event) -> str:
    loss = "–" if event["loss"] is None else f"{event['loss']:.4f}"
    up, down = event["bytes_up"] / 1e6, event["bytes_down"] / 1e6
    return f"round {event['round']}: loss {loss}, {event['seconds']:.1f} s, {up:.2f} MB up, {down:.2f} MB down"


def _started(event: Event) -> str:
    return f"{event['event'].replace('_', ' ')}: {event['method']}, {len(event['clients'])} clients"


def _finished(event: Event) -> str:
    metric = metric_of(event["metric"])
    return f"finished: {metric.title}, mean {metric.text(event['mean'])}, worst client {metric.text(event['worst'])}"


_LINES: dict[str, Callable[[Event], str]] = {
    "run_started": _started,
    "run_resumed": _started,
    "node": lambda event: f"client {event['client']}: {event['text']}",
    "note": lambda event: f"round {event['round']}: {event['text']}",
    "client_failed": lambda event: f"round {event['round']}: client {event['client']} left out: {event['reason']}",
    "round": _round,
    "evaluated": lambda event: f"round {event['round']}: scored in {event['seconds']:.1f} s",
    "run_finished": _finished,
}
