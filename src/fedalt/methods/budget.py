"""Ranks that give methods the same budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fedalt.config import RunConfig

Budget = Literal["parameters", "bytes"]


def matched(
    config: RunConfig, name: str, layer_sizes: Mapping[str, tuple[int, int]], clients: int, by: Budget
) -> RunConfig:
    """The configuration with the rank at which a method has the budget of the configured rank."""
    return config
