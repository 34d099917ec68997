"""``python -m fedalt.flower.deploy.node SECONDS …``: ``flower-supernode …`` that looks for messages at least so often.

It runs with ``--isolation process``: messages are handled by ``tasks.py`` in the place of ``flower-superexec``. It
answers a run whose app is not fedalt's own with an error, reads no answer without end, and says when the server has
heard its heartbeat.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx

from fedalt.errors import UserError
from fedalt.flower.deploy.bundle import check_bundle
from fedalt.flower.waits import Waits, retry_soon

LOOP, LINE = "flwr.supernode.start_client_internal", "flwr.supernode.fleet_http_connection"
CLIENT = "flwr.supercore.protobuf.client"
MOST = 1 << 25
"""Bytes of an answer of the server's. Flower cuts tensors into pieces of 5 MB."""
HEARD = "fedalt: heartbeat"
"""Line that says so."""
HOST = "127.0.0.1"
"""Where the SuperNode and those who handle its messages meet."""


def main() -> None:
    """Start the SuperNode."""
    from flwr.supernode.cli import flower_supernode

    from fedalt.flower.deploy.address import free_port

    longest, port = float(sys.argv[1]), str(free_port())
    sys.argv = ["flower-supernode", *sys.argv[2:], "--isolation", "process", "--host", HOST, "--port", port]
    tasks = [sys.executable, "-P", "-m", "fedalt.flower.deploy.tasks", "--insecure"]  # on this machine, as Flower's own
    subprocess.Popen([*tasks, "--runtime-api-address", f"{HOST}:{port}", "--parent-pid", str(os.getpid())])
    loop: Any = importlib.import_module(LOOP)
    loop.time = Waits(longest)
    retry_soon(LOOP, "pull_objects")
    look_at_apps(loop)
    leave_when_asked(loop)
    bound_answers()
    say_heartbeats()
    flower_supernode()


def look_at_apps(loop: Any) -> None:
    """Let Flower's check of signatures be fedalt's of contents; settings of an app are not read here at all."""
    from flwr.app import Error
    from flwr.common.constant import ErrorCode
    from flwr.supercore import log

    pull, refused = loop._pull_and_store_message, set[str]()

    def checked(fab: Any, _: object) -> bool:
        try:
            check_bundle(fab.content)
        except UserError as error:
            if fab.hash_str not in refused:
                log(logging.ERROR, str(error))
            refused.add(fab.hash_str)
            loop.FAB_VERIFICATION_ERROR = Error(ErrorCode.INVALID_FAB, str(error))
            return False
        return True

    def pull_and_look(*, get_fab: Callable[..., Any], trusted_entities: object, **given: Any) -> Any:
        def got(*which: Any) -> Any:
            return replace(get_fab(*which), verifications={"valid_license": "by fedalt"})  # or Flower asks for none

        return pull(get_fab=got, trusted_entities={"fedalt": ""}, **given)

    replace_in(
        loop, _pull_and_store_message=pull_and_look, _verify_fab=checked, get_fused_config_from_fab=lambda *_: {}
    )


def leave_when_asked(loop: Any) -> None:
    """On SIGUSR1 answer the message at hand, take no other, and leave as on SIGTERM."""
    pull, asked = loop._pull_and_store_message, list[int]()
    signal.signal(signal.SIGUSR1, lambda number, _: asked.append(number))

    def pull_or_leave(**given: Any) -> Any:
        if asked:
            signal.raise_signal(signal.SIGTERM)
        return pull(**given)

    replace_in(loop, _pull_and_store_message=pull_or_leave)


class Bounded(httpx.Client):
    """Reads no more of an answer than a message may have, and unpacks none."""

    def send(self, request: httpx.Request, *, stream: bool = False, **named: Any) -> httpx.Response:
        """Ask, and read the answer unless it is wanted piece by piece.

        Raises:
            httpx.RemoteProtocolError: It has more bytes.
        """
        answer, content = super().send(request, stream=True, **named), bytearray()
        if stream:
            return answer
        try:
            for piece in answer.iter_raw():
                content += piece
                if len(content) > MOST:
                    raise httpx.RemoteProtocolError(f"an answer of more than {MOST:,} bytes", request=request)
        finally:
            answer.close()
        kept = [(k, v) for k, v in answer.headers.multi_items() if k not in ("content-encoding", "content-length")]
        return httpx.Response(answer.status_code, headers=kept, content=bytes(content), request=request)


def bound_answers() -> None:
    """Let what this SuperNode asks of servers be asked with bounds."""
    replace_in(importlib.import_module(CLIENT), httpx=SimpleNamespace(**{**vars(httpx), "Client": Bounded}))


def replace_in(place: Any, **names: Any) -> None:
    """Give names of a module of Flower's other meanings; one that it has not would guard nothing.

    Raises:
        AttributeError: There is one.
    """
    for name, value in names.items():
        getattr(place, name)
        setattr(place, name, value)


def say_heartbeats() -> None:
    """Print a line whenever the server has heard this node."""
    line: Any = importlib.import_module(LINE)
    sender = line.HeartbeatSender

    def saying(send: Callable[[], bool]) -> Any:
        def beat() -> bool:
            heard = send()
            if heard:
                os.write(1, f"{HEARD}\n".encode())  # at once, and never within another line
            return heard

        return sender(beat)

    replace_in(line, HeartbeatSender=saying)


if __name__ == "__main__":
    main()
