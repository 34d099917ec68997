"""The same rows among other clients: some clients only, rows split over several clients, or mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedalt.data.rows import SPLITS, ClientData, Federation, Row
from fedalt.errors import UserError, did_you_mean, listed


def keep_tasks(federation: Federation, tasks: Sequence[str]) -> Federation:
    """Only the clients whose task is in the list, counted anew from 0 in their order.

    Raises:
        UserError: A task that no client has.
    """
    known = dict.fromkeys(data.train[0].task for data in federation.clients.values())
    for task in tasks:
        if task not in known:
            raise UserError(
                f'data.tasks: no client of {federation.source} has "{task}"{did_you_mean(task, known)}; '
                f"tasks: {listed(list(known))}"
            )
    kept = [data for data in federation.clients.values() if data.train[0].task in tasks]
    return replace(federation, clients=dict(enumerate(kept)))


def split_rows(federation: Federation, clients: int) -> Federation:
    """Deal every client's rows out to ``clients / K`` clients, as Figure 4 of the paper does with 16 and 24 clients.

    Of K clients, client i's rows go to clients i, i + K, i + 2K, … by turns, in their order. Training, validation and
    test rows are dealt apart, so none changes sides.

    Raises:
        UserError: ``clients`` is no multiple of K, or a client has too few rows to give every part one.
    """
    count = len(federation.clients)
    if clients % count:
        below = clients // count * count
        near = f"{below} or {below + count}"
        raise UserError(
            f"data.clients: {clients} clients asked for, {federation.source} has {count}; "
            f"to split their rows give a multiple of {count}, for example {near}"
        )
    parts = clients // count
    for client, data in federation.clients.items():
        for split in SPLITS:
            rows = getattr(data, split)
            if len(rows) < parts and (rows or split != "validation"):
                raise UserError(
                    f"data.clients: {clients} clients asked for, but client {client} of {federation.source} has only "
                    f"{len(rows)} {split} rows to split into {parts}"
                )
    sources = list(federation.clients.values())
    return replace(federation, clients={i: _dealt(sources[i % count], i // count, parts) for i in range(count * parts)})


def mix_tasks(federation: Federation, tasks: int) -> Federation:
    """Let every client hold equal shares of ``tasks`` neighbouring clients' rows; every row is used once.

    Each split of client k's rows is dealt into ``tasks`` shares, by turns; share j goes to client (k + j) mod K. So
    client k ends with its own first share and one share of each of the ``tasks - 1`` clients before it, in this
    order. Where all clients have the same number of rows, each keeps that number. With ``tasks`` = 1 nothing moves,
    with ``tasks`` = K every client holds rows of all.

    Raises:
        UserError: Fewer clients than ``tasks``, or a client would have no training or no test rows.
    """
    ids, data = federation.ids, list(federation.clients.values())
    if tasks == 1:
        return federation
    if tasks > len(ids):
        raise UserError(f"data.tasks_per_client: {tasks} asked for, but there are only {len(ids)} clients")

    def rows(k: int, split: str) -> tuple[Row, ...]:
        return tuple(row for j in range(tasks) for row in getattr(data[k - j], split)[j::tasks])

    mixed = {c: ClientData(**{split: rows(k, split) for split in SPLITS}) for k, c in enumerate(ids)}
    _check_filled(mixed, tasks)
    note = f"every client holds equal shares of {tasks} clients' rows: its own and those of the {tasks - 1} before it"
    return replace(federation, clients=mixed, notes=(*federation.notes, note))


def _dealt(data: ClientData, part: int, parts: int) -> ClientData:
    return ClientData(**{split: getattr(data, split)[part::parts] for split in SPLITS})


def _check_filled(clients: Mapping[int, ClientData], tasks: int) -> None:
    for client, data in clients.items():
        empty = next((split for split in ("train", "test") if not getattr(data, split)), None)
        if empty:
            raise UserError(f"data.tasks_per_client: {tasks} shares leave client {client} without {empty} rows")
