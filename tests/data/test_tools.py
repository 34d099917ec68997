"""Rows that call tools: through the tokenizer's chat template, with the loss on the assistant's turns alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedalt.config.data import DataConfig
from fedalt.data import load
from fedalt.data.encode import AnswerEncoder
from fedalt.data.federation import Row
from fedalt.errors import UserError
from micro import EOS, call, model_folder, read_lines, settings, tokenizer, write_rows, write_yaml

TEMPLATE = """\
{%- if tools %}{{ '<s>tools' }}{% for tool in tools %}{{ ' ' + (tool | tojson) }}{% endfor %}{{ '</s>\n' }}{% endif -%}
{%- for m in messages -%}
<s>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}</s>
{% endfor -%}
{%- if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif -%}
"""
TOOL = {
    "name": "add",
    "description": "adds",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
CALL = {"name": "add", "arguments": {"a": 2}}
OPENAI = [
    {"role": "user", "content": "2 more?"},
    {
        "role": "assistant",
        "tool_calls": [{"id": "c1", "type": "function", "function": {**CALL, "arguments": '{"a": 2}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]
SHAREGPT = [
    {"from": "human", "value": "2 more?"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "4"},
    {"from": "gpt", "value": "It is 4."},
]
WRITTEN = '<call>{"name": "add", "arguments": {"a": 2}}</call>'


def read(tmp_path: Path, values: list[dict[str, Any]]) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    pool = load.load_as_it_is(DataConfig(source=str(write_rows(tmp_path / "rows.jsonl", values, True)), clients=1), 0)
    (mine,) = pool.clients.values()
    return (*mine.train, *mine.test), pool.notes


def chatty(template: str = TEMPLATE) -> Any:
    made = tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize("name", ["messages", "conversations"])
@pytest.mark.parametrize("tools", [[{"type": "function", "function": TOOL}], json.dumps([TOOL])])
def test_turns_of_tools_are_what_the_chat_template_makes_of_them(tmp_path: Path, name: str, tools: Any) -> None:
    turns = OPENAI if name == "messages" else SHAREGPT
    rows, notes = read(tmp_path, [{name: turns, "tools": tools}] * 2)
    assert not any("not read" in note for note in notes)
    made = chatty()
    example = AnswerEncoder(made, "chat", 500).example(rows[0])
    assert example is not None
    plain = [
        {"role": "user", "content": "2 more?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]},
    ]
    plain += [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "It is 4."}]
    tool = {"type": "function", "function": TOOL}
    whole = made.apply_chat_template(plain, tools=[tool], tokenize=False)
    assert made.decode([*example.prompt, *example.answer]) == whole.removesuffix("\n")
    assert made.decode([token for _, token in example.supervised]) == f"{WRITTEN}{EOS}It is 4.{EOS}"
    assert example.row.output == "It is 4."


def test_a_call_may_be_the_last_answer(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, [{"messages": OPENAI[:2], "tools": [TOOL]}] * 2)
    assert rows[0].output == json.dumps(CALL)
    example = AnswerEncoder(chatty(), "chat", 500).example(rows[0])
    assert example is not None
    assert chatty().decode(example.answer) == f"{WRITTEN}{EOS}"
    assert example.row.output == WRITTEN


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (TEMPLATE.replace("if tools", "if false"), "tools"),
        (TEMPLATE.replace("m.tool_calls or []", "[]"), "tool_calls"),
        (TEMPLATE.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"), "results of tools"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(tmp_path: Path, template: str, what: str) -> None:
    rows, _ = read(tmp_path, [{"messages": OPENAI, "tools": [TOOL]}] * 2)
    with pytest.raises(UserError, match=rf"data\.template: chat: .* leaves out the {what} of rows"):
        AnswerEncoder(chatty(template), "chat", 500).example(rows[0])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": OPENAI, "tools": "add(a)"}, '"tools" is no list of tools'),
        ({"messages": [OPENAI[0], {"role": "assistant", "tool_calls": [{"id": "c1"}]}]}, "no function with a name"),
        (
            {"messages": [OPENAI[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "a=2"}]}]},
            "the arguments of the tool call f are no JSON object",
        ),
        (
            {"conversations": [SHAREGPT[0], {"from": "function_call", "value": "add 2"}]},
            "is JSON with name and arguments",
        ),
    ],
)
def test_calls_that_cannot_be_read_are_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(tmp_path, [{"messages": OPENAI, "tools": [TOOL]} | row if "messages" in row else row, row])


def test_a_run_with_tools_trains_and_scores_calls(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    chatty().save_pretrained(model)
    rows = [{"messages": OPENAI[: 2 + 2 * (i % 2)], "tools": [{"name": "add"}]} for i in range(32)]
    file = write_rows(tmp_path / "rows.jsonl", rows, True)
    values = settings(
        tmp_path / "run", model, file, data__clients=2, data__cutoff=256, federation__rounds=1, training__local_epochs=1
    )
    done = call("run", write_yaml(tmp_path / "c.yaml", values))
    assert done.code == 0, done.err
    assert "OpenAI messages (messages + tools)" in done.err
    lines = read_lines(tmp_path / "run/results/eval_client0_round1.jsonl")
    assert {line["reference"] for line in lines} == {WRITTEN, "It is 4."}


def test_without_a_chat_template_tools_are_refused(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, [{"messages": OPENAI}] * 2)
    with pytest.raises(UserError, match=r"data\.template: rows with tools are laid out by a tokenizer's chat template"):
        AnswerEncoder(tokenizer(), "alpaca_short", 500).example(rows[0])
