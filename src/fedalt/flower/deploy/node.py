"""``python -m fedalt.flower.deploy.node SECONDS …``: ``flower-supernode …`` that looks for messages at least so often.

Flower's waits 3 s after every look that found nothing, a constant in its code, and half a second for replies. It runs
with ``--isolation process``: messages are handled by ``tasks.py`` in the place of ``flower-superexec``.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

HOST = "127.0.0.1"
"""Where the SuperNode and those who handle its messages meet."""


@dataclass(frozen=True)
class Hasty:
    """The module ``time``, but nobody sleeps longer than ``limit`` seconds at once."""

    limit: float

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Sleep, at most ``limit`` seconds."""
        time.sleep(min(seconds, self.limit))


def main() -> None:
    """Start the SuperNode."""
    from flwr.supernode.cli import flower_supernode

    from fedalt.flower.deploy.address import free_port

    limit, port = float(sys.argv[1]), str(free_port())
    sys.argv = ["flower-supernode", *sys.argv[2:], "--isolation", "process", "--host", HOST, "--port", port]
    tasks = [sys.executable, "-P", "-m", "fedalt.flower.deploy.tasks", "--insecure"]  # on this machine, as Flower's own
    subprocess.Popen([*tasks, "--runtime-api-address", f"{HOST}:{port}", "--parent-pid", str(os.getpid())])
    looking: Any = importlib.import_module("flwr.supernode.start_client_internal")
    looking.time = Hasty(limit)
    flower_supernode()


if __name__ == "__main__":
    main()
