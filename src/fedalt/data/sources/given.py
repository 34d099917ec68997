"""Rows given in memory by a Python program: mappings or Hugging Face data sets, with clients or without."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedalt.config.data import DataConfig
from fedalt.data.federation import SPLITS, Federation, Pool, check_names
from fedalt.data.formats.columns import Record, has_header, mappings, named_clients, of_pools, to_pool
from fedalt.data.record import row_digest
from fedalt.data.sources.hub import from_datasets
from fedalt.errors import UserError, listed

PREFIX = "memory:"
"""``data.source`` of such rows is this and their digest."""
_HANDED_ON = "FEDALT_GIVEN_ROWS"
"""Environment variable: the folder from which processes of this one take such rows."""
_POSSIBLE = (
    "give a path or name, {name: (train rows, test rows)}, a list of rows, or a Hugging Face Dataset or DatasetDict; "
    "a row is a mapping, for example {'instruction': …, 'output': …} or {'text': …, 'label': …}"
)


@dataclass(frozen=True)
class Given:
    """What a program gave.

    Attributes:
        rows: A list of mappings or a ``Dataset``; split → such a thing; or client's name → (train, test) or (train,
            validation, test), or a mapping of splits.
    """

    rows: Any

    def read(self, config: DataConfig) -> Federation | Pool:
        """The rows: clients in the order of their names in the mapping, or rows that nobody has."""
        has_header(config, "what is given in memory")
        if not isinstance(self.rows, Mapping) or (
            _is_rows(self.rows.get("train")) and not isinstance(self.rows["train"], tuple)  # that is a client's pair
        ):
            return _pool(self.rows, config, config.source, "")
        if not self.rows:
            raise UserError("load_data: no clients")
        pools = {str(name): _client(str(name), rows, config) for name, rows in self.rows.items()}
        told = dict.fromkeys(note.partition('": ')[2] for pool in pools.values() for note in pool.notes[1:])
        notes = (f"{config.source}: rows in memory; {named_clients(len(pools), list(pools))}", *told)
        federation = of_pools(list(pools.values()), config.source, notes)
        check_names(config.label_names or {}, federation)
        return federation


def given_source(found: Federation | Pool) -> str:
    """What ``data.source`` calls rows in memory: a digest of all of them, of their order, and of who has which."""
    clients = found.clients.values() if isinstance(found, Federation) else (found,)
    rows = [
        [[[row_digest(row), row.task, row.category] for row in getattr(mine, split)] for split in SPLITS]
        for mine in clients
    ]
    columns = found.column if isinstance(found, Pool) else {}
    return PREFIX + hashlib.sha256(json.dumps([rows, columns]).encode()).hexdigest()[:12]


def read_handed_on(source: str) -> Given:
    """Rows that the process which started this one was given."""
    path = Path(os.environ.get(_HANDED_ON, "")) / source.removeprefix(PREFIX)
    if _HANDED_ON not in os.environ or not path.is_file():
        raise UserError(
            f"data.source: the rows of this run ({source}) were given in memory, by a Python program, and are kept "
            "nowhere; give them there again, to fedalt.run or fedalt.load_run(PATH, data), or others with --data where "
            "a command has it"
        )
    given: Given = pickle.loads(path.read_bytes())
    return given


@contextmanager
def handed_on(given: Given | None, source: str) -> Iterator[None]:
    """Processes started inside the block find the rows, too: in a folder that only this user can read."""
    if given is None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="fedalt-rows-") as folder:
        (Path(folder) / source.removeprefix(PREFIX)).write_bytes(pickle.dumps(given))
        os.environ[_HANDED_ON] = folder
        try:
            yield
        finally:
            del os.environ[_HANDED_ON]


def _client(name: str, rows: Any, config: DataConfig) -> Pool:
    where = f'client "{name}"'
    if isinstance(rows, tuple) and len(rows) in (2, 3):
        rows = dict(zip(("train", "test") if len(rows) == 2 else SPLITS, rows, strict=True))
    if not isinstance(rows, Mapping):
        raise UserError(f"load_data: {where}: give (train rows, test rows), found {_kind(rows)}")
    pool = _pool(rows, config, where, name)
    if not pool.test:
        raise UserError(f"load_data: {where} has no test rows; give (train rows, test rows)")
    return pool


def _pool(rows: Any, config: DataConfig, where: str, task: str) -> Pool:
    """Rows of one client, or of nobody, by split."""
    splits = rows if isinstance(rows, Mapping) else {"train": rows}
    for split, mine in splits.items():
        if not _is_rows(mine):
            raise UserError(f"load_data: {where}, {split}: found {_kind(mine)}; {_POSSIBLE}")
    if all(map(_is_dataset, splits.values())):
        return from_datasets(splits, where, config, task)
    unknown = [name for name in splits if name not in SPLITS]
    if unknown or "train" not in splits:
        raise UserError(f"load_data: {where}: the splits are {', '.join(SPLITS)}, found {listed(list(splits))}")
    records = {split: _records(mine, f"{where}, {split}") for split, mine in splits.items() if len(mine)}
    return to_pool(config, {"train": [], **records}, where, "rows in memory", task=task)


def _records(rows: Iterable[Any], where: str) -> list[Record]:
    return mappings((f"{where} row {i}", row) for i, row in enumerate(rows))


def _is_rows(value: Any) -> bool:
    return _is_dataset(value) or isinstance(value, list | tuple)


def _is_dataset(value: Any) -> bool:
    """Without an import of ``datasets``: whoever has such an object has imported it."""
    return type(value).__module__.partition(".")[0] == "datasets" and type(value).__name__ == "Dataset"


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
