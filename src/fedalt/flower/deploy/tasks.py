"""``python -m fedalt.flower.deploy.tasks …``: ``flower-superexec …`` whose ClientApp processes start in no time.

Flower starts a Python for every message, whose imports take a second of a core. Here it is a fork of a process that has
imported all of it and does nothing else. What a run brings along is neither installed nor imported: the ClientApp is
always that of the installed package.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import threading
import time
from typing import Any

import psutil
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult
from flwr.supernode.runtime.run_clientapp import run_clientapp

from fedalt.flower.deploy.node import replace_in
from fedalt.flower.waits import retry_soon

CLIENT_APP = "flwr.supernode.runtime.run_clientapp"
_FORKS = multiprocessing.get_context("forkserver")


class Forks(SubprocessExecutor):
    """Every task in a process of its own, forked from one that is ready."""

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start a ClientApp."""
        arguments = (spec.runtime_api_address, spec.token, spec.insecure, os.getpid())
        _FORKS.Process(target=_client_app, args=arguments).start()
        return LaunchResult.accepted()


def _client_app(address: str, token: str, insecure: bool, parent_pid: int) -> None:
    threading.Thread(target=end_with, args=(parent_pid,), daemon=True).start()
    retry_soon(CLIENT_APP, "pull_and_inflate_object_from_tree")
    run_own_app()
    run_clientapp(address, token, insecure=insecure, parent_pid=parent_pid)


def run_own_app() -> None:
    """Let Flower install nothing, and take the package's ClientApp for a run's."""
    from fedalt.flower.client_app import app

    place = importlib.import_module(CLIENT_APP)
    replace_in(place, install_from_fab=lambda *_, **__: None, get_load_client_app_fn=lambda **_: lambda *_: app)


def end_with(process: int) -> None:
    """End this process when another has ended: a ClientApp would ask a killed SuperNode for its message for ever."""
    while psutil.pid_exists(process):
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Serve a SuperNode until it ends."""
    from flwr.supercore.cli import flower_superexec

    os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.1")  # a message waits no second to be noticed
    _FORKS.set_forkserver_preload([CLIENT_APP, "fedalt.flower.client_app"])
    starting: Any = importlib.import_module("flwr.supercore.superexec.run_superexec")
    starting.get_executor = lambda *_, **__: Forks()
    flower_superexec()


if __name__ == "__main__":
    main()
