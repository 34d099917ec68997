"""All randomness comes from (run seed, purpose, …) alone, so order, cohort, resume and executor cannot change a run."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(run_seed: int, *parts: str | int) -> int:
    """Return a 63-bit seed that depends on all parts and on nothing else."""
    text = "/".join(map(str, (run_seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def rng(run_seed: int, *parts: str | int) -> torch.Generator:
    """Return a fresh CPU generator for one purpose, for example ``rng(seed, "order", round, client)``."""
    return torch.Generator().manual_seed(derive_seed(run_seed, *parts))
