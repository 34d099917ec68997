"""Requests and replies as Flower's records: a header, one array of bytes for all tensors, and a site's signature."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedalt.errors import UserError
from fedalt.flower.certs import PrivateKey, PublicKey, is_signed, sign
from fedalt.flower.requests import Reply, Request

KINDS = {
    "who": "query",
    "join": "query",
    "train": "train",
    "offer": "query",
    "mask": "train",
    "open": "query",
    "score": "evaluate",
    "save": "evaluate",
}
"""What is asked → Flower's type of message."""
_HEADER, _BLOCK, _SIGNATURE, _METRICS = "header", "block", "signature", "metrics"
_SIGNED = b"fedalt reply 1\0"
"""What a signature begins with, so that none of Flower's own, by the same key, is one."""


def to_node(request: Request, node: int, ttl: float | None = None) -> Message:
    """The message that carries a request; nobody gets it when it is older than ``ttl`` seconds."""
    content, kind = _content({_HEADER: request.header}, request.block), KINDS[request.do]
    return Message(content, dst_node_id=node, message_type=kind, ttl=ttl, group_id=str(request.round))


def request_in(message: Message) -> Request:
    """Invert ``to_node``."""
    header, _, block = _parts(message)
    return Request.parse(header, block)


def to_server(reply: Reply, to: Message, key: PrivateKey | None = None) -> Message:
    """The message that carries a reply, signed if there is a key to sign it with."""
    header = {_HEADER: reply.header}
    if key is not None:
        header[_SIGNATURE] = sign(key, _signed(reply.header, reply.block))
    content = _content(header, reply.block)
    content[_METRICS] = MetricRecord({"num-examples": 0})
    return Message(content, reply_to=to)


def reply_in(message: Message, keys: Mapping[int, PublicKey] | None = None) -> Reply:
    """Invert ``to_server``; ``keys`` are those with which the site of each client must have signed."""
    header, signature, block = _parts(message)
    reply = Reply.parse(header, block)
    if keys is not None and not (
        reply.client in keys and is_signed(keys[reply.client], _signed(header, block), signature)
    ):
        raise UserError(f"claims to be client {reply.client}, and is not signed with the key of client {reply.client}")
    return reply


def _signed(header: str, block: bytes) -> bytes:
    """Run, round, client and whatever else is in the header, and the digest of the block."""
    return _SIGNED + header.encode() + hashlib.sha256(block).digest()


def _content(header: dict[str, str], block: bytes) -> RecordDict:
    content = RecordDict({_HEADER: ConfigRecord({**header})})
    if block:
        content[_BLOCK] = _record(block)
    return content


@lru_cache(maxsize=1)
def _record(block: bytes) -> ArrayRecord:
    """One record for all who are told the same: it is copied and hashed once, and sent to the SuperLink once."""
    return ArrayRecord({_BLOCK: Array(np.frombuffer(block, np.uint8))})


def _parts(message: Message) -> tuple[str, str, bytes]:
    """Header, signature and block."""
    content = message.content
    headers, blocks = dict(content.config_records), dict(content.array_records)
    said = dict(headers.get(_HEADER, {}))
    header, signature = said.get(_HEADER), said.get(_SIGNATURE, "")
    known = headers.keys() == {_HEADER} and said.keys() <= {_HEADER, _SIGNATURE} and blocks.keys() <= {_BLOCK}
    if not known or not isinstance(header, str) or not isinstance(signature, str):
        raise UserError("a message with other records than a header and a block")
    if content.keys() - {_HEADER, _BLOCK, _METRICS} or any(record.keys() != {_BLOCK} for record in blocks.values()):
        raise UserError("a message with other records than a header and a block")
    return header, signature, _bytes(blocks[_BLOCK][_BLOCK]) if blocks else b""


def _bytes(array: Array) -> bytes:
    """The bytes of an array of bytes, whose header must be the one that NumPy writes for so many; it is not read."""
    start = 10 + int.from_bytes(array.data[8:10], "little")
    about, header = {"descr": "|u1", "fortran_order": False, "shape": (len(array.data) - start,)}, BytesIO()
    np.lib.format.write_array_header_1_0(header, about)
    if array.data[:start] != header.getvalue():
        raise UserError("a block that is no array of bytes")
    return array.data[start:]
