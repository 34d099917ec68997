"""Rows without clients in files: one table, or one per split."""

from __future__ import annotations

import re
from pathlib import Path

from fedalt.config.data import DataConfig
from fedalt.data.federation import Pool
from fedalt.data.formats.columns import to_pool
from fedalt.data.formats.files import read_records, stem, tables_in
from fedalt.errors import UserError

NAMES = {"train": ("train",), "validation": ("validation", "dev", "valid"), "test": ("test",)}
"""Split → what its file, or its folder of images, may be called."""
_SHARD = re.compile(r"(train|validation|valid|val|dev|test|eval)([-_.]\d+-of-\d+)")


def read_table(path: Path, config: DataConfig) -> Pool:
    """Read one file, or a folder with ``train.csv`` (or another ending) and maybe ``validation.*`` and ``test.*``."""
    if path.is_file():
        return to_pool(config, {"train": read_records(path, config)}, str(path), "a table", hint=_hint(config))
    files = {split: _file(path, split) for split in NAMES}
    records = {split: read_records(file, config) for split, file in files.items() if file}
    return to_pool(config, records, str(path), "a folder of tables", hint=_hint(config))


def read_together(folder: Path, config: DataConfig) -> Pool:
    """All rows of all tables of a folder, as one."""
    files = tables_in(folder)
    records = [record for file in files for record in read_records(file, config)]
    return to_pool(config, {"train": records}, str(folder), f"{len(files)} tables together", hint=_hint(config))


def is_table_folder(folder: Path) -> bool:
    """Whether there is a file of training rows."""
    return any(split_of(path) == "train" for path in tables_in(folder))


def split_of(path: Path) -> str:
    """The split that a file is called after; empty for another name."""
    return next((split for split, names in NAMES.items() if stem(path).lower() in names), "")


def is_shard(path: Path) -> bool:
    """Whether it is a part of a split, as ``datasets`` writes them."""
    return bool(_SHARD.fullmatch(stem(path).lower()))


def _hint(config: DataConfig) -> str:
    return "" if config.columns else "; where a CSV or TSV file has no header line, data.columns names them"


def _file(folder: Path, split: str) -> Path | None:
    found = [path for path in tables_in(folder) if split_of(path) == split]
    if len(found) > 1:
        raise UserError(f"{folder}: {split} rows twice, in {found[0].name} and {found[1].name}")
    return found[0] if found else None
