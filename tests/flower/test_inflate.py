"""Objects of Flower's that cannot be put together, or would become far larger than what has arrived."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import json
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from flwr.app import Message
from flwr.app.message.array import Array
from flwr.proto.message_pb2 import Metadata
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
)

import fedalt.flower.client_app  # noqa: F401 - bounds what a ClientApp puts together
from fedalt.flower.deploy import node
from fedalt.flower.inflate import bound
from fedalt.flower.messages import reply_in, to_node, to_server
from fedalt.flower.requests import Reply, Request
from fedalt.flower.server_app import GRID

Contents = dict[str, bytes]


def sent() -> tuple[str, Contents]:
    """A reply as it is on the way: the message's id, and all objects."""
    message = to_node(Request("train", "run-1", round=1), 1)
    message.metadata.__dict__["_message_id"] = "asked"
    objects = get_all_nested_objects(to_server(Reply("train", "run-1", 1, 1, block=b"x" * 1000), message))
    return list(objects)[-1], {name: each.deflate() for name, each in objects.items()}


def array_in(contents: Contents, change: Callable[[dict[str, Any]], Any]) -> Contents:
    for name, content in contents.items():
        if content.startswith(b"Array "):
            about = json.loads(get_object_body(content, Array))
            head = content[: content.index(b"\0")].decode().split(" ")
            body = json.dumps(change(about)).encode()
            text = " ".join([*head[:-1], str(len(body))])
            return contents | {name: text.encode() + b"\0" + body}
    raise AssertionError


BAD: dict[str, Callable[[str, Contents], Contents]] = {
    "a chunk a billion times": lambda root, c: array_in(c, lambda about: about | {"arraychunk_ids": [0] * 100_000}),
    "a chunk that is not there": lambda root, c: array_in(c, lambda about: about | {"arraychunk_ids": [7]}),
    "no mapping": lambda root, c: array_in(c, lambda about: []),
    "no JSON": lambda root, c: {n: v[:-3] + b"xxx" if v.startswith(b"Array ") else v for n, v in c.items()},
    "an object less": lambda root, c: {n: v for n, v in c.items() if not v.startswith(b"ArrayRecord")},
    "an object of no kind": lambda root, c: {n: v.replace(b"ArrayRecord", b"ArrayRecorx") for n, v in c.items()},
    "no message": lambda root, c: c | {root: next(v for v in c.values() if v.startswith(b"Array "))},
    "nothing": lambda root, c: {},
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_put_together_is_its_senders_error(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import flwr.superlink.grid.http_grid as grid

    monkeypatch.setattr("fedalt.flower.inflate.ROOM", 10_000_000)
    monkeypatch.setattr(grid, "inflate_object_from_contents", inflatable_utils.inflate_object_from_contents)
    inflate: Any = inflatable_utils.inflate_object_from_contents
    root, contents = sent()
    bad = BAD[kind](root, contents)
    with pytest.raises((ValueError, KeyError, IndexError, TypeError, AttributeError)):
        inflate(root, dict(bad)).metadata  # noqa: B018
    bound(GRID, errors=True)
    found = grid.inflate_object_from_contents(root, dict(bad))
    assert isinstance(found, Message) and found.has_error()
    if kind not in ("no message", "nothing"):
        assert found.metadata.reply_to_message_id == "asked"


def test_what_is_as_it_should_be_is_put_together() -> None:
    root, contents = sent()
    message: Any = inflatable_utils.inflate_object_from_contents(root, dict(contents))
    assert reply_in(message).block == b"x" * 1000


ANSWERS = {
    "endless": (b"x" * (1 << 20), {}),
    "a bomb": (gzip.compress(b"\0" * (1 << 28)), {"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_a_site_reads_no_answer_without_end(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """From a server that answers without end, or with a bomb of gzip, what is read has a bound."""
    piece, headers = ANSWERS[what]
    sent = list[int]()

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(1 if headers else 1000):
                    self.wfile.write(piece)
                    sent.append(len(piece))

        def log_message(self, *_: object) -> None:
            pass

    place = importlib.import_module(node.CLIENT)
    monkeypatch.setattr(place, "httpx", place.httpx)  # as it was, when this test ends
    node.bound_answers()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = place.ProtobufClient(f"http://127.0.0.1:{server.server_port}")
        ask = partial(
            client._unary_unary, path="/v1/fleet/x", rpc_method="x", request=Metadata(), response_type=Metadata
        )
        with pytest.raises(httpx.RemoteProtocolError if what == "endless" else ValueError):
            ask()
        server.shutdown()
    assert sum(sent) < 4 * node.MOST
