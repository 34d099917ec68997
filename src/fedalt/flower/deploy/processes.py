"""Flower's programs as child processes that end with whoever started them, even when that is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedalt.errors import UserError

_PATIENCE = 10.0


def program(name: str) -> str:
    """Path of one of Flower's programs: the one of this Python, or else the first on the PATH.

    Raises:
        UserError: It is not installed.
    """
    mine = Path(sys.executable).with_name(name)
    path = str(mine) if mine.is_file() else shutil.which(name)
    if path is None:
        raise UserError(f"{name} is not installed beside {sys.executable}; pip install 'fedalt[flower]' brings it")
    return path


def flower_environment(home: Path) -> dict[str, str]:
    """Environment of Flower's programs: their own folder, no telemetry, no calls home, this Python's programs first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    quiet = {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return {**os.environ, **quiet, "PATH": path, "PYTHONUNBUFFERED": "1"}


def start(
    command: Sequence[str], environment: Mapping[str, str], on_death: signal.Signals, **options: Any
) -> subprocess.Popen[str]:
    """Start a program whose output, errors included, can be read line by line.

    Args:
        command: Program and arguments.
        environment: All of its environment.
        on_death: Signal that it gets when this process dies (Linux); call from the main thread, whose end would count.
        options: Others of ``Popen``.
    """
    bound = [sys.executable, "-I", str(Path(__file__).with_name("bound.py")), str(int(on_death)), str(os.getpid())]
    return subprocess.Popen(
        [*bound, *command],
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches only this process, which ends the others in order
        **options,
    )


def end(*processes: subprocess.Popen[str]) -> None:
    """Ask processes to end, kill those that have not after ten seconds, and whatever they leave behind."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + _PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its group is its own, and mostly empty by now
