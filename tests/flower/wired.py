"""Flower's messages in the bytes that its grid sends."""

from __future__ import annotations

import torch
from flwr.app import Message
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects


def wired(message: Message) -> bytes:
    """All that Flower sends of a message: what it is, and the objects that it is taken apart into."""
    about = message_to_proto(remove_content_from_message(message)).SerializeToString()
    return b"".join([about, *(each.deflate() for each in get_all_nested_objects(message).values())])


def size(message: Message) -> int:
    """Bytes of the header's text and of the tensors, in Flower's records."""
    [header] = message.content.config_records.values()
    arrays = [array for record in message.content.array_records.values() for array in record.values()]
    return len(str(header["header"]).encode()) + sum(array.numpy().nbytes for array in arrays)


def raw(value: torch.Tensor) -> bytes:
    return value.contiguous().numpy().tobytes()
