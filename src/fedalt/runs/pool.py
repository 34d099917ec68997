"""A pool of processes that keep something in memory, a base for example; whoever is free gets the next task.

On top of ``multiprocessing`` and its method "spawn". ``concurrent.futures`` cannot say which process was killed, nor
what it was doing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Thread
from types import ModuleType
from typing import Any, NamedTuple, Self

from fedalt.errors import UserError
from fedalt.runs.events import Event, Sink
from fedalt.runtime import keep_freed_memory, keep_libraries_quiet

Work = Callable[[Any, Sink], Callable[[Any], Any]]
"""Called once in every process, with its settings and a sink for events; returns what is called with every task."""


class Task(NamedTuple):
    """Something to do.

    Attributes:
        doing: What it is, in a few words, for errors.
        value: What the process is given. It travels pickled; tensors travel as files.
    """

    doing: str
    value: Any


@dataclass
class _Worker:
    name: str
    process: BaseProcess
    connection: Connection
    doing: str = "starting"
    task: int | None = None


class Pool:
    """Several processes that do one kind of work; as a context manager, none of them outlives the block.

    They share this process's threads. They import from where it imports, but do not run its main module again. What
    they print goes to stderr. They end with this process, even when it is killed, and leave Ctrl-C to it.

    Args:
        work: What they do: a function of a module that can be imported.
        flag: The option that asked for them.
    """

    def __init__(self, work: Work, settings: Sequence[Any], names: Sequence[str], flag: str) -> None:
        import torch

        self._flag = flag
        self._workers: list[_Worker] = []
        threads = max(1, torch.get_num_threads() // len(names))
        try:
            for name, mine in zip(names, settings, strict=True):
                connection, theirs = multiprocessing.Pipe()
                process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,))
                self._workers.append(_Worker(name, process, connection))
                with _spawning():
                    process.start()
                theirs.close()  # no copy is left here, so the connection ends with the process
                _send(connection, (work, mine, threads))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._workers)

    def map(
        self,
        tasks: Iterable[Task],
        on_event: Callable[[int, Event], None] = lambda task, event: None,
        last: bool = False,
    ) -> list[Any]:
        """Results of all tasks, in the order of the tasks.

        Every process gets one of the first tasks, in the order of the processes.

        Args:
            tasks: What is to be done; the next one is made when a process is free for it.
            on_event: Called with the number of a task and each of its events, as they arrive.
            last: Whether a process ends, and frees its memory, as soon as no task is left for it.

        Raises:
            RuntimeError: A process failed for another reason, its traceback is on stderr; none is left then.
        """
        numbered, results = enumerate(tasks), dict[int, Any]()
        try:
            for worker in self._workers:
                _submit(worker, next(numbered, None), last)
            while any(worker.task is not None for worker in self._workers):
                for worker in self._ready():
                    kind, value = self._receive(worker)
                    assert worker.task is not None
                    if kind == "event":
                        on_event(worker.task, value)
                    else:
                        results[worker.task] = value
                        _submit(worker, next(numbered, None), last)
        except BaseException:
            self.close()  # before what they write into is cleared away
            raise
        return [results[number] for number in range(len(results))]

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        started = [worker.process for worker in self._workers if worker.process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join()

    def _ready(self) -> list[_Worker]:
        """Those that have sent something or ended, at least one; busy or not."""
        ready = wait([worker.connection for worker in self._workers if not worker.connection.closed])
        return [worker for worker in self._workers if worker.connection in ready]

    def _receive(self, worker: _Worker) -> tuple[str, Any]:
        who = f"{worker.name} ({worker.doing})"
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):  # it has ended, perhaps in the middle of a message
            worker.process.join()
            status = worker.process.exitcode or 0
            if status >= 0:
                raise RuntimeError(f"{who} ended with status {status}") from None
            raise UserError(
                f"{self._flag}: {who} was killed (signal {-status}), perhaps for lack of memory: each holds a base; "
                "finished rounds are safe, --resume goes on, with fewer of them if you like"
            ) from None
        if kind == "refused":
            raise UserError(value)
        if kind == "failed":
            raise RuntimeError(f"{who}: {value}")
        return kind, value


def _submit(worker: _Worker, numbered: tuple[int, Task] | None, last: bool) -> None:
    if numbered:
        worker.task, (worker.doing, value) = numbered
        _send(worker.connection, value)
        return
    worker.task, worker.doing = None, "waiting"
    if last:
        worker.connection.close()


def _send(connection: Connection, value: Any) -> None:
    with suppress(ConnectionError):  # the process has ended; its last message or its exit status says why
        connection.send(value)


@contextmanager
def _spawning() -> Iterator[None]:
    """What a process inherits that is spawned in this block.

    Not the main module, which "spawn" would run again: a script need not guard against that, and a notebook has none.
    Not the working directory as a place of Python's own modules. And a mask that keeps Ctrl-C away from its start on.
    """
    main, safe = sys.modules["__main__"], os.environ.get("PYTHONSAFEPATH")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        sys.modules["__main__"], os.environ["PYTHONSAFEPATH"] = ModuleType("__main__"), "1"
        resource_tracker.ensure_running()  # "spawn" starts it, too, but then it would lift the mask
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        sys.modules["__main__"] = main
        os.environ.pop("PYTHONSAFEPATH")
        if safe is not None:
            os.environ["PYTHONSAFEPATH"] = safe
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _serve(connection: Connection) -> None:
    """The life of a process of the pool."""
    os.dup2(2, 1)  # stdout is for the results of the command
    Thread(target=_end_with_parent, daemon=True).start()
    keep_libraries_quiet()
    keep_freed_memory()

    def send(kind: str, value: Any) -> None:
        with _needed():
            connection.send((kind, value))

    def receive() -> Any:
        with _needed():
            return connection.recv()

    try:
        work, settings, threads = receive()  # imports what the work needs, so after the above

        import torch

        torch.set_num_threads(threads)
        do = work(settings, lambda event: send("event", event))
        while True:
            send("result", do(receive()))
    except UserError as error:
        send("refused", str(error))
    except Exception as error:
        traceback.print_exc()
        send("failed", f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


@contextmanager
def _needed() -> Iterator[None]:
    """End this process when nobody is at the other end of the connection any more."""
    try:
        yield
    except (EOFError, ConnectionError):
        os._exit(0)
