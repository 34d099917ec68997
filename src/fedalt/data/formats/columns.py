"""From columns to rows: which columns are the prompt, which the answer, and what nobody reads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

from fedalt.config.data import DataConfig
from fedalt.data.federation import SPLITS, ClientData, Federation, Picture, Pool, Row, Turn, needs_column
from fedalt.errors import UserError, alternatives, did_you_mean, listed

_CLASSES = ("label", "fine_label", "labels", "class", "target", "coarse_label")
FORMATS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("instruction and output", ("instruction",), ("output", "response")),
    ("prompt and completion", ("prompt",), ("completion", "response")),
    ("question and answer", ("question",), ("answer", "response")),
    ("query and response", ("query",), ("response", "answer")),
    ("input and output", ("input",), ("output",)),
    ("", ("premise", "hypothesis"), _CLASSES),
    ("", ("sentence1", "sentence2"), _CLASSES),
    ("", ("question1", "question2"), _CLASSES),
    ("", ("question", "sentence"), _CLASSES),
    ("", ("text",), _CLASSES),
    ("", ("sentence",), _CLASSES),
    ("", ("review",), _CLASSES),
    ("", ("content",), _CLASSES),
)
"""Name, text columns (two are joined by a newline), and what the answer's column may be called."""
_TEXTS = tuple(text for _, text, _ in FORMATS)
_LABELS = tuple(dict.fromkeys(label for _, _, labels in FORMATS for label in labels))
_ASKED = {"instruction", "prompt", "question", "query"}
"""Texts that another column may go with, as Alpaca's ``input`` does."""
_INPUTS = ("input", "context")
_TURNS = ("messages", "conversations", "conversation")
_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard", "function_call"),
    "tool": ("tool", "observation", "function"),
}
"""Role → what OpenAI, ShareGPT and others call it."""
_KEYS = (("role", "content"), ("from", "value"))
_TOOL_KEYS = {"assistant": ("tool_calls", "function_call"), "tool": ("tool_call_id", "name")}
"""Role → what its turns may hold beside their text."""
_TOOLS = "tools"
_CLIENTS = ("client", "client_id")
_OPTIONAL = ("category", "system", "history", _TOOLS, *_INPUTS)
"""Columns that are read if any split has them."""
_UNREAD = "not read: "
COARSE = "coarse_label"
"""Column of superclasses, which becomes the category of rows that have none."""
INPUT = "\n\n### Input:\n"
"""What stands between Alpaca's instruction and its input."""


@dataclass(frozen=True, slots=True)
class Record:
    """A row as its source has it.

    Attributes:
        values: Column → value.
        where: File and line, or data set and row.
        name: What an image is called, which stands where other rows have their text.
        picture: The image.
    """

    values: Mapping[str, Any]
    where: str
    name: str = ""
    picture: Picture | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns become what.

    Attributes:
        format: Its name; empty for texts and labels.
        text: Columns that are joined by a newline; none where rows are images.
        extra: Column that is kept beside the rows because they are dealt by it.
        input: Column that joins the text in Alpaca's way.
        turns: Columns of a conversation, one after another.
        system: Column of a system prompt.
        history: Column of pairs of earlier questions and answers.
        tools: Column of the tools that a conversation may call.
    """

    format: str
    text: tuple[str, ...]
    label: str
    category: str = ""
    extra: str | None = None
    input: str = ""
    turns: tuple[str, ...] = ()
    system: str = ""
    history: str = ""
    tools: str = ""

    def __str__(self) -> str:
        if not self.format:
            return f"{'text: ' + ', '.join(self.text) if self.text else 'images'}; label: {self.label}"
        beside = [name for name in (self.system, self.history, self.tools) if name]
        if self.turns:
            return f"{self.format} ({' + '.join((*self.turns, *beside))})"
        return f"{self.format} ({' + '.join((*beside, *self.text, *filter(None, [self.input])))} → {self.label})"

    @property
    def read(self) -> set[str]:
        """Every column that is read."""
        single = (
            self.label,
            self.category,
            self.extra or "",
            self.input,
            self.system,
            self.history,
            self.tools,
            "task",
        )
        return {*self.text, *self.turns, *single} - {""}


def to_pool(
    config: DataConfig,
    splits: Mapping[str, Sequence[Record]],
    source: str,
    kind: str,
    *,
    hint: str = "",
    task: str | None = None,
) -> Pool:
    """Rows of every split from the columns that the settings name.

    Args:
        config: Names of columns and labels.
        splits: Records by split.
        source: What the pool is called.
        kind: What was recognised, for a note.
        hint: What else may be the matter where a column is not found.
        task: Task of rows that name none; the last part of ``source`` when not given.
    """
    pool, columns, told = _pool(config, splits, source, hint, task=task)
    return replace(pool, notes=(f"{source}: {kind}; {columns}; {_counted([pool])}", *_told(told, source)))


def to_federation(
    config: DataConfig,
    clients: Mapping[str, Mapping[str, Sequence[Record]]],
    source: str,
    kind: str,
    tasks: Sequence[str] = (),
) -> Federation:
    """Clients from the records of each, in this order; the columns of each are recognised for themselves.

    Args:
        config: Names of columns and labels.
        clients: What errors call a client → records by split.
        source: What the federation is called.
        kind: What was recognised, for a note.
        tasks: Task of each client's rows that name none; clients then are named in the first note.
    """
    pools, formats, told = list[Pool](), Counter[str](), Counter[str]()
    for place, (name, splits) in enumerate(clients.items()):
        pool, columns, mine = _pool(config, splits, name, "", task=tasks[place] if tasks else "", dealt=False)
        pools.append(pool)
        formats[str(columns)] += 1
        told.update(mine)
    recognised = listed([text if len(formats) == 1 else f"{count} × {text}" for text, count in formats.items()])
    note = f"{source}: {kind}; {recognised}; {named_clients(len(pools), tasks)}; {_counted(pools)}"
    return of_pools(pools, source, (note, *_told(told, source)))


def of_pools(pools: Sequence[Pool], source: str, notes: tuple[str, ...]) -> Federation:
    """A client for each pool."""
    made = {i: ClientData(*map(pool.split, SPLITS)) for i, pool in enumerate(pools)}
    return Federation(made, source, notes, frozenset(label for pool in pools for label in pool.labels))


def named_clients(count: int, names: Sequence[str]) -> str:
    """How many clients there are, and what they are called."""
    return f"{count} clients{': ' if names else ''}{listed([f'{i} {name}' for i, name in enumerate(names)])}"


def _pool(
    config: DataConfig,
    splits: Mapping[str, Sequence[Record]],
    source: str,
    hint: str,
    *,
    task: str | None,
    dealt: bool = True,
) -> tuple[Pool, Columns, Counter[str]]:
    """The rows, what was recognised, and what is left aside, with how often."""
    for split in splits:
        if not splits[split]:
            raise UserError(f"{source}: no {split} rows")
    every = [record for records in splits.values() for record in records]
    sample: dict[str, Any] = {}
    for record in splits["train"]:
        sample |= {k: v for k, v in record.values.items() if not sample.get(k)}
    for record in every:
        sample |= {k: v for k, v in record.values.items() if k in _OPTIONAL and not sample.get(k)}
    by = _clients_column(config, sample, source) if dealt else ""
    extra = needs_column(config.partition.column or by or None) if dealt else None
    columns = _choose(config, sample, pictures=every[0].picture is not None, source=source, hint=hint, extra=extra)
    task = source.rstrip("/").rpartition("/")[2].partition(".")[0] if task is None else task
    names = dict.fromkeys(name for record in every for name in record.values)
    told = Counter(f"{_UNREAD}{name or '(no name)'}" for name in names if name not in columns.read)
    owner = extra if by or config.partition.by == "column" else None
    rows: dict[str, Any] = {
        s: tuple(_row(record, columns, config, task=task, owner=owner, told=told) for record in splits.get(s, ()))
        for s in SPLITS
    }
    labels = frozenset(_cell(record, columns.label) for record in every) if columns.label else frozenset()
    kept = {s: tuple(_text(r, columns.extra) for r in mine) for s, mine in splits.items()} if columns.extra else {}
    return Pool(**rows, source=source, column=kept, labels=labels, by=by), columns, told


def _counted(pools: Sequence[Pool]) -> str:
    counts = {split: sum(len(pool.split(split)) for pool in pools) for split in SPLITS}
    return ", ".join(f"{count} {split} rows" for split, count in counts.items() if count)


def _told(told: Mapping[str, int], source: str) -> tuple[str, ...]:
    unread = [text.removeprefix(_UNREAD) for text in told if text.startswith(_UNREAD)]
    others = (f"{source}: {count} {text}" for text, count in told.items() if not text.startswith(_UNREAD))
    return (*((f"{source}: {_UNREAD}{listed(unread)}",) if unread else ()), *others)


def find_label(config: DataConfig, known: Sequence[str]) -> str | None:
    """The label's column: the one that the settings name, or the first that is usual; nothing where it is not there."""
    names = (config.label_column,) if config.label_column else (*_LABELS, *_TURNS)
    return next((name for name in names if name in known), None)


def has_header(config: DataConfig, source: str) -> None:
    """Refuse names of columns for a source that names them itself."""
    if config.columns:
        raise UserError(
            f"data.columns: {source} names its columns itself; this is for CSV and TSV files without a header"
        )


def mappings(values: Iterable[tuple[str, Any]]) -> list[Record]:
    """Mappings of columns to values, each after where it stands."""
    records: list[Record] = []
    for where, value in values:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: a row is a mapping of columns to values, found {type(value).__name__}")
        records.append(Record(value, where))
    return records


# ----------------------------------------------------------------------------------------------- which columns are what


def _clients_column(config: DataConfig, known: Mapping[str, Any], source: str) -> str:
    """A column that says whose a row is, where nothing else does."""
    options = config.partition
    named = {*(config.text_columns or ()), config.label_column}
    found = next((name for name in _CLIENTS if name in known and name not in named), "")
    if not found or options.by or options.file or options.column:
        return ""
    if config.clients:
        raise UserError(
            f'{source} has a column "{found}", and data.clients={config.clients} is asked for: write '
            f"data.partition.column={found} data.partition.by=column without data.clients for a client per value, or "
            "data.partition.by=iid to deal the rows"
        )
    return found


def _choose(
    config: DataConfig, known: Mapping[str, Any], *, pictures: bool, source: str, hint: str, extra: str | None
) -> Columns:
    where = _columns(list(known), source) + hint
    if pictures and config.text_columns:
        raise UserError(f"data.text_columns: the rows of {source} are images, which have no text")
    for key, names in (
        ("text_columns", config.text_columns or ()),
        ("label_column", (config.label_column,) if config.label_column else ()),
        ("partition.column", (extra,) if extra else ()),
    ):
        for name in names:
            if name not in known:
                raise UserError(f'data.{key}: no column "{name}"{did_you_mean(name, known)}; {where}')
    category = "category" if "category" in known else ""
    if pictures:
        label = find_label(config, list(known))
        if label is None:
            raise UserError(f"data.label_column: say which column is the label; {where}")
        return Columns("", (), label, category or (COARSE if label != COARSE else ""), extra)
    talks = _conversations(config, known)
    found = _one(talks if talks and config.text_columns else [*talks, *_pairs(config, known)], config, known, where)
    if not found.turns and not category and found.label != COARSE:
        category = COARSE if COARSE in known else ""
    return replace(found, category=category, extra=extra, **_beside(config, found, known))


def _pairs(config: DataConfig, known: Mapping[str, Any]) -> list[Columns]:
    """Every text with its answer that the columns may be read as."""
    free = [name for name in known if not _is_turns(known[name])]
    texts = [config.text_columns] if config.text_columns else _texts(free, config.label_column)
    labels = [config.label_column] if config.label_column else [x for x in _LABELS if x in free]
    labels = [label for label in labels if not config.text_columns or label not in config.text_columns]
    pairs = [
        Columns(name, text, label)
        for name, text, own in FORMATS
        for label in ([config.label_column] if config.label_column else own)
        if text in texts and label in labels and label not in text
    ]
    if config.label_column is None and pairs:
        return pairs
    named = {pair.text for pair in pairs}
    rest = [Columns("", text, label) for text in texts if text not in named for label in labels if label not in text]
    return [*pairs, *rest]


def _texts(known: Sequence[str], label: str | None) -> list[tuple[str, ...]]:
    """Groups of text columns that are there; none that is a part of another, nor an input that goes with a text."""
    there = [text for text in _TEXTS if set(text) <= {*known} - {label}]
    there = [text for text in there if not any(set(text) < set(other) for other in there)]
    asked = any(_ASKED & set(text) for text in there)
    return [text for text in there if not (asked and text == ("input",))]


def _conversations(config: DataConfig, known: Mapping[str, Any]) -> list[Columns]:
    """Every way to read the columns as turns."""
    turns = [name for name in known if _is_turns(known[name])]
    if config.label_column:
        return []
    if config.text_columns:
        both = all(name in turns for name in config.text_columns)
        return [_conversation(config.text_columns, known)] if both else []
    if {"prompt", "completion"} <= set(turns):
        return [_conversation(("prompt", "completion"), known)]
    return [_conversation((name,), known) for name in turns if name in _TURNS]


def _conversation(columns: tuple[str, ...], known: Mapping[str, Any]) -> Columns:
    role = _KEYS[0][0] in _values(known[columns[0]])[0]
    return Columns("OpenAI messages" if role else "ShareGPT conversations", (), "", turns=columns)


def _one(found: Sequence[Columns], config: DataConfig, known: Mapping[str, Any], where: str) -> Columns:
    """The only way to read the columns."""
    texts = list(dict.fromkeys(one.text or one.turns for one in found))
    if len(texts) > 1:
        spelt = alternatives([f"data.text_columns=[{','.join(text)}]" for text in texts])
        raise UserError(f"data.text_columns: several columns could be the text, write {spelt}; {where}")
    labels = [one.label for one in found if one.label != COARSE or len(found) == 1]
    if len(labels) > 1:
        spelt = alternatives([f"data.label_column={label}" for label in labels])
        raise UserError(f"data.label_column: several columns could be the answer, write {spelt}; {where}")
    if found:
        return found[0]
    if find_label(config, [name for name in known if name not in _TURNS]) is None:
        raise UserError(f"data.label_column: say which column is the label; {where}")
    raise UserError(f"data.text_columns: say which columns are the text; {where}")


def _beside(config: DataConfig, found: Columns, known: Mapping[str, Any]) -> dict[str, Any]:
    """Columns that go with a text: Alpaca's input, and LLaMA-Factory's system prompt and history."""
    if config.text_columns or not (found.turns or set(found.text) & _ASKED):
        return {}
    beside = {"system": "system"} if isinstance(known.get("system"), str) else {}
    if found.turns:
        return beside | ({_TOOLS: _TOOLS} if _listed(known.get(_TOOLS)) else {})
    beside |= {"history": "history"} if _is_history(known.get("history")) else {}
    taken = {*found.text, found.label}
    name = next((name for name in _INPUTS if name in known and name not in taken), "")
    if not name or isinstance(known[name], list | dict | bytes):
        return beside
    return beside | {"input": name, "format": "Alpaca" if found.text == ("instruction",) else found.format}


def _columns(known: Sequence[str], source: str) -> str:
    return f"{source} has the columns {listed([name if len(name) <= 30 else f'{name[:29]}…' for name in known])}"


# ----------------------------------------------------------------------------------------------------------------- rows


def _row(
    record: Record, columns: Columns, config: DataConfig, *, task: str, owner: str | None, told: Counter[str]
) -> Row:
    own = _text(record, "task", "") or (_text(record, owner, task) if owner else task)
    category = _text(record, columns.category, "")
    if columns.turns:
        messages = [message for name in columns.turns for message in _messages(record, name, told)]
        if columns.system and (system := _text(record, columns.system, "")):
            messages = [{"role": "system", "content": system}, *messages]
        return _conversed(messages, record, own, category, told)
    label = _text(record, columns.label)
    output = (config.label_names or {}).get(label, label)
    if record.picture:
        return Row(record.name, output, own, category, record.picture)
    text = "\n".join(_text(record, name) for name in columns.text)
    beside = _text(record, columns.input, "") if columns.input else ""
    asked = f"{text}{INPUT}{beside}" if beside else text
    earlier = _earlier(record, columns)
    if not earlier:
        return Row(asked, output, own, category, input=beside)
    turns = [*earlier, ("user", f"{text}\n{beside}" if beside else text)]
    return Row(_flat(turns), output, own, category, turns=tuple(turns))


def _earlier(record: Record, columns: Columns) -> list[Turn]:
    system = _text(record, columns.system, "") if columns.system else ""
    turns = [("system", system)] if system else []
    for pair in (columns.history and record.values.get(columns.history)) or ():
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(one, str) for one in pair)):
            raise UserError(f'{record.where}: "{columns.history}" holds pairs of a question and its answer')
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns


def _conversed(messages: Sequence[dict[str, Any]], record: Record, task: str, category: str, told: Counter[str]) -> Row:
    """The last answer, after everything before it."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if not last:
        raise UserError(f"{record.where}: the conversation has no answer of the assistant to a turn before it")
    if last < len(messages) - 1:
        told["conversations go on after their last answer; what follows it is left out"] += 1
    messages = messages[: last + 1]
    tools = _whole(_listed(record.values.get(_TOOLS), record.where))
    turns = [(message["role"], _shown(message)) for message in messages]
    for role, text in turns:
        check_text(text, f"turn of {role}", record.where, required=role != "tool")
    chat = ""
    if tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        chat = json.dumps({"messages": messages, "tools": tools}, ensure_ascii=False)
    return Row(_flat(turns[:last]), turns[last][1], task, category, turns=tuple(turns[:last]), chat=chat)


def _shown(message: Mapping[str, Any]) -> str:
    """What a turn says, with the calls in it."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(filter(None, [message["content"], *calls]))


def _flat(turns: Sequence[Turn]) -> str:
    """Turns as one text, for logs and digests: the question alone where there is nothing else."""
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)


def _messages(record: Record, column: str, told: Counter[str]) -> list[dict[str, Any]]:
    """Turns as a chat template takes them; those of one role are joined where no tool is called."""
    messages: list[dict[str, Any]] = []
    value = record.values.get(column)
    if not _is_turns(value):
        raise UserError(
            f'{record.where}: "{column}" is no list of turns, each with role and content (or from and value)'
        )
    for turn in _values(value):
        who, what = _keys(turn) or _KEYS[0]
        role = next((role for role, names in _ROLES.items() if turn[who] in names), None)
        if role is None:
            known = listed([name for names in _ROLES.values() for name in names])
            raise UserError(f'{record.where}: a turn of "{turn[who]}" cannot be read; the roles are {known}')
        read = {k: _whole(turn[k]) for k in _TOOL_KEYS.get(role, ()) if turn.get(k)}
        unread = turn.keys() - {who, what, *read}
        told.update({f"{_UNREAD}{column}[].{k}": 1 for k in turn if k in unread and turn[k] is not None})
        text = _content(turn.get(what), column, record.where)
        calls = _calls(text if turn[who] == "function_call" else None, read, f"{record.where}: {column}")
        message = {"role": role, "content": "" if turn[who] == "function_call" else text, **read, **calls}
        if messages and messages[-1]["role"] == role != "tool" and not {*message, *messages[-1]} - {"role", "content"}:
            message["content"] = f"{messages.pop()['content']}\n{text}"
        messages.append(message)
    return messages


def _calls(said: str | None, read: dict[str, Any], where: str) -> dict[str, Any]:
    """The calls of a turn in one form: OpenAI's two, or LLaMA-Factory's turn of a call."""
    calls = read.pop("tool_calls", None) or read.pop("function_call", None) or (said and _parsed(said))
    if not calls:
        if said is not None:
            raise UserError(f"{where}: a function_call is JSON with name and arguments")
        return {}
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: a tool call has no function with a name")
        arguments = function.get("arguments") or {}
        arguments = _parsed(arguments) if isinstance(arguments, str) else arguments  # templates write JSON themselves
        if not isinstance(arguments, Mapping):
            raise UserError(f"{where}: the arguments of the tool call {function['name']} are no JSON object")
        beside = {k: v for k, v in call.items() if k == "id"}
        made.append({**beside, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return {"tool_calls": made}


def _parsed(text: str) -> Any:
    """A text's JSON, or nothing."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _listed(tools: Any, where: str = "") -> list[Any]:
    """Tools in a list, or in the JSON of one, each with its type; refused where they are something else."""
    found = _parsed(tools) if isinstance(tools, str) else tools
    if not isinstance(found, list | tuple):
        if tools and where:
            raise UserError(f'{where}: "{_TOOLS}" is no list of tools, nor its JSON')
        return []
    return [t if not isinstance(t, Mapping) or "function" in t else {"type": "function", "function": t} for t in found]


def _whole(value: Any) -> Any:
    """A value without the empty fields that columnar files give everybody."""
    if isinstance(value, Mapping):
        return {k: _whole(v) for k, v in value.items() if v is not None}
    return [_whole(v) for v in value] if isinstance(value, list | tuple) else value


def _content(value: Any, column: str, where: str) -> str:
    if isinstance(value, list):  # OpenAI's parts
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in value
        ]
        value = "\n".join(parts) if all(isinstance(part, str) for part in parts) else value  # type: ignore[arg-type]
    if value is not None and not isinstance(value, str):
        raise UserError(f'{where}: a turn of "{column}" holds {type(value).__name__}, expected text')
    return value or ""


def _values(value: Any) -> list[Any]:
    """A list of turns, or its JSON in a cell; anything else has no turns."""
    if isinstance(value, str) and value.startswith("[{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return list(value) if isinstance(value, list | tuple) else []


def _is_turns(value: Any) -> bool:
    turns = _values(value)
    return bool(turns) and all(isinstance(turn, Mapping) and _keys(turn) is not None for turn in turns)


def _keys(turn: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a turn's role and text are called; a turn that calls tools may have no text."""
    calls = not turn.keys().isdisjoint(_TOOL_KEYS["assistant"])
    return next((keys for keys in _KEYS if keys[0] in turn and (keys[1] in turn or calls)), None)


def _is_history(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(pair, list | tuple) for pair in value)


def _text(record: Record, column: str | None, instead: str | None = None) -> str:
    """A cell as text; where the column or its value may be missing, ``instead``."""
    text = _cell(record, column or "")
    if instead is not None and not text:
        return instead
    if instead is None and column not in record.values:
        hint = did_you_mean(str(column), record.values)
        raise UserError(f'{record.where}: no "{column}"{hint}; the row has: {listed(list(record.values)) or "nothing"}')
    check_text(text, str(column), record.where, instead is None)
    return text


def _cell(record: Record, column: str) -> str:
    value = record.values.get(column) if column else None  # a column without a name is pandas' index
    if isinstance(value, list | dict | bytes):
        raise UserError(f'{record.where}: "{column}" is {type(value).__name__}, expected text or a number')
    empty = value is None or (isinstance(value, float) and isnan(value))  # pandas' null
    return "" if empty else str(value)


def check_text(text: str, name: str, where: str, required: bool = True) -> None:
    """Refuse half characters, and nothing but blanks where there must be something."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f'{where}: "{name}" holds half a character (a lone surrogate), which is no text')
    if required and not text.strip():
        raise UserError(f'{where}: "{name}" is empty')
