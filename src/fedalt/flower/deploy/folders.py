"""State folders: one process at a time, and each for one thing."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedalt.errors import UserError
from fedalt.files import disk_errors, lock, read_json, write_json
from fedalt.flower.trainer import SITE

_LOCK, _DRAIN = "lock", "drain"
STATE = "FEDALT_STATE"
"""Variable with which a server's programs find its state folder."""
_LOOK = 0.2
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Have a folder, made if need be, to oneself; the lock ends with this process, however it ends.

    Until then nobody else can read what this process, and those that it starts, make anywhere.
    """
    before = os.umask(_OTHERS)
    descriptor = -1
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        lock(descriptor, f"--state {folder}: {what} uses this folder now; end it or choose another folder")
        (folder / _DRAIN).unlink(missing_ok=True)
        yield
    finally:
        os.umask(before)
        if descriptor >= 0:
            os.close(descriptor)


def drain(folder: Path) -> None:
    """Ask the site or server of a state folder to finish what it is at and to end, and wait until it has."""
    if not _used(folder):
        raise UserError(f"{folder}: no fedalt site or server runs with this --state")
    with disk_errors(folder):
        (folder / _DRAIN).touch()
    while _used(folder):
        time.sleep(_LOOK)


def draining(folder: Path) -> bool:
    """Whether it is to end so."""
    return (folder / _DRAIN).exists()


def _used(folder: Path) -> bool:
    with suppress(FileNotFoundError, NotADirectoryError), (folder / _LOCK).open() as file:
        try:
            lock(file.fileno(), "")
        except UserError:
            return True
    return False


def make_private(folder: Path, mark: str, tell: Callable[[str], None]) -> None:
    """Take a state folder that others can read away from them, with everything in it, and say so.

    The folder may be new, and have a lock; ``mark`` is a file that it has if it is a state folder.
    """
    mode = folder.stat().st_mode
    if not mode & _OTHERS:
        return
    inside = {path.name for path in folder.iterdir()}
    if inside - {_LOCK} and mark not in inside:
        raise UserError(
            f"--state {folder}: others can read it, and it holds something else than a state; choose another folder"
        )
    with disk_errors(folder):
        for path in [folder, *folder.rglob("*")]:
            if not path.is_symlink():
                path.chmod(stat.S_IMODE(path.stat().st_mode) & ~_OTHERS)
    tell(f"note: --state {folder} could be read by others (mode {stat.S_IMODE(mode):o}); now it is private")


def check_private(key: Path) -> None:
    """Refuse a private key that others can read."""
    found = key.stat()
    if found.st_mode & (_OTHERS if found.st_uid == os.geteuid() else stat.S_IRWXO):
        raise UserError(f"{key}: others can read this private key (mode {stat.S_IMODE(found.st_mode):o}); chmod 600 it")


def claim_site(folder: Path, settings: dict[str, Any]) -> None:
    """Write a site's settings into its state folder."""
    path = folder / SITE
    if path.is_file():
        owner = read_json(path)["client"]
        if owner != settings["client"]:
            raise UserError(
                f"--state {folder}: holds the private state of client {owner}, not of client {settings['client']}; "
                "give each client a folder of its own"
            )
    elif any(inside.name not in (_LOCK, f".{SITE}.tmp") for inside in folder.iterdir()):
        raise UserError(f"--state {folder}: not empty and no site's state folder (no {SITE}); choose another folder")
    write_json(path, settings)
