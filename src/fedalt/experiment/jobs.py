"""The runs of a comparison in several processes, each with its own base in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from fedalt.errors import UserError
from fedalt.experiment.events import Event, Sink
from fedalt.experiment.folder import IfExists
from fedalt.experiment.members import Member

_COMMAND = (sys.executable, "-P", "-m", "fedalt.experiment.worker")


def train_in_jobs(members: Sequence[Member], jobs: int, if_exists: IfExists, sink: Sink) -> None:
    """Train members in ``jobs`` processes; whoever has finished one is handed the next.

    Every process loads the base for itself and has its share of this process's threads. Events have ``job`` added. The
    first error ends all processes; their finished rounds are safe.

    Raises:
        UserError: As for a single run; or a process was killed, for lack of memory for example.
        RuntimeError: A process failed for another reason; its traceback is on stderr.
    """
    jobs = min(jobs, len(members))
    waiting = list(reversed(members))
    events: SimpleQueue[tuple[int, Event | None]] = SimpleQueue()
    settings = {"if_exists": if_exists, "threads": max(1, torch.get_num_threads() // jobs)}
    workers = [
        subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(jobs)
    ]
    try:
        for job, worker in enumerate(workers):
            Thread(target=_listen, args=(job, worker, events), daemon=True).start()
            _tell(worker, settings)
            _next(worker, waiting)
        busy = jobs
        while busy:
            job, event = events.get()
            if event is None:
                busy -= 1
                _check_end(workers[job].wait(), job)
                continue
            if event["event"] == "failed":
                _give_up(workers[job].wait(), job, event["message"])
            sink({**event, "job": job})
            if event["event"] == "member_finished":
                _next(workers[job], waiting)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()


def _listen(job: int, worker: subprocess.Popen[str], events: SimpleQueue[tuple[int, Event | None]]) -> None:
    assert worker.stdout
    for line in worker.stdout:
        events.put((job, json.loads(line)))
    events.put((job, None))


def _next(worker: subprocess.Popen[str], waiting: list[Member]) -> None:
    """Hand out the next member, or say that there are no more."""
    assert worker.stdin
    if waiting:
        _tell(worker, waiting.pop().to_json())
        return
    with suppress(BrokenPipeError):
        worker.stdin.close()


def _tell(worker: subprocess.Popen[str], value: Any) -> None:
    assert worker.stdin
    with suppress(BrokenPipeError):  # it has ended; its last event or its exit status says why
        worker.stdin.write(json.dumps(value) + "\n")
        worker.stdin.flush()


def _give_up(status: int, job: int, message: str) -> None:
    raise UserError(message) if status == 2 else RuntimeError(f"job {job}: {message}")


def _check_end(status: int, job: int) -> None:
    if status < 0:
        raise UserError(
            f"--jobs: job {job} was killed (signal {-status}), perhaps for lack of memory: every job holds a base; "
            "finished rounds are safe, --resume goes on, with fewer jobs if you like"
        )
    if status:
        raise RuntimeError(f"job {job} ended with status {status}")
