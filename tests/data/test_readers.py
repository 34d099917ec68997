"""Readers agree: the same rows through every kind of file are the same rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalt.config.data import DataConfig
from fedalt.data.formats.columns import Record
from fedalt.data.formats.files import read_records
from fedalt.errors import UserError

pa = pytest.importorskip("pyarrow", reason="needs pip install 'fedalt[datasets]'")
Cells = Sequence[Sequence[str]]
COLUMNS = ("instruction", "input", "output")


def _mappings(cells: Cells) -> list[dict[str, str | None]]:
    """An empty input is null."""
    return [dict(zip(COLUMNS, (a, b or None, c), strict=True)) for a, b, c in cells]


def _json(cells: Cells) -> bytes:
    return json.dumps(_mappings(cells)).encode()


def _lines(cells: Cells) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in _mappings(cells)).encode()


def _objects(cells: Cells) -> bytes:
    return "\n".join(json.dumps(row, indent=2) for row in _mappings(cells)).encode()


def _wrapped(cells: Cells) -> bytes:
    return json.dumps({"version": 1, "data": _mappings(cells)}).encode()


def _csv(cells: Cells, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, quoting=quoting).writerows([COLUMNS, *cells])  # type: ignore[arg-type]
    return out.getvalue().encode()


def _tsv(cells: Cells) -> bytes:
    return "".join("\t".join(line) + "\r\n" for line in [COLUMNS, *cells]).encode()


def _parquet(cells: Cells) -> bytes:
    from pyarrow import parquet

    out = io.BytesIO()
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    parquet.write_table(pa.Table.from_pylist(_mappings(cells), schema), out)
    return out.getvalue()


FILES: dict[str, tuple[str, Callable[[Cells], bytes]]] = {
    "a JSON list": ("json", _json),
    "JSON lines with CRLF": ("jsonl", _lines),
    "objects over several lines": ("json", _objects),
    "an object with data": ("json", _wrapped),
    "CSV": ("csv", _csv),
    "CSV with all quotes": ("csv", lambda cells: _csv(cells, quoting=csv.QUOTE_ALL)),
    "CSV with semicolons": ("csv", lambda cells: _csv(cells, delimiter=";")),
    "TSV": ("tsv", _tsv),
    "Parquet": ("parquet", _parquet),
}
CODES: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "with a mark": lambda data: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "gzip": gzip.compress,
}
letters = st.characters(exclude_categories=("Cs", "Cc"))
texts = st.text(letters, min_size=1, max_size=12).filter(str.strip)
tables = st.lists(st.tuples(texts, st.text(letters, max_size=5), texts), min_size=1, max_size=4)


def read(folder: str | Path, ending: str, data: bytes) -> list[tuple[str, ...]]:
    path = Path(folder) / f"rows.{ending}"
    path.write_bytes(data)
    return [_cells(record) for record in read_records(path, DataConfig())]


def _cells(record: Record) -> tuple[str, ...]:
    return tuple(record.values[name] or "" for name in COLUMNS)


@settings(max_examples=25, deadline=None)
@given(tables)
@pytest.mark.parametrize("kind", FILES)
def test_the_same_rows_through_every_file(kind: str, cells: Cells) -> None:
    ending, write = FILES[kind]
    with TemporaryDirectory() as folder:
        for code, change in CODES.items():
            if kind == "Parquet" and code in ("with a mark", "UTF-16"):
                continue
            assert read(folder, ending + (".gz" if code == "gzip" else ""), change(write(cells))) == list(cells), code


@pytest.mark.parametrize("kind", FILES)
def test_cells_of_any_length(tmp_path: Path, kind: str) -> None:
    ending, write = FILES[kind]
    cells = [("a", "", "x" * 200_000)]
    assert read(tmp_path, ending, write(cells)) == cells


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "TSV"])
def test_cells_with_newlines_and_tabs(tmp_path: Path, kind: str) -> None:
    ending, write = FILES[kind]
    cells = [('say "a"\nand\tb', "", "c, d; e")]
    assert read(tmp_path, ending, write(cells)) == cells


def test_a_tsv_as_pandas_writes_it(tmp_path: Path) -> None:
    cells = [('say "a"\nand\tb', "", "c")]
    assert read(tmp_path, "tsv", _csv(cells, delimiter="\t")) == cells


BROKEN = {
    "gzip": ("json.gz", gzip.compress(b"[]" * 100)[:-9], "a broken gzip file"),
    "Parquet": ("parquet", b"PAR1 and nothing", "no Parquet file, or a broken one"),
    "UTF-8": ("json", b'[{"a": "\xff"}]', "not UTF-8 text (byte 8)"),
    "UTF-16": ("json", b"\xff\xfe\x00\xd8", "not UTF-16 text"),
    "an object": ("json", b'{"a": 1}\n\n{"a": \n', "rows.json:3: broken JSON"),
    "empty data": ("json", b'{"data": []}', "no rows"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str) -> None:
    ending, data, piece = BROKEN[name]
    with pytest.raises(UserError) as caught:
        read(tmp_path, ending, data)
    assert piece in str(caught.value) and "\n" not in str(caught.value)
