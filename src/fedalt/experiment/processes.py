"""Processes of ``fedalt.experiment.worker``: how they are started, told, heard and ended. JSON lines both ways."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, NoReturn, Self

import torch

from fedalt.errors import UserError
from fedalt.experiment.events import Event

_COMMAND = (sys.executable, "-P", "-m", "fedalt.experiment.worker")


class Processes:
    """Several processes with one kind of work; as a context manager none of them outlives the block.

    Args:
        work: What they do, by its name in ``fedalt.experiment.worker``.
        settings: What each of them is told first; its share of this process's threads is added.
        names: What each is called in errors.
        flag: The option that asked for them.
    """

    def __init__(self, work: str, settings: Sequence[dict[str, Any]], names: Sequence[str], flag: str) -> None:
        self._names, self._flag = names, flag
        self._doing = ["" for _ in names]
        self._dismissed = set[int]()
        self._heard: SimpleQueue[tuple[int, Event | None]] = SimpleQueue()
        self._running: list[subprocess.Popen[str]] = []
        threads = max(1, torch.get_num_threads() // len(names))
        try:
            for number, mine in enumerate(settings):
                process = subprocess.Popen((*_COMMAND, work), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                self._running.append(process)
                Thread(target=self._listen, args=(number, process), daemon=True).start()
                self.tell(number, {**mine, "threads": threads})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._running)

    def tell(self, number: int, value: Any, doing: str = "") -> None:
        """Tell one of them something; its errors name what it was told to do last."""
        self._doing[number] = doing
        stdin = self._running[number].stdin
        assert stdin
        with suppress(BrokenPipeError):  # it has ended; its last event or its exit status says why
            stdin.write(json.dumps(value) + "\n")
            stdin.flush()

    def dismiss(self, number: int) -> None:
        """Let one of them end."""
        self._dismissed.add(number)
        stdin = self._running[number].stdin
        assert stdin
        with suppress(BrokenPipeError):
            stdin.close()

    def hear(self) -> tuple[int, Event]:
        """The next event, and from whom.

        Raises:
            UserError: As the process has said; or it was killed, for lack of memory for example.
            RuntimeError: It failed for another reason; its traceback is on stderr.
        """
        while True:
            number, event = self._heard.get()
            if event is None and number in self._dismissed:
                continue
            if event is None or event["event"] == "failed":
                self._complain(number, self._running[number].wait(), event)
            return number, event

    def close(self) -> None:
        """End them all, whatever they are doing."""
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.wait()

    def _listen(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        with suppress(ValueError):  # half a line, of a process that was killed while it spoke
            for line in process.stdout:
                self._heard.put((number, json.loads(line)))
        self._heard.put((number, None))

    def _complain(self, number: int, status: int, failed: Event | None) -> NoReturn:
        who = self._names[number] + (f" ({self._doing[number]})" if self._doing[number] else "")
        if failed:
            raise UserError(failed["message"]) if status == 2 else RuntimeError(f"{who}: {failed['message']}")
        if status < 0:
            raise UserError(
                f"{self._flag}: {who} was killed (signal {-status}), perhaps for lack of memory: each holds a base; "
                "finished rounds are safe, --resume goes on, with fewer of them if you like"
            )
        raise RuntimeError(f"{who} ended with status {status}")
