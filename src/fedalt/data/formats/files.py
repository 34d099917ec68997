"""Files of rows → records: JSON in every layout, CSV, TSV and Parquet, perhaps gzipped; UTF-16 by its mark."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedalt.config.data import DataConfig
from fedalt.data.federation import Pool
from fedalt.data.formats.columns import Record, has_header, mappings, to_pool
from fedalt.errors import UserError, needs
from fedalt.files import JSON, json_errors, read_bytes

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
POSSIBLE = f"{', '.join(ENDINGS)}, each also with .gz"
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order mark → encoding; the longer ones first, since one begins with another."""
_WRAPPERS = ("data", "rows", "examples", "instances")
"""Keys of an object that holds a list of all rows, as in ``{"data": […]}``."""
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files beside tables that describe them, of ``datasets`` and LLaMA-Factory."""
_BLANK = re.compile(r"[ \t\r\n]*")


def ending(path: Path) -> str:
    """The ending that says how a file is read; empty for a file that is no table."""
    name = path.name.lower().removesuffix(".gz")
    return next((one for one in ENDINGS if name.endswith(one)), "")


def stem(path: Path) -> str:
    """A table's name without its endings."""
    name = path.name.removesuffix(".gz").removesuffix(".GZ")
    return name[: -len(ending(path))] if ending(path) else name


def tables_in(folder: Path) -> list[Path]:
    """The tables that lie directly in a folder, by name."""
    if not folder.is_dir():
        return []
    files = (path for path in folder.iterdir() if ending(path) and path.is_file())
    return sorted(path for path in files if not path.name.startswith((".", "_")) and path.name not in _DESCRIPTIONS)


def read_records(path: Path, config: DataConfig) -> list[Record]:
    """All rows of one file."""
    kind = ending(path)
    if kind in (".csv", ".tsv"):
        records = _cells(path, config, tabs=kind == ".tsv")
    else:
        has_header(config, str(path))
        records = mappings(_parquet(path) if kind == ".parquet" else json_values(read_text(path), path))
    if not records:
        raise UserError(f"{path}: no rows; every file of rows needs at least one")
    return records


def read_text(path: Path) -> str:
    """Read a text file; one that is none is a ``UserError``."""
    data = _bytes(path)
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {encoding.upper()} text (byte {error.start})") from None


def _bytes(path: Path) -> bytes:
    try:
        data = read_bytes(path)
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: a broken gzip file") from None


def json_values(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Every value after where it stands: of a list, lines, objects over several lines, or ``{"data": […]}``."""
    if text.lstrip().startswith("["):
        with json_errors(path):
            values = JSON.decode(text)
        yield from ((f"{path}: row {i}", value) for i, value in enumerate(values))
        return
    found = list(_stream(text, path))
    if len(found) == 1 and isinstance(found[0][1], dict):
        whole = found[0][1]
        for name in _WRAPPERS:
            if isinstance(whole.get(name), list) and all(isinstance(row, dict) for row in whole[name]):
                yield from ((f"{path}: {name} row {i}", row) for i, row in enumerate(whole[name]))
                return
    yield from found


def _stream(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Values one after another, with nothing but blanks between them."""
    at, line, counted = 0, 1, 0
    while (at := _BLANK.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        with json_errors(path, line):
            value, at = JSON.raw_decode(text, at)
        yield f"{path}:{line}", value


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    with needs("datasets", "Parquet files"):
        import pyarrow as pa
        from pyarrow import parquet
    try:
        rows = parquet.read_table(pa.BufferReader(_bytes(path))).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: no Parquet file, or a broken one ({str(error).splitlines()[0][:100]})") from None
    return ((f"{path}: row {i}", row) for i, row in enumerate(rows))


def _cells(path: Path, config: DataConfig, tabs: bool) -> list[Record]:
    """Rows of cells. In a CSV quotes hold commas and newlines together; in a TSV they are letters like others.

    A TSV whose lines have unequal cells so is read with quotes, as pandas writes it.
    """
    text = read_text(path)
    if not tabs:
        return _lines(text, path, config, delimiter=_delimiter(text), strict=True)
    try:
        return _lines(text, path, config, delimiter="\t", quoting=csv.QUOTE_NONE)
    except UserError:
        with_quotes = _quoted(text, path, config)
        if with_quotes is None:
            raise
        return with_quotes


def _quoted(text: str, path: Path, config: DataConfig) -> list[Record] | None:
    try:
        return _lines(text, path, config, delimiter="\t", strict=True)
    except UserError:
        return None


def _delimiter(text: str) -> str:
    """Spreadsheets of some countries separate cells by semicolons."""
    first = text.partition("\n")[0]
    return ";" if ";" in first and "," not in first else ","


def _lines(text: str, path: Path, config: DataConfig, **dialect: Any) -> list[Record]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    names = list(config.columns or ())
    records: list[Record] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not names:
                names = _header(cells, path)
                continue
            if not records and config.columns and sorted(cells) == sorted(names):
                raise UserError(f"{path}:1: is a header line; leave data.columns out, which is for files without one")
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
