"""Objects of Flower's that cannot be put together, or would become far larger than what has arrived."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Message
from flwr.app.message.array import Array
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
)

import fedalt.flower.client_app  # noqa: F401 - bounds what a ClientApp puts together
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
