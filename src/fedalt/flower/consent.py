"""What a site lets out: it reads the settings it is sent, and refuses those under which more would leave it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fedalt.config import RunConfig
from fedalt.flower.requests import SiteError
from fedalt.methods.base import Method
from fedalt.methods.registry import build
from fedalt.names import HEAD, MIXER, Key

Private = Literal["mixer", "heads"]
_NAMES: dict[str, Private] = {MIXER: "mixer", HEAD: "heads"}
PRIVATE = tuple(_NAMES.values())
"""Parts that leave a site only if it says so."""


@dataclass(frozen=True)
class Consent:
    """What a site agrees to.

    Attributes:
        share: Parts that may leave it, besides LoRA factors.
        allow_two: Whether it takes part where another client may be told what is made of its LoRA alone.
    """

    share: frozenset[Private] = frozenset()
    allow_two: bool = False

    def check_settings(self, config: RunConfig, clients: int) -> None:
        """Refuse what needs its rows elsewhere, a federation of two, and settings that let single uploads be told."""
        method = build(config, clients)
        check_pooled(method)
        check_two(method, self.allow_two)
        if config.data.canaries:
            raise SiteError("planted")
        if config.federation.secure and not self.allow_two:
            check_few(config, clients)
        if config.flower.allow_two and _shares(method) and not self.allow_two:
            raise SiteError("allow_two")

    def check_uploads(self, keys: Iterable[Key]) -> None:
        """Refuse to upload what is private."""
        for slot in {key.slot for key in keys} & _NAMES.keys():
            if _NAMES[slot] not in self.share:
                raise SiteError(_NAMES[slot])


def check_pooled(method: Method) -> None:
    """Refuse a method that trains on everybody's rows."""
    if method.centralised:
        raise SiteError(
            "pooled", f"method: {method.name} trains on everybody's rows in one place; here rows stay at their sites"
        )


def check_two(method: Method, allowed: bool) -> None:
    """Refuse to hand a client's LoRA to the only other one, as it is or by subtraction, unless that is wanted."""
    if method.clients == 2 and _shares(method) and not allowed:
        raise SiteError(
            "two",
            f"refused: with two clients {method.name} lets each one have the LoRA that the other shares; "
            "add a third, or --allow-two at the server and at both sites",
        )


FEW = 4
"""Clients of which each one sees the mean of three others, if all take part."""


def check_few(config: RunConfig, clients: int) -> None:
    """Refuse secure sums of so few that one client can tell what another sent."""
    if clients < FEW or config.federation.secure_min < FEW - 1:
        raise SiteError(
            "two",
            f"federation.secure: {clients} clients and secure_min={config.federation.secure_min}; with fewer than "
            f"{FEW}, or sums of fewer than {FEW - 1}, one can tell much of what another sent; --allow-two permits it",
        )


def _shares(method: Method) -> bool:
    return any(slot.share for slot in method.slots)
