"""Tables in files: CSV, TSV, JSON and JSON lines, one file or one per split."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedalt.config.data import DataConfig
from fedalt.data.federation import Pool
from fedalt.data.formats.columns import Record, has_header, to_pool
from fedalt.data.formats.folder import json_values, read_text
from fedalt.errors import UserError, did_you_mean

ENDINGS = (".csv", ".tsv", ".json", ".jsonl")
NAMES = {"train": ("train",), "validation": ("validation", "dev", "valid"), "test": ("test",)}
"""Split → what its file, or its folder of images, may be called."""


def read_table(path: Path, config: DataConfig) -> Pool:
    """Read one file, or a folder with ``train.csv`` (or tsv, json, jsonl) and maybe ``validation.*`` and ``test.*``.

    Raises:
        UserError: Two files for a split, a broken line, and what ``to_pool`` refuses.
    """
    if path.is_file():
        return to_pool(config, {"train": _records(path, config)}, str(path), "a table", hint=_hint(config))
    files = {split: _file(path, split) for split in NAMES}
    records = {split: _records(file, config) for split, file in files.items() if file}
    return to_pool(config, records, str(path), "a folder of tables", hint=_hint(config))


def is_table_folder(folder: Path) -> bool:
    """Whether there is a file of training rows."""
    return any((folder / f"train{ending}").is_file() for ending in ENDINGS)


def _hint(config: DataConfig) -> str:
    return "" if config.columns else "; where a CSV or TSV file has no header line, data.columns names them"


def _file(folder: Path, split: str) -> Path | None:
    found = [p for name in NAMES[split] for ending in ENDINGS if (p := folder / f"{name}{ending}").is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: {split} rows twice, in {found[0].name} and {found[1].name}")
    return found[0] if found else None


def _records(path: Path, config: DataConfig) -> list[Record]:
    if path.suffix in (".csv", ".tsv"):
        records = _lines(path, config)
    else:
        has_header(config, str(path))
        records = mappings(json_values(read_text(path), path))
    if not records:
        raise UserError(f"{path}: no rows")
    return records


def _lines(path: Path, config: DataConfig) -> list[Record]:
    """Lines of cells; in a TSV quotes are letters like others, in a CSV they hold commas and newlines together."""
    text = io.StringIO(read_text(path).removeprefix("\ufeff"), newline="")
    tabs = path.suffix == ".tsv"
    reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(text, strict=True)
    names = list(config.columns or ())
    records = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not names:
                names = _header(cells, path)
                continue
            where = f"{path}:{reader.line_num}"
            if len(cells) != len(names):
                raise UserError(f"{where}: {len(cells)} cells, but {len(names)} columns: {', '.join(names)}")
            records.append(Record(dict(zip(names, cells, strict=True)), where))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: broken line ({error})") from None
    return records


def _header(cells: list[str], path: Path) -> list[str]:
    twice = next((name for i, name in enumerate(cells) if name in cells[:i]), None)
    if twice is not None:
        raise UserError(f'{path}:1: column "{twice}" twice; where a file has no header line, name them in data.columns')
    return cells


def mappings(values: Iterable[tuple[str, Any]]) -> list[Record]:
    """Mappings of columns to values, each after where it stands.

    Raises:
        UserError: One is no mapping, or lacks a column that the first one has.
    """
    records: list[Record] = []
    for where, value in values:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: a row is a mapping of columns to values, found {type(value).__name__}")
        known = records[0].values if records else value
        for name in known:
            if name not in value:
                raise UserError(f'{where}: no "{name}"{did_you_mean(name, value)}, which the first row has')
        records.append(Record(value, where))
    return records
