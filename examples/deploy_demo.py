"""``make deploy-demo``: a server and three sites on this machine with TLS and authentication; one is killed on the way.

Every line that starts with ``$`` is a command that you could type; ``docs/deploy.md`` explains them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

FEDALT = [sys.executable, "-c", "from fedalt.cli import main; main()"]
FOLDER = Path("runs/deploy-demo")
RECIPE = Path("recipes/tinyworld.yaml")
KILLED = 1
WIDTH = 7
SHARED = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 3))}
"""Three sites train on one machine: more threads than cores would wait for each other."""


class Command:
    """A command of fedalt's whose lines are shown with its name in front."""

    def __init__(self, name: str, *arguments: object) -> None:
        self.name = name
        self.lines: list[str] = []
        self.changed = threading.Condition()
        words = [str(argument) for argument in arguments]
        print(f"{name:<{WIDTH}} │ $ fedalt {shlex.join(words)}", flush=True)
        self.process = subprocess.Popen(
            [*FEDALT, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=SHARED | os.environ
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def until(self, said: Callable[[list[str]], bool]) -> None:
        """Wait until it has said something."""
        with self.changed:
            while not said(self.lines):
                if not self.changed.wait(1) and self.process.poll() is not None:
                    sys.exit(f"{self.name} ended with status {self.process.returncode}")

    def says(self, text: str, times: int = 1) -> None:
        """Wait until a text has come up so many times."""
        self.until(lambda lines: sum(text in line for line in lines) >= times)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            print(f"{self.name:<{WIDTH}} │ {line.rstrip()}", flush=True)
            with self.changed:
                self.lines.append(line)
                self.changed.notify_all()


def main() -> int:
    """Run the demonstration; the exit status is that of ``fedalt submit``."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    tls = FOLDER / "tls"
    inside, outside = (f"127.0.0.1:{port}" for port in free_ports())
    trust = ("--ca", tls / "ca.crt", "--server")
    started: list[Command] = []

    def start(name: str, *arguments: object) -> Command:
        started.append(Command(name, *arguments))
        return started[-1]

    def site(client: int) -> Command:
        own = ("--client-id", client, "--state", FOLDER / f"site{client}", "--key", tls / "keys" / f"client_{client}")
        return start(f"site {client}", "site", *trust, outside, *own)

    try:
        start("certs", "certs", tls, "--sites", 3).process.wait()
        places = ("--address", inside, "--public", outside, "--tls", tls, "--state", FOLDER / "server")
        start("server", "server", *places).says("at site N")
        sites = [site(client) for client in range(3)]
        for one in sites:
            one.says("SuperNode ID")
        run = start("submit", "submit", RECIPE, "--clients", 3, "--rounds", 3, "--out", FOLDER / "run", *trust, inside)
        run.says("round 1: loss")
        sites[KILLED].says("Receiving: train", times=2)
        time.sleep(1)
        print(
            f"{'demo':<{WIDTH}} │ kill -9 of site {KILLED}, which is training round 2; then it is started again",
            flush=True,
        )
        sites[KILLED].process.kill()
        site(KILLED)
        status = run.process.wait()
        run.reader.join()
        start("status", "status", *trust, inside, "--state", FOLDER / "server").reader.join()
        return status
    finally:
        for command in reversed(started):
            command.process.terminate()
        for command in started:
            command.process.wait()


def free_ports() -> list[int]:
    """Two ports that nothing listens on."""
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in (one, other)]


if __name__ == "__main__":
    sys.exit(main())
