"""Flower takes a message apart into objects, and puts it together again: here within bounds, whatever the objects are.

An array's object lists its chunks, and may list one of 5 MB a million times. What cannot be put together raises; at the
server that would end the run, so there it becomes an error of whoever sent it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, Error, Message, MessageType
from flwr.app.message import make_message
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_type_from_object_content,
)

SITE = "flwr.supercore.inflatable.inflatable_utils"
"""Where a ClientApp puts messages together."""
TIMES, ROOM = 10, 64_000_000
"""Bytes that an object may become: so many times what has arrived, and so many besides. Chunks of zeros repeat."""
_UNREADABLE = 0


def bound(module: str, errors: bool = False) -> None:
    """Let a module of Flower's put objects together within bounds.

    Args:
        module: Where the function is looked up.
        errors: Whether what cannot be put together is an error message, and not an exception.
    """
    place: Any = importlib.import_module(module)
    inflate = place.inflate_object_from_contents

    def bounded(object_id: str, object_contents: dict[str, bytes], **named: Any) -> Any:
        if named.get("objects") is not None:  # inside of what has been looked at
            return inflate(object_id, object_contents, **named)
        root = object_contents.get(object_id, b"")
        try:
            check(object_contents)
            found = inflate(object_id, object_contents, **named)
            if errors and not isinstance(found, Message):
                raise ValueError("no message")
            return found
        except Exception:
            if not errors:
                raise
            return _error(root)

    place.inflate_object_from_contents = bounded


def check(contents: Mapping[str, bytes]) -> None:
    """Refuse arrays that would become much larger than what has arrived.

    Raises:
        ValueError: They would.
    """
    most, total = TIMES * sum(map(len, contents.values())) + ROOM, 0
    for content in contents.values():
        if get_object_type_from_object_content(content) == Array.__qualname__:
            _, children, _ = get_object_head_values_from_object_content(content)
            chunks = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(contents[children[chunk]]) for chunk in chunks)
    if total > most:
        raise ValueError(f"{total:,} bytes of arrays from {sum(map(len, contents.values())):,} bytes")


def _error(root: bytes) -> Message:
    """The error that a message could not be read, in answer to what that message answers, if that can be read."""
    error = Error(code=_UNREADABLE, reason="unreadable")
    try:
        metadata = ProtoMessage.FromString(get_object_body(root, Message)).metadata
        return make_message(metadata=metadata_from_proto(metadata), error=error)
    except Exception:
        nobodys = Metadata(message_type=MessageType.QUERY)  # in answer to nothing
        return make_message(metadata=metadata_from_proto(nobodys), error=error)
