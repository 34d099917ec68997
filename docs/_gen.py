"""Pages that are made from the code while the site is built: settings, commands, methods, API, decisions, changelog.

A hook of MkDocs. Nothing is written into ``docs/``.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
import typer
from annotated_types import Ge, Gt, Le, Lt
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.text import Text

import fedalt
from fedalt.cli.app import app
from fedalt.cli.known import method_table
from fedalt.config import RunConfig
from fedalt.methods.registry import Variant
from fedalt.registry import METHODS
from fedalt.registry import sections as registered_sections

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages to those in the folder."""
    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Keep short cells of tables, such as ``49.3 ± 2.2``, on one line."""
    return re.sub(r"<(t[dh])>(?=[^<]{1,22}</)", r'<\1 class="short">', html)


def pages() -> dict[str, str]:
    """Path below ``docs/`` → Markdown."""
    return {
        "reference/settings.md": settings_page(),
        "reference/commands.md": commands_page(),
        "reference/methods.md": methods_page(),
        "reference/api.md": api_page(),
        "reference/works.md": works_page(),
        "adr/index.md": decisions_page(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    }


# -------------------------------------------------------------------------------------------------------- settings


def settings_page() -> str:
    """Every key of the YAML with type, range, default and description, section by section."""
    head = (
        "# Settings\n\nOne YAML file holds every setting of a run; `--set KEY=VALUE` changes one on the command line. "
        "A key that does not exist, or a value outside its range, stops the run before it starts. The defaults are "
        "the paper's. Only what differs from them needs to be written.\n\n"
        "```yaml\nmethod: fedalt\nmodel: {name: my/llama, dtype: bfloat16}\ndata: {source: my_rows}\n```\n"
    )
    return head + "\n".join(_sections(RunConfig, "")) + "\n"


def _sections(section: type[BaseModel], path: str) -> Iterator[str]:
    fields = dict(section.model_fields)
    if not path:
        fields.pop("sections", None)  # of registered things, which follow
    nested = {key: field.annotation for key, field in fields.items() if _is_section(field.annotation)}
    yield f"\n## {f'`{path}`' if path else 'The run'}\n\n{first_line(section)}\n"
    yield from (setting(f"{path}.{key}".lstrip("."), field) for key, field in fields.items() if key not in nested)
    for key, kind in nested.items():
        yield from _sections(kind, f"{path}.{key}".lstrip("."))
    if not path:
        for key, kind in registered_sections().items():
            yield from _sections(kind, key)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def setting(key: str, field: FieldInfo) -> str:
    """One setting as an entry of a definition list."""
    default = field.get_default(call_default_factory=True)
    shown = f"default {_code(default)}" if default is not None else "no default"
    return f"`{key}`{{ #{key} }} · {type_of(field)} · {shown}\n:   {escaped(field.description or '')}\n"


def type_of(field: FieldInfo) -> str:
    """A field's type in words, with its range."""
    return _in_words(field.annotation, field.metadata)


def _in_words(kind: Any, limits: Any = ()) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _in_words(args[0], [*args[1:], *limits])
    if origin in (Union, UnionType):
        return " or ".join(_in_words(a, limits) if a is not NoneType else "None" for a in args)
    if origin is Literal:
        return ", ".join(_code(value) for value in args)
    if origin is tuple:
        return f"list of {_in_words(args[0])}"
    if origin is dict:
        return f"{_in_words(args[0])} → {_in_words(args[1])}"
    words = {bool: "true or false", int: "integer", float: "number", str: "text"}
    return " ".join([words.get(kind, "anything"), *_range(limits)])


def _range(limits: Any) -> Iterator[str]:
    """``≥ 1`` and the like, of constraints however deep pydantic has put them."""
    for limit in limits:
        if isinstance(limit, FieldInfo):
            yield from _range(limit.metadata)
        for kind, sign, name in ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt")):
            if isinstance(limit, kind):
                yield f"{sign} {getattr(limit, name):g}"


def _code(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (tuple, list)):
        return "`[" + ", ".join(map(str, value)) + "]`"
    return f"`{value}`"


# ------------------------------------------------------------------------------------------------------ what works

TESTED = {
    "howto/data.md": ("Rows", "tests/data/test_formats.py::test_a_format_is_read_and_named"),
    "models.md": ("Models", "tests/benchmarks/test_models.py::test_every_model_does_what_the_docs_say"),
    "serve.md": ("Destinations", ""),
}
"""Page with a table of what goes in or out → what it is of, and the test of every row; in ``serve.md`` rows name it."""


def works_page() -> str:
    """Every format, model and destination of the other pages' first tables, with the test that holds it."""
    text = "# What works, and which test holds it\n\nMade of the tables of other pages while the site is built.\n"
    for name, (title, test) in TESTED.items():
        rows = first_table((ROOT / "docs" / name).read_text(encoding="utf-8"))
        text += f"\n## [{title}](../{name})\n\n| | | test |\n|---|---|---|\n"
        text += "".join(f"| {what} | {how} | {f'`{test}`' if test else more[0]} |\n" for what, how, *more in rows)
    return text


def first_table(page: str) -> list[list[str]]:
    """Cells of a page's first table, without its head."""
    found = re.search(r"^\|[^\n]*\|\n\|[-| ]+\|\n((?:\|[^\n]*\|\n)+)", page, re.MULTILINE)
    assert found
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[1].splitlines()]


# -------------------------------------------------------------------------------------------------------- commands


def commands_page() -> str:
    """Every command with its arguments and options, from the command line's own help."""
    root = typer.main.get_command(app)
    context = click.Context(root, info_name="fedalt")
    head = (
        "# Commands\n\n`fedalt COMMAND --help` says the same in a terminal. "
        "Exit codes: 0 done, 2 something in your input is wrong (one line says what), 1 anything else.\n\n"
    )
    head += "\n\n".join(filter(None, (_parameter(param, context) for param in root.params)))
    groups: dict[str, list[str]] = {}
    for command in _leaves(root, context):
        groups.setdefault(_panel(command.command) or _panel(command.parent.command), []).append(_command(command))
    if list(groups) == [""]:
        return head + "\n\n" + "\n".join(groups[""])
    return head + "".join(f"\n\n## {panel}\n\n" + "\n".join(entries) for panel, entries in groups.items())


def _leaves(command: Any, context: click.Context) -> Iterator[click.Context]:
    for name, child in command.commands.items():
        inner = click.Context(child, info_name=name, parent=context)
        if hasattr(child, "commands"):
            yield from _leaves(child, inner)
        elif not child.hidden:
            yield inner


def _panel(command: Any) -> str:
    panel = getattr(command, "rich_help_panel", None)
    return panel if isinstance(panel, str) else ""


def _command(context: click.Context) -> str:
    command, path = context.command, context.command_path
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [f"### `{path}` {{ #{path.removeprefix('fedalt ').replace(' ', '-')} }}", plain(command.help or "")]
    parts += [f"```text\n{path} {usage}\n```"]
    parts += [_note(plain(note)) for note in (command.epilog or "").split("\n\n") if note.strip()]
    records = [_parameter(param, context) for param in command.params]
    return "\n\n".join([*parts, *(record for record in records if record)]) + "\n"


def _note(text: str) -> str:
    """A paragraph under a help page; the command of an example is code."""
    head, example, command = text.partition("Example: ")
    return f"{escaped(head)}{example}`{command}`" if example else escaped(text)


def _parameter(param: click.Parameter, context: click.Context) -> str:
    if getattr(param, "hidden", False) or "--help" in param.opts:
        return ""
    names, text = param.get_help_record(context) or (param.human_readable_name, "")
    text = plain(text).removesuffix("[required]").strip()
    return f"`{names}`\n:   {escaped(text)}" if text else ""


def plain(text: str) -> str:
    """Help text without Rich's markup, on one line."""
    return " ".join(Text.from_markup(inspect.cleandoc(text)).plain.split())


# --------------------------------------------------------------------------------------------------------- methods


def methods_page() -> str:
    """Every method and variant of the registry."""
    known = method_table()
    variants = {entry.name: entry.value for entry in METHODS.entries() if isinstance(entry.value, Variant)}
    lines = [
        "# Methods in the package",
        "",
        "Names for `--method` and `--methods`. Equations, and what each method sends: [equations](../methods.md). "
        "Your own: [write a method](../howto/method.md).",
        "",
        "| name | in tables | what it does | source |",
        "|---|---|---|---|",
    ]
    for name, one in known.items():
        if name not in variants:
            told = (one["title"], escaped(one["what it is"]), escaped(one["source"]))
            lines.append(f"| `{name}` | {' | '.join(told)} |")
    lines += ["", "## Variants", "", "A variant is a method with settings of its own.", ""]
    lines += ["| name | in tables | method | settings |", "|---|---|---|---|"]
    for name, one in variants.items():
        changed = ", ".join(f"`{key}: {_code(value)[1:-1]}`" for key, value in one.settings.items())
        lines.append(f"| `{name}` | {one.title} | `{one.method}` | {changed} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------- API, decisions, helpers


def api_page() -> str:
    """The public names of the package and what their functions return, documented by mkdocstrings."""
    public = {name: getattr(fedalt, name) for name in fedalt.__all__}
    head = "# Python API\n\nThese names, and no others, are public: `import fedalt as fa`.\n"
    parts = [_documented(f"fedalt.{name}", _place(name, value)) for name, value in public.items()]
    returned = {kind.__name__: kind for value in public.values() for kind in _returned(value)}
    parts += ["\n## What these return\n"] if returned else []
    parts += [_documented(name, _place(name, kind)) for name, kind in returned.items() if name not in public]
    return head + "".join(parts)


def _documented(heading: str, place: str) -> str:
    return f"\n::: {place}\n    options: {{heading: {heading}, toc_label: {heading.rpartition('.')[2]}}}\n"


def _place(name: str, value: Any) -> str:
    """Where a public name is defined: the package imports it when it is asked for, so its source is elsewhere."""
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return str(getattr(value, "__name__", f"fedalt.{name}"))


def _returned(value: Any, seen: frozenset[Any] = frozenset()) -> Iterator[type]:
    """Classes in a function's own module that it returns, and those that their methods return."""
    methods = [m for name, m in vars(value).items() if name[0] != "_"] if inspect.isclass(value) else [value]
    for method in filter(inspect.isfunction, methods):
        for name in str(method.__annotations__.get("return")).split(" | "):
            kind = vars(sys.modules[method.__module__]).get(name)
            if inspect.isclass(kind) and kind.__module__ == method.__module__ and kind not in seen:
                yield kind
                yield from _returned(kind, seen | {kind})


def decisions_page() -> str:
    """The list of decisions."""
    lines = ["# Decisions", "", "Why the code is as it is: one short page for each decision that shaped it.", ""]
    for path in sorted((ROOT / "docs" / "adr").glob("[0-9]*.md")):
        title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        number, _, words = title.partition(". ")
        lines.append(f"- {number} · [{words}]({path.name})")
    return "\n".join(lines) + "\n"


def first_line(thing: Any) -> str:
    """The first sentence or line of a docstring."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\|*_`\[\]{}])", r"\\\1", text.replace("``", "")).replace("<", "&lt;").replace(">", "&gt;")
