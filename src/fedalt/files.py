"""Files that are either whole or not there: temporary name, fsync, rename. A full disk is the user's to fix."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from fedalt.errors import UserError, shortened

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
        refused = isinstance(error, PermissionError | NotADirectoryError | FileExistsError)
        nowhere = isinstance(error, FileNotFoundError) and str(path.absolute()).startswith(str(error.filename))
        if refused or nowhere or error.errno == errno.EROFS:
            raise UserError(f"{path}: cannot write here ({error.strerror})") from None
        raise


def write_bytes(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file atomically and durably, readable like any other unless a mode is given (0644 with the usual umask).

    In a folder that is being filled (``filling``) a file is as good as the folder, and simply written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _filling.isdisjoint(path.parents):
            path.write_bytes(data)
            return
        try:
            with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
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


def read_json_lines(path: Path) -> list[Any]:
    """Read what ``write_json_lines`` has written."""
    with intact(path):
        return [json.loads(line) for line in read_bytes(path).decode().split("\n") if line]


def read_bytes(path: Path) -> bytes:
    """Read a file; what may have no end, a pipe or a device, is refused."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: no ordinary file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{shortened(str(path), 200)}: cannot be read ({error.strerror})") from None


def read_json(path: Path) -> Any:
    """Read JSON; broken JSON is a ``UserError`` with its line."""
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    with json_errors(path):
        return JSON.decode(text)


@contextmanager
def json_errors(path: Path, line: int | None = None) -> Iterator[None]:
    """Turn whatever is wrong with JSON into one line."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line or error.lineno}: broken JSON ({error.msg})") from None
    except (RecursionError, ValueError) as error:
        deep = isinstance(error, RecursionError)
        why = "nested too deeply" if deep else "a number too long" if "digits" in str(error) else str(error)
        raise UserError(f"{path}{f':{line}' if line else ''}: broken JSON ({why})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'"{shortened(next(key for key in keys if keys.count(key) > 1))}" twice')
    return found


JSON = json.JSONDecoder(object_pairs_hook=_unique)
"""JSON in which no object has a key twice."""


@contextmanager
def intact(path: Path) -> Iterator[None]:
    """Around the use of what fedalt has written: anything that is not there, or of another type, is damage."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else shortened(str(error))
        raise UserError(f"{path}: damaged ({what})") from None


# ----------------------------------------------------------------------------------------------------------------- YAML

_DEEP, _MANY = 50, 100_000


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; one in which a key stands twice, or that swells by aliases, is none.

    Raises:
        yaml.YAMLError: It is not valid, with its line.
        ValueError: A date or a number in it cannot be.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, 0, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    finally:
        loader.dispose()


def _size(node: yaml.Node, depth: int, known: dict[yaml.Node, int]) -> int:
    """How many values there are in a node once its aliases are written out."""
    if node in known:
        return known[node]
    if depth > _DEEP:
        raise _unfit(node, "nested too deeply")
    inside = []
    if isinstance(node, yaml.MappingNode):
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for i, (key, _) in enumerate(node.value) if (key.tag, key.value) in keys[:i]), None):
            raise _unfit(twice, f'"{shortened(twice.value)}" twice')
        inside = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inside = node.value
    size = 1 + sum(_size(part, depth + 1, known) for part in inside)
    if size > _MANY:
        raise _unfit(node, f"more than {_MANY:,} values")
    known[node] = size
    return size


def _unfit(node: yaml.Node, why: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, why, node.start_mark)


# -------------------------------------------------------------------------------------------------------------- folders


def lock(descriptor: int, taken: str) -> None:
    """Take a lock that ends with this process; ``taken`` is the line where another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(taken) from None


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Have a folder to oneself; the lock is the folder's own, and ends with this process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            lock(descriptor, f"{folder}: another process uses this folder now; wait for its end")
        yield
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    if path.name in ("", ".."):
        raise UserError(f"{path}: give the new folder a name")
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
