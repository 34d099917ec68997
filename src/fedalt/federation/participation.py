"""Who takes part in a round."""

from __future__ import annotations

import torch

from fedalt.seeding import rng


def sample_clients(clients: tuple[int, ...], fraction: float, seed: int, round_: int) -> tuple[int, ...]:
    """max(⌊fraction·K⌋, 1) clients without replacement, ascending, from (seed, round) alone (Shepherd's rule)."""
    count = max(int(fraction * len(clients) + 1e-9), 1)
    order = torch.randperm(len(clients), generator=rng(seed, "participation", round_))
    return tuple(sorted(clients[i] for i in order[:count].tolist()))
