"""What a run will read: prompts, answers and trained tokens of some rows, and lengths of all, without the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from fedalt.config import RunConfig
from fedalt.data.encode import Example, encode_client, left_out, token_texts
from fedalt.data.federation import Federation, Row, labels_of
from fedalt.data.load import Rows, load_as_it_is
from fedalt.errors import UserError, listed
from fedalt.model.base import load_about, load_tokenizer
from fedalt.model.source import resolve_source
from fedalt.runs.setup import load_rows, read_settings, text_encoder


@dataclass(frozen=True)
class PreviewRow:
    """One training row.

    Attributes:
        prompt: Everything before the answer, as text.
        answer: What is to be answered; the label.
        tokens: Text of every token; none for an image, nor for a row that is skipped.
        trained: Whether each of them is trained.
        cut: Tokens that ``data.cutoff`` leaves out; all of them where the row is skipped.
    """

    prompt: str
    answer: str
    tokens: tuple[str, ...] = ()
    trained: tuple[bool, ...] = ()
    cut: int = 0


@dataclass(frozen=True)
class Preview:
    """What is made of rows.

    Attributes:
        notes: What was understood, first, and what else there is to know.
        template: How prompts are made.
        cutoff: Longest row in tokens.
        rows: Training rows of one client.
        tasks: Client → its task.
        train: Client → training rows.
        validation: Client → validation rows.
        test: Client → test rows.
        lengths: Client → tokens of its training rows.
        skipped: Client → rows of all splits whose prompt fills the cut-off.
        cut: Client → rows of all splits whose end is cut off.
    """

    notes: tuple[str, ...]
    template: str
    cutoff: int
    rows: tuple[PreviewRow, ...]
    tasks: dict[int, str]
    train: dict[int, int]
    validation: dict[int, int]
    test: dict[int, int]
    lengths: dict[int, list[int]]
    skipped: dict[int, int]
    cut: dict[int, int]


def preview(config: RunConfig, client: int, count: int) -> Preview:
    """Read rows as a run does, and show some of one client."""
    config, federation = _rows(config)
    if client not in federation.clients:
        raise UserError(f"--client {client}: {federation.source} has clients {listed(federation.ids)}")
    if config.model.task == "image_classification":
        rows = tuple(PreviewRow(row.instruction, row.output) for row in federation.clients[client].train[:count])
        return _preview(config, federation, federation.notes, rows, {c: ([], 0, 0) for c in federation.ids})
    name = resolve_source(config.model.name)
    tokenizer = load_tokenizer(name, not config.classifies)
    about = SimpleNamespace(config=load_about(name))
    config, notes = read_settings(config, federation, about, tokenizer)
    encoder = text_encoder(config, tokenizer)
    examples = {c: encode_client(encoder, data) for c, data in federation.clients.items()}
    sizes = {
        c: ([len(e) for e in mine.train], sum(mine.skipped.values()), sum(mine.cut.values()))
        for c, mine in examples.items()
    }
    shown = tuple(_row(encoder.example(row), row, tokenizer) for row in federation.clients[client].train[:count])
    first, *others = federation.notes
    told = (first, *notes, *others, *left_out(examples, config.data.cutoff))
    return _preview(config, federation, told, shown, sizes)


def _rows(config: RunConfig) -> tuple[RunConfig, Federation]:
    """The rows of all clients; of rows that nobody has yet, all as one client's."""
    rows, data = Rows(), config.data
    found = rows.read(data)
    if (
        isinstance(found, Federation)
        or data.clients
        or found.by
        or data.partition.by == "column"
        or data.partition.file
    ):
        return load_rows(config, rows)
    whole = load_as_it_is(data, config.seed)
    first, *others = whole.notes
    one = replace(whole, notes=(f"{first}; nobody's yet, data.clients=N deals them", *others))
    if config.classifies and not config.model.labels:
        labels = labels_of(one, Federation({}, one.source))
        config = config.model_copy(update={"model": config.model.model_copy(update={"labels": labels})})
    return config, one


def _row(example: Example | None, row: Row, tokenizer: Any) -> PreviewRow:
    if example is None:
        return PreviewRow(row.instruction, row.output, cut=1)
    ids = (*example.prompt, *example.answer)
    trained = {place for place, _ in example.supervised} if example.answer else set()
    prompt = tokenizer.decode(example.prompt, clean_up_tokenization_spaces=False)
    marks = tuple(place in trained for place in range(len(ids)))
    return PreviewRow(prompt, example.row.output, tuple(token_texts(tokenizer, ids)), marks, example.cut)


def _preview(
    config: RunConfig,
    federation: Federation,
    notes: tuple[str, ...],
    rows: tuple[PreviewRow, ...],
    sizes: dict[int, tuple[list[int], int, int]],
) -> Preview:
    clients = federation.clients.items()
    return Preview(
        notes,
        config.data.template,
        config.data.cutoff,
        rows,
        tasks={c: data.train[0].task for c, data in clients},
        train={c: len(data.train) for c, data in clients},
        validation={c: len(data.validation) for c, data in clients},
        test={c: len(data.test) for c, data in clients},
        lengths={c: lengths for c, (lengths, _, _) in sizes.items()},
        skipped={c: skipped for c, (_, skipped, _) in sizes.items()},
        cut={c: cut for c, (_, _, cut) in sizes.items()},
    )
