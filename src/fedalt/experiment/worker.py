"""``python -m fedalt.experiment.worker members|cohorts`` works on what it is told, a JSON line each.

``members`` trains runs of a comparison, ``cohorts`` works on the cohorts of one run. Events go to stdout as JSON lines,
and so does ``failed`` with the one line that says why it stopped. When nobody can tell it anything any more it ends at
once, whatever it is doing: whoever has started it is gone or needs it no longer.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from fedalt.allocator import keep_freed_memory
from fedalt.errors import UserError
from fedalt.quiet import keep_libraries_quiet


def main() -> int:
    """Exit status: 0 no more to do, 2 the user's input is wrong, 1 anything else."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is not an event

    def sink(event: dict[str, Any]) -> None:
        answers.write(json.dumps(event) + "\n")
        answers.flush()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has started this one, and ends it
    keep_libraries_quiet()
    keep_freed_memory()
    told = _told()
    try:
        {"members": _members, "cohorts": _cohorts}[sys.argv[1]](next(told), told, sink)
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


def _told() -> Iterator[Any]:
    lines: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        for line in iter(sys.stdin.readline, ""):
            lines.put(line)
        os._exit(0)

    Thread(target=listen, daemon=True).start()
    while True:
        yield json.loads(lines.get())


def _members(settings: dict[str, Any], told: Iterator[Any], sink: Any) -> None:
    import torch

    from fedalt.experiment.members import Bases, Member, train

    torch.set_num_threads(settings["threads"])
    train(map(Member.from_json, told), settings["if_exists"], sink, Bases())


def _cohorts(settings: dict[str, Any], told: Iterator[Any], sink: Any) -> None:
    import torch

    from fedalt.config import parse_config
    from fedalt.experiment.events import EventLog
    from fedalt.experiment.folder import RunFolder
    from fedalt.experiment.orders import follow
    from fedalt.experiment.prepare import prepare
    from fedalt.experiment.residents import Residents

    torch.set_num_threads(settings["threads"])
    config, folder = parse_config(settings["config"], "settings"), RunFolder(Path(settings["folder"]))
    device = torch.device(config.model.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    experiment = prepare(config)
    crew = Residents(experiment, folder, EventLog(folder.events, sink))
    sink({"event": "ready", "cohort": experiment.fitting_cohort})
    for order in told:
        sink({"event": "done", "answer": follow(order, crew)})


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # a thread still listens, which Python would wait for or stumble over
