"""The official server: for every client, a stack of all the others' uploads and its mean.

With more than eight clients it serves eight of them, from all uploads, and the time of all is extrapolated: every
client costs the same. Memory is what was measured, plus the rows of the clients that were not served, all of which the
official server holds.
"""

from __future__ import annotations

from fedalt.benchmarks.sides.plain import others_mean
from fedalt.benchmarks.sides.uploads import SERVED, norm, shape, upload
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.names import Tensors


def prepare(spec: Spec) -> Job:
    """Everything before the clock."""
    adapters = shape(spec)
    all_: list[Tensors] = [upload(spec, adapters, client) for client in range(spec.clients)]
    served = min(spec.clients, SERVED)

    def play() -> Outcome:
        rows = [others_mean(all_, k) for k in range(served)]
        size = sum(value.numel() * value.element_size() for value in rows[0].values())
        unserved = (spec.clients - served) * size
        return Outcome(values=[norm(row) for row in rows], scale=spec.clients / served, more_memory=unserved)

    return Job(lambda: others_mean(all_[:2], 0), play)
