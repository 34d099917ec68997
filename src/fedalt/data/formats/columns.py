"""From columns to rows: which column is the text, which the label, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedalt.config.data import DataConfig
from fedalt.data.federation import SPLITS, Picture, Pool, Row, needs_column
from fedalt.data.formats.folder import check_text
from fedalt.errors import UserError, did_you_mean, listed

_TEXTS = (
    ("instruction",),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
    ("review",),
    ("content",),
)
"""Text columns where none are given: the first group that is there; two are joined by a newline."""
_LABELS = ("output", "label", "fine_label", "labels", "class", "target", "coarse_label")
COARSE = "coarse_label"
"""Column of superclasses, which becomes the category of rows that have none."""


@dataclass(frozen=True, slots=True)
class Record:
    """A row as its source has it.

    Attributes:
        values: Column → value.
        where: File and line, or data set and row.
        name: What an image is called, which stands where other rows have their text.
        picture: The image.
    """

    values: Mapping[str, Any]
    where: str
    name: str = ""
    picture: Picture | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns become what.

    Attributes:
        text: Columns that are joined by a newline; none where rows are images.
        label: The label's column.
        category: The category's column.
        extra: Column that is kept beside the rows because they are dealt by it.
    """

    text: tuple[str, ...]
    label: str
    category: str
    extra: str | None

    def __str__(self) -> str:
        return f"{'text: ' + ', '.join(self.text) if self.text else 'images'}; label: {self.label}"


def to_pool(
    config: DataConfig,
    splits: Mapping[str, Sequence[Record]],
    source: str,
    kind: str,
    *,
    hint: str = "",
    task: str | None = None,
) -> Pool:
    """Rows of every split from the columns that the settings name.

    Args:
        config: Names of columns and labels.
        splits: Records by split.
        source: What the pool is called.
        kind: What was recognised, for a note.
        hint: What else may be the matter where a column is not found.
        task: Task of rows that name none; the last part of ``source`` when not given.

    Raises:
        UserError: No training rows, a column that is not there, an empty text or label.
    """
    for split in splits:
        if not splits[split]:
            raise UserError(f"{source}: no {split} rows")
    first = splits["train"][0]
    columns = _choose(config, list(first.values), first.picture is not None, source, hint)
    task = source.rstrip("/").rpartition("/")[2].partition(".")[0] if task is None else task
    rows = {s: tuple(_row(record, columns, config, task) for record in splits.get(s, ())) for s in SPLITS}
    labels = frozenset(_cell(record, columns.label) for records in splits.values() for record in records)
    extra = columns.extra
    kept = {s: tuple(_text(r, extra) for r in records) for s, records in splits.items()} if extra else {}
    note = f"{source}: {kind}; {columns}; {', '.join(f'{len(mine)} {s} rows' for s, mine in rows.items() if mine)}"
    return Pool(**rows, source=source, notes=(note,), column=kept, labels=labels)


def find_label(config: DataConfig, known: Sequence[str]) -> str | None:
    """The label's column: the one that the settings name, or the first that is usual; nothing where it is not there."""
    return next((name for name in ((config.label_column,) if config.label_column else _LABELS) if name in known), None)


def has_header(config: DataConfig, source: str) -> None:
    """Refuse names of columns for a source that names them itself."""
    if config.columns:
        raise UserError(
            f"data.columns: {source} names its columns itself; this is for CSV and TSV files without a header"
        )


def _choose(config: DataConfig, known: Sequence[str], pictures: bool, source: str, hint: str) -> Columns:
    where, extra = _columns(known, source) + hint, needs_column(config.partition.column)
    if pictures and config.text_columns:
        raise UserError(f"data.text_columns: the rows of {source} are images, which have no text")
    for key, names in (
        ("text_columns", config.text_columns or ()),
        ("label_column", (config.label_column,) if config.label_column else ()),
        ("partition.column", (extra,) if extra else ()),
    ):
        for name in names:
            if name not in known:
                raise UserError(f'data.{key}: no column "{name}"{did_you_mean(name, known)}; {where}')
    label = find_label(config, known)
    if label is None:
        raise UserError(f"data.label_column: say which column is the label; {where}")
    text = config.text_columns or next((group for group in _TEXTS if set(group) <= set(known)), ())
    if not text and not pictures:
        raise UserError(f"data.text_columns: say which columns are the text; {where}")
    category = "category" if "category" in known else COARSE if label != COARSE else ""
    return Columns(() if pictures else text, label, category, extra)


def _columns(known: Sequence[str], source: str) -> str:
    return f"{source} has the columns {listed([name if len(name) <= 30 else f'{name[:29]}…' for name in known])}"


def _row(record: Record, columns: Columns, config: DataConfig, task: str) -> Row:
    label = _text(record, columns.label)
    text = record.name if record.picture else "\n".join(_text(record, name) for name in columns.text)
    return Row(
        text,
        (config.label_names or {}).get(label, label),
        _text(record, "task", task),
        _text(record, columns.category, ""),
        record.picture,
    )


def _text(record: Record, column: str, instead: str | None = None) -> str:
    """A cell as text; where the column or its value may be missing, ``instead``."""
    text = _cell(record, column)
    if instead is not None and not text:
        return instead
    check_text(text, column, record.where)
    return text


def _cell(record: Record, column: str) -> str:
    value = record.values.get(column)
    if isinstance(value, list | dict | bytes):
        raise UserError(f'{record.where}: "{column}" is {type(value).__name__}, expected text or a number')
    return "" if value is None else str(value)
