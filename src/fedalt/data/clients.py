"""From rows that nobody has to clients: training rows are dealt, test and validation rows follow."""

from __future__ import annotations

from fedalt.data.mirror import check_kinds, held_out, mirrored, test_rows
from fedalt.data.options import DataConfig, PartitionConfig
from fedalt.data.partition import TrainingRows, alpha_of, deal, partitioner_of, unused
from fedalt.data.pool import LABEL, Pool
from fedalt.data.rows import ClientData, Federation, Row
from fedalt.errors import UserError


def to_clients(pool: Pool, config: DataConfig, seed: int, clients: int | None, column: str = LABEL) -> Federation:
    """Deal a pool to clients as ``data.partition`` says.

    Args:
        pool: The rows.
        config: How.
        seed: Of the deal.
        clients: How many, where nothing is asked for.
        column: What rows are dealt by, where nothing is asked for.

    Raises:
        UserError: No number of clients, and what ``deal``, ``check_kinds`` and ``mirrored`` refuse.
    """
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
        parts[split] = everything if options.test == "shared" else mirrored(pool, split, column, train, seed)
    made = {k: ClientData(**{s: _rows(pool.split(s), places[k]) for s, places in parts.items()}) for k in range(count)}
    if not pool.test:
        made = {client: _with_test(client, data, config.test_share, seed) for client, data in made.items()}
    return Federation(
        made, pool.source, (*pool.notes, _note(options, count, column), *unused(config, True, pool.source))
    )


def one_client(pool: Pool, share: float, seed: int) -> Federation:
    """All rows as one client's; without test rows it holds a share out.

    Raises:
        UserError: There is one row only.
    """
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


def _note(options: PartitionConfig, clients: int, column: str) -> str:
    alpha = alpha_of(options)
    detail = "" if alpha is None else f", alpha {alpha:g}"
    return f"rows dealt to {clients} clients: {partitioner_of(options)}{detail}; by {column}"
