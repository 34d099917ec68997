"""A federation on loopback through the commands, ``fedalt server``, ``site`` and ``submit``, a process each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

import micro
from fedalt.flower.deploy.address import free_port

FEDALT = (str(Path(sys.executable).with_name("fedalt")),)
SPOILT = (sys.executable, str(Path(__file__).with_name("spoilt_site.py")))

PATIENCE = 300.0
"""Seconds; machines may be slow."""
CLOSE = 1e-5
"""How far models may be from those of one machine."""


class Deployment:
    """One server and some sites; all of it ends with the ``with`` block, and may serve several runs before."""

    def __init__(self, folder: Path, clients: int = 3, tls: Path | None = None) -> None:
        self.folder, self.clients, self.tls, self.rows = folder, clients, tls, micro.shared_data()
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self._from: dict[str, int] = {}

    def __enter__(self) -> Deployment:
        self.restore()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.terminate()
        for name in list(self.processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.processes[name].wait(30)
            self.kill(name)

    def restore(self) -> None:
        """Start whatever does not run."""
        if not self.runs("server"):
            self.start_server()
        for client in range(self.clients):
            if not self.runs(f"site{client}"):
                self.start_site(client)

    def give(self, rows: Path) -> None:
        """Let all sites have other rows, and start whatever does not run."""
        if rows != self.rows:
            self.rows = rows
            for client in range(self.clients):
                if self.runs(f"site{client}"):
                    self.end(f"site{client}")
        self.restore()

    def runs(self, name: str) -> bool:
        return name in self.processes and self.processes[name].poll() is None

    def start_server(self) -> None:
        trust = ["--tls", str(self.tls)] if self.tls else []
        self._start("server", ["server", "--address", self.address, "--state", str(self.folder / "server"), *trust])
        self.wait_for("server", "at site N: fedalt site")

    def start_site(
        self, client: int, *extra: str, spoilt: str = "", key: int | None = None, server: str = "", data: str = ""
    ) -> None:
        """Start a site, with its own key unless it is another's; all its scores may be known."""
        holds = client if key is None else key
        trust = ["--ca", f"{self.tls}/ca.crt", "--key", f"{self.tls}/keys/client_{holds}"] if self.tls else []
        own = ["--data", data or str(self.rows), "--model", str(micro.shared_model()), "--set", "min_rows=1"]
        own += ["--set", f"task=task{client}", "--set", "categories=compare,copy", *trust]
        place = ["--server", server or self.address, "--client-id", str(client), "--state", str(self.state(holds))]
        self._start(f"site{holds}", ["site", *place, *own, *extra], (*SPOILT, spoilt) if spoilt else FEDALT)

    def state(self, client: int) -> Path:
        return self.folder / f"state{client}"

    def submit(self, values: dict[str, Any], *extra: str) -> subprocess.Popen[str]:
        name = Path(values["out"]).name
        path = micro.write_yaml(self.folder / f"{name}.yaml", values)
        trust = ["--ca", f"{self.tls}/ca.crt"] if self.tls else []
        for other in self.processes:
            self._mark(other)
        return self._start("submit", ["submit", str(path), "--server", self.address, *trust, *extra])

    def finish(self, values: dict[str, Any], *extra: str, code: int = 0) -> str:
        """Submit and wait; what it printed."""
        process = self.submit(values, *extra)
        assert process.wait(PATIENCE) == code, self.log("submit")
        return self.log("submit")

    def end(self, name: str) -> None:
        """Ask a process to end, and see it end."""
        self.processes[name].terminate()
        self.processes[name].wait(60)

    def kill(self, name: str) -> None:
        """``kill -9`` of a process and of everything that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.processes[name].pid)
            for each in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def log(self, name: str) -> str:
        """What a process has printed since it was started, or since the last run was submitted."""
        return (self.folder / f"{name}.log").read_bytes()[self._from[name] :].decode()

    def _mark(self, name: str) -> None:
        path = self.folder / f"{name}.log"
        self._from[name] = path.stat().st_size if path.exists() else 0

    def wait_for(self, name: str, text: str, times: int = 1) -> None:
        def said() -> bool:
            return self.log(name).count(text) >= times

        wait(said, lambda: f"{text!r} not in {name}.log:\n{self.log(name)}")

    def trainer(self, client: int) -> psutil.Process:
        return psutil.Process(json.loads((self.state(client) / "trainer.json").read_text())["pid"])

    def wait_for_training(self, client: int, seconds: float = 1.0) -> None:
        """Wait until a site's trainer has computed for so long from now on."""
        process = self.trainer(client)
        before = process.cpu_times().user
        wait(lambda: process.cpu_times().user > before + seconds, lambda: f"site {client} does not train")

    def models(self, run: str) -> dict[str, Any]:
        """Every client's saved model, of a run whose folder has this name."""
        found: dict[str, Any] = {}
        for client in range(self.clients):
            [path] = self.state(client).glob(f"{run}-*")
            found |= micro.adapters(path)
        return found

    def _start(self, name: str, arguments: Sequence[str], program: Sequence[str] = FEDALT) -> subprocess.Popen[str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mark(name)
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [*program, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=self.folder,
                env=os.environ | micro.ENVIRONMENT,
                start_new_session=True,
            )
        return self.processes[name]


def wait(until: Callable[[], bool], why: Callable[[], str]) -> None:
    end = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < end, why()
        time.sleep(0.1)


def values(folder: Path, name: str = "run", **changes: Any) -> dict[str, Any]:
    return micro.settings(folder / name, **{"data__clients": 3, "evaluation__every": 3, **changes})


def failures(run: Path) -> list[tuple[int, int, str]]:
    return [(e["round"], e["client"], e["reason"]) for e in micro.of_kind(run, "client_failed")]


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys() and one
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def on_one_machine(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    micro.run_here(values(folder, "here", **changes))
    return micro.adapters(folder / "here")
