"""From rows to token ids. Prompt and answer are tokenised apart, so training sees exactly the prompt of generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedalt.config import DataConfig
from fedalt.data.rows import ClientData, Federation, Row
from fedalt.data.templates import CHAT, Template, get_template
from fedalt.errors import UserError


@dataclass(frozen=True, slots=True)
class Example:
    """One row in tokens.

    Attributes:
        prompt: Ids of the rendered template.
        answer: Ids of the reference answer, with the end-of-sequence token where the cut-off leaves room.
        row: Where it came from.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    row: Row

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True, slots=True)
class ClientExamples:
    """One client's rows in tokens, and how many were skipped because their prompt fills the cut-off."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    skipped: dict[str, int]


class Encoder:
    """Renders the template and tokenises.

    Args:
        tokenizer: A Hugging Face tokenizer.
        template: Name or file, see ``get_template``.
        cutoff: Longest row in tokens; the answer is cut there, a row whose prompt fills it is skipped.
    """

    def __init__(self, tokenizer: Any, template: str, cutoff: int) -> None:
        self.tokenizer = tokenizer
        self.template: Template = get_template(template, tokenizer)
        self.cutoff = cutoff
        self._special = template != CHAT  # a chat template writes its own special tokens

    def prompt(self, instruction: str) -> tuple[int, ...]:
        """Token ids of the prompt, without an end-of-sequence token."""
        ids = self.tokenizer(self.template(instruction), add_special_tokens=self._special)["input_ids"]
        return tuple(ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids)

    def example(self, row: Row) -> Example | None:
        """The row in tokens, or nothing when no token of the answer fits under the cut-off."""
        prompt = self.prompt(row.instruction)
        if len(prompt) >= self.cutoff:
            return None
        answer = self.tokenizer(row.output, add_special_tokens=False)["input_ids"]
        return Example(prompt, tuple([*answer, self.tokenizer.eos_token_id][: self.cutoff - len(prompt)]), row)

    def client(self, data: ClientData) -> ClientExamples:
        """All rows of one client."""
        splits = {name: getattr(data, name) for name in ("train", "validation", "test")}
        encoded = {name: _present([self.example(row) for row in rows]) for name, rows in splits.items()}
        skipped = {name: len(rows) - len(encoded[name]) for name, rows in splits.items()}
        return ClientExamples(**encoded, skipped=skipped)


def encode_federation(federation: Federation, tokenizer: Any, config: DataConfig) -> dict[int, ClientExamples]:
    """Tokenise everybody's rows.

    Raises:
        UserError: A client has no row left to train on, or none to be scored on.
    """
    encoder = Encoder(tokenizer, config.template, config.cutoff)
    clients = {client: encoder.client(data) for client, data in federation.clients.items()}
    for client, examples in clients.items():
        for split in ("train", "test"):
            if not getattr(examples, split):
                raise UserError(
                    f"client {client}: all {examples.skipped[split]} {split} rows have a prompt of {config.cutoff} "
                    "tokens or more (data.cutoff), so all labels are masked and no answer is left"
                )
    return clients


def _present(examples: Sequence[Example | None]) -> tuple[Example, ...]:
    return tuple(example for example in examples if example is not None)
