"""The server: Flower's SuperLink, and the keys of the sites that may join."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedalt.errors import UserError, listed
from fedalt.files import read_json, write_json
from fedalt.flower.certs import CA, CERTIFICATE, KEY, SITE_KEYS, TLS, check_server, server_names, site_keys
from fedalt.flower.deploy.address import WILDCARDS, Address, Connection, check_free, on_loopback
from fedalt.flower.deploy.control import control, going_on
from fedalt.flower.deploy.folders import STATE, check_private, draining, locked, make_private
from fedalt.flower.deploy.processes import Watch, end, flower_environment, program, shortened, start

_UP = "Uvicorn running on"
_NOTHING = "N/A"
_DOOR = "door"
_AT_A_TIME = 4
_LOOK = 5.0
"""Seconds between looks whether there are other keys."""
_SAFE = "finished rounds are in their run folders; start it again with this --state, then fedalt submit … --resume"
DATABASE = "superlink.db"
"""The SuperLink's own file in a server's state folder."""
NODES = "nodes.json"
"""File in a server's state folder: site → its public key and node id."""


@dataclass(frozen=True)
class Server:
    """What ``fedalt server`` was asked for.

    Attributes:
        tls: Folder with certificates and the sites' public keys; neither encryption nor authentication when not given.
        public: Where sites come in, and only sites; at the address itself when not given.
    """

    address: Address
    tls: Path | None
    state: Path
    public: Address | None = None

    @property
    def connection(self) -> Connection:
        """How this machine reaches it."""
        return Connection(self.address.local, self.tls and self.tls / CA)

    @property
    def for_sites(self) -> list[Address]:
        """Where sites may reach it."""
        place = self.public or self.address
        if place.host not in WILDCARDS:
            return [place]
        names = server_names(self.tls) if self.tls else ["THIS_MACHINE"]
        return [Address(name, place.port) for name in names]

    def check(self) -> None:
        """Check everything that can be checked before anything is started."""
        if self.tls:
            hosts = [self.connection.address.host]  # the SuperLink's own processes check it, too
            if self.public and self.public.host not in WILDCARDS:
                hosts.append(self.public.host)
            check_server(self.tls, hosts)
            check_private(self.tls / KEY)
            site_keys(self.tls)
            if not on_loopback(self.address):
                raise UserError(
                    f"--address {self.address}: whoever reaches it can submit runs and register keys; keep it on "
                    "loopback, as 127.0.0.1:9092 is, and let sites in with --public HOST:PORT"
                )
        elif self.public:
            raise UserError("--public needs --tls DIR: a way in for everybody must be encrypted")
        check_free(self.address, "--address")
        if self.public:
            check_free(self.public, "--public")

    def command(self) -> list[str]:
        """The plain ``flower-superlink`` line."""
        place = ["--host", self.address.host, "--port", str(self.address.port)]
        kept = ["--database", str(self.state / DATABASE), "--disable-runtime-dependency-installation"]
        if self.tls is None:
            return ["flower-superlink", "--insecure", *place, *kept]
        files = {"--ssl-ca-certfile": CA, "--ssl-certfile": CERTIFICATE, "--ssl-keyfile": KEY}
        tls = [part for flag, name in files.items() for part in (flag, str(self.tls / name))]
        return ["flower-superlink", *tls, "--enable-supernode-auth", *place, *kept]


def serve(server: Server, tell: Callable[[str], None], ready: Callable[[], None]) -> int:
    """Run the SuperLink until this process is asked to end; ``ready`` is called when sites can join.

    Returns 0, or 1 if the SuperLink ended by itself.
    """
    name, *arguments = server.command()
    environment = flower_environment(server.state.absolute() / "flwr")
    environment |= {STATE: str(server.state.absolute())}
    environment |= {TLS: str(server.tls.absolute())} if server.tls else {}
    with locked(server.state, "another server"), Watch() as watch:
        make_private(server.state, DATABASE, tell)
        # on this process's death SIGKILL, because after SIGTERM a SuperLink waits for whoever reads a log
        running = {name: start([program(name), *arguments], environment, signal.SIGKILL)}
        watch.follow(name, running[name])
        keys, due, leaving = _keys(server), float("inf"), False
        try:
            while not (happened := watch.next(_LOOK)) or happened.what == "line":
                if happened and (line := shortened(happened.text)):
                    tell(line)
                if happened and _UP in happened.text:
                    keys, due = _keys(server), time.monotonic() + _LOOK
                    _let_sites_in(server, tell)
                    if door := _door(server):
                        running[_DOOR] = start(door, environment, signal.SIGKILL)
                        watch.follow(_DOOR, running[_DOOR])
                    ready()
                if time.monotonic() > due:
                    before, keys, due = keys, _keys(server), time.monotonic() + _LOOK
                    if keys != before:
                        _take_up(server, running.get(_DOOR), tell)
                    if draining(server.state) and not leaving:
                        tell("draining: rounds at hand are finished, no other begins")
                        leaving = True
                    elif leaving and not _at_work(server):
                        tell(f"drained: {_SAFE}")
                        return 0
            if happened and happened.what == "signal":
                tell(f"ended by {happened.text}: {_SAFE}")
        finally:
            end(*running.values())
    if happened and happened.what == "signal":
        return 0
    ended = happened.name if happened else name
    tell(f"{ended} ended with status {running[ended].returncode}")
    return 1


def _at_work(server: Server) -> bool:
    """Whether there is a run that has not ended."""
    with suppress(UserError), control(server.connection) as superlink:
        return any(going_on(run) for run in superlink.runs())
    return True


def _keys(server: Server) -> set[tuple[str, int]]:
    """Which keys there are, and of when."""
    paths = (server.tls / SITE_KEYS).glob("*.pub") if server.tls else ()
    found = set[tuple[str, int]]()
    for path in paths:
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def _take_up(server: Server, door: subprocess.Popen[str] | None, tell: Callable[[str], None]) -> None:
    """Let in and keep out whom the keys in the folder say, from now on."""
    try:
        _let_sites_in(server, tell)
    except UserError as error:
        tell(f"note: who may join is as it was: {error}")
        return
    if door:
        door.send_signal(signal.SIGHUP)


def _door(server: Server) -> list[str] | None:
    if server.public is None:
        return None
    place = [server.public.host, str(server.public.port), str(server.address.local), str(server.tls)]
    return [sys.executable, "-P", "-m", "fedalt.flower.deploy.door", *place]


def _registered(state: Path) -> dict[str, dict[str, Any]]:
    """Site → its public key and node id, as far as this machine knows them."""
    path = state / NODES
    known: dict[str, dict[str, Any]] = read_json(path) if path.is_file() else {}
    return known


def now(
    connection: Connection, state: Path | None, tell: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A server's sites, named by its state folder, and its runs; the commands that ask for them are told."""
    if state and not state.is_dir():
        raise UserError(f"--state {state}: no such folder here; it is the server's")
    names = {node["node"]: site for site, node in _registered(state).items()} if state else {}
    with control(connection, tell) as superlink:
        nodes, runs = superlink.nodes(), superlink.runs()
    return [_site(node, names) for node in nodes], [_run(run) for run in runs]


def _site(node: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    since = {"online": "online-at", "offline": "offline-at"}.get(node["status"], "created-at")
    number = node["node-id"]
    return {"site": names.get(int(number)), "node": number, "status": node["status"], "since": node[since]}


def _run(run: Mapping[str, Any]) -> dict[str, Any]:
    traffic, details, started = run["network-traffic"], run["status-details"], run["running-at"]
    return {
        "run": run["run-id"],
        "status": run["status"],
        "details": "" if details == _NOTHING else details,
        "started": None if started == _NOTHING else started,
        "seconds": run["elapsed"],
        "bytes_in": traffic["inbound-bytes"],
        "bytes_out": traffic["outbound-bytes"],
    }


def _let_sites_in(server: Server, tell: Callable[[str], None]) -> None:
    """Register the keys in the folder, and no others: one that was taken out may not join again."""
    if server.tls is None:
        return
    known, keys = _registered(server.state), site_keys(server.tls)
    with control(server.connection) as superlink:
        there = {int(node["node-id"]) for node in superlink.nodes()}
        known = {site: node for site, node in known.items() if node["node"] in there}
        for site in [site for site, node in known.items() if keys.get(site) != node["key"]]:
            superlink.unregister(known.pop(site)["node"])
            tell(f"flwr supernode unregister: {site} may not join any more")
        fresh = sorted(keys.keys() - known.keys())
        files = [server.tls / SITE_KEYS / f"{site}.pub" for site in fresh]
        with ThreadPoolExecutor(_AT_A_TIME) as several:
            for site, node in zip(fresh, several.map(superlink.register, files), strict=True):
                if node is not None:
                    known[site] = {"key": keys[site], "node": node}
    write_json(server.state / NODES, known)
    tell(f"flwr supernode register: {len(fresh)} new keys; may join: {listed(sorted(keys))}")
