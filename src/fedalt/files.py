"""Files that are either whole or not there: temporary name, fsync, rename. A full disk is the user's to fix."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedalt.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_filling: set[Path] = set()
"""Folders whose files need not be durable one by one."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space" and "not permitted" into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"{path}: disk full ({error.strerror}); finished rounds are safe, free some space and use --resume"
            ) from None
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError) or error.errno == errno.EROFS:
            raise UserError(f"{path}: cannot write here ({error.strerror})") from None
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and durably, readable like any other (mode 0644 less the umask).

    In a folder that is being filled (``filling``) a file is as good as the folder, and simply written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _filling.isdisjoint(path.parents):
            path.write_bytes(data)
            return
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN is not JSON and raises."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write one JSON value a line, atomically."""
    write_text(path, "".join(json.dumps(v, ensure_ascii=False, allow_nan=False) + "\n" for v in values))


def read_json(path: Path) -> Any:
    """Read JSON; broken JSON is a ``UserError`` with its line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Files of this folder are made durable together by whoever will give it its name, or by nobody."""
    _filling.add(folder)
    try:
        yield
    finally:
        _filling.remove(folder)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A new folder for what is needed until the block ends."""
    shutil.rmtree(path, ignore_errors=True)
    with disk_errors(path):
        path.mkdir(parents=True)
        try:
            with filling(path):
                yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it is made durable and renamed, in one step, when the block ends well."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with disk_errors(path):
        temporary.mkdir(parents=True)
        try:
            with filling(temporary):
                yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for inside in sorted(temporary.rglob("*")):
            sync(inside)
        sync(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        sync(path.parent)


def link(source: Path, path: Path) -> None:
    """Let a file of a new folder be one that exists already: a hard link, or a copy where there are no links."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, path)
        except OSError:
            shutil.copyfile(source, path)


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
