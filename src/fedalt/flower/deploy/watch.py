"""What happens to child processes, one thing after another: their lines, their ends, and a signal to end."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from types import FrameType
from typing import Any, Literal

_ENDING = (signal.SIGTERM, signal.SIGINT)
_LAST_WORDS = 2.0
"""Seconds to wait for a process's last lines when it has ended."""


@dataclass(frozen=True)
class Happened:
    """One thing.

    Attributes:
        what: A ``line`` of a process, its ``end``, or a ``signal`` that asks this process to end.
        name: Of which process.
        text: The line.
    """

    what: Literal["line", "end", "signal"]
    name: str = ""
    text: str = ""


class Watch:
    """Within the ``with`` block signals do not interrupt; they come in turn."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Happened] = SimpleQueue()
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

    def next(self, seconds: float | None = None) -> Happened | None:
        """The next thing, or nothing if nothing happens for so long."""
        try:
            return self._queue.get(timeout=seconds)
        except Empty:
            return None

    def _read(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            self._queue.put(Happened("line", name, line))

    def _wait(self, name: str, process: subprocess.Popen[str], reader: Thread) -> None:
        """A process's own children may hold its output open, and end only when it is no zombie any more."""
        process.wait()
        reader.join(_LAST_WORDS)
        self._queue.put(Happened("end", name))

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self._queue.put(Happened("signal"))
