"""``python -m fedalt.flower.deploy.node SECONDS …``: ``flower-supernode …`` that looks for messages at least so often.

It runs with ``--isolation process``: messages are handled by ``tasks.py`` in the place of ``flower-superexec``.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

from fedalt.flower.waits import Waits, retry_soon

LOOP = "flwr.supernode.start_client_internal"
HOST = "127.0.0.1"
"""Where the SuperNode and those who handle its messages meet."""


def main() -> None:
    """Start the SuperNode."""
    from flwr.supernode.cli import flower_supernode

    from fedalt.flower.deploy.address import free_port

    longest, port = float(sys.argv[1]), str(free_port())
    sys.argv = ["flower-supernode", *sys.argv[2:], "--isolation", "process", "--host", HOST, "--port", port]
    tasks = [sys.executable, "-P", "-m", "fedalt.flower.deploy.tasks", "--insecure"]  # on this machine, as Flower's own
    subprocess.Popen([*tasks, "--runtime-api-address", f"{HOST}:{port}", "--parent-pid", str(os.getpid())])
    loop: Any = importlib.import_module(LOOP)
    loop.time = Waits(longest)
    retry_soon(LOOP, "pull_objects")
    flower_supernode()


if __name__ == "__main__":
    main()
