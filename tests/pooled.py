"""What processes of a pool do in tests; they import it from here."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from fedalt.errors import UserError
from fedalt.runs.pool import Pool, Task


def dying(settings: Any, sink: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def leaving(settings: Any, sink: Any) -> Any:
    raise SystemExit(3)


def obliging(name: Any, sink: Any) -> Any:
    """Do what the task says."""
    return lambda task: globals()[f"_{task[0]}"](name, sink, *task[1:])


def spawned(pid: int) -> list[Any]:
    """Processes of a pool that another process has."""
    import psutil

    alive = [child for child in psutil.Process(pid).children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if "--multiprocessing-fork" in child.cmdline()]


def squares(count: int) -> list[int]:
    """Through two processes."""
    with Pool(obliging, ["a", "b"], ["a", "b"], "--jobs") as pool:
        return pool.map([Task("squaring", ("square", i)) for i in range(count)])


def _square(name: Any, sink: Any, number: int) -> int:
    return number * number


def _sleep(name: Any, sink: Any, seconds: float) -> Any:
    sink({"event": "asleep", "pid": os.getpid()})
    time.sleep(seconds)
    return name


def _wait(name: Any, sink: Any, event: str) -> Any:
    """Until there is such a file."""
    sink({"event": "waiting"})
    while not os.path.exists(event):  # noqa: PTH110
        time.sleep(0.01)
    return name


def _spin(name: Any, sink: Any) -> None:
    """One long call into C++ after the other."""
    import torch

    sink({"event": "spinning"})
    while True:
        torch.randn(1500, 1500) @ torch.randn(1500, 1500)


def _refuse(name: Any, sink: Any) -> None:
    raise UserError(f"no such thing as {name}")


def _fail(name: Any, sink: Any) -> None:
    raise EOFError("half a file")


def _die(name: Any, sink: Any) -> None:
    sink({"event": "dying"})
    os.kill(os.getpid(), signal.SIGKILL)


def _speak(name: Any, sink: Any) -> None:
    print("from Python")
    os.write(1, b"from C\n")


def _threads(name: Any, sink: Any) -> int:
    import torch

    return torch.get_num_threads()


def _main(name: Any, sink: Any) -> Any:
    return getattr(sys.modules["__main__"], "__file__", None)


def _nested(name: Any, sink: Any, count: int) -> list[int]:
    return squares(count)


def _import(name: Any, sink: Any, module: str) -> Any:
    return __import__(module).WHERE
