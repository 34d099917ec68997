"""Cohorts: how many clients are on the model at a time. The numbers are the same for all sizes, up to rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

import psutil
import torch

from fedalt.allocator import release_freed_memory
from fedalt.config import FederationConfig
from fedalt.model.adapted import AdaptedModel

_TOKENS = {"cpu": 2_048, "cuda": 16_384}
"""Tokens in a step beyond which more clients at a time are no faster. Measured on two cores; a guess for GPUs."""
_SHARE = 0.5
"""Most of the free memory that the activations of a step may take."""


def cohort_size(config: FederationConfig, clients: int) -> int:
    """Clients on the model at a time, of so many: one with the executor ``loop``, else ``cohort`` or all."""
    return 1 if config.executor == "loop" else min(clients, config.cohort or clients)


def cohorts(clients: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The clients in order, some at a time; memory that one cohort freed is given back before the next."""
    for start in range(0, len(clients), size):
        release_freed_memory()
        yield clients[start : start + size]


def fitting_cohort(model: AdaptedModel, lengths: Sequence[float], batch_size: int) -> int:
    """Clients whose rows of one step, together, are enough for full speed and fit well into free memory; at least one.

    More clients at a time would only take more memory: a cohort's tensors are all that a run holds.

    Args:
        model: The model they go on.
        lengths: Mean row length of every client, in tokens.
        batch_size: Rows per client and step.
    """
    room = _SHARE * free_memory(model.device) / model.bytes_per_token
    step = batch_size * mean(lengths)
    return max(1, min(len(lengths), round(min(_TOKENS[model.device.type], room) / step)))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
