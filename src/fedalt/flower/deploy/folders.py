"""State folders: one process at a time, and each for one thing."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedalt.errors import UserError
from fedalt.files import disk_errors, read_json, write_json
from fedalt.flower.trainer import SITE

_LOCK = "lock"


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Have a folder, made if need be, to oneself; the lock ends with this process, however it ends.

    Raises:
        UserError: Another process has it, or nothing can be written there.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--state {folder}: {what} uses this folder now; end it or choose another folder") from None
        yield
    finally:
        os.close(descriptor)


def claim_site(folder: Path, settings: dict[str, Any]) -> None:
    """Write a site's settings into its state folder.

    Raises:
        UserError: The folder belongs to another client, or to something else.
    """
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
