"""Which node is which client, and asking clients until they have answered or it is too late.

Node ids change when a site starts anew, messages to a node that went away are lost, and replies may say so a minute
later: a client is asked again, under its present node, until its reply is there. That is safe because a site gives the
reply of a finished round again.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedalt.errors import UserError, shortened
from fedalt.flower.certs import PublicKey
from fedalt.flower.messages import reply_in, to_node
from fedalt.flower.requests import Reply, Request

_log = logging.getLogger("flwr")
LOST = {3, 4, 5, 8}
"""Flower's error codes for messages and nodes that are gone: ask again."""
_POLL, _LOOK = 0.25, 1.0
"""Seconds between looks for replies, and for nodes."""


@dataclass
class Nodes:
    """The sites behind a Flower grid.

    Attributes:
        keys: Client → the public key of its site; None where sites have no keys.
        note: Called with (client, what happened) when a site comes, comes back or is not heard of.
        refused: Called with a line about a node that is not who it says.
        ttl: Seconds after which a site that has not taken a message does not get it any more.
        node_of: Client → its present node.
        came: Client → how often a site has said to be this client.
    """

    grid: Grid
    clients: int
    keys: Mapping[int, PublicKey] | None = None
    note: Callable[[int, str], None] = lambda client, line: None
    refused: Callable[[str], None] = lambda line: None
    ttl: float | None = None
    node_of: dict[int, int] = field(default_factory=dict)
    came: Counter[int] = field(default_factory=Counter)
    _asked: dict[str, tuple[int, Request]] = field(default_factory=dict)
    _known: set[int] = field(default_factory=set)
    _refused: str = ""
    _looked: float = 0.0

    def ask(
        self, requests: Mapping[int, Request], until: Callable[[int], float], again: float = 1.0
    ) -> Iterator[tuple[int, Reply]]:
        """Ask clients, each its own, and yield (client, reply) as they come; one that does not fit is ``unfit``.

        Ends when everybody has replied, or when the time is over that ``until`` gives for the number of replies so far,
        in the seconds of ``time.monotonic``.
        """
        waiting, sent = dict(requests), dict[str, int]()
        at = dict[str, int]()  # message → the node it went to
        after = dict.fromkeys(requests, 0.0)
        got = 0
        while waiting:
            late = time.monotonic() >= until(got)
            self.look()
            for lost in [m for m, client in sent.items() if self.node_of.get(client) != at[m]]:
                del sent[lost]  # its site has another node now, or none
            now = time.monotonic()
            out = [c for c in waiting if c in self.node_of and c not in sent.values() and after[c] <= now]
            if out and not late:
                sent |= self._push({client: waiting[client] for client in out}, self.node_of)
                at |= {message: self.node_of[client] for message, client in sent.items()}
                after |= dict.fromkeys(set(out) - set(sent.values()), now + again)
            replies = list(self.grid.pull_messages(list(sent))) if sent else []
            for message in replies:
                client = sent.pop(str(message.metadata.reply_to_message_id), None)
                if client is None:
                    continue
                if message.has_error() and message.error.code in LOST:
                    self.note(client, f"lost (Flower's error {message.error.code})")
                    self._forget(client)
                    after[client] = time.monotonic() + again
                    continue
                reply = self._read(message, waiting.pop(client), client)
                got += not reply.why
                yield client, reply
            if not replies and late:  # what came while one reply was waited for is taken first
                return
            if not replies:
                time.sleep(_POLL)

    def _read(self, message: Message, request: Request, client: int | None = None) -> Reply:
        """An answer to a request, of a client or of whoever it is; ``unfit`` says what is wrong with it."""
        try:
            if message.has_error():
                raise UserError(f"failed (Flower's error {message.error.code})")
            reply = reply_in(message, self.keys)
            reply.check(request, reply.client if client is None else client)
            return reply
        except UserError as error:
            line = str(error)
        except Exception as error:  # a reply may be anything, and ends no run
            line = f"no answer that can be read ({type(error).__name__})"
        return Reply.to(request, client or 0, unfit=line)

    def _push(self, requests: Mapping[int, Request], to: Mapping[int, int]) -> dict[str, int]:
        """Send requests by whom they are for, to these nodes; message id → whom. What Flower refuses is left out."""
        names = list(requests)
        ids = list(self.grid.push_messages([to_node(requests[name], to[name], self.ttl) for name in names]))
        return {str(id_): name for id_, name in zip(ids, names, strict=False) if id_} if len(ids) == len(names) else {}

    def _forget(self, client: int) -> None:
        """Its node may be gone; whoever is there is asked anew who it is."""
        self._known.discard(self.node_of.pop(client, 0))

    def look(self) -> None:
        """Ask nodes that are new who they are, and take in what the last ones said."""
        now = time.monotonic()
        if self._asked:
            for message in self.grid.pull_messages(list(self._asked)):
                asked = self._asked.pop(str(message.metadata.reply_to_message_id), None)
                if asked is not None:
                    self._introduce(*asked, message)
        if now - self._looked < _LOOK:
            return
        self._looked = now
        online = set(self.grid.get_node_ids())
        for client, node in list(self.node_of.items()):
            if node not in online:
                self.note(client, "not heard of")
                del self.node_of[client]
        self._known &= online
        self._asked = {m: (node, asked) for m, (node, asked) in self._asked.items() if node in online}
        new = sorted(online - self._known - {node for node, _ in self._asked.values()})
        if new:
            who = {node: Request("who", secrets.token_hex(16)) for node in new}
            sent = self._push(who, {node: node for node in new})
            self._asked |= {message: (node, who[node]) for message, node in sent.items()}

    def _introduce(self, node: int, asked: Request, message: Message) -> None:
        self._known.add(node)
        if message.has_error():
            if message.error.code != ErrorCode.INVALID_FAB:
                self._known.discard(node)
            elif not self._refused:
                self._refused = shortened(message.error.reason or "", 300)
                _log.error("a site: %s", self._refused)
            return
        reply = self._read(message, asked)
        if reply.unfit:
            self.refused(f"node {node} is refused: {reply.unfit}")
            return
        client = reply.client
        if client >= self.clients:
            return  # no site of this run
        before = self.node_of.get(client)
        if before is not None and before != node:
            self._known.discard(before)
            self.note(client, "back under another node")
        self.node_of[client] = node
        self.came[client] += 1
