"""A headless Chromium that opens a file as a phone or a desktop and tells what happened, over its DevTools socket."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Scheme = Literal["light", "dark"]
PHONE, DESKTOP = (390, 844), (1280, 900)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--hide-scrollbars",
)


def find_browser() -> str | None:
    """Path of a Chromium, if there is one."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@dataclass
class Visit:
    """One page as it was opened.

    Attributes:
        requests: Addresses that were asked for, the page's own among them.
        errors: Console errors and exceptions.
        page: The browser's tab, for more questions.
    """

    page: Tab
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Tab:
    """A tab that is spoken to in the DevTools protocol."""

    def __init__(self, address: str) -> None:
        import websocket

        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.sent = 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while (message := self._next()).get("id") != self.sent:
            pass
        assert "error" not in message, (method, message)
        return message["result"]

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, (expression, result)
        return result["result"].get("value")

    def look(self, size: tuple[int, int], scheme: Scheme) -> None:
        """Be a phone or a desktop, dark or light."""
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=size == PHONE,
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, page: Path | str, size: tuple[int, int], scheme: Scheme) -> Visit:
        """Open a file or an address."""
        self.look(size, scheme)
        self.events = []
        self.call("Page.navigate", url=page.resolve().as_uri() if isinstance(page, Path) else page)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()
        # two frames, so that what is drawn on load and resized afterwards has been drawn
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
        return self.visit()

    def visit(self) -> Visit:
        """What has happened since the page was opened."""
        visit = Visit(self)
        for event in self.events:
            about = event["params"]
            if event["method"] == "Network.requestWillBeSent":
                visit.requests.append(about["request"]["url"])
            elif event["method"] == "Page.javascriptDialogOpening":
                visit.errors.append(about["message"])
            elif event["method"] == "Runtime.exceptionThrown":
                visit.errors.append(str(about["exceptionDetails"]))
            elif (event["method"] == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert")) or (
                event["method"] == "Log.entryAdded" and about["entry"]["level"] == "error"
            ):
                visit.errors.append(str(about))
        return visit

    def screenshot(self, path: Path) -> None:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.socket.recv())
        if "method" in message:
            self.events.append(message)
        if message.get("method") == "Page.javascriptDialogOpening":  # or the page would wait for ever
            self.sent += 1
            self.socket.send(
                json.dumps({"id": self.sent, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}})
            )
        return message


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A browser with an empty profile in a folder, and its one tab; it ends with the block."""
    executable = find_browser()
    assert executable
    command = [executable, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        tab = Tab(_address(folder / "DevToolsActivePort"))
        yield tab
        tab.socket.close()
    finally:
        process.terminate()
        process.wait(20)


def _address(port_file: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if port_file.is_file() and (lines := port_file.read_text().split()):
            with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                pages = [target for target in json.load(answer) if target["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise TimeoutError("the browser did not start")
