"""Partitioners: which client gets which training rows. Flower Datasets' where it has them, our own where not.

A partitioner is a function of the rows, as it sees them, the number of clients, and a random generator; it returns the
places of every client's rows, each row once:

    @PARTITIONERS.register("halves")
    def halves(rows: TrainingRows, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        return np.array_split(rng.permutation(len(rows)), clients)

A class is made once, and called in the same way; its settings are ``self.settings``: those of its nested ``Settings``,
or the section ``data.partition``, of which it uses the keys that it lists in ``uses``. Rows are dealt again, with
another generator, until every client has enough.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import TYPE_CHECKING, Any

import torch

from fedalt.config.data import DataConfig, PartitionConfig
from fedalt.data.federation import Pool
from fedalt.errors import UserError, needs
from fedalt.registry import PARTITIONERS
from fedalt.seeding import derive_seed, rng


def split_like_train(pool: Pool, split: str, column: str, train: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
    """Deal a split's rows so that of each kind every client gets the share that it has of its training rows.

    Shares are rounded by largest remainder, ties fall by the seed, and every row goes to exactly one client. A client
    that would be left without any gets a row of its most frequent kind from whoever has most of them.

    Returns:
        Places of every client's rows in the split.
    """
    kinds, known = pool.kinds(split, column), pool.kinds("train", column)
    mine = [Counter(known[i] for i in places) for places in train]
    parts: list[list[int]] = [[] for _ in train]
    for kind, places in grouped(kinds).items():
        weights = [counts[kind] for counts in mine]
        order = shuffled(len(places), seed, split, "rows", kind)
        counts = largest_remainder(len(places), weights, shuffled(len(train), seed, split, "ties", kind))
        start = 0
        for part, count in zip(parts, counts, strict=True):
            part += [places[i] for i in order[start : start + count]]
            start += count
    _fill(parts, mine, kinds, split)
    return [[part[i] for i in shuffled(len(part), seed, split, "order", k)] for k, part in enumerate(parts)]


def check_kinds(pool: Pool, split: str, column: str) -> None:
    """Refuse test and validation rows of a kind that no training row has."""
    kinds = pool.kinds(split, column)
    strange = sorted(set(kinds) - set(pool.kinds("train", column)))
    if strange:
        raise UserError(
            f'{pool.source}: {column} "{strange[0]}" is in {kinds.count(strange[0])} {split} rows and in no training '
            "row; where it is an answer and no label, set data.partition.column to task or category"
        )


def held_out(labels: Sequence[str], share: float, seed: int, client: int) -> tuple[list[int], list[int]]:
    """Split one client's rows into training and test rows, by label; while they last, a label keeps a training row.

    Returns:
        Places of training rows and of test rows, in order.
    """
    places = grouped(labels)
    total = test_rows(len(labels), share)
    sizes, spare = [len(mine) for mine in places.values()], [len(mine) - 1 for mine in places.values()]
    weights = spare if sum(spare) >= total else sizes
    counts = largest_remainder(total, weights, shuffled(len(places), seed, "held", client))
    test: set[int] = set()
    for (label, mine), count in zip(places.items(), counts, strict=True):
        test |= {mine[i] for i in shuffled(len(mine), seed, "held", client, label)[:count]}
    return [i for i in range(len(labels)) if i not in test], sorted(test)


def test_rows(rows: int, share: float) -> int:
    """How many of a client's rows become test rows."""
    return min(max(1, round(share * rows)), rows - 1)


def largest_remainder(total: int, weights: Sequence[int], order: Sequence[int]) -> list[int]:
    """Whole numbers in the shares of ``weights`` that sum to ``total``; of equal remainders, the first in ``order``."""
    whole = sum(weights)
    counts = [total * weight // whole for weight in weights]
    rest = sorted(order, key=lambda i: -(total * weights[i] % whole))
    for i in rest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def grouped(kinds: Sequence[str]) -> dict[str, list[int]]:
    """Kind → places, kinds in alphabetical order."""
    places = defaultdict[str, list[int]](list)
    for place, kind in enumerate(kinds):
        places[kind].append(place)
    return dict(sorted(places.items()))


def shuffled(count: int, seed: int, *purpose: str | int) -> list[int]:
    """The numbers below ``count`` in an order that depends on seed and purpose alone."""
    order: list[int] = torch.randperm(count, generator=rng(seed, "partition", *purpose)).tolist()
    return order


def _fill(parts: list[list[int]], mine: Sequence[Counter[str]], kinds: Sequence[str], split: str) -> None:
    for client, part in enumerate(parts):
        if part:
            continue
        for kind, _ in mine[client].most_common():
            giver = max(range(len(parts)), key=lambda k: (len(parts[k]) > 1, sum(kinds[i] == kind for i in parts[k])))
            given = next((i for i in reversed(parts[giver]) if kinds[i] == kind), None)
            if given is not None and len(parts[giver]) > 1:
                parts[giver].remove(given)
                part.append(given)
                break
        else:
            raise UserError(
                f"data.clients: {len(parts)} clients, but the {len(kinds)} {split} rows are too few to give client "
                f"{client} one of a kind that it trains on; ask for fewer clients, or set data.partition.test to shared"
            )


if TYPE_CHECKING:
    import numpy as np

_DRAWS, _TRIES = 20, 10
"""Draws, and Dirichlet's own tries of each, after which too few rows mean that the settings do not fit the rows."""
_SHARED = {"by", "column", "min_rows", "test", "seed"}
"""Settings that matter whatever deals the rows."""

Parts = list[list[int]]
"""Places of every client's rows, in the order in which it has them."""


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Training rows to deal to clients, as a partitioner sees them.

    Attributes:
        labels: What every row is dealt by, usually its label.
        categories: The category of every row.
        fewest: Rows that every client must get.
        seed: Of this draw.
        column: What the labels are, for messages.
        source: Where the rows are from, for messages.
    """

    labels: Sequence[str]
    categories: Sequence[str]
    fewest: int
    seed: int
    column: str
    source: str

    def __len__(self) -> int:
        return len(self.labels)


def partitioner_of(options: PartitionConfig) -> str:
    """The name of what deals rows that are dealt."""
    return options.by or "iid"


def deal(rows: TrainingRows, clients: int, config: DataConfig) -> Parts:
    """Deal rows until every client has enough; every row goes to exactly one client."""
    if clients > len(rows):
        raise UserError(f"data.clients: {clients} clients asked for, but {rows.source} has {len(rows)} training rows")
    name = partitioner_of(config.partition)
    partition = PARTITIONERS.make(name, config.section, config.partition)
    fixed = getattr(partition, "fixed", False)
    for draw in range(1 if fixed else _DRAWS):
        parts = _drawn(name, partition, replace(rows, seed=derive_seed(rows.seed, "partition", draw)), clients)
        if parts and min(map(len, parts)) >= rows.fewest:
            return parts
    raise UserError(
        f"data.partition: {name} leaves one of {clients} clients with fewer than {rows.fewest} rows of "
        f"{rows.source} (data.partition.min_rows, and what is held out); ask for fewer clients"
        + (", a larger data.partition.alpha" if "alpha" in used_by(name) else "")
        + " or a smaller min_rows"
    )


def _drawn(name: str, partition: Any, rows: TrainingRows, clients: int) -> Parts:
    """What a partitioner deals; none where it asks to draw again."""
    import numpy as np

    with PARTITIONERS.blamed(name):
        parts = [[index(i) for i in part] for part in partition(rows, clients, np.random.default_rng(rows.seed))]
    if not parts:
        return []
    if len(parts) != clients:
        raise UserError(f'partitioner "{name}" made parts for {len(parts)} clients; there are {clients}')
    times = Counter(i for part in parts for i in part)
    wrong = next((i for i in {*range(len(rows)), *times} if times[i] != 1 or not 0 <= i < len(rows)), None)
    if wrong is not None:
        raise UserError(
            f'partitioner "{name}" dealt row {wrong} {times[wrong]} times; each of rows 0 to {len(rows) - 1} goes to '
            "one client"
        )
    return parts


def used_by(name: str) -> tuple[str, ...]:
    """The settings of ``data.partition`` that a partitioner uses, besides those that always matter."""
    return getattr(PARTITIONERS.get(name), "uses", ())


def alpha_of(options: PartitionConfig) -> float | None:
    """Dirichlet's concentration; None where the partitioner has none."""
    default = getattr(PARTITIONERS.get(partitioner_of(options)), "alpha", None)
    return options.alpha or default if "alpha" in used_by(partitioner_of(options)) else None


def unused(config: DataConfig, dealt: bool, source: str) -> tuple[str, ...]:
    """A note on settings of ``data.partition`` that differ from their defaults and change nothing; none if all do.

    ``dealt`` says whether rows are, and do not stay with the clients that have them.
    """
    options = config.partition
    if options.file:
        used, why = {"file"}, f"clients and rows are as in {options.file}"
    elif dealt:
        used, why = {*_SHARED, *used_by(partitioner_of(options))}, f"{partitioner_of(options)} does not use them"
    else:
        used, why = (
            {"seed"} if config.shuffle or (config.limit_by == "sample" and any(config.limits.values())) else set(),
            f"the clients of {source} keep their rows; data.partition.by deals them anew",
        )
    given = [key for key, field in PartitionConfig.model_fields.items() if getattr(options, key) != field.default]
    idle = [f"data.partition.{key}" for key in given if key not in used]
    return (f"without effect: {', '.join(idle)}; {why}",) if idle else ()


@PARTITIONERS.register("iid", fixed=True)
def iid(rows: TrainingRows, clients: int, rng: np.random.Generator) -> Parts:
    """Evenly and at random."""
    return _dealt(_flower().IidPartitioner(clients), rows.labels, rows.seed)


@PARTITIONERS.register("dirichlet", uses=("alpha",))
class DirichletPartitioner:
    """For each label, the clients' shares are drawn from Dir(alpha): Flower's, which is also GL-Dir of HiLoRA."""

    alpha = 0.5
    settings: PartitionConfig

    def __call__(self, rows: TrainingRows, clients: int, rng: np.random.Generator) -> Parts:
        """Deal the rows."""
        return _dirichlet(rows.labels, clients, self.settings.alpha or self.alpha, rows.fewest, rows.seed)


@PARTITIONERS.register("gl_dir")
class GlDirPartitioner(DirichletPartitioner):
    """The same, as HiLoRA sets it."""

    alpha = 0.3


def _dirichlet(labels: Sequence[str], clients: int, alpha: float, fewest: int, seed: int) -> Parts:
    partitioner = _flower().DirichletPartitioner(
        num_partitions=clients,
        partition_by="kind",
        alpha=alpha,
        min_partition_size=fewest,
        self_balancing=False,
        seed=seed,
    )
    try:
        return _dealt(partitioner, labels, seed)
    except ValueError:  # none of its tries gave everybody enough
        return []


@PARTITIONERS.register("pathological", uses=("classes_per_client",))
class PathologicalPartitioner:
    """A few labels each. Flower's leaves labels out where clients are fewer, so there our own assignment is used."""

    settings: PartitionConfig

    def __call__(self, rows: TrainingRows, clients: int, rng: np.random.Generator) -> Parts:
        """Deal the rows."""
        each, places = self.settings.classes_per_client, grouped(rows.labels)
        if each > len(places):
            raise UserError(
                f"data.partition.classes_per_client: {each}, but {rows.source} has {len(places)} values of "
                f"{rows.column}"
            )
        _check_cover(rows, clients, each * clients, len(places), "classes_per_client")
        if clients < len(places):
            return _shared(places, cover(list(places), [each] * clients, rows.seed), rows.seed)
        partitioner = _flower().PathologicalPartitioner(
            num_partitions=clients,
            partition_by="kind",
            num_classes_per_partition=each,
            class_assignment_mode="first-deterministic",
            seed=rows.seed,
        )
        try:
            return _dealt(partitioner, rows.labels, rows.seed)
        except ValueError:  # a label is drawn for more clients than it has rows: draw again
            return []


@PARTITIONERS.register("column", fixed=True)
def column(rows: TrainingRows, clients: int, rng: np.random.Generator) -> Parts:
    """A client per value."""
    return _dealt(_flower().NaturalIdPartitioner("kind"), rows.labels, rows.seed)


@PARTITIONERS.register("quantity", uses=("alpha",))
class QuantityPartitioner:
    """Sizes are drawn from Dir(alpha), as in NIID-Bench; which rows, evenly."""

    alpha = 0.5
    settings: PartitionConfig

    def __call__(self, rows: TrainingRows, clients: int, rng: np.random.Generator) -> Parts:
        """Deal the rows."""
        import numpy as np

        draws = rng.dirichlet([self.settings.alpha or self.alpha] * clients, _TRIES)
        ends = np.round(np.cumsum(draws, axis=1) * len(rows)).astype(int)
        ends[:, -1] = len(rows)
        sizes = next((row for row in np.diff(ends, prepend=0).tolist() if min(row) >= rows.fewest), None)
        if sizes is None:
            return []
        return _dealt(_flower().SizePartitioner(sizes), rows.labels, rows.seed)


@PARTITIONERS.register("sc_dir", uses=("alpha", "superclasses_per_client", "dir_level"))
class ScDirPartitioner:
    """Superclasses are handed out, and the rows of each shared by Dir(alpha) among the clients that hold it."""

    alpha = 3.0
    settings: PartitionConfig

    def __call__(self, rows: TrainingRows, clients: int, rng: np.random.Generator) -> Parts:
        """Deal the rows."""
        places, each = grouped(rows.categories), self.settings.superclasses_per_client
        if "" in places:
            raise UserError(
                f"data.partition.by: sc_dir needs the category of every row, and {rows.source} has some without"
            )
        if (each or 1) > len(places):
            raise UserError(
                f"data.partition.superclasses_per_client: {each}, but {rows.source} has {len(places)} categories"
            )
        _check_cover(rows, clients, (each or 2) * clients, len(places), "superclasses_per_client")
        drawn = rng.integers(1, min(2, len(places)) + 1, clients).tolist()
        held = cover(list(places), [each] * clients if each else drawn, rows.seed)
        parts: Parts = [[] for _ in range(clients)]
        for place, (superclass, own) in enumerate(places.items()):
            holders = [client for client, mine in enumerate(held) if superclass in mine]
            if not 0 < len(holders) <= len(own):
                return []
            within = self.settings.dir_level == "class_in_superclass"
            labels = [rows.labels[i] if within else superclass for i in own]
            seed = derive_seed(rows.seed, "superclass", place)
            shares = _dirichlet(labels, len(holders), self.settings.alpha or self.alpha, 0, seed)
            for client, share in zip(holders, shares, strict=True):
                parts[client] += [own[i] for i in share]
        return [[part[i] for i in shuffled(len(part), rows.seed, "order", k)] for k, part in enumerate(parts)]


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


def _check_cover(rows: TrainingRows, clients: int, most: int, values: int, key: str) -> None:
    if most < values:
        raise UserError(
            f"data.partition.{key}: {clients} clients hold at most {most} of the {values} values in "
            f"{rows.source}, so some would be left with no client; ask for more clients or more of them per client"
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
