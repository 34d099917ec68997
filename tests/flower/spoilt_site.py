"""``spoilt_site.py KIND site …``: ``fedalt site …`` with a trainer or a SuperNode that goes wrong.

``lies``: its uploads are spoilt, from round 2 on in every round in another way.
``dies``: all of it is killed with ``kill -9`` when it is about to send its first upload.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fedalt.flower.requests import Reply, Request
from fedalt.flower.wire import pack, unpack
from fedalt.names import Key

KINDS = {"lies": "fedalt.flower.trainer", "dies": "fedalt.flower.deploy.node"}
"""Kind → the module in whose place this file is run."""
_INSIDE = "inside"


def change(function: Callable[[Key, torch.Tensor], torch.Tensor]) -> Callable[[Reply], Reply]:
    return lambda reply: replace(
        reply, block=pack({key: function(key, value) for key, value in unpack(reply.block).items()})
    )


def poisoned(key: Key, value: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(value.numel()).view_as(value) == 0, float("nan"), value)


def halved(key: Key, value: torch.Tensor) -> torch.Tensor:
    return value[:2] if key.factor == "A" else value[:, :2]


NAN = change(poisoned), "is not finite"
RANK = change(halved), "is (2, 32), this run has (4, 32)"
HUGE = change(lambda key, value: 200 * value), "times as long as the median of this round"
LIES = {2: NAN, 3: RANK, 4: HUGE}
REPLAYED = 5
"""Round in which the reply of round 1 is sent once more."""


def lie() -> None:
    from fedalt.flower import trainer

    answered, first = trainer._answered, list[Reply]()

    def spoilt(site: Any, request: Request) -> Reply:
        reply = answered(site, request)
        if request.do != "train":
            return reply
        first.append(reply)
        if request.round == REPLAYED:
            return first[0]
        return LIES[request.round][0](reply) if request.round in LIES else reply

    trainer._answered = spoilt
    trainer.main()


def die() -> None:
    from fedalt.flower.deploy import node

    loop: Any = importlib.import_module(node.LOOP)
    push = loop._push_messages

    def deadly(send: Callable[..., Any], **others: Any) -> None:
        def die_over(message: Any, *more: Any) -> Any:
            if message.metadata.message_type == "train":
                for process in (os.getppid(), os.getpid()):
                    os.kill(process, signal.SIGKILL)
            return send(message, *more)

        push(send=die_over, **others)

    loop._push_messages = deadly
    node.main()


def supervise(kind: str) -> None:
    from fedalt.cli import main
    from fedalt.flower.deploy import supervisor

    start = supervisor.start

    def spoilt(command: list[str], *more: Any, **named: Any) -> subprocess.Popen[str]:
        python, _, _, module, *rest = command
        swapped = [python, __file__, kind, _INSIDE, *rest] if module == KINDS[kind] else command
        return start(swapped, *more, **named)

    supervisor.start = spoilt
    main()


if __name__ == "__main__":
    asked = sys.argv.pop(1)
    if sys.argv[1] != _INSIDE:
        supervise(asked)
    else:
        del sys.argv[1]
        {"lies": lie, "dies": die}[asked]()
