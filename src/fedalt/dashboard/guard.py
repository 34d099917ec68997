"""Who may talk to the dashboard: a browser on this machine with the token, on a page that the dashboard has served."""

from __future__ import annotations

import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = "127.0.0.1"
_NAMES = {HOST, "localhost"}
STRICT = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; " + (
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""What a page may load: nothing from elsewhere, and no script that is written into it."""
REPORT = "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline'; " + (
    "style-src 'unsafe-inline'; img-src data: blob:; frame-ancestors 'none'"
)
"""A report is a file with scripts inside; it runs apart from the dashboard's pages and reaches nothing."""


class Guard:
    """Lets through what has the token, names this machine as its host, and comes from no other page."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":  # there are no sockets here
            return
        refusal = self._refusal(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", STRICT)
                headers.setdefault("Cache-Control", "no-store")
                for name, value in _ALWAYS.items():
                    headers[name] = value
            await send(message)

        await (refusal or self.app)(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if host.rpartition(":")[0] not in _NAMES and host not in _NAMES:
            return _refused("this name is not this machine's; open http://127.0.0.1")
        if scope["method"] not in ("GET", "HEAD") and headers.get("origin") != f"http://{host}":
            return _refused("asked by a page of another origin")
        query = parse_qs(scope["query_string"].decode("latin-1"))
        given = query.pop("token", [""])[0]
        if given and scope["method"] == "GET" and self._is_right(given):  # the token leaves the address bar
            rest = f"?{urlencode(query, doseq=True)}" if query else ""
            answer = RedirectResponse(f"/{rest}", 303)
            answer.set_cookie(_cookie(host), self.token, httponly=True, samesite="strict")
            return answer
        return (
            None
            if self._is_right(_given(headers, host))
            else _refused("open the address that fedalt dashboard printed")
        )

    def _is_right(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.token.encode())


_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def _cookie(host: str) -> str:
    """Name of the cookie: browsers do not tell ports apart, and there may be several dashboards."""
    return f"fedalt-{host.rpartition(':')[2]}"


def _given(headers: Headers, host: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(_cookie(host))
    except CookieError:
        return ""
    return found.value if found else ""


def _refused(why: str) -> Response:
    return PlainTextResponse(f"refused: {why}\n", 403)
