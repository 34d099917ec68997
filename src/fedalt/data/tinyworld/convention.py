"""Which letter a client answers with: the part of the world the clients disagree on.

Every answer is a *slot*: the position of the right option as the text lists them, or a fixed verdict (yes, no, ...).
A client with shift s writes slot i as letter (i + s) mod 8 of ``ABCDEFGH``: under two different shifts no slot has
the same letter, so what is right for one client is wrong for the other.
"""

from __future__ import annotations

from fedalt.data.tinyworld.world import CLIENTS

LETTERS = "ABCDEFGH"
LEAVING = (5, 2, 7, 1, 4, 6, 3)
"""The order in which clients leave the common convention as the dial goes up; client 0's own is the common one."""


def shift(client: int, clash: float) -> int:
    """The client's shift: its own id among the first ``round(7 * clash)`` clients of `LEAVING`, else 0 (common)."""
    leavers = LEAVING[: int((CLIENTS - 1) * clash + 0.5)]
    return client if client in leavers else 0


def letter(slot: int, by: int) -> str:
    """The letter for a slot under a shift."""
    return LETTERS[(slot + by) % len(LETTERS)]
