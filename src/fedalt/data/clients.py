"""From rows to clients, and from clients to other clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedalt.config.data import DataConfig, PartitionConfig
from fedalt.data.federation import LABEL, SPLITS, ClientData, Federation, Pool, Row
from fedalt.data.formats.columns import named_clients
from fedalt.data.partition import (
    TrainingRows,
    alpha_of,
    check_kinds,
    deal,
    grouped,
    held_out,
    largest_remainder,
    partitioner_of,
    shuffled,
    split_like_train,
    test_rows,
    unused,
)
from fedalt.errors import UserError, did_you_mean, listed


def to_clients(pool: Pool, config: DataConfig, seed: int, clients: int | None, column: str = LABEL) -> Federation:
    """Deal a pool to clients as ``data.partition`` says."""
    options = config.partition
    column = options.column or column
    if options.by == "column" and not options.column:
        raise UserError("data.partition.column: say which, for example task; every value of it becomes a client")
    kinds = pool.kinds("train", column)
    count = len(set(kinds)) if options.by == "column" else config.clients or clients
    if count is None:
        raise UserError(f"data.clients: say how many clients the {len(pool.train)} rows of {pool.source} are dealt to")
    if config.clients not in (None, count):
        raise UserError(
            f"data.clients: {config.clients} clients asked for, but {column} has {count} values in {pool.source}, and "
            "each becomes a client; leave it out"
        )
    later = [split for split in ("validation", "test") if pool.split(split)]
    for split in later:
        check_kinds(pool, split, column)
    categories = [row.category for row in pool.train]
    train = deal(TrainingRows(kinds, categories, _fewest(pool, config), seed, column, pool.source), count, config)
    parts = {"train": train}
    for split in later:
        everything = [list(range(len(pool.split(split))))] * count
        parts[split] = everything if options.test == "shared" else split_like_train(pool, split, column, train, seed)
    made = {k: ClientData(**{s: _rows(pool.split(s), places[k]) for s, places in parts.items()}) for k in range(count)}
    if not pool.test:
        made = {client: _with_test(client, data, config.test_share, seed) for client, data in made.items()}
    owners = [kinds[places[0]] for places in train] if options.by == "column" else []
    first, *others = pool.notes or (pool.source,)
    dealt = f"{first}; {_note(options, count, column, owners)}"
    return Federation(made, pool.source, (dealt, *others, *unused(config, True, pool.source)))


def one_client(pool: Pool, share: float, seed: int) -> Federation:
    """All rows as one client's; without test rows it holds a share out."""
    data = ClientData(pool.train, pool.validation, pool.test)
    if not pool.test and len(pool.train) < 2:
        raise UserError(f"{pool.source}: 1 row; a client needs one to train on and one to be scored on")
    return Federation({0: data if pool.test else _with_test(0, data, share, seed)}, pool.source, pool.notes)


def _fewest(pool: Pool, config: DataConfig) -> int:
    """Rows that a client must be dealt so that its training rows are enough when others have been held out."""
    needed = config.partition.min_rows + (0 if pool.validation else config.validation_rows)
    if pool.test:
        return needed
    rows = needed + 1
    while rows - test_rows(rows, config.test_share) < needed:
        rows += 1
    return rows


def _rows(rows: tuple[Row, ...], places: list[int]) -> tuple[Row, ...]:
    return tuple(rows[i] for i in places)


def _with_test(client: int, data: ClientData, share: float, seed: int) -> ClientData:
    train, test = held_out([row.output for row in data.train], share, seed, client)
    return ClientData(_rows(data.train, train), data.validation, _rows(data.train, test))


def with_tests(federation: Federation, share: float, seed: int) -> Federation:
    """The same with test rows for clients that have none, held out of their own as where rows are dealt."""
    lacking = [client for client, data in federation.clients.items() if not data.test]
    for client in lacking:
        if len(federation.clients[client].train) < 2:
            raise UserError(f"client {client} of {federation.source}: 1 row; it needs one more to be scored on")
    if not lacking:
        return federation
    made = {c: _with_test(c, d, share, seed) if c in lacking else d for c, d in federation.clients.items()}
    note = f"{share:g} of the rows of {len(lacking)} clients without test rows are held out for that (data.test_share)"
    return replace(federation, clients=made, notes=(*federation.notes, note))


def sampled(answers: Sequence[str], limit: int, *purpose: str | int) -> list[int]:
    """Places of a sample of ``limit`` at most, in order; few answers have their share of it each, and one row at least.

    ``purpose`` is the seed, and what for.
    """
    if limit >= len(answers):
        return list(range(len(answers)))
    places = grouped(answers)
    if len(places) > limit // 2:
        places = {"": list(range(len(answers)))}
    seed, *what = purpose
    sizes = [len(mine) - 1 for mine in places.values()]
    order = shuffled(len(places), int(seed), "limit", *what)
    counts = [1 + n for n in largest_remainder(limit - len(places), sizes, order)]
    chosen = [
        mine[i]
        for (answer, mine), count in zip(places.items(), counts, strict=True)
        for i in shuffled(len(mine), int(seed), "limit", *what, answer)[:count]
    ]
    return sorted(chosen)


def _note(options: PartitionConfig, clients: int, column: str, owners: Sequence[str]) -> str:
    if owners:
        return f"a client for each value of {column}: {named_clients(clients, owners)}"
    alpha = alpha_of(options)
    detail = "" if alpha is None else f", alpha {alpha:g}"
    return f"rows dealt to {clients} clients: {partitioner_of(options)}{detail}; by {column}"


def keep_tasks(federation: Federation, tasks: Sequence[str]) -> Federation:
    """Only the clients whose task is in the list, counted anew from 0 in their order."""
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
