"""Flower's programs as child processes: they are watched, and end with whoever started them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from types import FrameType
from typing import Any, Literal

from fedalt.errors import UserError

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = re.compile(r"[╭╮╰╯│─]+( Error)?")
_LEVEL = re.compile(r"^(?:\S+Z )?(INFO|WARNING|ERROR|DEBUG) ?:? *(?:\[uvicorn\.\w+\] )?")
_LONG = re.compile(r" \(ID: [0-9a-f]+\)|^\[/v1[^]]*\]\[ApiError:\d+\] | with public key: b'[^']*'")
_NOISE = re.compile(
    r'^$|"(GET|POST) /|^(Started|Finished) server process|[Aa]pplication (startup|shutdown)|^FastAPI lifespan'
    r"|^SuperLinkLifespan|^\[RUN \d+(, ROUND \S+)?\]|^Sending: "
    r"|^Shutting down|^(Received|Sent) successfully|^ControlServicer|^\[Fleet\.(GetRun|GetFab|PushMessages|PushObject)"
    r"|^Start(ing)? (`flwr-\w+` process|Flower SuperExec|logstream)|^Exiting logstream|^Uvicorn running"
    r"|Starting the SuperLink (Runtime|Control)|^All logs for run|^Connection attempt failed, retrying"
    r"|^(Exception in thread|Using SuperLink|Recommended property|Successfully (installed|started))"
    r"|^Flower App configuration warnings|^- Recommended property|^For more information, visit|^SuperExec terminated"
    r"|Listing all (runs|nodes)|^FAB verification failed|^Cannot get processing duration"
)


def plain(line: str) -> str:
    """A line without colours, frames, level and time."""
    return _LEVEL.sub("", _FRAME.sub("", _COLOURS.sub("", line)).rstrip()).strip()


def shortened(line: str) -> str | None:
    """What to show of a line of Flower's log, or nothing."""
    text = plain(line)
    return None if _NOISE.search(text) else _LONG.sub("", text)


_ENDING = (signal.SIGTERM, signal.SIGINT)
_LAST_WORDS = 2.0
"""Seconds to wait for a process's last lines when it has ended."""


@dataclass(frozen=True)
class ProcessEvent:
    """One thing.

    Attributes:
        what: A ``line`` of a process, its ``end``, or a ``signal`` that asks this process to end.
        name: Of which process.
        text: The line, or the signal's name.
    """

    what: Literal["line", "end", "signal"]
    name: str = ""
    text: str = ""


class Watch:
    """Within the ``with`` block signals do not interrupt; they come in turn."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[ProcessEvent] = SimpleQueue()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Watch:
        self._before = {number: signal.signal(number, self._asked) for number in _ENDING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def follow(self, name: str, process: subprocess.Popen[str]) -> None:
        """Report a process's lines and its end."""
        reader = Thread(target=self._read, args=(name, process), daemon=True)
        reader.start()
        Thread(target=self._wait, args=(name, process, reader), daemon=True).start()

    def next(self, seconds: float | None = None) -> ProcessEvent | None:
        """The next thing, or nothing if nothing happens for so long."""
        try:
            return self._queue.get(timeout=seconds)
        except Empty:
            return None

    def _read(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            self._queue.put(ProcessEvent("line", name, line))

    def _wait(self, name: str, process: subprocess.Popen[str], reader: Thread) -> None:
        """A process's own children may hold its output open, and end only when it is no zombie any more."""
        process.wait()
        reader.join(_LAST_WORDS)
        self._queue.put(ProcessEvent("end", name))

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self._queue.put(
            ProcessEvent("signal", text="Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        )


_PATIENCE = 10.0


def program(name: str) -> str:
    """Path of one of Flower's programs: the one of this Python, or else the first on the PATH."""
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
    """Start a program whose output, errors included, can be read line by line; ``options`` are others of ``Popen``.

    ``on_death`` is the signal that it gets when this process dies (Linux); call from the main thread, whose end would
    count.
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
