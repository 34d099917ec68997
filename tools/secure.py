"""``python -m tools.secure``: the arithmetic of one attempt at a secure sum, with a million numbers a site."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from fedalt.flower.masks import Session, Total
from fedalt.flower.requests import Request

SIZE, TIMES = 1_000_000, 5


def main() -> None:
    """Print a row for each number of sites."""
    print("| sites | a site masks, s | the server adds and opens, s | MB up a site |\n|---|---|---|---|")
    for sites in (3, 10, 50):
        sessions = [Session.begin(Request("mask", "run", attempt=1), client, 1, None) for client in range(sites)]
        offers = tuple(session.offer for session in sessions)
        masked = partial(sessions[0].masked, torch.randint(-(2**25), 2**25, (SIZE,)), offers)
        block, total = masked(), Total(offers, SIZE)
        server = _seconds(partial(total.add, block)) + _seconds(partial(total.opened, {0: sessions[0].seed}))
        print(f"| {sites} | {_seconds(masked):.3f} | {sites * server:.3f} | {len(block) / 1e6:.1f} |")


def _seconds(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(TIMES):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return median(taken)


if __name__ == "__main__":
    main()
