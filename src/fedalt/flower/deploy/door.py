"""``python -m fedalt.flower.deploy.door HOST PORT INSIDE TLS``: a way in for sites, and for nobody else.

Flower serves sites, users and its own processes on one port. The door listens where sites can reach it, with the
server's certificate, and hands on what sites need: ``/v1/fleet/…`` and ``/health``. The SuperLink itself listens on
INSIDE, a port of loopback.
"""

from __future__ import annotations

import ssl
import sys
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedalt.flower.certs import CA, CERTIFICATE, KEY

OPEN = "/v1/fleet/"
_OF_A_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "content-length", "host"}
_SECONDS = 120.0


def door(inside: str, trust: ssl.SSLContext | bool = True) -> Starlette:
    """The application: passes requests of sites on to a SuperLink, and refuses all others.

    Args:
        inside: Where the SuperLink is, for example ``https://127.0.0.1:41234``.
        trust: Whose certificates to accept there.
    """
    superlink = httpx.AsyncClient(base_url=inside, verify=trust, timeout=_SECONDS, trust_env=False)

    async def hand_on(request: Request) -> Response:
        headers = [(name, value) for name, value in request.headers.raw if name.decode() not in _OF_A_CONNECTION]
        body = await request.body()
        answer = await superlink.request(request.method, request.url.path, headers=headers, content=body)
        kept = {name: value for name, value in answer.headers.items() if name not in _OF_A_CONNECTION}
        return Response(answer.content, answer.status_code, kept)

    async def refuse(request: Request) -> Response:
        return PlainTextResponse("this door is for sites only\n", 403)

    routes = [
        Route("/health", hand_on, methods=["GET"]),
        Route(OPEN + "{name:str}", hand_on, methods=["POST"]),
        Route("/{rest:path}", refuse, methods=["GET", "POST", "PUT", "DELETE", "PATCH"]),
    ]
    return Starlette(routes=routes)


def main() -> None:
    """Serve until told to end."""
    host, port, inside, folder = sys.argv[1:]
    tls = Path(folder)
    app = door(f"https://{inside}", ssl.create_default_context(cafile=str(tls / CA)))
    certificate, key = str(tls / CERTIFICATE), str(tls / KEY)
    uvicorn.run(
        app, host=host, port=int(port), log_level="warning", access_log=False, ssl_certfile=certificate, ssl_keyfile=key
    )


if __name__ == "__main__":
    main()
