"""Equal budgets: how much a method trains at once and sends per round, and the rank at which it meets another's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from fedalt.config import RunConfig, with_settings
from fedalt.errors import UserError
from fedalt.methods.base import sent, trainable
from fedalt.methods.registry import build, configured


def matched(
    config: RunConfig,
    name: str,
    layers: Mapping[str, tuple[int, int]],
    clients: int,
    by: Literal["parameters", "bytes"],
) -> RunConfig:
    """The settings with the rank at which a method trains, or sends, nearest to one LoRA of the configured rank.

    alpha changes with the rank, so that the scale alpha/r stays. A method that sends nothing keeps its rank under
    ``bytes``. Ties go to the lower rank. Mixers come on top and do not count: their size does not depend on the rank.

    Raises:
        UserError: No rank up to four times the configured one is possible.
    """
    measure = trainable if by == "parameters" else sent
    target = sum(config.lora.r * (d_in + d_out) for d_in, d_out in layers.values())
    best: tuple[int, RunConfig] | None = None
    for rank in range(1, 4 * config.lora.r + 1):
        lora = config.lora
        alpha = lora.alpha * (rank / lora.r) ** 0.5 if lora.rslora else lora.alpha * rank / lora.r
        candidate = configured(with_settings(config, {"lora.r": rank, "lora.alpha": alpha}), name)
        method = build(candidate, clients, layers)
        try:
            size = measure(method, replace(method.shape, mixed=False))
        except UserError:  # a rank that the method cannot split
            continue
        if size == 0:
            return configured(config, name)
        if best is None or abs(size - target) < best[0]:
            best = (abs(size - target), candidate)
    if best is None:
        raise UserError(f"{name}: no rank from 1 to {4 * config.lora.r} suits it")
    return best[1]
