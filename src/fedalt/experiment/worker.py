"""``python -m fedalt.experiment.worker`` trains the members it is handed, a JSON line each, until there are no more.

Events go to stdout as JSON lines, and so does ``failed`` with the one line that says why it stopped.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from fedalt.allocator import keep_freed_memory
from fedalt.errors import UserError
from fedalt.quiet import keep_libraries_quiet


def main() -> int:
    """Exit status: 0 no more members, 2 the user's input is wrong, 1 anything else."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is not an event

    def sink(event: dict[str, Any]) -> None:
        answers.write(json.dumps(event) + "\n")
        answers.flush()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has started this one, and ends it
    keep_libraries_quiet()
    keep_freed_memory()
    try:
        _work(json.loads(sys.stdin.readline()), sink)
    except UserError as error:
        sink({"event": "failed", "message": str(error)})
        return 2
    except BrokenPipeError:
        return 1  # nobody listens any more
    except Exception as error:
        traceback.print_exc()
        sink({"event": "failed", "message": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _work(settings: dict[str, Any], sink: Any) -> None:
    import torch

    from fedalt.experiment.members import Bases, Member, train

    torch.set_num_threads(settings["threads"])
    members: Iterator[Member] = (Member.from_json(json.loads(line)) for line in iter(sys.stdin.readline, ""))
    train(members, settings["if_exists"], sink, Bases())


if __name__ == "__main__":
    sys.exit(main())
