"""Test and validation rows for clients that have training rows: in the same shares, or held out of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch

from fedalt.data.pool import Pool
from fedalt.errors import UserError
from fedalt.seeding import rng


def mirrored(pool: Pool, split: str, column: str, train: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
    """Deal a split's rows so that of each kind every client gets the share that it has of its training rows.

    Shares are rounded by largest remainder, ties fall by the seed, and every row goes to exactly one client. A client
    that would be left without any gets a row of its most frequent kind from whoever has most of them.

    Args:
        pool: All rows.
        split: ``validation`` or ``test``.
        column: What a row's kind is.
        train: Places of every client's training rows.
        seed: Of the order of rows, and of ties.

    Returns:
        Places of every client's rows in the split.

    Raises:
        UserError: A client cannot be given any row.
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

    Args:
        labels: Label of every row.
        share: Of test rows; there is at least one, and at least one training row.
        seed: Of which rows.
        client: Its id.

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
