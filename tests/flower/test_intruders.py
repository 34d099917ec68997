"""Real processes: a site that claims to be another one, and every byte that a site sends."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

import micro
from fedalt.flower.certs import make_certs
from fedalt.flower.deploy.address import free_port
from flower.deployment import Deployment

pytestmark = pytest.mark.slow
SECRET = "patient4711mueller"
SMALL = {"data__clients": 3, "data__source": "tinyworld", "data__train_limit": 12, "data__test_limit": 12}


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    return micro.settings(folder / "run", **{**SMALL, **changes})


def test_a_site_that_holds_the_key_of_client_1_is_not_client_0(tmp_path: Path) -> None:
    """It is there before client 0, takes its place neither then nor later, and the others go on."""
    make_certs(tmp_path / "tls", 3)
    deployment = Deployment(tmp_path, tls=tmp_path / "tls")
    deployment.start_server()
    with contextlib.ExitStack() as stack:
        stack.push(deployment.__exit__)
        deployment.start_site(0, key=1)
        deployment.wait_for("site1", "SuperNode ID")
        for client in (0, 2):
            deployment.start_site(client)
            deployment.wait_for(f"site{client}", "SuperNode ID")
        changes = {"flower__round_deadline": 25, "federation__rounds": 2, "evaluation__every": 2}
        out = deployment.finish(values(tmp_path, **changes))
        assert "joined run-" not in deployment.log("site1") and "joined run-" in deployment.log("site0")
    said = [e["text"] for e in micro.of_kind(tmp_path / "run", "note") if "refused" in e["text"]]
    assert len(said) == 1 and said[0].endswith(
        "is refused: claims to be client 0, and is not signed with the key of client 0"
    )
    assert said[0] in out
    assert [(e["round"], e["client"]) for e in micro.of_kind(tmp_path / "run", "client")] == [
        (1, 0), (1, 2), (2, 0), (2, 2)
    ]  # fmt: skip


class Tap:
    """A way to the server that keeps what goes there."""

    def __init__(self, to: str) -> None:
        self.to, self.heard = to, bytearray()
        self.listener = socket.create_server(("127.0.0.1", free_port()))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self.listener.accept()
                host, _, port = self.to.rpartition(":")
                there = socket.create_connection((host, int(port)))
                for source, sink, keep in ((here, there, True), (there, here, False)):
                    threading.Thread(target=self._pass, args=(source, sink, keep), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, keep: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if keep:
                    self.heard += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def test_no_byte_that_a_site_sends_holds_a_secret(tmp_path: Path) -> None:
    """Of rows, labels, categories, tasks, columns, paths and file names; one of the sites cannot read its rows."""
    for client in range(3):
        made = [
            {"instruction": f"Is {SECRET} {i}?", "output": f"{SECRET} {i % 3}", "task": SECRET, "category": SECRET}
            for i in range(60)
        ]
        if client == 2:
            made = [{f"{SECRET}{name}": value for name, value in row.items()} for row in made]
        micro.write_rows(tmp_path / SECRET / str(client) / f"{SECRET}.jsonl", made, True)
    deployment = Deployment(tmp_path / SECRET)
    deployment.start_server()
    tap = Tap(deployment.address)
    with contextlib.ExitStack() as stack:
        stack.push(deployment.__exit__)
        for client in range(3):
            data = str(tmp_path / SECRET / str(client) / f"{SECRET}.jsonl")
            more = ("--set", "task=ward", "--set", "min_rows=10", "--set", "categories=named")
            deployment.start_site(client, *more, server=tap.address, data=data)
            deployment.wait_for(f"site{client}", "SuperNode ID")
        changes = {"flower__round_deadline": 20, "federation__rounds": 2, "evaluation__every": 2}
        deployment.finish(values(tmp_path, **changes, flower__allow_two=False))
        assert SECRET in deployment.log("site2"), "its own log says what is wrong"
    heard = bytes(tap.heard)
    assert b'"loss":' in heard and b'"rouge1":' in heard and b"ward" in heard, "all of it is heard, in plain text"
    assert SECRET.encode() not in heard and str(tmp_path).encode() not in heard
    reasons = [e["reason"] for e in micro.of_kind(tmp_path / "run", "client_failed") if e["client"] == 2]
    assert reasons[0] == "cannot join: cannot use its rows with these settings"
