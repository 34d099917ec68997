"""A Flower grid without a network: messages are made, serialised and answered as on a real one, and may go wrong.

Sites are the real ones, each with its own folder. Node ids, losses and delays are the test's to choose. Time is too,
where a test has a deadline: what a site computes takes none, so no machine is too slow for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Error, Message
from flwr.serverapp import Grid

import micro
from fedalt.flower.certs import PrivateKey
from fedalt.flower.consent import Consent
from fedalt.flower.messages import request_in, to_server
from fedalt.flower.requests import Reply, Request
from fedalt.flower.site import Site
from fedalt.runs.setup import Bases

Fault = Callable[[int, Request], str | None]
"""(client, request) → "lost" (the site never hears of it), "late" (it does, its answer is lost), or nothing."""


class Clock:
    """The server's ``time``: it goes on when somebody waits, and at no other moment."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


def count_time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Deadlines pass while the server waits, however long the sites take on this machine."""
    time = Clock()
    for module in ("nodes", "sites", "server_app"):
        monkeypatch.setattr(f"fedalt.flower.{module}.time", time)
    return time


class LocalGrid(Grid):
    """Sites of this process behind Flower's interface."""

    def __init__(
        self, folder: Path, clients: Iterable[int], bases: Bases | None = None, consent: Consent | None = None
    ) -> None:
        self.folder, self.bases, self.consent = folder, bases or Bases(), consent or Consent()
        self.sites = {client: self.site(client) for client in clients}
        self.node = {client: 100 + client for client in self.sites}
        self.fault: Fault = lambda client, request: None
        self.tamper: Callable[[int, Request, Reply], Reply] = lambda client, request, reply: reply
        self.keys: dict[int, PrivateKey] = {}
        self.seen: list[tuple[int, Request]] = []
        self.sent: list[tuple[int, Request, Reply]] = []
        self.ttls: set[float] = set()
        self.messages: list[tuple[int, Message, Message]] = []
        self._inbox: dict[str, Message] = {}
        self._count = 0

    def site(self, client: int, **named: Any) -> Site:
        return Site(client, self.folder / str(client), self.bases, **{"consent": self.consent, "alone": True, **named})

    def models(self) -> dict[str, torch.Tensor]:
        """Every client's saved model, of the one run."""
        paths = [path for client in self.sites for path in (self.folder / str(client)).iterdir() if path.is_dir()]
        return {name: value for path in paths for name, value in micro.adapters(path).items()}

    def restart(self, client: int, node: int | None = None) -> None:
        """A site's processes begin anew; what is on its disk stays."""
        old = self.sites[client]
        self.sites[client] = self.site(client, rows=old.rows, consent=old.consent)
        if node is not None:
            self.node[client] = node

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=1)

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.node.values())

    def get_nodes(self) -> Iterable[Any]:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._inbox.pop(name) for name in list(message_ids) if name in self._inbox]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def _deliver(self, message: Message) -> str:
        self._count += 1
        name = f"message-{self._count}"
        message.metadata.__dict__["_message_id"] = name
        node = message.metadata.dst_node_id
        self.ttls.add(message.metadata.ttl)
        client = next((c for c, mine in self.node.items() if mine == node), None)
        request = request_in(copy.deepcopy(message))
        fault = "gone" if client is None else self.fault(client, request)
        if client is not None:
            self.seen.append((client, request))
        if fault == "gone":
            self._inbox[name] = Message(Error(code=5, reason="Node Unavailable"), reply_to=message)
        if client is None or fault in ("gone", "lost"):
            return name
        reply = Reply.to(request, client) if request.do == "who" else self.sites[client].answer(request)
        reply = self.tamper(client, request, reply)
        if fault != "late":
            answer = to_server(reply, message, self.keys.get(client))
            self.messages.append((client, message, answer))
            self.sent.append((client, request, reply))
            self._inbox[name] = answer
        return name
