"""What server and site say to each other: a header of plain JSON, and a block of tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from fedalt.errors import UserError

Do = Literal["who", "join", "train", "score", "save"]


class ApartError(UserError):
    """A site holds another upload than the one that counts, so that it cannot take itself out of a mean."""


class Frame:
    """What goes over the wire."""

    block: bytes

    @property
    def header(self) -> str:
        """Everything but the block, as JSON."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return len(self.header.encode()) + len(self.block)


@dataclass(frozen=True)
class Request(Frame):
    """What the server asks of a site.

    Attributes:
        do: ``who`` are you; ``join`` the run; ``train`` a round; ``score`` or ``save`` your model as it would start the
            next round.
        run: Identifies the run, anew for every start but a resumption.
        settings: The run's settings, as JSON.
        clients: Number of clients in the run.
        round: The round to train, or the last finished one.
        common: Digest of what all sites of the run have in common, for a site that has joined.
        counts: The round of the client's upload in what it is told, 0 for none.
        share: The client's weight in what it is told; see ``Message``.
        told: Whether it is told anything; the tensors are in ``block``.
        block: See ``wire.py``.
    """

    do: Do
    run: str = ""
    settings: str = "{}"
    clients: int = 0
    round: int = 0
    common: str = ""
    counts: int = 0
    share: float = 0.0
    told: bool = False
    block: bytes = b""

    @property
    def header(self) -> str:
        """Everything but the block, as JSON."""
        return json.dumps({name: value for name, value in vars(self).items() if name != "block"})

    @staticmethod
    def parse(header: str, block: bytes) -> Request:
        """Invert ``header``."""
        return Request(**json.loads(header), block=block)


@dataclass(frozen=True)
class Reply(Frame):
    """What a site answers.

    Attributes:
        body: What was asked for; ``run`` and ``round`` as in the request. ``apart`` where the site needs a row of its
            own.
        error: Why there is no answer, in one line, or nothing.
        block: An upload; see ``wire.py``.
    """

    body: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    block: bytes = b""

    @property
    def header(self) -> str:
        """Everything but the block, as JSON."""
        return json.dumps({"body": self.body, "error": self.error})

    @staticmethod
    def parse(header: str, block: bytes) -> Reply:
        """Invert ``header``."""
        return Reply(**json.loads(header), block=block)
