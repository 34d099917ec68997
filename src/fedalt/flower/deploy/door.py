"""``python -m fedalt.flower.deploy.door HOST PORT INSIDE TLS``: a way in for sites, and for nobody else.

Flower serves sites, users and its own processes on one port. The door listens where sites can reach it, with the
server's certificate, and hands on what sites need: ``/v1/fleet/…`` and ``/health``. The SuperLink itself listens on
INSIDE, a port of loopback.

Whatever arrives, it takes little memory: lines are counted before they are encrypted, a request has to begin soon and
to end at last, and no more than ``SMALL`` bytes of a body are read unless a site's key has signed the request.
"""

from __future__ import annotations

import asyncio
import base64
import re
import signal
import socket
import ssl
import sys
import time
from asyncio import constants, sslproto
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.common.constant import TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import verify_signature
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedalt.errors import UserError
from fedalt.flower.certs import CA, CERTIFICATE, KEY, site_keys

OPEN = "/v1/fleet/"
SMALL, LARGE = 1 << 16, 1 << 25
"""Bytes of a request's body: from anybody, and from a site. Flower cuts tensors into pieces of 5 MB."""
LINES, LINES_EACH = 512, 256
"""Lines at a time, in all and from one address."""
BEGIN, IDLE, END = 10.0, 30.0, 300.0
"""Seconds until a line is encrypted and until a request has begun, between pieces of its body, and until it is over."""
RATE, BURST, PATIENCE = 300.0, 600.0, 3.0
"""Requests a second from one address, how many at once, and seconds that those beyond have to wait at most."""
_OF_A_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "host", "expect"}
_KEPT = 2.0
"""Seconds that an idle line to the SuperLink may be used again; it hangs up after five."""
_LOST = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
"""A line that the SuperLink had closed already, or closed without an answer."""


class Pace:
    """Who comes too often waits, or is sent away.

    Attributes:
        rate: Times a second.
        burst: Times at once.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self._due: dict[str, float] = {}

    def wait(self, host: str, patience: float) -> float | None:
        """Seconds to wait; nothing if they would be more than ``patience``."""
        now = time.monotonic()
        due = max(self._due.get(host, 0.0), now - self.burst / self.rate)
        if due - now > patience:
            return None
        if len(self._due) > 10 * LINES:
            self._due = {other: at for other, at in self._due.items() if at > now - self.burst / self.rate}
        self._due[host] = due + 1 / self.rate
        return max(0.0, due - now)


class Gate(socket.socket):
    """A listening socket that hangs up on those who are too many, before anything is spent on them."""

    def __init__(self, *options: Any) -> None:
        super().__init__(*options)
        self._lines: dict[socket.socket, str] = {}
        self._pace = Pace(RATE / 3, LINES_EACH)

    def accept(self) -> tuple[socket.socket, Any]:
        """The next line."""
        line, address = super().accept()
        host = network(address[0])
        self._lines = {other: at for other, at in self._lines.items() if other.fileno() >= 0}
        full = len(self._lines) >= LINES or list(self._lines.values()).count(host) >= LINES_EACH
        if full or self._pace.wait(host, 0.0) is None:
            line.close()
            raise ConnectionAbortedError
        self._lines[line] = host
        return line, address


def network(host: str) -> str:
    """An address, or the network of an IPv6 address, which one host has to itself."""
    address = ip_address(host.partition("%")[0])
    return host if address.version == 4 else f"{int(address) >> 64:x}"


class Punctual(H11Protocol):
    """Hangs up on lines on which no request has begun in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self._look(self)

    def _look(self, before: object) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and before is self.cycle:
            self.transport.abort()
        elif not self.transport.is_closing():
            self.loop.call_later(BEGIN, self._look, self.cycle)


class _Answer(StreamingResponse):
    """What the SuperLink answers, as it comes."""

    def __init__(self, answer: httpx.Response) -> None:
        kept = {name: value for name, value in answer.headers.items() if name not in _OF_A_CONNECTION}
        super().__init__(answer.aiter_raw(SMALL), answer.status_code, kept)
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.answer.aclose()  # or its line would never be free again


class _TooLargeError(Exception):
    pass


def door(inside: str, trust: ssl.SSLContext | bool, known: Callable[[Request], bool]) -> ASGIApp:
    """The application: passes requests of sites on to a SuperLink, and refuses all others.

    Args:
        inside: Where the SuperLink is, for example ``https://127.0.0.1:41234``.
        trust: Whose certificates to accept there.
        known: Whether a site that may take part has signed a request.
    """
    limits = httpx.Limits(max_connections=LINES_EACH, max_keepalive_connections=16, keepalive_expiry=_KEPT)
    patience = httpx.Timeout(120.0, connect=5.0, pool=5.0)
    superlink = httpx.AsyncClient(base_url=inside, verify=trust, timeout=patience, limits=limits, trust_env=False)
    pace = Pace(RATE, BURST)

    async def hand_on(request: Request) -> Response:
        name = request.path_params.get("name")
        if name is not None and not re.fullmatch("[a-z-]+", name):
            return await refuse(request)
        wait = pace.wait(network(request.client.host), PATIENCE) if request.client else 0.0
        if wait is None:
            return _no("too many requests from this address", 503)
        await asyncio.sleep(wait)
        try:
            return await passed_on(request)
        except (_TooLargeError, ClientDisconnect):
            return _no(f"a body may have {SMALL:,} bytes, {LARGE:,} with the key of a site of this server", 413)
        except TimeoutError:
            return _no("the request took too long", 408)
        except httpx.TransportError:
            return _no("the server does not answer", 503)

    async def passed_on(request: Request) -> Response:
        announced = int(request.headers.get("content-length", 0)) > SMALL
        if announced and not known(request):
            raise _TooLargeError
        pieces, start, ended = _pieces(request), b"", False
        async with asyncio.timeout(IDLE):
            while len(start) <= SMALL and not ended:
                piece = await anext(pieces, None)
                start, ended = start + (piece or b""), piece is None
        if ended:
            try:
                return await answered(request, start)
            except _LOST:
                return await answered(request, start)
        if not announced and not known(request):
            raise _TooLargeError
        return await answered(request, _bounded(start, pieces))

    async def answered(request: Request, body: bytes | AsyncIterator[bytes]) -> Response:
        drop = _OF_A_CONNECTION | ({"content-length"} if isinstance(body, bytes) else set())
        headers = [(name, value) for name, value in request.headers.raw if name.decode("latin-1") not in drop]
        asked = superlink.build_request(request.method, request.url.path, headers=headers, content=body)
        return _Answer(await superlink.send(asked, stream=True))

    async def refuse(request: Request) -> Response:
        return _no("this door is for sites only", 403)

    routes = [
        Route("/health", hand_on, methods=["GET"]),
        Route(OPEN + "{name:str}", hand_on, methods=["POST"]),
        Route("/{rest:path}", refuse, methods=["GET", "POST", "PUT", "DELETE", "PATCH"]),
    ]
    app = Starlette(routes=routes)

    async def punctual(scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(END):
                await app(scope, receive, send)

    return punctual


def _no(why: str, status: int) -> Response:
    return PlainTextResponse(f"{why}\n", status, {"Connection": "close"})


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        async with asyncio.timeout(IDLE):
            piece = await anext(stream, None)
        if piece is None:
            return
        if piece:
            yield piece


async def _bounded(start: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    count = len(start)
    yield start
    async for piece in pieces:
        count += len(piece)
        if count > LARGE:
            raise _TooLargeError
        yield piece


def signed_by(keys: dict[str, str]) -> Callable[[Request], bool]:
    """Whether one of these keys, in OpenSSH's format, has signed a request a moment ago, as Flower's sites do."""
    loaded = [load_ssh_public_key(key.encode()) for key in keys.values()]
    known = {
        key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo): key
        for key in loaded
        if isinstance(key, ec.EllipticCurvePublicKey)
    }

    def signed(request: Request) -> bool:
        try:
            key, signature = (
                base64.b64decode(request.headers[name])
                for name in (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
            )
            moment = request.headers[TIMESTAMP_HEADER]
            age = (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
            return abs(age) < TIMESTAMP_TOLERANCE and verify_signature(known[key], moment.encode(), signature)
        except (KeyError, ValueError, TypeError):
            return False

    return signed


def listen(host: str, port: int) -> list[socket.socket]:
    """Listen at a host's addresses."""
    gates: list[socket.socket] = []
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        gate = Gate(family, kind, protocol)
        gate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            gate.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        gate.bind(place)
        gates.append(gate)
    return gates


def main() -> None:
    """Serve until told to end."""
    host, port, inside, folder = sys.argv[1:]
    tls = Path(folder)
    known = signed_by(site_keys(tls))

    def read_keys(*_: object) -> None:
        nonlocal known
        with suppress(UserError):  # the server says what is wrong
            known = signed_by(site_keys(tls))

    def is_known(request: Request) -> bool:
        return known(request)

    signal.signal(signal.SIGHUP, read_keys)
    constants.SSL_HANDSHAKE_TIMEOUT = BEGIN
    sslproto.SSLProtocol.max_size = SMALL  # of a buffer that every line has: a quarter of the usual
    trust = ssl.create_default_context(cafile=str(tls / CA))
    config = uvicorn.Config(
        door(f"https://{inside}", trust, is_known),
        http=Punctual,
        ws="none",
        loop="asyncio",  # another one would not ask Gate.accept
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
        timeout_keep_alive=15,  # longer than sites keep an idle line
        ssl_certfile=str(tls / CERTIFICATE),
        ssl_keyfile=str(tls / KEY),
    )
    uvicorn.Server(config).run(listen(host, int(port)))


if __name__ == "__main__":
    main()
