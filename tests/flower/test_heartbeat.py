"""A site of which the server hears nothing any more notices within a minute, whatever the cause."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from fedalt.flower.deploy.address import free_port
from fedalt.flower.deploy.door import door
from flower.test_commands import Process, running, site

MINUTE = 60.0


class Proxy:
    """Between a site and its server; answers heartbeats with 500 as long as it is told so."""

    def __init__(self, inside: int) -> None:
        self.spoilt, self.heartbeats = False, 0
        self._pass = door(f"http://127.0.0.1:{inside}", True, lambda request: True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        heartbeat = scope.get("path", "").endswith("heartbeat")
        self.heartbeats += heartbeat
        if heartbeat and self.spoilt:
            await PlainTextResponse("Internal Server Error", 500)(scope, receive, send)
        else:
            await self._pass(scope, receive, send)


@contextlib.contextmanager
def proxy(inside: int, outside: int) -> Iterator[Proxy]:
    between = Proxy(inside)
    server = uvicorn.Server(uvicorn.Config(between, port=outside, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    yield between
    server.should_exit = True
    thread.join()


def started_again(joined: Process, count: int) -> float:
    """Seconds until a site has started its SuperNode again for the so-manieth time."""
    begun = time.monotonic()
    joined.until(r"has not heard it for \d+ s; starting it again", count)
    seconds = time.monotonic() - begun
    joined.until("SuperNode ID: ", count + 1)
    return seconds


@pytest.mark.slow
def test_a_dead_heartbeat_and_a_stalled_node(tmp_path: Path) -> None:
    inside, outside = free_port(), free_port()
    serve = ("server", "--address", f"127.0.0.1:{inside}", "--state", tmp_path / "server")
    with running(tmp_path / "server.log", *serve) as server, proxy(inside, outside) as between:
        server.until("at site N: ")
        between.spoilt = True  # Flower's thread ends at the first answer, and its process goes on
        with running(tmp_path / "site.log", *site(tmp_path, 0, outside)) as joined:
            joined.until("SuperNode ID: ")
            until_dead = between.heartbeats
            between.spoilt = False
            assert started_again(joined, 1) < MINUTE
            assert until_dead <= 1 < between.heartbeats
            joined.child("fedalt.flower.deploy.node").suspend()
            assert started_again(joined, 2) < MINUTE
            assert joined.end() == 0
        assert "ended by SIGTERM: finished rounds are safe in" in joined.text
