"""All randomness comes from (run seed, purpose, …) alone, so order, cohort, resume and executor cannot change a run."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def derive_seed(run_seed: int, *parts: str | int) -> int:
    """Return a 63-bit seed that depends on all parts and on nothing else."""
    text = "/".join(map(str, (run_seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def rng(run_seed: int, *parts: str | int) -> torch.Generator:
    """Return a fresh CPU generator for one purpose, for example ``rng(seed, "order", round, client)``."""
    return torch.Generator().manual_seed(derive_seed(run_seed, *parts))


def derive_key(key: bytes, *parts: str | int) -> bytes:
    """A key of 256 bits for one purpose, which tells nothing of ``key``."""
    return hashlib.shake_256(key + "/".join(map(str, parts)).encode()).digest(32)


def secret_uniform(key: bytes, count: int) -> Tensor:
    """Numbers in (0, 1) in fp64, of 52 bits each, that only who has the key can tell from chance (SHAKE-256)."""
    bits = np.frombuffer(hashlib.shake_256(key + b"uniform").digest(8 * count), "<u8") >> 12
    return torch.from_numpy((bits + 0.5) * 2.0**-52)
