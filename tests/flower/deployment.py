"""A federation on loopback through the commands, ``fedalt server``, ``site`` and ``submit``, a process each."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

import micro
from fedalt.flower.deploy.address import free_port

FEDALT = str(Path(sys.executable).with_name("fedalt"))


class Deployment:
    """One server and some sites; all of it ends with the ``with`` block."""

    def __init__(self, folder: Path, clients: int = 3, tls: Path | None = None) -> None:
        self.folder, self.clients, self.tls = folder, clients, tls
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Deployment:
        self.start_server()
        for client in range(self.clients):
            self.start_site(client)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.terminate()
        for name in list(self.processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.processes[name].wait(30)
            self.kill(name)

    def start_server(self) -> None:
        trust = ["--tls", str(self.tls)] if self.tls else []
        self._start("server", ["server", "--address", self.address, "--state", str(self.folder / "server"), *trust])
        self.wait_for("server", "at site N: fedalt site")

    def start_site(self, client: int, *extra: str) -> None:
        trust = ["--ca", f"{self.tls}/ca.crt", "--key", f"{self.tls}/keys/client_{client}"] if self.tls else []
        state = str(self.state(client))
        self._start(
            f"site{client}",
            ["site", "--server", self.address, "--client-id", str(client), "--state", state, *trust, *extra],
        )

    def state(self, client: int) -> Path:
        return self.folder / f"state{client}"

    def submit(self, values: dict[str, Any], *extra: str) -> subprocess.Popen[str]:
        name = Path(values["out"]).name
        path = micro.write_yaml(self.folder / f"{name}.yaml", values)
        trust = ["--ca", f"{self.tls}/ca.crt"] if self.tls else []
        return self._start("submit", ["submit", str(path), "--server", self.address, *trust, *extra])

    def finish(self, values: dict[str, Any], *extra: str, code: int = 0) -> str:
        """Submit and wait; what it printed."""
        process = self.submit(values, *extra)
        assert process.wait(240) == code, self.log("submit")
        return self.log("submit")

    def kill(self, name: str) -> None:
        """``kill -9`` of a process and of everything that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.processes[name].pid)
            for each in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait_for(self, name: str, text: str, seconds: float = 120) -> None:
        wait(lambda: text in self.log(name), seconds, lambda: f"{text!r} not in {name}.log:\n{self.log(name)}")

    def models(self, run: str) -> dict[str, Any]:
        """Every client's saved model, of a run whose folder has this name."""
        found: dict[str, Any] = {}
        for client in range(self.clients):
            [path] = self.state(client).glob(f"{run}-*")
            found |= micro.adapters(path)
        return found

    def _start(self, name: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [FEDALT, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=self.folder,
                env=os.environ | micro.ENVIRONMENT,
                start_new_session=True,
            )
        return self.processes[name]


def wait(until: Callable[[], bool], seconds: float, why: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, why()
        time.sleep(0.1)
