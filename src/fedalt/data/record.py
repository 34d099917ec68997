"""partition.json: which row went to which client, by digest, and back from there to the same clients."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedalt.config.data import DataConfig
from fedalt.data.federation import SPLITS, ClientData, Federation, Pool, Row, unplanted
from fedalt.errors import UserError
from fedalt.files import intact, read_json

Digests = dict[str, dict[str, list[str]]]
"""Client → split → digest of every row."""
Counts = dict[str, dict[str, dict[str, int]]]
"""Client → split → label → rows."""
_MOST_LABELS = 1000
_SETTINGS = ("source", "config", "tasks", "clients", "held_out", "test_share", "validation_rows", "partition")


def record(config: DataConfig, seed: int, federation: Federation, held_out: Federation | None = None) -> dict[str, Any]:
    """The content of partition.json."""
    held_out = held_out or Federation({}, federation.source)
    federation = unplanted(federation) if config.canaries else federation
    kind, counts = label_counts(federation, held_out)
    return {
        "source": federation.source,
        "digest": "sha256(instruction, NUL, output)[:12], for an image its digest after another NUL",
        "settings": {"seed": seed, **config.model_dump(mode="json", include=set(_SETTINGS))},
        "clients": digests(federation),
        "held_out": digests(held_out),
        "counted_by": kind,
        "counts": counts,
    }


def digests(federation: Federation) -> Digests:
    """Which row went to which client: a digest of every row, by client and split, in order."""
    return {
        str(client): {split: [row_digest(row) for row in getattr(data, split)] for split in SPLITS}
        for client, data in federation.clients.items()
    }


def row_digest(row: Row) -> str:
    """Twelve hexadecimal digits that identify a row by its content."""
    image = f"\0{row.image.digest()}" if row.image else ""
    return hashlib.sha256(f"{row.instruction}\0{row.output}{image}".encode()).hexdigest()[:12]


def label_counts(*federations: Federation) -> tuple[str, Counts]:
    """Rows per client and split, by label; by task where answers are too many to be labels."""
    clients = {client: data for made in federations for client, data in made.clients.items()}
    every = [row for data in clients.values() for split in SPLITS for row in getattr(data, split)]
    labels = {row.output for row in every}
    kind = "label" if len(labels) <= min(_MOST_LABELS, len(every) / 2) else "task"

    def of(row: Row) -> str:
        return row.output if kind == "label" else row.task

    return kind, {
        str(client): {split: _counted(map(of, getattr(data, split))) for split in SPLITS}
        for client, data in clients.items()
    }


def in_order(labels: Iterable[str]) -> list[str]:
    """Numbers by size, then words by the alphabet."""
    return sorted(labels, key=lambda label: (not _number(label), int(label) if _number(label) else 0, label))


def _number(label: str) -> bool:
    return label.isdecimal() and len(label) < 1000


def _counted(labels: Iterable[str]) -> dict[str, int]:
    counts = Counter(labels)
    return {label: counts[label] for label in in_order(counts)}


def reproduce(file: Path, pool: Pool) -> Federation:
    """Give the clients of a partition.json the rows that they had, in the same order."""
    written = read_json(file)
    known: dict[str, list[Row]] = defaultdict(list)
    for split in SPLITS:
        for row in pool.split(split):
            known[row_digest(row)].append(row)
    used: Counter[str] = Counter()
    clients: dict[int, ClientData] = {}
    missing = 0
    for client, splits in _listed(written, file).items():
        rows: dict[str, tuple[Row, ...]] = {}
        for split, wanted in splits.items():
            times = Counter(wanted)
            missing += sum(max(0, count - len(known[digest])) for digest, count in times.items())
            found = []
            for digest in wanted:
                if same := known[digest]:
                    found.append(same[used[digest] % len(same)])  # shared rows are used by every client
                    used[digest] += 1
            rows[split] = tuple(found)
        clients[client] = ClientData(**rows)
    if missing:
        raise UserError(f"data.partition.file: {missing} rows of {file} are not in {pool.source}")
    return Federation(dict(sorted(clients.items())), pool.source, (*pool.notes, f"clients and rows as in {file}"))


def held_out_in(file: Path) -> tuple[int, ...]:
    """Clients of a partition.json that took no part in its run."""
    written = read_json(file)
    with intact(file):
        return tuple(sorted(map(int, written.get("held_out", {}))))


def _listed(written: Any, file: Path) -> dict[int, Mapping[str, list[str]]]:
    try:
        everybody = {**written["clients"], **written.get("held_out", {})}
        clients = {int(client): {split: list(mine[split]) for split in SPLITS} for client, mine in everybody.items()}
    except (TypeError, KeyError, ValueError, AttributeError):
        raise UserError(f"data.partition.file: {file} is no partition.json: clients with digests are missing") from None
    if not clients:
        raise UserError(f"data.partition.file: {file} has no clients")
    return dict(clients)
