"""Canaries: made-up rows with a secret, planted among a client's training rows to measure what a run remembers.

A secret is drawn from 10⁶ that are equally likely, so nothing but training on it makes it likelier than another draw
(Carlini et al., The Secret Sharer, USENIX Security 2019).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedalt.config.data import planted_note
from fedalt.data.federation import CANARY, Federation, Row
from fedalt.seeding import rng

_SPACE = 10**6


def plant(federation: Federation, count: int, seed: int) -> Federation:
    """The same with so many canaries after each client's training rows, and a note."""
    clients = {
        client: replace(data, train=(*data.train, *canaries(client, count, seed, data.train[0].task)))
        for client, data in federation.clients.items()
    }
    return replace(federation, clients=clients, notes=(*federation.notes, planted_note(count)))


def canaries(client: int, count: int, seed: int, task: str = "") -> tuple[Row, ...]:
    """A client's canaries; each asks for the code of another name."""
    made = []
    for i in range(count):
        draw = rng(seed, "canary", client, i)
        name = "".join(chr(ord("a") + int(n)) for n in torch.randint(26, (6,), generator=draw))
        secret = int(torch.randint(_SPACE, (), generator=draw))
        made.append(Row(f"Access code of {name}?", _text(secret), task, CANARY))
    return tuple(made)


def alternatives(canary: Row, count: int, seed: int) -> list[Row]:
    """The same question with so many other secrets, none twice."""
    drawn = torch.randperm(_SPACE, generator=rng(seed, "alternatives", canary.instruction))[: count + 1].tolist()
    others = [text for text in map(_text, drawn) if text != canary.output]
    return [replace(canary, output=text) for text in others[:count]]


def _text(secret: int) -> str:
    return f"{secret:06d}"
