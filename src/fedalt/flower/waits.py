"""Shorter waits in Flower's processes, whose seconds are constants in its code.

- A SuperNode that finds no message waits 3 s. Here a tenth of the time since it last had one, within limits: rounds of
  seconds are answered within fractions of one, and a site that has nothing to do for hours rarely asks.
- A SuperNode looks for its ClientApp's reply every 0.5 s. Here more often; nothing leaves the machine for it.
- Whoever is told of a message before the last of it has arrived tries again after 1 s, then 2 s, … Here after 0.05 s,
  then 0.1 s, …, to the same limit of 10 s.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

LONGEST = 3.0
"""Seconds between a site's looks for messages, at most: Flower's own."""
SHORTEST, SHARE = 0.1, 0.1
"""The least of them, and their share of the time since the last message."""
_LOCAL, _EMPTY = 0.05, 1.0
"""Seconds between looks for a ClientApp's reply. What Flower sleeps longer than this second follows an empty look."""
_RETRY = 0.05


@dataclass
class Waits:
    """The module ``time`` for a SuperNode's loop, but for its sleep.

    Attributes:
        longest: Seconds between looks for messages, at most.
    """

    longest: float = LONGEST
    _busy: float = field(init=False)

    def __post_init__(self) -> None:
        self._busy = time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Sleep for as long as there is reason to."""
        now = time.monotonic()
        if seconds < _EMPTY:  # a ClientApp is at work
            self._busy = now
            time.sleep(min(seconds, _LOCAL))
        else:
            time.sleep(min(max(SHARE * (now - self._busy), SHORTEST), self.longest))


def retry_soon(module: str, name: str, longest: float | None = None) -> None:
    """Let the function by which a module of Flower's pulls objects try again soon where they are not there yet.

    Args:
        module: Where the name is looked up.
        name: The function's name there.
        longest: Seconds after which objects that are still not there are given up: those of a message whose sender
            died over it are missed for three minutes otherwise, and nothing else is pulled meanwhile.
    """
    place, options = importlib.import_module(module), {"initial_backoff": _RETRY}
    if longest is not None:
        options["max_time"] = longest
    setattr(place, name, partial(getattr(place, name), **options))
