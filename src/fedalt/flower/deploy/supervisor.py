"""A site: Flower's SuperNode and the trainer that holds the base model, kept alive and ended together."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedalt.errors import UserError
from fedalt.files import disk_errors
from fedalt.flower.certs import check_ca, check_site_key
from fedalt.flower.deploy.address import Connection, UnreachableError, check_server
from fedalt.flower.deploy.folders import check_private, claim_site, draining, locked, make_private
from fedalt.flower.deploy.node import HEARD
from fedalt.flower.deploy.processes import ProcessEvent, Watch, end, flower_environment, plain, shortened, start
from fedalt.flower.trainer import SITE, WRONG

_TRAINER, _NODE = "trainer", "flower-supernode"
_REFUSED, _JOINED, _PARTING = "Failed to activate SuperNode", "SuperNode ID:", "Exit Code:"
_KEYLESS = "[code: 2001]"
"""Flower's number for a site without a key at a server that wants one."""
_DEATHS, _WITHIN = 5, 60.0
_PAUSE, _NODE_PAUSE = 1.0, 3.0
_LOOK, _SILENCE, _AWAY, _STARTING = 5.0, 45.0, 30.0, 60.0
"""Seconds between looks at the heartbeat; without one until a SuperNode is started again; until the server is asked
again that does not answer; and until there must be a first one, besides. Flower's come every 23 s at least, and 20 s
after one that failed."""
_GRACE, _GRACE_AFTER_KILL = 45.0, 90.0
"""Seconds to go on asking a server that refuses: it may be registering keys, or still count a killed site as online."""


@dataclass(frozen=True)
class Site:
    """What ``fedalt site`` was asked for.

    Attributes:
        poll: Seconds between looks for messages, at most.
        data: Where its rows are; as the run's settings say when not given.
        own: Other settings that are the site's; see ``fedalt.flower.own.SiteRows``.
    """

    connection: Connection
    client: int
    state: Path
    poll: float
    key: Path | None = None
    data: str | None = None
    model: str | None = None
    device: str | None = None
    allow_two: bool = False
    share: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    own: Mapping[str, object] = field(default_factory=dict)

    def check(self) -> None:
        """Check the files."""
        if self.key and not self.connection.ca:
            raise UserError("--key needs --ca FILE: Flower checks a site's key over TLS only")
        if self.connection.ca:
            check_ca(self.connection.ca)
        if self.key:
            check_site_key(self.key)
            check_private(self.key)
        if any(c in "\"\\'\n" for c in str(self.state)):
            raise UserError(f"--state {self.state}: Flower takes no path with quotation marks or backslashes")

    def settings(self) -> dict[str, object]:
        """The content of ``site.json``, for the trainer."""
        names = ("client", "data", "model", "device", "allow_two")
        lists = {"share": list(self.share), "plugins": list(self.plugins)}
        key = str(self.key.absolute()) if self.key else None
        return {name: getattr(self, name) for name in names} | lists | {"key": key, "own": dict(self.own)}

    def command(self) -> list[str]:
        """The plain ``flower-supernode`` line, but for its own port and how often it looks for messages."""
        trust = ["--root-certificates", str(self.connection.ca)] if self.connection.ca else ["--insecure"]
        key = ["--auth-supernode-private-key", str(self.key)] if self.key else []
        config = f'client-id={self.client} state="{self.state.absolute()}"'
        return [_NODE, *trust, *key, "--superlink", str(self.connection.address), "--node-config", config]


def supervise(site: Site, tell: Callable[[str], None]) -> int:
    """Run a site until this process is asked to end, or cannot go on; 1 if the SuperNode ended by itself, else 0."""
    with locked(site.state, "another fedalt site"), Watch() as watch:
        claim_site(site.state, site.settings())
        make_private(site.state, SITE, tell)
        return _Supervisor(site, tell, watch).run()


class _Supervisor:
    def __init__(self, site: Site, tell: Callable[[str], None], watch: Watch) -> None:
        self.site, self.tell, self.watch = site, tell, watch
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.deaths = {name: deque[float](maxlen=_DEATHS) for name in (_TRAINER, _NODE)}
        self.refused = self.silent = self.leaving = False
        self.heard = time.monotonic()
        self.refused_since: float | None = None
        self.last = dict.fromkeys(self.deaths, "no word")
        self.parting: list[str] = []
        self.online = site.state / "online"
        """A file that is there from joining to leaving; left by a kill."""

    def run(self) -> int:
        if not self._wait_for_server():
            return 0
        try:
            self._start_trainer()
            self._start_node()
            while not (happened := self.watch.next(_LOOK)) or happened.what != "signal":
                if draining(self.site.state) and not self.leaving:
                    self._leave()
                if happened and not self._went_on(happened):
                    return 0 if self.leaving else 1
                self._listen()
            return self._asked_to_end(happened)
        finally:
            node, trainer = self.processes.get(_NODE), self.processes.get(_TRAINER)
            end(*(process for process in (node, trainer) if process))
            if node and node.returncode in (0, -signal.SIGTERM):
                self.online.unlink(missing_ok=True)

    def _asked_to_end(self, happened: ProcessEvent | None = None) -> int:
        how = f"ended by {happened.text}" if happened else "drained"
        self.tell(f"{how}: finished rounds are safe in {self.site.state}; start it again to go on")
        return 0

    def _leave(self) -> None:
        self.leaving = True
        self.tell("draining: what is at hand is finished and answered, nothing else is taken")
        self.processes[_NODE].send_signal(signal.SIGUSR1)

    def _went_on(self, happened: ProcessEvent) -> bool:
        """Do what there is to do; false if the SuperNode has ended by itself."""
        if happened.what == "line":
            self._read(happened)
        elif happened.name == _TRAINER:
            self._revive(_TRAINER)
        else:
            return self._node_goes_on()
        return True

    def _wait_for_server(self) -> bool:
        """Wait for a server to answer; false if asked to end before."""
        told = False
        while True:
            try:
                check_server(self.site.connection)
                return True
            except UnreachableError as error:
                if not told:
                    self.tell(f"{error}; waiting for it")
                    told = True
            happened = self.watch.next(_PAUSE)
            if draining(self.site.state) or (happened and happened.what == "signal"):
                self._asked_to_end(happened)
                return False

    def _start_trainer(self) -> None:
        command = [sys.executable, "-P", "-m", "fedalt.flower.trainer", str(self.site.state.absolute())]
        self._start(_TRAINER, command, signal.SIGKILL)

    def _start_node(self) -> None:
        name, *arguments = self.site.command()
        node = [sys.executable, "-P", "-m", "fedalt.flower.deploy.node", str(self.site.poll)]
        self._start(name, [*node, *arguments], signal.SIGTERM)
        self.heard = time.monotonic() + _STARTING

    def _start(self, name: str, command: list[str], on_death: signal.Signals) -> None:
        environment = flower_environment(self.site.state.absolute() / "flwr")
        process = start(command, environment, on_death, stdin=subprocess.PIPE)
        self.processes[name] = process
        self.watch.follow(name, process)

    def _listen(self) -> None:
        """End a SuperNode, to be started again, of which the server has heard nothing, whatever the cause."""
        silence = time.monotonic() - self.heard
        if silence < _SILENCE or self.silent:
            return
        try:
            check_server(self.site.connection)
        except UserError:
            self.heard += silence - _SILENCE + _AWAY
            return
        self.tell(f"{_NODE}: the server has not heard it for {silence:.0f} s; starting it again")
        self.silent = True
        end(self.processes[_NODE])

    def _read(self, happened: ProcessEvent) -> None:
        if happened.name == _NODE and happened.text.startswith(HEARD):
            self.heard = time.monotonic()
            return
        if _REFUSED in happened.text:
            self.refused = True
        if _JOINED in happened.text:
            with disk_errors(self.online):
                self.online.touch()
            self.refused_since, self.heard = None, time.monotonic()
        line = shortened(happened.text) if happened.name == _NODE else plain(happened.text)
        if line and happened.name == _NODE and (self.parting or line.startswith(_PARTING)):
            self.parting.append(line)
        elif line and (happened.name == _TRAINER or self.refused_since is None):
            self.last[happened.name] = line
            self.tell(f"{happened.name}: {line}")

    def _revive(self, name: str) -> None:
        """Start a process again that has died, unless it does so again and again."""
        now, status, deaths = time.monotonic(), self.processes[name].returncode, self.deaths[name]
        if name == _TRAINER and status == WRONG:
            raise UserError(f"{name}: {self.last[name].removeprefix('error: ')}")
        why = f"(signal {-status})" if status < 0 else f"with status {status}"
        deaths.append(now)
        if len(deaths) == _DEATHS and now - deaths[0] < _WITHIN:
            raise UserError(f"{name} ended {_DEATHS} times within a minute, at last {why}: {self.last[name]}")
        self.tell(f"{name}: ended {why}; starting it again")
        time.sleep(_PAUSE)
        self._start_trainer() if name == _TRAINER else self._start_node()

    def _node_goes_on(self) -> bool:
        """Start the SuperNode again if it was refused or killed; false if it has ended by itself."""
        end(self.processes[_NODE])
        if self.leaving:
            self._asked_to_end()
            return False
        parting, self.parting = self.parting, []
        address, status = self.site.connection.address, self.processes[_NODE].returncode
        if any(_KEYLESS in line for line in parting):
            raise UserError(
                f"{address}: this server lets in only sites whose key it knows; --key FILE names this site's"
            )
        if self.refused:
            self._wait_to_be_let_in()
            return True
        if self.silent:
            self.silent = False
            self._start_node()
            return True
        for line in parting:
            self.tell(f"{_NODE}: {line}")
        if status < 0:
            self._revive(_NODE)
            return True
        self.tell(f"{_NODE} ended with status {status}")
        return False

    def _wait_to_be_let_in(self) -> None:
        grace = _GRACE_AFTER_KILL if self.online.exists() else _GRACE
        now = time.monotonic()
        if self.refused_since is None:
            self.refused_since = now
            self.tell(
                f"the server does not let this site in: it does not know its key, is still registering keys, or counts "
                f"a killed site as online for another minute; trying again for {grace:.0f} s"
            )
        if now - self.refused_since > grace:
            raise UserError(
                f"{self.site.connection.address}: the server does not let {self.site.key or 'this site'} in: the key's "
                "public half is not registered there (fedalt server --tls DIR registers DIR/keys/*.pub), or another "
                "site uses it now"
            )
        time.sleep(_NODE_PAUSE)
        self.refused = False
        self._start_node()
