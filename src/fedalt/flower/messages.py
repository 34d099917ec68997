"""Requests and replies as Flower's records: a header, and one array of bytes for all tensors."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedalt.flower.requests import Reply, Request

KINDS = {"who": "query", "join": "query", "train": "train", "score": "evaluate", "save": "evaluate"}
"""What is asked → Flower's type of message."""
_HEADER, _BLOCK = "header", "block"


def to_node(request: Request, node: int, ttl: float | None = None) -> Message:
    """The message that carries a request; nobody gets it when it is older than ``ttl`` seconds."""
    content, kind = _content(request.header, request.block), KINDS[request.do]
    return Message(content, dst_node_id=node, message_type=kind, ttl=ttl, group_id=str(request.round))


def request_in(message: Message) -> Request:
    """Invert ``to_node``."""
    return Request.parse(*_parts(message))


def to_server(reply: Reply, to: Message) -> Message:
    """The message that carries a reply."""
    content = _content(reply.header, reply.block)
    content["metrics"] = MetricRecord({"num-examples": 0})
    return Message(content, reply_to=to)


def reply_in(message: Message) -> Reply:
    """Invert ``to_server``."""
    return Reply.parse(*_parts(message))


def _content(header: str, block: bytes) -> RecordDict:
    content = RecordDict({_HEADER: ConfigRecord({_HEADER: header})})
    if block:
        content[_BLOCK] = _record(block)
    return content


@lru_cache(maxsize=1)
def _record(block: bytes) -> ArrayRecord:
    """One record for all who are told the same: it is copied and hashed once, and sent to the SuperLink once."""
    return ArrayRecord({_BLOCK: Array(np.frombuffer(block, np.uint8))})


def _parts(message: Message) -> tuple[str, bytes]:
    content = message.content
    header = str(content.config_records[_HEADER][_HEADER])
    if _BLOCK not in content.array_records:
        return header, b""
    return header, content.array_records[_BLOCK][_BLOCK].numpy().astype(np.uint8, copy=False).tobytes()
