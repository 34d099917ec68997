"""How often the verdicts of ``fedalt compare`` are wrong, by simulation: the table of docs/howto/compare.md.

    python -m tools.error_rates

A client's difference to the reference is drawn around the true one, with a spread and a shape that the rule does not
know. ``better`` or ``worse`` is false where nothing differs, ``equivalent`` where the difference is the margin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from fedalt.comparisons.statistics import beyond, judge, paired

MARGIN, _TABLES, _SAMPLES = 1.0, 2000, 400
SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy tails (t, 3 df)": lambda rng, n: rng.standard_t(3, n) / 3**0.5,
    "one in ten 5 times as far": lambda rng, n: rng.standard_normal(n) * np.where(rng.random(n) < 0.1, 5, 1) / 3.4**0.5,
    "skewed (exponential)": lambda rng, n: rng.exponential(1.0, n) - 1,
}
"""Differences of clients with mean 0 and standard deviation 1."""


def rates(clients: int, shape: str, truth: float, spread: float, *, methods: int = 1) -> Counter[str]:
    """Share of tables in which some method gets each verdict."""
    rng, seen = np.random.default_rng(1), Counter[str]()
    for _ in range(_TABLES):
        drawn = {str(m): truth + spread * SHAPES[shape](rng, clients) for m in range(methods)}
        found = judge({name: paired(list(values), MARGIN) for name, values in drawn.items()})
        seen.update({str(one["verdict"]) for one in found.values()})
    return Counter({verdict: count / _TABLES for verdict, count in seen.items()})


def coverage(clients: int, draws: int, seeds: int, dealt: bool) -> float:
    """How often ``beyond`` holds the true difference, where clients, draws, seeds and all else vary alike."""
    rng, inside = np.random.default_rng(2), 0
    for _ in range(_SAMPLES):
        shape = (draws, clients, seeds)
        parts = [(draws, 1, 1), (draws, clients, 1) if dealt else (1, clients, 1), (1, 1, seeds), shape]
        cells = sum((rng.standard_normal(part) * size for part, size in zip(parts, (1, 2, 0.5, 1), strict=True)), 0.0)
        low, high = beyond(np.broadcast_to(cells, shape), dealt, times=1000) or (0, 0)
        inside += low <= 0 <= high
    return inside / _SAMPLES


def main() -> None:
    """Print the tables as Markdown."""
    head = (
        "clients",
        "differences",
        "better or worse, truth 0",
        "the same, 10 methods",
        "equivalent, truth 1",
        "spread 2",
    )
    print("| " + " | ".join(head) + " |")
    print("|---:|---|---:|---:|---:|---:|")
    for clients in (8, 10):
        for shape in SHAPES:
            one, ten = (rates(clients, shape, 0, 20 * MARGIN, methods=m) for m in (1, 10))
            wrong = [100 * (found["better"] + found["worse"]) for found in (one, ten)]
            wrong += [100 * rates(clients, shape, MARGIN, spread)["equivalent"] for spread in (0.5, 2)]
            print(f"| {clients} | {shape} | {' | '.join(f'{value:.1f} %' for value in wrong)} |")
    print("\n| clients, draws, seeds | beyond, clients stay | clients dealt anew |\n|---|---:|---:|")
    for sizes in ((8, 1, 3), (8, 3, 3), (8, 5, 5), (10, 10, 3)):
        shares = [f"{100 * coverage(*sizes, dealt):.0f} %" for dealt in (False, True)]
        print(f"| {', '.join(map(str, sizes))} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
