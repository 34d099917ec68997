"""What both sides of ``aggregation`` agree on."""

from __future__ import annotations

import torch
from torch import Tensor

from fedalt.benchmarks import shapes
from fedalt.benchmarks.task import Spec
from fedalt.benchmarks.workload import LORA
from fedalt.errors import UserError
from fedalt.methods.registry import get_method
from fedalt.model.layer import features
from fedalt.model.state import AdapterShape
from fedalt.model.targets import find_targets
from fedalt.names import INDIVIDUAL, Key, Tensors

SERVED = 8
"""Clients whose row the official server computes; each costs the same, so K of them are extrapolated from these."""


def shape(spec: Spec) -> AdapterShape:
    """Shapes of a client's adapters; the model itself is never built.

    Raises:
        UserError: Fewer than two clients.
    """
    if spec.clients < 2:
        raise UserError(f"--clients {spec.clients}: an aggregation needs two clients or more")
    base = shapes.skeleton(spec)
    sizes = {path: features(base.get_submodule(path)) for path in find_targets(base)}
    return get_method("fedalt")(spec.clients).shape(LORA.r, sizes)


def uploads(spec: Spec, adapters: AdapterShape) -> list[dict[Key, Tensor]]:
    """Random individual LoRAs of K clients, by seed."""
    generator = torch.Generator().manual_seed(spec.seed)
    sizes = {key: size for key, size in adapters.shapes().items() if key.slot == INDIVIDUAL}
    return [{key: torch.randn(size, generator=generator) for key, size in sizes.items()} for _ in range(spec.clients)]


def norm(tensors: Tensors) -> float:
    """Norm of everything in a row, to compare the two sides by."""
    return float(sum(value.double().square().sum() for value in tensors.values()) ** 0.5)
