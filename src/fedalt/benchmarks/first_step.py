"""``python -m fedalt.benchmarks.first_step run …`` is ``fedalt run …`` that leaves after its first optimiser step."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def leave(event: Mapping[str, Any]) -> None:
    """In the place of the progress bar: end the process at the first ``step`` event."""
    if event["event"] == "step":
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        os._exit(0)


@contextmanager
def live(rounds: int) -> Iterator[Any]:
    """Stands in for ``show.live``."""
    yield leave


if __name__ == "__main__":
    from fedalt.cli import main, show

    show.live = live
    main()
    sys.exit("the run ended without a step")
