"""From rows to what a model reads: tokens or pixels, and an answer or a label.

Prompt and answer are tokenised apart, so training sees exactly the prompt of generation.

A template is a text with ``{instruction}`` in it, or a function from an instruction to a prompt:

    @TEMPLATES.register("shout")
    def shout(instruction: str) -> str:
        return f"{instruction.upper()}!"

A class is made once, and called in the same way; its settings are ``self.settings``: those of its nested ``Settings``,
or the section ``data``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from fedalt.config.data import DataConfig
from fedalt.config.section import Named
from fedalt.data.federation import SPLITS, ClientData, Federation, Row
from fedalt.errors import UserError, did_you_mean, listed
from fedalt.registry import TEMPLATES


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What every token adds to the text; a token that ends inside a character adds nothing, the next one the whole."""
    parts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        unfinished = text.endswith("\ufffd") and end < len(ids)
        parts.append("" if unfinished else text[len(before) :])
        before = before if unfinished else text
    return parts


CHAT = "chat"
_PLACE = "{instruction}"

TEMPLATES.add("alpaca_short", "### Instruction:\n{instruction}\n\n### Response:\n", __name__)
TEMPLATES.add(
    "alpaca",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
    __name__,
)


class Template(Protocol):
    """Turns an instruction into the text that the answer follows."""

    def __call__(self, instruction: str) -> str:
        """The prompt."""
        ...


@TEMPLATES.register(CHAT)
class Chat:
    """The tokenizer's own template, which writes special tokens itself."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("data.template: chat, but this tokenizer has no chat template; use alpaca_short or a file")
        self.tokenizer = tokenizer

    def __call__(self, instruction: str) -> str:
        """The prompt."""
        turn = [{"role": "user", "content": instruction}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def get_template(name: str, tokenizer: Any, config: Named | None = None) -> Template:
    """A template by name, or the text of a file that holds ``{instruction}``.

    Args:
        name: Name or file.
        tokenizer: A Hugging Face tokenizer.
        config: The section ``data``, which knows a template's own settings.

    Raises:
        UserError: Unknown name and no such file, a text without the place holder, a tokenizer without a chat template.
    """
    if name == CHAT:
        return Chat(tokenizer)
    text = template_text(name)
    if text is not None:
        return lambda instruction: text.replace(_PLACE, instruction)
    config = config or Named()
    render = TEMPLATES.make(name, config.section, config)

    def prompt(instruction: str) -> str:
        with TEMPLATES.blamed(name):
            made = render(instruction)
        if not isinstance(made, str):
            raise UserError(f'template "{name}" returned {type(made).__name__}; a prompt is text')
        return made

    return prompt


def template_text(name: str) -> str | None:
    """The text of a template with ``{instruction}`` in it; None for a function and for the tokenizer's chat template.

    Raises:
        UserError: Unknown name and no such file, or a text without the place holder.
    """
    if name not in TEMPLATES:
        return _with_place(_read(name), name)
    value = TEMPLATES.get(name)
    return _with_place(value, name) if isinstance(value, str) else None


def _read(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        known = TEMPLATES.names()
        raise UserError(
            f'data.template: "{name}" is no template{did_you_mean(name, known)} and no file; known: {", ".join(known)}'
            ", or FILE.py:Name"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data.template: {name} is not UTF-8 text (byte {error.start})") from None


def _with_place(text: str, name: str) -> str:
    if _PLACE not in text:
        raise UserError(f"data.template: {name} does not hold {_PLACE}, the place where the instruction goes")
    return text


Prompt = tuple[int, ...]
"""Token ids that an answer or a label follows."""
_KEPT = 1 << 30
"""Bytes of pixels that are kept once they have been read."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is read, and brought to the model's size, when it is needed.

    Attributes:
        row: Whose image it is.
        tokens: Tokens that the model makes of it.
        read: Reads the pixels.
    """

    row: Row
    tokens: int
    read: Callable[[Row], Float[Tensor, "c h w"]]

    def __len__(self) -> int:
        return self.tokens

    @property
    def pixels(self) -> Float[Tensor, "c h w"]:
        """The image as the model sees it."""
        return self.read(self.row)


Input = Prompt | Image
"""What a model reads of a row before it answers."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the model reads it.

    Attributes:
        prompt: Ids of the rendered template, or of the text to classify; none for an image.
        answer: Ids of the reference answer, with the end-of-sequence token where the cut-off leaves room; none where
            there is a label.
        row: Where it came from.
        label: Index of the reference class, where rows are classified.
        image: The image, where there is one.
    """

    prompt: Prompt
    answer: tuple[int, ...]
    row: Row
    label: int = -1
    image: Image | None = None

    def __len__(self) -> int:
        return len(self.input) + len(self.answer)

    @property
    def input(self) -> Input:
        """What the model reads before it answers."""
        return self.image or self.prompt


@dataclass(frozen=True, slots=True)
class ClientExamples:
    """One client's examples, and how many rows were skipped because their prompt fills the cut-off."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    skipped: dict[str, int]


class Encoder(Protocol):
    """Makes examples of rows."""

    def example(self, row: Row) -> Example | None:
        """The row as the model reads it, or nothing when it does not fit.

        Raises:
            UserError: The row is not of the kind that the task asks for.
        """


class AnswerEncoder:
    """Renders the template and tokenises, for models that write answers.

    Args:
        tokenizer: A Hugging Face tokenizer.
        template: Name or file, see ``get_template``.
        cutoff: Longest row in tokens; the answer is cut there, a row whose prompt fills it is skipped.
        config: The section ``data``, which knows a template's own settings.
    """

    def __init__(self, tokenizer: Any, template: str, cutoff: int, config: DataConfig | None = None) -> None:
        self.tokenizer = tokenizer
        self.template: Template = get_template(template, tokenizer, config)
        self.cutoff = cutoff
        self._special = template != CHAT  # a chat template writes its own special tokens

    def prompt(self, instruction: str) -> Prompt:
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


class Classes:
    """The labels of a run.

    Args:
        labels: Their names, in the order of the head's outputs.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._index = {label: i for i, label in enumerate(labels)}

    def index(self, row: Row) -> int:
        """The class of a row.

        Raises:
            UserError: Its label is none of the run's.
        """
        if row.output not in self._index:
            known = listed(list(self._index))
            raise UserError(
                f'label "{row.output}" is on no training row and not in model.labels'
                f"{did_you_mean(row.output, self._index)}; labels: {known}"
            )
        return self._index[row.output]


class TextEncoder:
    """Tokenises texts to be classified, as the tokenizer does by default: with its special tokens, cut at the end.

    Args:
        tokenizer: A Hugging Face tokenizer.
        labels: Names of the classes.
        cutoff: Longest text in tokens.
    """

    def __init__(self, tokenizer: Any, labels: Sequence[str], cutoff: int) -> None:
        self.tokenizer = tokenizer
        self.classes = Classes(labels)
        self.cutoff = cutoff

    def prompt(self, instruction: str) -> Prompt:
        """Token ids of a text."""
        return tuple(self.tokenizer(instruction, truncation=True, max_length=self.cutoff)["input_ids"])

    def example(self, row: Row) -> Example:
        """The row in tokens and its class."""
        if row.image is not None:
            raise UserError("rows with images are for model.task=image_classification")
        return Example(self.prompt(row.instruction), (), row, self.classes.index(row))


class ImageEncoder:
    """Brings images to the model's size and range, when they are needed.

    Args:
        processor: A Hugging Face image processor.
        labels: Names of the classes.
        channels: Of the model: 3, or 1 for grey images.
        tokens: Tokens that the model makes of an image.
    """

    def __init__(self, processor: Any, labels: Sequence[str], channels: int, tokens: int) -> None:
        self.processor = processor
        self.classes = Classes(labels)
        self.mode = "L" if channels == 1 else "RGB"
        self.tokens = tokens
        self._read: Callable[[Row], Tensor] | None = None

    def picture(self, picture: Any) -> Float[Tensor, "c h w"]:
        """The pixels of a ``PIL.Image.Image``."""
        values: Tensor = self.processor(picture.convert(self.mode), return_tensors="pt")["pixel_values"][0]
        return values

    def image(self, row: Row) -> Image:
        """The row's image, to be read later."""
        if row.image is None:
            raise UserError("rows without images are for model.task=sequence_classification or causal_lm")
        if self._read is None:
            first = self.pixels(row)
            self._read = lru_cache(max(1, _KEPT // (first.numel() * first.element_size())))(self.pixels)
        return Image(row, self.tokens, self._read)

    def pixels(self, row: Row) -> Float[Tensor, "c h w"]:
        """Read a row's image now."""
        assert row.image is not None
        return self.picture(row.image.open())

    def example(self, row: Row) -> Example:
        """The row's image and its class."""
        return Example((), (), row, self.classes.index(row), self.image(row))


class Once:
    """An encoder that makes the example of a row once and keeps it.

    Args:
        encoder: What makes it.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._made: dict[int, tuple[Row, Example | None]] = {}

    def example(self, row: Row) -> Example | None:
        """The row as the model reads it; rows are told apart by identity, and kept so that theirs stays their own."""
        if id(row) not in self._made:
            self._made[id(row)] = row, self._encoder.example(row)
        return self._made[id(row)][1]


def encode_client(encoder: Encoder, data: ClientData) -> ClientExamples:
    """All rows of one client."""
    splits = {name: getattr(data, name) for name in SPLITS}
    encoded = {name: _present([encoder.example(row) for row in rows]) for name, rows in splits.items()}
    skipped = {name: len(rows) - len(encoded[name]) for name, rows in splits.items()}
    return ClientExamples(**encoded, skipped=skipped)


def encode_federation(federation: Federation, encoder: Encoder, config: DataConfig) -> dict[int, ClientExamples]:
    """Everybody's rows.

    Raises:
        UserError: A client has no row left to train on, or none to be scored on, or one that does not suit the task.
    """
    clients: dict[int, ClientExamples] = {}
    for client, data in federation.clients.items():
        try:
            examples = clients[client] = encode_client(encoder, data)
        except UserError as error:
            raise UserError(f"client {client}: {error}") from None
        for split in ("train", "test"):
            if not getattr(examples, split):
                raise UserError(
                    f"client {client}: all {examples.skipped[split]} {split} rows have a prompt of {config.cutoff} "
                    "tokens or more (data.cutoff), so all labels are masked and no answer is left"
                )
    return clients


def laid_out(inputs: Sequence[Input]) -> Tensor:
    """Token ids one after another, or images in a stack."""
    images = [value.pixels for value in inputs if isinstance(value, Image)]
    if images:
        return torch.stack(images)
    return torch.tensor([token for value in inputs if not isinstance(value, Image) for token in value])


def _present(examples: Sequence[Example | None]) -> tuple[Example, ...]:
    return tuple(example for example in examples if example is not None)
