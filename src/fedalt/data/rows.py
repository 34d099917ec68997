"""Rows and federations: what every data source delivers and every later room reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

SPLITS = ("train", "validation", "test")
FIELDS = ("instruction", "output", "task", "category")


class Picture(Protocol):
    """An image that is read when it is needed."""

    def open(self) -> Any:
        """The image, as a ``PIL.Image.Image``.

        Raises:
            UserError: It is no image any more.
        """

    def digest(self) -> str:
        """Identifies the image by its content."""


@dataclass(frozen=True, slots=True)
class Row:
    """One instruction and its reference answer, or one text or image and its label.

    Attributes:
        instruction: What the model is asked, before the prompt template; the text to classify; the name of an image.
        output: The reference answer; the label.
        task: Name of the task the row belongs to, for example ``snli``.
        category: Kind of task, for example ``natural language inference``; scores are grouped by it.
    """

    instruction: str
    output: str
    task: str = ""
    category: str = ""
    image: Picture | None = None


@dataclass(frozen=True, slots=True)
class ClientData:
    """The rows of one site. They never leave it."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...] = ()
    test: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True)
class Federation:
    """Client id → rows, in ascending order of id, with a line saying where they came from."""

    clients: dict[int, ClientData]
    source: str
    notes: tuple[str, ...] = field(default=())

    @property
    def ids(self) -> tuple[int, ...]:
        """Client ids in order."""
        return tuple(self.clients)
