"""Formats of rows that people have: what each becomes, what it is called, and the table of them in the docs.

``python tests/data/test_formats.py`` writes the table anew.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedalt.config.data import DataConfig
from fedalt.data import load
from fedalt.data.federation import Pool, Row
from fedalt.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "data.md"


def said(*turns: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, _, text in (turn.partition(": ") for turn in turns)]


@dataclass(frozen=True)
class Case:
    """A row, what it becomes, and what a note calls it.

    Attributes:
        name: What people call the format.
        row: As it stands in a file.
        becomes: The row that is trained.
        note: What is said about it.
        unread: Fields that are not read.
    """

    name: str
    row: dict[str, Any]
    becomes: Row
    note: str
    unread: str = ""


TALK = (("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?"))
FLAT = "System: Be brief.\n\nUser: 2+2?\n\nAssistant: 4\n\nUser: And 3+3?"
CASES = [
    Case(
        "Alpaca",
        {"instruction": "Add.", "input": "2 3", "output": "5"},
        Row("Add.\n\n### Input:\n2 3", "5", input="2 3"),
        "Alpaca (instruction + input → output)",
    ),
    Case(
        "Alpaca with an empty input",
        {"instruction": "Say hi.", "input": "", "output": "Hi.", "text": "Below is …"},
        Row("Say hi.", "Hi."),
        "Alpaca (instruction + input → output)",
        "text",
    ),
    Case(
        "instruction and output",
        {"instruction": "2+2?", "output": "4"},
        Row("2+2?", "4"),
        "instruction and output (instruction → output)",
    ),
    Case(
        "Dolly",
        {"instruction": "Who?", "context": "Ann did.", "response": "Ann", "category": "closed_qa"},
        Row("Who?\n\n### Input:\nAnn did.", "Ann", category="closed_qa", input="Ann did."),
        "Alpaca (instruction + context → response)",
    ),
    Case(
        "LLaMA-Factory",
        {"instruction": "And 3+3?", "output": "6", "system": "Be brief.", "history": [["2+2?", "4"]]},
        Row(FLAT, "6", turns=TALK),
        "instruction and output (system + history + instruction → output)",
    ),
    Case(
        "prompt and completion",
        {"prompt": "2+2?", "completion": "4", "id": 7},
        Row("2+2?", "4"),
        "prompt and completion (prompt → completion)",
        "id",
    ),
    Case(
        "prompt and completion as messages (TRL)",
        {"prompt": said(*[f"{role}: {text}" for role, text in TALK]), "completion": said("assistant: 6")},
        Row(FLAT, "6", turns=TALK),
        "OpenAI messages (prompt + completion)",
    ),
    Case(
        "question and answer",
        {"question": "2+2?", "answer": 4},
        Row("2+2?", "4"),
        "question and answer (question → answer)",
    ),
    Case("text and label", {"text": "Fine.", "label": 1}, Row("Fine.", "1"), "text: text; label: label"),
    Case(
        "pairs of texts",
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "yes", "idx": 0},
        Row("It rains.\nIt is wet.", "yes"),
        "text: premise, hypothesis; label: label",
        "idx",
    ),
    Case(
        "messages (OpenAI)",
        {"messages": said("user: 2+2?", "assistant: 4")},
        Row("2+2?", "4", turns=(("user", "2+2?"),)),
        "OpenAI messages (messages)",
    ),
    Case(
        "messages of several turns",
        {"messages": [*said(*[f"{role}: {text}" for role, text in TALK]), *said("assistant: 6")]},
        Row(FLAT, "6", turns=TALK),
        "OpenAI messages (messages)",
    ),
    Case(
        "messages in parts, with a weight",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
                {"role": "assistant", "content": "4", "weight": 1},
            ]
        },
        Row("2+2?", "4", turns=(("user", "2+2?"),)),
        "OpenAI messages (messages)",
        "messages[].weight",
    ),
    Case(
        "messages that call tools",
        {
            "tools": [{"type": "function", "function": {"name": "add"}}],
            "messages": [
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "1", "content": "4"},
                {"role": "assistant", "content": "4."},
            ],
        },
        Row(
            'User: 2+2?\n\nAssistant: {"name": "add", "arguments": {}}\n\nTool: 4',
            "4.",
            turns=(("user", "2+2?"), ("assistant", '{"name": "add", "arguments": {}}'), ("tool", "4")),
            chat='{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "", '
            '"tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {}}}]}, '
            '{"role": "tool", "content": "4", "tool_call_id": "1"}, {"role": "assistant", "content": "4."}], '
            '"tools": [{"type": "function", "function": {"name": "add"}}]}',
        ),
        "OpenAI messages (messages + tools)",
    ),
    Case(
        "conversations (ShareGPT)",
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "gpt", "value": "4"},
                {"from": "human", "value": "And 3+3?"},
                {"from": "gpt", "value": "6"},
            ],
            "system": "Be brief.",
            "id": "x1",
        },
        Row(FLAT, "6", turns=TALK),
        "ShareGPT conversations (conversations + system)",
        "id",
    ),
]


def read(path: Path, *rows: Any, **settings: Any) -> Pool:
    path.write_text(json.dumps(rows), encoding="utf-8")
    pool = load.read(DataConfig(source=str(path), **settings))
    assert isinstance(pool, Pool)
    return pool


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_format_is_read_and_named(tmp_path: Path, case: Case) -> None:
    pool = read(tmp_path / "rows.json", case.row)
    (row,) = pool.train
    assert row == Row(**{**{f: getattr(case.becomes, f) for f in Row.__slots__}, "task": "rows"})
    assert case.note in pool.notes[0]
    assert pool.notes[1:] == ((f"{pool.source}: not read: {case.unread}",) if case.unread else ())


ASKED = {
    "two texts": ({"text": "a", "sentence": "b", "label": 1}, {}, ["[text]", "[sentence]"]),
    "two formats": ({"prompt": "a", "completion": "b", "text": "c", "label": 1}, {}, ["[prompt]", "[text]"]),
    "messages and a text": (
        {"messages": said("user: a", "assistant: b"), "instruction": "a", "output": "b"},
        {},
        ["[messages]", "[instruction]"],
    ),
    "two answers": (
        {"instruction": "a", "output": "b", "response": "c"},
        {},
        ["label_column=output", "label_column=response"],
    ),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, ["data.label_column: say which", "chosen"]),
    "plain text": ({"text": "a"}, {}, ["data.label_column: say which column is the label"]),
    "no answer": ({"messages": said("system: a", "user: b")}, {}, ["has no answer of the assistant"]),
    "an unknown role": ({"messages": said("user: a", "wizard: b", "assistant: c")}, {}, ['a turn of "wizard"']),
    "an empty answer": ({"messages": said("user: a", "assistant:  ")}, {}, ['"turn of assistant" is empty']),
    "pictures in a message": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, *said("assistant: a")]},
        {},
        ["holds list, expected text"],
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_could_be_either_is_asked_for(tmp_path: Path, name: str) -> None:
    row, settings, pieces = ASKED[name]
    with pytest.raises(UserError) as caught:
        read(tmp_path / "rows.json", row, **settings)
    assert all(piece in str(caught.value) for piece in pieces), str(caught.value)


def test_a_column_that_is_named_is_taken(tmp_path: Path) -> None:
    both = {"text": "a", "sentence": "b", "label": 1}
    assert read(tmp_path / "a.json", both, text_columns=("sentence",)).train[0].instruction == "b"
    preferred = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert read(tmp_path / "b.json", preferred, label_column="chosen").train[0].output == "b"
    mixed = {"messages": said("user: a", "assistant: b"), "instruction": "c", "output": "d"}
    assert read(tmp_path / "c.json", mixed, text_columns=("messages",)).train[0].output == "b"
    assert read(tmp_path / "d.json", mixed, text_columns=("instruction",)).train[0].output == "d"
    alone = {"instruction": "a", "input": "b", "output": "c"}
    pool = read(tmp_path / "e.json", alone, text_columns=("instruction",))
    assert (pool.train[0].instruction, pool.notes[1]) == ("a", f"{pool.source}: not read: input")


def test_what_follows_the_last_answer_is_left_out_with_a_note(tmp_path: Path) -> None:
    pool = read(tmp_path / "a.json", {"messages": said("user: a", "assistant: b", "user: c")})
    assert pool.train[0].output == "b"
    assert "1 conversations go on after their last answer" in pool.notes[1]


def test_optional_fields_may_be_null_or_missing(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "input": "b", "output": "c", "task": "t"},
        {"instruction": "a", "input": None, "output": "c", "task": None},
        {"instruction": "a", "output": "c"},
    ]
    found = read(tmp_path / "a.json", *rows).train
    assert [(row.input, row.task) for row in found] == [("b", "t"), ("", "a"), ("", "a")]


def table() -> str:
    """Formats, a row each."""

    def cell(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
        return text.replace("|", "\\|")

    head = "| format | a row | how it is named |\n|---|---|---|\n"
    return head + "".join(f"| {c.name} | `{short(cell(c.row))}` | {cell(c.note)} |\n" for c in CASES)


def short(text: str) -> str:
    return text if len(text) <= 62 else f"{text[:61]}…"


MARKED = re.compile(r"(?<=<!-- formats -->\n\n).*?(?=\n<!-- end -->)", re.DOTALL)


def test_the_table_in_the_docs_is_made_of_these_rows() -> None:
    assert MARKED.findall(PAGE.read_text(encoding="utf-8")) == [table()]


if __name__ == "__main__":
    PAGE.write_text(MARKED.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
