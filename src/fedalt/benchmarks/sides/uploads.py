"""What both sides of ``aggregation`` agree on."""

from __future__ import annotations

import torch

from fedalt.benchmarks import shapes
from fedalt.benchmarks.task import Spec
from fedalt.benchmarks.workload import LORA
from fedalt.config import RunConfig, with_settings
from fedalt.errors import UserError
from fedalt.methods.registry import build
from fedalt.model.layer import features
from fedalt.model.state import AdapterShape
from fedalt.model.targets import find_targets
from fedalt.names import INDIVIDUAL, Tensors
from fedalt.seeding import rng

SERVED = 8
"""Clients whose row the official server computes; each costs the same, so K of them are extrapolated from these."""


def shape(spec: Spec) -> AdapterShape:
    """Shapes of a client's adapters; the model itself is never built.

    The rank is the usual one, or the lowest that makes an upload of ``spec.parameters`` or more.

    Raises:
        UserError: Fewer than two clients.
    """
    if spec.clients < 2:
        raise UserError(f"--clients {spec.clients}: an aggregation needs two clients or more")
    base = shapes.skeleton(spec)
    sizes = {path: features(base.get_submodule(path)) for path in find_targets(base)}
    each = sum(map(sum, sizes.values()))  # parameters of an upload by rank
    rank = LORA.r if spec.parameters is None else -(-spec.parameters // each)
    return build(with_settings(RunConfig(), {"lora.r": rank}), spec.clients, sizes).shape


def upload(spec: Spec, adapters: AdapterShape, client: int) -> Tensors:
    """A client's random individual LoRA, by seed."""
    generator = rng(spec.seed, "bench", client, "upload")
    sizes = {key: size for key, size in adapters.shapes().items() if key.slot == INDIVIDUAL}
    return {key: torch.randn(size, generator=generator) for key, size in sizes.items()}


def norm(tensors: Tensors) -> float:
    """Norm of everything in a row, to compare the two sides by."""
    return float(sum(value.double().square().sum() for value in tensors.values()) ** 0.5)
