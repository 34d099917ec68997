"""Federations in a folder: one training and one test file per client, in the layout of the FedALT README.

    DIR/train/local_training_{i}.json     or  DIR/local_training_{i}.json
    DIR/test/local_testing_{i}.jsonl
    DIR/validation/local_validation_{i}.jsonl          optional, for all clients or none

Every file may be a JSON list or JSON lines, whatever its ending.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedalt.data.federation import FIELDS, ClientData, Federation, Row
from fedalt.errors import UserError, did_you_mean

_REQUIRED = FIELDS[:2]


def read_folder(folder: Path) -> Federation:
    """Read every client's rows.

    Raises:
        UserError: No training files, a client index twice or missing, a client without a test file,
            an empty file, broken JSON, or a row that is not a mapping of strings with ``instruction`` and ``output``.
    """
    inside = folder / "train"
    train = _by_client(inside if inside.is_dir() else folder, "local_training")
    if not train:
        raise UserError(f"{folder}: no training rows; expected train/local_training_0.json, …_1.json and so on")
    _check_indices(train, folder)
    test = _by_client(folder / "test", "local_testing")
    validation = _by_client(folder / "validation", "local_validation")
    for name, files in (
        ("test/local_testing", test),
        ("validation/local_validation", validation if validation else test),
    ):
        missing = next((client for client in train if client not in files), None)
        if missing is not None:
            raise UserError(f"client {missing}: {folder}/{name}_{missing}.jsonl is missing")
    clients = {
        client: ClientData(
            train=read_rows(path),
            validation=read_rows(validation[client]) if validation else (),
            test=read_rows(test[client]),
        )
        for client, path in train.items()
    }
    return Federation(clients, str(folder))


def read_rows(path: Path) -> tuple[Row, ...]:
    """Read one file of rows."""
    rows = tuple(_row(value, where) for where, value in json_values(read_text(path), path))
    if not rows:
        raise UserError(f"{path}: no rows; every client needs at least one")
    return rows


def is_client_folder(folder: Path) -> bool:
    """Whether there is any client file in it."""
    return any(
        True for inside in (folder, folder / "train", folder / "test") for _ in inside.glob("local_*ing_*.json*")
    )


def read_text(path: Path) -> str:
    """Read a text file; one that is none is a ``UserError``."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _by_client(folder: Path, stem: str) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(f"{stem}_*.json*")):
        match = re.fullmatch(rf"{stem}_(\d+)\.jsonl?", path.name)
        if not match:
            raise UserError(f"{path}: not a client file; names are {stem}_<number>.json or .jsonl")
        client = int(match[1])
        if client in found:
            raise UserError(f"client {client} twice: {found[client]} and {path}")
        found[client] = path
    return dict(sorted(found.items()))


def _check_indices(files: dict[int, Path], folder: Path) -> None:
    missing = sorted(set(range(max(files) + 1)) - set(files))
    if missing:
        names = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise UserError(
            f"{folder}: client {names} is missing; indices run from 0 without gaps, and there is a client {max(files)}"
        )


def json_values(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Every value of a JSON list or of JSON lines, after where it stands."""
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: broken JSON ({error.msg})") from None
        yield from ((f"{path}: row {i}", value) for i, value in enumerate(values))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: broken JSON ({error.msg})") from None


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row is a mapping with {' and '.join(_REQUIRED)}, found {type(value).__name__}")
    for name in _REQUIRED:
        if name not in value:
            raise UserError(
                f'{where}: no "{name}"{did_you_mean(name, value)}; the row has: {", ".join(value) or "nothing"}'
            )
    for name in FIELDS:
        if not isinstance(value.get(name, ""), str):
            raise UserError(f'{where}: "{name}" is {type(value[name]).__name__}, expected text')
    for name in FIELDS:
        check_text(value.get(name, ""), name, where, name in _REQUIRED)
    return Row(**{name: value.get(name, "") for name in FIELDS})


def check_text(text: str, name: str, where: str, required: bool = True) -> None:
    """Refuse half characters, and nothing but blanks where there must be something."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f'{where}: "{name}" holds half a character (a lone surrogate), which is no text')
    if required and not text.strip():
        raise UserError(f'{where}: "{name}" is empty')
