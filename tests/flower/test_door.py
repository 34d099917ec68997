"""The public door, attacked: it takes little memory whatever arrives, loses no request, and lets sites through."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from fedalt.flower.certs import make_certs, site_keys
from fedalt.flower.deploy import door as door_
from fedalt.flower.deploy.address import free_port
from fedalt.flower.deploy.door import BEGIN, LARGE, LINES, LINES_EACH, SMALL, Pace, door, network, signed_by
from flower.test_commands import Process, running, secure, site

ELSEWHERE = "127.0.0.2"
"""An attacker's address: what is limited by address does not meet sites of this machine."""
PUSH = "/v1/fleet/push-object"
MB = 1 << 20


@dataclass
class Served:
    """A server with a door, and keys of two sites."""

    folder: Path
    port: int
    server: Process

    @property
    def below(self) -> list[psutil.Process]:
        return [self.server.child("fedalt.flower.deploy.door"), self.server.child("flower-superlink")]

    def line(self, source: str = ELSEWHERE) -> http.client.HTTPSConnection:
        context = ssl._create_unverified_context()
        return http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=30, source_address=(source, 0), context=context
        )

    def signed(self, name: str = "client_0") -> dict[str, str]:
        return signature(self.folder / "tls" / "keys" / name)

    def status(self, path: str, body: Any, headers: dict[str, str] | None = None) -> int:
        """The answer's status; 0 where the door hung up over the body."""
        line = self.line()
        with contextlib.closing(line):
            try:
                line.request("POST", path, body, headers or {}, encode_chunked=not isinstance(body, bytes))
            except OSError:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    return line.getresponse().status
                return 0
            return line.getresponse().status


def signature(path: Path) -> dict[str, str]:
    """Headers as Flower's sites send them."""
    key: Any = load_ssh_private_key(path.read_bytes(), None)
    moment = datetime.now(UTC).isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public_key_to_bytes(key.public_key())).decode(),
        TIMESTAMP_HEADER: moment,
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(key, moment.encode())).decode(),
        "Content-Type": "application/protobuf",
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, inside, outside = tmp_path_factory.mktemp("served"), free_port(), free_port()
    make_certs(folder / "tls", 2)
    places = ("--address", f"127.0.0.1:{inside}", "--public", f"127.0.0.1:{outside}")
    with running(folder / "server.log", "server", *places, "--tls", folder / "tls", "--state", folder / "s") as server:
        server.until("at site N: ")
        one = Served(folder, outside, server)
        until(lambda: reached(one), 60)
        yield one


def reached(served: Served) -> bool:
    with contextlib.suppress(OSError), contextlib.closing(served.line("127.0.0.1")) as line:
        line.request("GET", "/health")
        return line.getresponse().status == 200
    return False


def until(right: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not right():
        assert time.monotonic() < end
        time.sleep(0.1)


@contextlib.contextmanager
def little_memory(served: Served) -> Iterator[None]:
    """Neither the door nor the SuperLink behind it grows by 64 MB, at any time."""
    before, most = [p.memory_info().rss for p in served.below], [0, 0]
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            most[:] = [max(m, p.memory_info().rss) for m, p in zip(most, served.below, strict=True)]

    looker = threading.Thread(target=look)
    looker.start()
    try:
        yield
    finally:
        done.set()
        looker.join()
    grown = [(m - b) / MB for m, b in zip(most, before, strict=True)]
    assert max(grown) < 64, grown


def pieces(megabytes: int) -> Iterator[bytes]:
    yield from [bytes(MB)] * megabytes


# ------------------------------------------------------------------------------------------------------- real processes


def test_hundreds_of_megabytes_without_a_key_take_no_memory(served: Served) -> None:
    with little_memory(served):
        line = served.line()
        line.putrequest("POST", PUSH)
        line.putheader("Content-Length", str(600 * MB))
        line.endheaders()
        assert line.getresponse().status == 413  # before a byte of it is read
        assert served.status(PUSH, pieces(600)) in (413, 0)
        wrong = served.signed() | {TIMESTAMP_HEADER: datetime.now(UTC).isoformat()}
        assert served.status(PUSH, pieces(100), wrong) in (413, 0)
        many = [threading.Thread(target=served.status, args=(PUSH, bytes(SMALL))) for _ in range(100)]
        for one in many:
            one.start()
        for one in many:
            one.join()
    assert reached(served)


def test_a_sites_key_lets_a_tensor_through_and_no_more(served: Served) -> None:
    assert LARGE > 4 * FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
    with little_memory(served):
        assert served.status(PUSH, pieces(100), served.signed()) in (413, 0)
    assert served.status(PUSH, bytes(6 * MB), served.signed()) not in (0, 413, 503), "the SuperLink has answered"
    assert served.status(PUSH, bytes(6 * MB)) in (413, 0)


def test_headers_without_end_and_other_protocols(served: Served) -> None:
    with little_memory(served):
        for start in (
            b"GET /health HTTP/1.1\r\nX: " + bytes(4 * MB),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x00" * 100,
        ):
            line = served.line()
            line.connect()
            with contextlib.suppress(OSError):
                line.sock.sendall(start)
                answer = line.sock.recv(1000)
                assert answer.startswith(b"HTTP/1.1 40") or not answer
            line.close()
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"}
    assert served.status("/v1/fleet/x", b"", upgrade) not in (101, 500)


def test_a_site_gets_through_while_lines_are_held_open(served: Served, tmp_path: Path) -> None:
    """Some without a handshake, some without a whole header, some without the rest of a body: all are hung up on."""
    held: list[socket.socket] = []
    with little_memory(served):
        for number in range(LINES_EACH + 50):
            with contextlib.suppress(OSError):
                line = served.line() if number % 4 else None
                if line is None:
                    held.append(socket.create_connection(("127.0.0.1", served.port), 30, (ELSEWHERE, 0)))
                    continue
                line.connect()
                started = {
                    1: b"POST /v1/fl",
                    2: b"",
                    3: f"POST {PUSH} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
                }
                part = started[number % 4]
                line.sock.sendall(part if isinstance(part, bytes) else part.encode())
                held.append(line.sock)
        begun = time.monotonic()
        assert len(served.below[0].net_connections()) <= LINES_EACH + 30
        with running(tmp_path / "site.log", *site(tmp_path, 0, served.port, *secure(served.folder, 0))) as joined:
            joined.until("SuperNode ID: ")
        for number, line_ in enumerate(held):
            if isinstance(line_, ssl.SSLSocket) and number % 4 == 3:
                continue  # a body has longer
            line_.settimeout(max(0.1, begun + 4 * BEGIN - time.monotonic()))
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                assert line_.recv(1) == b"", number
    for line_ in held:
        line_.close()


def test_handles_do_not_grow_with_requests(served: Served) -> None:
    counts = []
    for _ in range(3):
        many = [threading.Thread(target=served.status, args=(PUSH, b"x", served.signed())) for _ in range(100)]
        for one in many:
            one.start()
        for one in many:
            one.join()
        until(lambda: len(served.below[0].net_connections()) < 25, 30)  # those that are kept, and the listener
        counts.append([p.num_fds() for p in served.below])
    assert all(after <= before + 10 for before, after in zip(counts[0], counts[-1], strict=True)), counts


# ------------------------------------------------------------------------------------------------------- the door alone


@contextlib.asynccontextmanager
async def upstream(answers: list[bytes]) -> Any:
    """A server that answers every line once, as it is told, and closes it; an empty answer is none at all."""
    seen: list[bytes] = []

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        count = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]) if b"ontent-" in head else 0
        seen.append(await reader.readexactly(count))
        writer.write(answers.pop(0))
        writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen


GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine"


def asked(answers: list[bytes], body: bytes, known: bool = True) -> tuple[int, bytes, list[bytes]]:
    async def ask() -> tuple[int, bytes, list[bytes]]:
        async with upstream(list(answers)) as (address, seen):
            app = httpx.ASGITransport(door(address, True, lambda request: known))  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=app, base_url="http://door") as client:
                answer = await client.post(PUSH, content=body)
                return answer.status_code, answer.content, seen

    return asyncio.run(ask())


def test_where_nothing_was_answered_it_asks_once_more() -> None:
    assert asked([b"", GOOD], b"small") == (200, b"fine", [b"small", b"small"])


def test_a_server_that_never_answers_is_what_flower_tries_again() -> None:
    status, _, seen = asked([b"", b"", GOOD], b"small")
    assert (status, seen) == (503, [b"small"] * 2), "Flower's sites repeat a request that has 503, and end at 500"
    assert asked([b"", GOOD], bytes(SMALL + 1))[0] == 503, "a body that was not kept is the site's to send again"


def test_large_bodies_pass_in_pieces_and_only_with_a_key() -> None:
    body = bytes(range(256)) * 1024
    assert asked([GOOD], body) == (200, b"fine", [body])
    assert asked([GOOD], body, known=False)[0] == 413
    assert asked([GOOD], bytes(SMALL), known=False)[0] == 200


def test_an_idle_line_is_dropped_before_the_superlink_drops_it() -> None:
    assert uvicorn.Config("x:y").timeout_keep_alive > door_._KEPT
    assert httpx.Limits().keepalive_expiry == 5.0, "sites keep theirs for so long, the door for 15 s"


def test_a_pace() -> None:
    pace = Pace(rate=10, burst=5)
    waits = [pace.wait("one", 0.35) for _ in range(12)]
    assert waits[:5] == [0.0] * 5 and waits[-1] is None
    assert sorted(w for w in waits if w is not None)[-1] == pytest.approx(0.35, abs=0.06)
    assert pace.wait("another", 0.0) == 0.0
    for number in range(20 * LINES):
        pace.wait(str(number), 1.0)
    assert len(pace._due) <= 20 * LINES


def test_one_host_has_a_network_of_ipv6() -> None:
    assert network("2001:db8:1:2:3:4:5:6") == network("2001:db8:1:2::7") != network("2001:db8:1:3::7")
    assert network("2001:db8::1") == network("2001:db8::2") and network("fe80::1%eth0") == network("fe80::2")
    assert network("192.0.2.1") != network("192.0.2.2")


def test_a_signature_counts_if_it_is_fresh_right_and_by_a_key_of_the_folder(tmp_path: Path) -> None:
    make_certs(tmp_path / "tls", 1)
    make_certs(tmp_path / "other", 1)
    signed = signed_by(site_keys(tmp_path / "tls"))

    def counts(headers: dict[str, str]) -> bool:
        return signed(httpx.Request("POST", "http://x", headers=headers))  # type: ignore[arg-type]

    ours = signature(tmp_path / "tls/keys/client_0")
    assert counts(ours)
    assert not counts(signature(tmp_path / "other/keys/client_0"))
    assert not counts({})
    for name, value in {TIMESTAMP_HEADER: "2020-01-01T00:00:00+00:00", FLEET_HTTP_SIGNATURE_HEADER: "AAAA"}.items():
        assert not counts(ours | {name: value})
    assert not counts(ours | {TIMESTAMP_HEADER: datetime.now().isoformat()}), "a time without a zone"
