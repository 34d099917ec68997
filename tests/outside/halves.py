"""A partitioner: shuffled rows in parts of which each is as large as all that follow."""

from fedalt.registry import PARTITIONERS


@PARTITIONERS.register("halves")
def halves(rows, clients, rng):
    """Half of the rows, half of the rest, and so on; the last two clients have the same."""
    order, parts = list(rng.permutation(len(rows))), []
    for _ in range(clients - 1):
        parts.append(order[: len(order) // 2])
        order = order[len(order) // 2 :]
    return [*parts, order]
