"""``kill -9`` at a named file operation, laid in the process that is to die."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple


class Kill(NamedTuple):
    """Where a process dies.

    Attributes:
        where: Operation and path inside the run folder (temporary names as they are), or an event and its round.
        how: ``before`` or ``after`` the operation, or ``half`` way through it.
    """

    where: str
    how: str

    def __str__(self) -> str:
        return f"{self.how} {self.where}"


def lay_trap(kill: Kill | None, run: Path, seen: list[str] | None = None) -> None:
    """Patch every operation that changes a run folder, in this process only."""
    from fedalt.runs.events import EventLog

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL if not kill or kill.how != "interrupt" else signal.SIGINT)

    def guarded(label: str, act: Callable[[], Any], half: Callable[[], Any]) -> Any:
        if seen is not None:
            seen.append(label)
        if kill is None or label != kill.where:
            return act()
        if kill.how == "half":
            half()
        elif kill.how == "after":
            act()
        die()
        return act()

    def name(path: Any) -> str:
        full = Path(path).absolute()
        return str(full.relative_to(run)) if full.is_relative_to(run) else str(full)

    fsync, replace, rename, rmtree, emit = os.fsync, Path.replace, Path.rename, shutil.rmtree, EventLog.emit
    link, write = os.link, Path.write_bytes

    def halve(descriptor: int) -> None:
        with contextlib.suppress(OSError):  # a folder
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)

    def my_fsync(descriptor: int) -> None:
        label = f"fsync {name(Path(f'/proc/self/fd/{descriptor}').readlink())}"
        guarded(label, partial(fsync, descriptor), partial(halve, descriptor))

    def my_rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        def some() -> None:
            for file in sorted(Path(path).rglob("*.safetensors"))[::2]:
                file.unlink()

        if Path(path).exists():
            guarded(f"rmtree {name(path)}", partial(rmtree, path, *args, **kwargs), some)

    def my_emit(self: Any, kind: str, **fields: Any) -> None:
        def half() -> None:
            with self.path.open("a") as file:
                file.write(f'{{"event": "{kind}", "rou')

        client = f" client {fields['client']}" if "client" in fields else ""
        guarded(f"emit {kind} {fields['round']}{client}", partial(emit, self, kind, **fields), half)

    def my_link(source: Any, to: Any) -> None:
        guarded(f"link {name(to)}", partial(link, source, to), lambda: None)

    def my_write(self: Path, data: bytes) -> int:
        return guarded(f"write {name(self)}", partial(write, self, data), lambda: write(self, data[: len(data) // 2]))

    def moves(label: str, original: Callable[[Path, Any], Any]) -> Any:
        return lambda self, to: guarded(f"{label} {name(self)}", partial(original, self, to), lambda: None)

    os.fsync, shutil.rmtree, EventLog.emit = my_fsync, my_rmtree, my_emit  # type: ignore[method-assign]
    os.link, Path.write_bytes = my_link, my_write  # type: ignore[method-assign]
    Path.replace, Path.rename = moves("replace", replace), moves("rename", rename)  # type: ignore[method-assign]


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
AT = "FEDALT_TESTS_DIE_AT"
"""Variable for processes that another one starts: the number of the operation at which they die, and the folder."""


def die_at(number: int, folder: Path) -> list[str]:
    """Let this process die at its so-many-th operation that changes something in a folder; what there was so far.

    Python tells of files that are opened to be written, renamed, linked or removed. At an fsync the file is cut first
    where the number is even.
    """
    seen, fsync, root = list[str](), os.fsync, str(folder.absolute())

    def count(what: str, path: Any, cut: Callable[[], None] = lambda: None) -> None:
        if isinstance(path, str | os.PathLike) and str(Path(path).absolute()).startswith(root):
            seen.append(f"{what} {path}")
            if len(seen) == number:
                if number % 2 == 0:
                    cut()
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & WRITES:
            count("open", args[0])
        elif event in ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            count(event, args[0])

    def my_fsync(descriptor: int) -> None:
        def cut() -> None:
            with contextlib.suppress(OSError):  # a folder
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)

        count("fsync", Path(f"/proc/self/fd/{descriptor}").readlink(), cut)
        fsync(descriptor)

    sys.addaudithook(hook)
    os.fsync = my_fsync
    return seen


def die_if_asked() -> None:
    """In a process that was started by another one."""
    if asked := os.environ.get(AT):
        number, _, folder = asked.partition(" ")
        die_at(int(number), Path(folder))
