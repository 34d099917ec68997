"""Partitioners: which client gets which training rows. Flower Datasets' where it has them, our own where not."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedalt.data.mirror import grouped, shuffled
from fedalt.data.options import PartitionConfig
from fedalt.errors import UserError
from fedalt.extras import needs
from fedalt.seeding import derive_seed

_DRAWS, _TRIES = 20, 10
"""Draws, and Dirichlet's own tries of each, after which too few rows mean that the settings do not fit the rows."""
ALPHA = {"dirichlet": 0.5, "quantity": 0.5, "gl_dir": 0.3, "sc_dir": 3.0}
"""Concentration of the partitioners that have one."""

Parts = list[list[int]]
"""Places of every client's rows, in the order in which it has them."""


@dataclass(frozen=True, slots=True)
class Deck:
    """Training rows to deal, seen by their kinds only.

    Attributes:
        kinds: What every row is dealt by, usually its label.
        superclasses: The category of every row.
        clients: How many share them.
        options: How.
        column: What the kinds are, for messages.
        source: Where the rows are from, for messages.
    """

    kinds: Sequence[str]
    superclasses: Sequence[str]
    clients: int
    options: PartitionConfig
    column: str
    source: str

    @property
    def alpha(self) -> float:
        """Dirichlet's concentration."""
        return self.options.alpha or ALPHA[self.by]

    @property
    def by(self) -> str:
        """The partitioner."""
        return self.options.by or "iid"


def deal(deck: Deck, fewest: int, seed: int) -> Parts:
    """Deal rows until every client has enough; every row goes to exactly one client.

    Raises:
        UserError: More clients than rows, settings that the kinds of rows do not allow, or no draw that leaves every
            client ``fewest`` rows.
    """
    if deck.clients > len(deck.kinds):
        raise UserError(
            f"data.clients: {deck.clients} clients asked for, but {deck.source} has {len(deck.kinds)} training rows"
        )
    partitioner = _PARTITIONERS[deck.by]
    for draw in range(1 if deck.by in _FIXED else _DRAWS):
        parts = partitioner(deck, fewest, derive_seed(seed, "partition", draw))
        if parts and min(map(len, parts)) >= fewest:
            return parts
    raise UserError(
        f"data.partition: {deck.by} leaves one of {deck.clients} clients with fewer than {fewest} rows of "
        f"{deck.source} (data.partition.min_rows, and what is held out); ask for fewer clients"
        + (", a larger data.partition.alpha" if deck.by in ALPHA else "")
        + " or a smaller min_rows"
    )


def _iid(deck: Deck, fewest: int, seed: int) -> Parts:
    return _dealt(_flower().IidPartitioner(deck.clients), deck.kinds, seed)


def _dirichlet(deck: Deck, fewest: int, seed: int) -> Parts:
    """For each kind, the clients' shares are drawn from Dir(alpha): Flower's, which is also GL-Dir of HiLoRA."""
    return _dirichlet_of(deck.kinds, deck.clients, deck.alpha, fewest, seed)


def _dirichlet_of(kinds: Sequence[str], clients: int, alpha: float, fewest: int, seed: int) -> Parts:
    partitioner = _flower().DirichletPartitioner(
        num_partitions=clients,
        partition_by="kind",
        alpha=alpha,
        min_partition_size=fewest,
        self_balancing=False,
        seed=seed,
    )
    try:
        return _dealt(partitioner, kinds, seed)
    except ValueError:  # none of its tries gave everybody enough
        return []


def _pathological(deck: Deck, fewest: int, seed: int) -> Parts:
    """A few labels each. Flower's leaves labels out where clients are fewer, so there our own assignment is used."""
    each, places = deck.options.classes_per_client, grouped(deck.kinds)
    if each > len(places):
        raise UserError(
            f"data.partition.classes_per_client: {each}, but {deck.source} has {len(places)} values of {deck.column}"
        )
    _check_cover(deck, each * deck.clients, len(places), "classes_per_client")
    if deck.clients < len(places):
        return _shared(places, cover(list(places), [each] * deck.clients, seed), seed)
    partitioner = _flower().PathologicalPartitioner(
        num_partitions=deck.clients,
        partition_by="kind",
        num_classes_per_partition=each,
        class_assignment_mode="first-deterministic",
        seed=seed,
    )
    try:
        return _dealt(partitioner, deck.kinds, seed)
    except ValueError:  # a label is drawn for more clients than it has rows: draw again
        return []


def _column(deck: Deck, fewest: int, seed: int) -> Parts:
    return _dealt(_flower().NaturalIdPartitioner("kind"), deck.kinds, seed)


def _quantity(deck: Deck, fewest: int, seed: int) -> Parts:
    """Sizes are drawn from Dir(alpha), as in NIID-Bench; which rows, evenly."""
    import numpy as np

    draws = np.random.default_rng(seed).dirichlet([deck.alpha] * deck.clients, _TRIES)
    ends = np.round(np.cumsum(draws, axis=1) * len(deck.kinds)).astype(int)
    ends[:, -1] = len(deck.kinds)
    sizes = next((row for row in np.diff(ends, prepend=0).tolist() if min(row) >= fewest), None)
    if sizes is None:
        return []
    return _dealt(_flower().SizePartitioner(sizes), deck.kinds, seed)


def _sc_dir(deck: Deck, fewest: int, seed: int) -> Parts:
    """Superclasses are handed out, and the rows of each shared by Dir(alpha) among the clients that hold it."""
    import numpy as np

    places, each = grouped(deck.superclasses), deck.options.superclasses_per_client
    if "" in places:
        raise UserError(
            f"data.partition.by: sc_dir needs the category of every row, and {deck.source} has some without"
        )
    if (each or 1) > len(places):
        raise UserError(
            f"data.partition.superclasses_per_client: {each}, but {deck.source} has {len(places)} categories"
        )
    _check_cover(deck, (each or 2) * deck.clients, len(places), "superclasses_per_client")
    drawn = np.random.default_rng(seed).integers(1, min(2, len(places)) + 1, deck.clients).tolist()
    held = cover(list(places), [each] * deck.clients if each else drawn, seed)
    parts: Parts = [[] for _ in range(deck.clients)]
    for place, (superclass, rows) in enumerate(places.items()):
        holders = [client for client, mine in enumerate(held) if superclass in mine]
        if not 0 < len(holders) <= len(rows):
            return []
        within = deck.options.dir_level == "class_in_superclass"
        kinds = [deck.kinds[i] if within else superclass for i in rows]
        shares = _dirichlet_of(kinds, len(holders), deck.alpha, 0, derive_seed(seed, "superclass", place))
        for client, share in zip(holders, shares, strict=True):
            parts[client] += [rows[i] for i in share]
    return [[part[i] for i in shuffled(len(part), seed, "order", k)] for k, part in enumerate(parts)]


_PARTITIONERS: dict[str, Callable[[Deck, int, int], Parts]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "pathological": _pathological,
    "column": _column,
    "quantity": _quantity,
    "gl_dir": _dirichlet,
    "sc_dir": _sc_dir,
}
_FIXED = {"iid", "column"}
"""Sizes of their parts do not depend on the draw."""


def cover(values: Sequence[str], counts: Sequence[int], seed: int) -> list[list[str]]:
    """Hand every client ``counts[k]`` different values, each value once before any comes again."""
    queue: list[str] = []
    held = []
    for client, count in enumerate(counts):
        mine: list[str] = []
        while len(mine) < count:
            fresh = next((value for value in queue if value not in mine), None)
            if fresh is None:
                queue += [values[i] for i in shuffled(len(values), seed, "cover", client)]
            else:
                queue.remove(fresh)
                mine.append(fresh)
        held.append(mine)
    return held


def _shared(places: dict[str, list[int]], held: Sequence[Sequence[str]], seed: int) -> Parts:
    """Every kind's rows in equal parts among the clients that hold it."""
    parts: Parts = [[] for _ in held]
    for kind, rows in places.items():
        holders = [client for client, mine in enumerate(held) if kind in mine]
        for turn, i in enumerate(shuffled(len(rows), seed, "kind", kind)):
            parts[holders[turn % len(holders)]].append(rows[i])
    return [[part[i] for i in shuffled(len(part), seed, "order", k)] for k, part in enumerate(parts)]


def _check_cover(deck: Deck, most: int, values: int, key: str) -> None:
    if most < values:
        raise UserError(
            f"data.partition.{key}: {deck.clients} clients hold at most {most} of the {values} values in "
            f"{deck.source}, so some would be left with no client; ask for more clients or more of them per client"
        )


def _dealt(partitioner: Any, kinds: Sequence[str], seed: int) -> Parts:
    """Let a partitioner of Flower's see the rows in a seeded order, as numbers with a kind."""
    import datasets

    order, numbers = shuffled(len(kinds), seed, "rows"), {kind: n for n, kind in enumerate(sorted(set(kinds)))}
    columns = {"row": order, "kind": [numbers[kinds[i]] for i in order]}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off
        warnings.simplefilter("ignore")
        partitioner.dataset = datasets.Dataset.from_dict(columns)
        return [list(partitioner.load_partition(k)["row"]) for k in range(partitioner.num_partitions)]


def _flower() -> Any:
    with needs("datasets", "partitioners"):
        from flwr_datasets import partitioner
    return partitioner
