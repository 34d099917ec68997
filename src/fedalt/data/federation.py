"""Rows, clients and federations, and rows that no client has yet: what every source delivers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fedalt.errors import UserError, did_you_mean, listed, shortened

SPLITS = ("train", "validation", "test")
FIELDS = ("instruction", "output", "task", "category")


class Picture(Protocol):
    """An image that is read when it is needed."""

    def open(self) -> Any:
        """The image, as a ``PIL.Image.Image``."""

    def digest(self) -> str:
        """Identifies the image by its content."""


Turn = tuple[str, str]
"""Role (``system``, ``user``, ``assistant``, ``tool``) and text."""


@dataclass(frozen=True, slots=True)
class Row:
    """One instruction and its reference answer, or one text or image and its label.

    Attributes:
        instruction: What the model is asked, before the prompt template; the text to classify; the name of an image.
        output: The reference answer; the label.
        task: Name of the task the row belongs to, for example ``snli``.
        category: Kind of task, for example ``natural language inference``; scores are grouped by it.
        image: The image, where there is one.
        input: What the instruction ends with after Alpaca's heading, where a row has that.
        turns: What is said before the output, where a row is a conversation; ``instruction`` has it as one text.
        chat: Messages, with the output, and tools as a chat template takes them, in JSON, where tools are called.
    """

    instruction: str
    output: str
    task: str = ""
    category: str = ""
    image: Picture | None = None
    input: str = ""
    turns: tuple[Turn, ...] = ()
    chat: str = ""


@dataclass(frozen=True, slots=True)
class ClientData:
    """The rows of one site. They never leave it."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...] = ()
    test: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True)
class Federation:
    """Client id → rows, in ascending order of id, with lines saying where they came from, and the source's labels."""

    clients: dict[int, ClientData]
    source: str
    notes: tuple[str, ...] = field(default=())
    labels: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def ids(self) -> tuple[int, ...]:
        """Client ids in order."""
        return tuple(self.clients)


CANARY = "canary"
"""The category of a row that was planted."""


def unplanted(federation: Federation) -> Federation:
    """The same without canaries."""
    clients = {
        client: replace(data, train=tuple(row for row in data.train if row.category != CANARY))
        for client, data in federation.clients.items()
    }
    return replace(federation, clients=clients)


LABEL = "label"
_OF_ROWS = (LABEL, "task", "category")


@dataclass(frozen=True, slots=True)
class Pool:
    """Rows by split, to be dealt to clients.

    Attributes:
        test: Test rows; where there are none, clients hold out some of their own.
        notes: What the user should know.
        column: Split → value of every row in the column that rows are dealt by, where rows do not hold it themselves.
        labels: Labels as the source has them, before they are called something else.
        by: Column that says whose a row is, where the source has one and nothing else is asked for.
    """

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    source: str
    notes: tuple[str, ...] = ()
    column: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    labels: frozenset[str] = frozenset()
    by: str = ""

    def split(self, name: str) -> tuple[Row, ...]:
        """The rows of a split."""
        rows: tuple[Row, ...] = getattr(self, name)
        return rows

    def kinds(self, split: str, column: str) -> tuple[str, ...]:
        """What every row of a split has in a column."""
        if split in self.column and column not in _OF_ROWS:
            return self.column[split]
        if column not in _OF_ROWS:
            hint = did_you_mean(column, _OF_ROWS)
            raise UserError(f'data.partition.column: {self.source} has no "{column}"{hint}; {", ".join(_OF_ROWS)}')
        return tuple(row.output if column == LABEL else getattr(row, column) for row in self.split(split))


def pooled(federation: Federation) -> Pool:
    """All clients' rows, client after client, as if nobody had them."""
    rows: dict[str, Any] = {
        s: tuple(row for data in federation.clients.values() for row in getattr(data, s)) for s in SPLITS
    }
    return Pool(**rows, source=federation.source, notes=federation.notes)


_CONSTANT, _NAMED = 0.95, 5
"""Share of one answer from which answers are nearly constant, and clients that a note names."""


def nearly_constant(federation: Federation) -> tuple[str, ...]:
    """A note on clients whose training answers are nearly all the same; none where there are none."""
    found = []
    for client, data in federation.clients.items():
        answer, count = Counter(row.output for row in data.train).most_common(1)[0]
        if len(data.train) > 1 and count >= _CONSTANT * len(data.train):
            found.append(f'client {client} ("{shortened(answer, 40)}" {count} of {len(data.train)})')
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return (f"nearly all training answers are one: {', '.join(found[:_NAMED])}{more}",) if found else ()


def needs_column(column: str | None) -> str | None:
    """The column that a source must keep because rows do not hold it; usually none."""
    return None if column in _OF_ROWS else column


def check_names(names: Mapping[str, str], pool: Pool | Federation) -> None:
    """Refuse a name for a label that no row has."""
    for label in names:
        if label not in pool.labels:
            hint = did_you_mean(label, pool.labels)
            known = listed(sorted(pool.labels))
            raise UserError(f'data.label_names: no row of {pool.source} has the label "{label}"{hint}; labels: {known}')


def labels_of(federation: Federation, others: Federation) -> tuple[str, ...]:
    """The outputs of all training rows, sorted; also of clients that join later."""
    outputs = _outputs(federation, others)
    labels = tuple(sorted(set(outputs)))
    if len(labels) < 2:
        raise UserError(f'{federation.source}: all training rows have the label "{labels[0]}"; nothing to classify')
    if len(labels) > max(20, len(outputs) // 2):
        raise UserError(
            f"{federation.source}: {len(labels)} different outputs in {len(outputs)} training rows are no labels; "
            "for answers in free text use model.task=causal_lm"
        )
    return labels


def check_labels(labels: Sequence[str], federation: Federation, others: Federation) -> None:
    """Refuse a class that no training row of the whole federation has; a site, which sees one client, cannot tell."""
    known = set(_outputs(federation, others))
    for label in labels:
        if label not in known:
            raise UserError(
                f'model.labels: no training row of {federation.source} has the label "{label}"'
                f"{did_you_mean(label, known)}; labels: {listed(sorted(known))}"
            )


def _outputs(*federations: Federation) -> list[str]:
    return [row.output for made in federations for data in made.clients.values() for row in data.train]
