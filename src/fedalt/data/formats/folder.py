"""Federations in a folder: files of clients, in the layout of the FedALT README or under names of their own.

    DIR/train/local_training_{i}.json     or  DIR/local_training_{i}.json
    DIR/test/local_testing_{i}.jsonl
    DIR/validation/local_validation_{i}.jsonl          optional, for all clients or none

    DIR/ann.csv, DIR/ben.jsonl, …                      a client each; test rows are held out of its own
    DIR/ann_train.csv, DIR/ann_test.csv, …             the same with splits
    DIR/train/ann.csv, DIR/test/ann.csv, …             the same
    DIR/ann/train.csv, DIR/ann/test.csv, …             the same

Every JSON file may be a list or lines, whatever its ending.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from fedalt.config.data import DataConfig
from fedalt.data.federation import SPLITS, Federation
from fedalt.data.formats.columns import Record, to_federation
from fedalt.data.formats.files import NAMES, ending, is_shard, read_records, split_of, stem, tables_in
from fedalt.errors import UserError

_SUFFIX = re.compile(
    r"(.+?)[-_.](?:(?P<train>train|training)|(?P<validation>validation|valid|val|dev)|(?P<test>test|testing))",
    re.IGNORECASE,
)
Files = dict[str, dict[str, Path]]
"""Client's name → split → its file."""


def read_folder(folder: Path, config: DataConfig | None = None) -> Federation:
    """Read the rows of every client of the seed's layout."""
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
    parts = {"train": train, "validation": validation, "test": test}
    clients = {str(c): {split: files[c] for split, files in parts.items() if files} for c in train}
    return _read(clients, folder, "client files", config or DataConfig(), named=False)


def read_named(folder: Path, config: DataConfig) -> Federation:
    """Read the rows of clients that are named after their files."""
    return _read(named_clients(folder), folder, "a client per file", config)


def is_client_folder(folder: Path) -> bool:
    """Whether there is any client file of the seed's layout in it."""
    return any(
        True for inside in (folder, folder / "train", folder / "test") for _ in inside.glob("local_*ing_*.json*")
    )


def named_clients(folder: Path) -> Files:
    """Files of clients by their names; none where the files are something else, or there are less than two clients."""
    if is_client_folder(folder):
        return {}
    files = tables_in(folder)
    found = _side_by_side(files) if files else _in_folders(folder)
    return found if len(found) > 1 and all("train" in mine for mine in found.values()) else {}


def _side_by_side(files: list[Path]) -> Files:
    matches = [_SUFFIX.fullmatch(stem(path)) for path in files]
    found: Files = {}
    if not all(matches) and any(split_of(path) or is_shard(path) for path in files):
        return found
    for path, match in zip(files, matches, strict=True):
        name, split = (match[1], match.lastgroup or "") if match and all(matches) else (stem(path), "train")
        _put(found.setdefault(name, {}), split, path)
    return found


def _in_folders(folder: Path) -> Files:
    """A folder for each split with a file of the same name for each client, or a folder for each client."""
    below = {split: tables_in(inside) for split in NAMES if (inside := _below(folder, split))}
    found: Files = {}
    if below.get("train"):
        if any({stem(path) for path in mine} != {stem(path) for path in below["train"]} for mine in below.values()):
            return found
        pairs = [(stem(path), split, path) for split, mine in below.items() for path in mine]
    else:
        parts = [(path.name, tables_in(path)) for path in sorted(folder.iterdir()) if path.is_dir()]
        pairs = [(name, split_of(path), path) for name, mine in parts for path in mine]
        if not all(split for _, split, _ in pairs):
            return found
    for name, split, path in pairs:
        _put(found.setdefault(name, {}), split, path)
    return found


def _put(mine: dict[str, Path], split: str, path: Path) -> None:
    if split in mine:
        raise UserError(f"{path.parent}: {split} rows of {stem(path)} twice, in {mine[split].name} and {path.name}")
    mine[split] = path


def _below(folder: Path, split: str) -> Path | None:
    return next((folder / name for name in NAMES[split] if (folder / name).is_dir()), None)


def _read(clients: Files, folder: Path, kind: str, config: DataConfig, named: bool = True) -> Federation:
    records: dict[str, dict[str, list[Record]]] = {
        f"{folder}: client {name}": {split: read_records(files[split], config) for split in SPLITS if split in files}
        for name, files in clients.items()
    }
    return to_federation(config, records, str(folder), kind, list(clients) if named else ())


def _by_client(folder: Path, start: str) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(f"{start}_*")):
        match = re.fullmatch(rf"{start}_(\d+)", stem(path)) if ending(path) else None
        if not match:
            raise UserError(f"{path}: not a client file; names are {start}_<number>.json or .jsonl")
        client = int(match[1])
        if client in found:
            raise UserError(f"client {client} twice: {found[client]} and {path}")
        found[client] = path
    return dict(sorted(found.items()))


def _check_indices(files: dict[int, Path], folder: Path) -> None:
    missing = list(islice((client for client in range(max(files) + 1) if client not in files), 6))
    if missing:
        names = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise UserError(
            f"{folder}: client {names} is missing; indices run from 0 without gaps, and there is a client {max(files)}"
        )
