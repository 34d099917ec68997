"""From rows to what a model reads: tokens or pixels, and an answer or a label.

Prompt and answer are tokenised apart, so training sees exactly the prompt of generation; or together, as the official
code does (``data.boundary``). Of a conversation all answers are trained, and the last one is written and scored.

A template is a text with ``{instruction}`` in it, or a function from an instruction to a prompt:

    @TEMPLATES.register("shout")
    def shout(instruction: str) -> str:
        return f"{instruction.upper()}!"

A class is made once, and called in the same way; its settings are ``self.settings``: those of its nested ``Settings``,
or the section ``data``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from fedalt.config.data import DataConfig
from fedalt.config.section import Named
from fedalt.data.federation import SPLITS, ClientData, Federation, Row, Turn
from fedalt.data.formats.columns import INPUT
from fedalt.data.formats.files import read_text
from fedalt.errors import UserError, did_you_mean, listed, shortened
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
_PLACE, _INPUT_PLACE = "{instruction}", "{input}"
_ASKED = "### Instruction:\n{instruction}\n\n"
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)

TEMPLATES.add("alpaca_short", f"{_ASKED}### Response:\n", __name__)
TEMPLATES.add("alpaca", f"{_ALPACA.format('')}{_ASKED}### Response:\n", __name__)
_PAIRED = {
    "alpaca": _ALPACA.format(", paired with an input that provides further context")
    + f"{_ASKED}### Input:\n{_INPUT_PLACE}\n\n### Response:\n"
}
"""Template → its text for an instruction with an input, where that is another one."""


class Template(Protocol):
    """Turns an instruction, perhaps with an input, into the text that the answer follows."""

    def __call__(self, instruction: str, beside: str = "") -> str:
        """The prompt."""
        ...


@dataclass(frozen=True)
class _Text:
    """A text with places in it; an input without a place of its own follows the instruction as in Alpaca."""

    plain: str
    paired: str

    def __call__(self, instruction: str, beside: str = "") -> str:
        """The prompt."""
        text = self.paired if beside else self.plain
        asked = f"{instruction}{INPUT}{beside}" if beside and _INPUT_PLACE not in text else instruction
        return re.sub(r"\{(instruction|input)\}", lambda place: asked if place[1] == "instruction" else beside, text)


@TEMPLATES.register(CHAT)
class Chat:
    """The tokenizer's own template, which writes special tokens itself."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("data.template: chat, but this tokenizer has no chat template; use alpaca_short or a file")
        self.tokenizer = tokenizer

    def __call__(self, instruction: str, beside: str = "") -> str:
        """The prompt."""
        return self.render(messages_of([("user", f"{instruction}\n{beside}" if beside else instruction)]))

    def render(self, said: Sequence[Message], tools: Sequence[Any] = (), asks: bool = True) -> str:
        """The text of a conversation, that the assistant's answer follows where it ``asks``."""
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}
        try:
            return str(
                self.tokenizer.apply_chat_template(list(said), tokenize=False, add_generation_prompt=asks, **options)
            )
        except Exception as error:  # whatever Jinja and the template raise
            roles, reason = ", ".join(str(message["role"]) for message in said), shortened(str(error), 200)
            raise UserError(
                f"data.template: chat: the tokenizer's template refuses turns of {roles}: {reason}"
            ) from None


Message = Mapping[str, Any]
"""A turn as chat templates take it."""


def messages_of(turns: Sequence[Turn]) -> list[Message]:
    """Turns as chat templates take them."""
    return [{"role": role, "content": text} for role, text in turns]


def get_template(name: str, tokenizer: Any, config: Named | None = None) -> Template:
    """A template by name, or a file's text that holds ``{instruction}``; ``config`` knows a template's own settings."""
    if name == CHAT:
        return Chat(tokenizer)
    text = template_text(name)
    if text is not None:
        return _Text(text, _PAIRED.get(name, text))
    config = config or Named()
    render = TEMPLATES.make(name, config.section, config)

    def prompt(instruction: str, beside: str = "") -> str:
        with TEMPLATES.blamed(name):
            made = render(f"{instruction}{INPUT}{beside}" if beside else instruction)
        if not isinstance(made, str):
            raise UserError(f'template "{name}" returned {type(made).__name__}; a prompt is text')
        return made

    return prompt


def template_text(name: str) -> str | None:
    """The text of a template with ``{instruction}`` in it; None for a function and for a tokenizer's chat template."""
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
    return read_text(path)


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
        tokens: Tokens that the model makes of it.
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
        label: Index of the reference class, where rows are classified.
        spans: Where in the prompt of a conversation earlier answers are, which are trained, too: first and after last.
        asked: The prompt as text, where answers are tokenised together with it.
        cut: Tokens that the cut-off leaves out.
    """

    prompt: Prompt
    answer: tuple[int, ...]
    row: Row
    label: int = -1
    image: Image | None = None
    spans: tuple[tuple[int, int], ...] = ()
    asked: str = field(default="", repr=False)
    cut: int = 0

    def __len__(self) -> int:
        return len(self.input) + len(self.answer)

    @property
    def supervised(self) -> list[tuple[int, int]]:
        """Place of every token that is trained, and the token."""
        earlier = [(i, self.prompt[i]) for first, end in self.spans for i in range(max(first, 1), end)]
        return [*earlier, *enumerate(self.answer, len(self.prompt))]

    @property
    def input(self) -> Input:
        """What the model reads before it answers."""
        return self.image or self.prompt


@dataclass(frozen=True, slots=True)
class ClientExamples:
    """One client's examples.

    Attributes:
        skipped: Split → rows that are left out because their prompt fills the cut-off.
        cut: Split → rows whose end the cut-off leaves out.
        ended: Split → rows whose answer has lost an end-of-sequence text.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    skipped: dict[str, int]
    cut: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)


class Encoder(Protocol):
    """Makes examples of rows."""

    def example(self, row: Row) -> Example | None:
        """The row as the model reads it, or nothing when it does not fit."""


class AnswerEncoder:
    """Renders the template and tokenises, for models that write answers.

    Args:
        template: Name or file, see ``get_template``.
        cutoff: Longest row in tokens; the answer is cut there, a row whose prompt fills it is skipped.
    """

    def __init__(self, tokenizer: Any, template: str, cutoff: int, config: DataConfig | None = None) -> None:
        self.tokenizer = tokenizer
        self.template: Template = get_template(template, tokenizer, config)
        self.cutoff = cutoff
        self._joint = config is not None and config.boundary == "joint"
        self._special = template != CHAT  # a chat template writes its own special tokens

    def prompt(self, asked: str | Sequence[Turn]) -> Prompt:
        """Token ids of what an answer follows, an instruction or a conversation, without an end-of-sequence token."""
        if not isinstance(asked, str):
            return self._conversation(asked)[0]
        return _ids(self.tokenizer, self.template(asked), self._special)

    def example(self, row: Row) -> Example | None:
        """The row in tokens, or nothing when no token of the answer fits under the cut-off."""
        row = self._without_ends(row)
        spans: tuple[tuple[int, int], ...] = ()
        if row.chat:
            row, prompt, spans, asked = self._calling(row)
        elif row.turns:
            prompt, spans, asked = self._conversation(row.turns)
        else:
            bare = row.instruction.removesuffix(f"{INPUT}{row.input}") if row.input else row.instruction
            asked = self.template(bare, row.input)
            prompt = _ids(self.tokenizer, asked, self._special)
        if len(prompt) >= self.cutoff:
            return None
        asked = asked if self._joint else ""
        answer = self._answer(row.output, prompt, asked)
        if row.chat:  # answers are compared without special tokens
            row = replace(row, output=self.tokenizer.decode(answer, skip_special_tokens=True))
        room = self.cutoff - len(prompt)
        return Example(prompt, answer[:room], row, spans=spans, asked=asked, cut=max(0, len(answer) - room))

    def _answer(self, text: str, prompt: Prompt, asked: str) -> tuple[int, ...]:
        return (*answer_ids(self.tokenizer, text, prompt, asked), self.tokenizer.eos_token_id)

    def _without_ends(self, row: Row) -> Row:
        """The row without an end-of-sequence text at the end of its answers: training adds the token itself."""
        end = getattr(self.tokenizer, "eos_token", None)
        if not end:
            return row
        turns = tuple((role, _without(text, end) if role == "assistant" else text) for role, text in row.turns)
        output = _without(row.output, end)
        return row if (output, turns) == (row.output, row.turns) else replace(row, output=output, turns=turns)

    def _conversation(self, turns: Sequence[Turn]) -> tuple[Prompt, tuple[tuple[int, int], ...], str]:
        """Token ids of everything before the last answer, where earlier answers are in them, and what is asked."""
        if isinstance(self.template, Chat):
            return self._chat(self.template, turns)
        ids: Prompt = ()
        spans, text = list[tuple[int, int]](), ""
        for role, said in turns:
            if role == "system":
                text += f"{said}\n\n"
            elif role == "user":
                text += self.template(said)
            else:
                prompt = _ids(self.tokenizer, text, not ids)
                answer = self._answer(said, prompt, text if self._joint else "")
                spans.append((len(ids) + len(prompt), len(ids) + len(prompt) + len(answer)))
                ids, text = (*ids, *prompt, *answer), "\n\n"
        return (*ids, *_ids(self.tokenizer, text, not ids)), tuple(spans), text

    def _chat(self, chat: Chat, turns: Sequence[Turn]) -> tuple[Prompt, tuple[tuple[int, int], ...], str]:
        text = chat.render(messages_of(turns))
        ids, spans = _ids(self.tokenizer, text, special=False), list[tuple[int, int]]()
        for place, (role, said) in enumerate(turns):
            if role != "assistant" or not place:
                continue
            start = text.find(said.strip(), _common(text, chat.render(messages_of(turns[:place]))))
            if start < 0:  # the template shows earlier answers in another form
                continue
            spans.append(self._span(ids, text, start, start + len(said.strip())))
        return ids, tuple(spans), text

    def _calling(self, row: Row) -> tuple[Row, Prompt, tuple[tuple[int, int], ...], str]:
        """A row that calls tools, with its last answer as the template writes it; and as ``_conversation``."""
        chat, given = self.template, json.loads(row.chat)
        if not isinstance(chat, Chat):
            raise UserError("data.template: rows with tools are laid out by a tokenizer's chat template only")
        messages, tools, end = given["messages"], given["tools"], self.tokenizer.eos_token
        for message in messages:
            if message["role"] == "assistant":
                message["content"] = _without(message["content"], end)
        self._check_tools(messages, tools, chat)
        *asked, last = messages
        text = chat.render(asked, tools)
        ids, spans = _ids(self.tokenizer, text, special=False), list[tuple[int, int]]()

        def answered(place: int, text: str) -> tuple[int, int]:
            """Where the answer at a place is in the whole text, without what ends its turn."""
            before, after = chat.render(messages[:place], tools), chat.render(messages[: place + 1], tools, asks=False)
            said = text[len(before) : _common(text, after)].partition(end)[0].rstrip()
            if not text.startswith(before) or not said.strip():
                raise UserError(
                    "data.template: chat: the tokenizer's template writes answers elsewhere than their prompts end"
                )
            return len(before) + len(said) - len(said.lstrip()), len(before) + len(said)

        for place, message in enumerate(asked):
            if message["role"] == "assistant" and place:
                spans.append(self._span(ids, text, *answered(place, text)))
        if "tool_calls" in last:
            whole = chat.render(messages, tools, asks=False)
            row = replace(row, output=whole[slice(*answered(len(asked), whole))])
        return row, ids, tuple(spans), text

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Any], chat: Chat) -> None:
        """Refuse a template that leaves out what a row says."""

        def without(name: str) -> list[Message]:
            return [{k: v for k, v in message.items() if k != name} for message in messages]

        silent = [{**message, "content": ""} if message["role"] == "tool" else message for message in messages]
        shown = chat.render(messages, tools, asks=False)
        for what, said, given in (
            ("tools", messages, ()),
            ("tool_calls", without("tool_calls"), tools),
            ("results of tools", silent, tools),
        ):
            if (said, given) != (messages, tools) and chat.render(said, given, asks=False) == shown:
                raise UserError(f"data.template: chat: the tokenizer's template leaves out the {what} of rows")

    def _span(self, ids: Prompt, text: str, start: int, end: int) -> tuple[int, int]:
        """Tokens of an earlier answer, with the end-of-sequence token if it is there."""
        first, after = (self._shared(ids, text[:to]) for to in (start, end))
        return first, after + (ids[after : after + 1] == (self.tokenizer.eos_token_id,))

    def _shared(self, ids: Prompt, text: str) -> int:
        """How many tokens a beginning of the text has in common with the whole."""
        return _common(ids, self.tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_ids(tokenizer: Any, text: str, prompt: Prompt, asked: str = "") -> tuple[int, ...]:
    """Token ids of an answer by itself; or as they follow its prompt in one text.

    ``asked`` is the prompt, or its end, as text; empty for an answer by itself. A token that would reach across the
    boundary cannot be told apart, so such an answer is tokenised by itself.
    """
    for special in (True, False) if asked else ():
        alone, whole = (_ids(tokenizer, text, special) for text in (asked, asked + text))
        if prompt[len(prompt) - len(alone) :] == alone == whole[: len(alone)] != whole:
            return whole[len(alone) :]
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ids(tokenizer: Any, text: str, special: bool) -> Prompt:
    """Token ids of a text, without an end-of-sequence token."""
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    return tuple(ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids)


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How much two sequences have in common from their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _without(text: str, end: str) -> str:
    """A text without an ending; unchanged where nothing would be left."""
    short = text.rstrip()
    while short.endswith(end):
        short = short.removesuffix(end).rstrip()
    return short if short and end in text[len(short) :] else text


class Classes:
    """The labels of a run, in the order of the head's outputs."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._index = {label: i for i, label in enumerate(labels)}

    def index(self, row: Row) -> int:
        """The class of a row."""
        if row.output not in self._index:
            known = listed(list(self._index))
            raise UserError(
                f'label "{row.output}" is on no training row and not in model.labels'
                f"{did_you_mean(row.output, self._index)}; labels: {known}"
            )
        return self._index[row.output]


class TextEncoder:
    """Tokenises texts to be classified, as the tokenizer does by default: with its special tokens, cut at the end."""

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
        prompt = self.prompt(row.instruction)
        long = len(prompt) == self.cutoff and len(self.tokenizer(row.instruction)["input_ids"])
        return Example(prompt, (), row, self.classes.index(row), cut=max(0, long - self.cutoff))


class ImageEncoder:
    """Brings images to the model's size and range, when they are needed.

    Args:
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
    """An encoder that makes the example of a row once and keeps it."""

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
    made = {name: [(row, encoder.example(row)) for row in rows] for name, rows in splits.items()}
    encoded = {name: _present([example for _, example in pairs]) for name, pairs in made.items()}
    return ClientExamples(
        **encoded,
        skipped={name: len(pairs) - len(encoded[name]) for name, pairs in made.items()},
        cut={name: sum(example.cut > 0 for example in mine) for name, mine in encoded.items()},
        ended={n: sum(e is not None and _lost_end(row, e.row) for row, e in pairs) for n, pairs in made.items()},
    )


def _lost_end(row: Row, read: Row) -> bool:
    return read.turns != row.turns or (read.output != row.output and not row.chat)


def encode_federation(federation: Federation, encoder: Encoder, config: DataConfig) -> dict[int, ClientExamples]:
    """Everybody's rows."""
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


_MOST_NOTES = 20
"""Clients whose skipped rows get a note of their own."""


def left_out(examples: Mapping[int, ClientExamples], cutoff: int) -> tuple[str, ...]:
    """Notes on rows that are skipped or cut, and on answers that have lost an end-of-sequence text."""

    def counted(name: str) -> str:
        counts = {s: sum(getattr(mine, name).get(s, 0) for mine in examples.values()) for s in SPLITS}
        return ", ".join(f"{count} {split}" for split, count in counts.items() if count)

    notes = list[str]()
    for client, mine in examples.items():
        if skipped := ", ".join(f"{count} {split}" for split, count in mine.skipped.items() if count):
            notes.append(f"client {client}: {skipped} rows skipped, their prompt fills data.cutoff={cutoff}")
    if len(notes) > _MOST_NOTES:
        notes[_MOST_NOTES:] = [f"rows of {len(notes) - _MOST_NOTES} more clients skipped, too"]
    if cut := counted("cut"):
        notes.append(f"cut at data.cutoff={cutoff} tokens: {cut} rows")
    if ended := counted("ended"):
        notes.append(
            f"an end-of-sequence text is taken off the answers of {ended} rows: training adds the token itself"
        )
    return tuple(notes)


def laid_out(inputs: Sequence[Input]) -> Tensor:
    """Token ids one after another, or images in a stack."""
    images = [value.pixels for value in inputs if isinstance(value, Image)]
    if images:
        return torch.stack(images)
    return torch.tensor([token for value in inputs if not isinstance(value, Image) for token in value])


def _present(examples: Sequence[Example | None]) -> tuple[Example, ...]:
    return tuple(example for example in examples if example is not None)
