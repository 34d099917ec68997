"""Rows that nobody has yet: what a source of rows without clients delivers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedalt.data.rows import SPLITS, Federation, Row
from fedalt.errors import UserError, did_you_mean, listed

LABEL = "label"
_OF_ROWS = (LABEL, "task", "category")


@dataclass(frozen=True, slots=True)
class Pool:
    """Rows by split, to be dealt to clients.

    Attributes:
        train: Training rows.
        validation: Validation rows; there may be none.
        test: Test rows; where there are none, clients hold out some of their own.
        source: Where they came from, for people.
        notes: What the user should know.
        column: Split → value of every row in the column that rows are dealt by, where rows do not hold it themselves.
        labels: Labels as the source has them, before they are called something else.
    """

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    source: str
    notes: tuple[str, ...] = ()
    column: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    labels: frozenset[str] = frozenset()

    def split(self, name: str) -> tuple[Row, ...]:
        """The rows of a split."""
        rows: tuple[Row, ...] = getattr(self, name)
        return rows

    def kinds(self, split: str, column: str) -> tuple[str, ...]:
        """What every row of a split has in a column."""
        if split in self.column and column not in _OF_ROWS:
            return self.column[split]
        if column not in _OF_ROWS:
            hint = did_you_mean(column, _OF_ROWS)
            raise UserError(f'data.partition.column: {self.source} has no "{column}"{hint}; {", ".join(_OF_ROWS)}')
        return tuple(row.output if column == LABEL else getattr(row, column) for row in self.split(split))


def pooled(federation: Federation) -> Pool:
    """All clients' rows, client after client, as if nobody had them."""
    rows: dict[str, Any] = {
        s: tuple(row for data in federation.clients.values() for row in getattr(data, s)) for s in SPLITS
    }
    return Pool(**rows, source=federation.source, notes=federation.notes)


def needs_column(column: str | None) -> str | None:
    """The column that a source must keep because rows do not hold it; usually none."""
    return None if column in _OF_ROWS else column


def check_names(names: Mapping[str, str], pool: Pool) -> None:
    """Refuse a name for a label that no row has."""
    for label in names:
        if label not in pool.labels:
            hint = did_you_mean(label, pool.labels)
            known = listed(sorted(pool.labels))
            raise UserError(f'data.label_names: no row of {pool.source} has the label "{label}"{hint}; labels: {known}')
