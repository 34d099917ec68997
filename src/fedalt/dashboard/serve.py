"""The dashboard's server, on this machine alone."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from fedalt.dashboard.app import application
from fedalt.dashboard.guard import HOST
from fedalt.errors import UserError


def serve(root: Path, port: int, tell: Callable[[str], None]) -> None:
    """Serve a folder's runs until Ctrl-C; the address with its token is told."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of runs")
    token = secrets.token_urlsafe(32)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
            listening.listen()  # who opens the address at once waits, and is not refused
        except OSError as error:
            raise UserError(f"--port {port}: cannot be used ({error.strerror}); choose another") from None
        tell(f"http://{HOST}:{listening.getsockname()[1]}/?token={token}")
        quiet = {"log_level": "warning", "access_log": False, "server_header": False, "proxy_headers": False}
        config = uvicorn.Config(application(root, token), timeout_graceful_shutdown=1, **quiet)  # type: ignore[arg-type]
        uvicorn.Server(config).run([listening])
