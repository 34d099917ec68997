"""A run, handed to a server: Flower's ``flwr run``, its log, and how the run ended."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import tomli_w

from fedalt.config import RunConfig
from fedalt.errors import LeftError, UserError, listed
from fedalt.flower.deploy.address import Connection
from fedalt.flower.deploy.bundle import PROJECT, app_with
from fedalt.flower.deploy.control import NAME, Control, control, going_on
from fedalt.flower.deploy.processes import plain, shortened
from fedalt.runs.folder import IfExists

_STARTED = re.compile(r"Successfully started run (\d+)")
_ERROR = "error: "
_POLL = 2.0
_GO_ON = "finished rounds are safe, submit it again with --resume"


class RunFailedError(Exception):
    """A run did not end well, for a reason that is not the user's input; one line says what and how to go on."""


LATEST = "latest"


def submit(config: RunConfig, connection: Connection, if_exists: IfExists, tell: Callable[[str], None]) -> None:
    """Hand a run to a server, show its log, and wait for its end; the run folder is one of the server's machine.

    A run with the same settings, of the same account, that goes on there is followed instead, unless this one is to
    resume or overwrite: after a crash a server takes a dead run for one that goes on, for a while. ``tell`` is called
    with Flower's commands and every line of the ServerApp.

    Raises:
        RunFailedError: The run failed for another reason, or the server has gone.
        KeyboardInterrupt: The user has stopped it, here and at the server.
        LeftError: The user has stopped following a run that goes on.
    """
    with control(connection, tell) as superlink, tempfile.TemporaryDirectory(prefix="fedalt-app-") as app:
        runs = [run for run in superlink.runs() if going_on(run)] if if_exists == "ask" else []
        hashes = _hashes(config) if runs else ()
        if known := [run["run-id"] for run in runs if run["fab-hash"] in hashes]:
            _attend(superlink, known[0], connection, tell)
            return
        write_app(Path(app), config, if_exists)
        log = _Log(tell)
        try:
            _follow(superlink, ["run", app, NAME, "--stream"], log)
            if log.run is None:
                raise RunFailedError(f"flwr run could not start the run: {' '.join(log.rest)}")
            _end(superlink, log)
        except KeyboardInterrupt:
            if log.run:
                superlink.stop(log.run)
            raise


def attach(run: str, connection: Connection, tell: Callable[[str], None]) -> str:
    """Follow a run of a server, or its ``LATEST`` that goes on, to its end; its id. Raises as ``submit`` does."""
    with control(connection, tell) as superlink:
        runs = superlink.runs()
        found = [one["run-id"] for one in runs if (going_on(one) if run == LATEST else one["run-id"] == run)]
        if not found:
            some = listed([one["run-id"] for one in runs if going_on(one)]) or "none"
            raise UserError(f"--attach {run}: no such run at {connection.address}; in progress: {some}")
        _attend(superlink, found[0], connection, tell)
        return str(found[0])


def _attend(superlink: Control, run: str, connection: Connection, tell: Callable[[str], None]) -> None:
    """Follow a run that somebody has begun."""
    tell(f"following run {run}, which has begun before; Ctrl-C leaves it going")
    log = _Log(tell, run)
    try:
        _follow(superlink, ["log", run, NAME, "--stream"], log)
        _end(superlink, log)
    except KeyboardInterrupt:
        trust = f" --ca {connection.ca}" if connection.ca else ""
        again = f"fedalt submit --attach {run} --server {connection.address}{trust}"
        raise LeftError(f"run {run} goes on; {again} follows it again") from None


def _hashes(config: RunConfig) -> set[str]:
    """Of the apps that ``write_app`` makes of these settings."""
    from flwr.cli.build import build_fab_from_disk

    found = set[str]()
    for how in get_args(IfExists):
        with tempfile.TemporaryDirectory(prefix="fedalt-app-") as app:
            write_app(Path(app), config, how)
            found.add(hashlib.sha256(build_fab_from_disk(Path(app))).hexdigest())
    return found


def _end(superlink: Control, log: _Log) -> None:
    """Wait until the run has ended, and say if that was not well."""
    assert log.run
    outcome = _outcome(superlink, log.run)
    if log.error:
        raise UserError(log.error)
    if outcome["status"] != "finished:completed":
        raise RunFailedError(f"run {log.run}: {outcome['status']} ({outcome['status-details']}); {_GO_ON}")


def write_app(folder: Path, config: RunConfig, if_exists: IfExists) -> None:
    """Write the app: nothing but a ``pyproject.toml``, as all code is in the installed package."""
    settings = json.dumps(config.portable())
    how = {"resume": if_exists == "resume", "overwrite": if_exists == "overwrite"}
    run = app_with({"settings": settings, **how, "by": _account()})
    (folder / PROJECT).write_text(tomli_w.dumps(run), encoding="utf-8")


def _account() -> str:
    """Who submits, for the server's log: what this machine says, and no proof."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # no name for this number
        name = str(os.getuid())
    return re.sub(r"[^\w.@-]", "?", f"{name}@{socket.gethostname()}", flags=re.ASCII)[:100]


class _Log:
    """What ``flwr`` prints, taken apart."""

    def __init__(self, tell: Callable[[str], None], run: str | None = None) -> None:
        self.tell, self.run = tell, run
        self.error = ""
        self.rest: list[str] = []

    def read(self, line: str) -> None:
        text = plain(line)
        if started := _STARTED.search(text):
            self.run = started[1]
            self.tell(f"flwr run: run {self.run}")
        elif text.startswith(_ERROR):
            self.error = text.removeprefix(_ERROR)
        elif self.error or not (short := shortened(line)):
            return
        elif self.run is None:
            self.rest.append(short)
        else:
            self.tell(short)


def _follow(superlink: Control, arguments: list[str], log: _Log) -> None:
    with subprocess.Popen(
        superlink.command(*arguments),
        env=superlink.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout
            for line in process.stdout:
                log.read(line)
        except KeyboardInterrupt:
            process.terminate()
            raise


def _outcome(superlink: Control, run: str) -> dict[str, Any]:
    """How the run ended; its log may end before it does."""
    while True:
        try:
            [found] = [each for each in superlink.runs() if each["run-id"] == run]
        except UserError as error:
            raise RunFailedError(f"{error}; run {run} may have been cut off; {_GO_ON}") from None
        if not going_on(found):
            return found
        time.sleep(_POLL)
