"""Cohorts: how many clients are on the model at a time. The numbers are the same for all sizes, up to rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

from fedalt.config import FederationConfig
from fedalt.model.adapted import AdaptedModel
from fedalt.model.base import free_memory
from fedalt.runtime import release_freed_memory

_TOKENS = {"cpu": 2_048, "cuda": 16_384}
"""Tokens in a step beyond which more clients at a time are no faster on two cores. A guess for GPUs: on an H100 with a
7B model 17,800 tokens a second with 5,000 of them in a step, 19,700 with 10,000; more were not tried."""
_SHARE = 0.5
"""Most of the free memory that a step may take: activations, adapters, optimiser."""
_COPIES, _TRAINED = 2, 4
"""Copies of an adapter: in the state, on the model; of what trains, also gradient, two moments, and the new state."""


def cohort_size(config: FederationConfig, clients: int) -> int:
    """Clients on the model at a time, of so many: one with the executor ``loop``, else ``cohort`` or all."""
    return 1 if config.executor == "loop" else min(clients, config.cohort or clients)


def cohorts(clients: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The clients in order, some at a time; memory that one cohort freed is given back before the next."""
    for start in range(0, len(clients), size):
        release_freed_memory()
        yield clients[start : start + size]


def fitting_cohort(
    model: AdaptedModel, lengths: Sequence[float], batch_size: int, parameters: int = 0, trained: int = 0
) -> int:
    """Clients whose rows of one step, together, are enough for full speed and fit well into free memory; at least one.

    More clients at a time would only take more memory: a cohort's tensors are all that a run holds.

    Args:
        model: The model they go on.
        lengths: Mean row length of every client, in tokens.
        batch_size: Rows per client and step.
        parameters: Of a client's adapters and heads, in fp32.
        trained: How many of them train.
    """
    step = batch_size * mean(lengths)  # tokens of a client
    each = step * model.bytes_per_token + 4 * (_COPIES * parameters + _TRAINED * trained)
    room = _SHARE * free_memory(model.device) / each
    return max(1, min(len(lengths), round(_TOKENS[model.device.type] / step), int(room)))
