"""What the documentation says against the code: generated pages, commands, links, words, widths."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
import typer

import fedalt
from fedalt.cli.app import app
from fedalt.config import RunConfig, parse_override, with_settings
from fedalt.methods.registry import title_of
from fedalt.personal.chat import Chat
from fedalt.registry import ALL, METHODS, OURS
from micro import call, data_folder, shared_model

pytest.importorskip("mkdocs", reason="needs pip install 'fedalt[docs]'")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HISTORY = ("log.md", "adr")
"""Pages that say what was thought at the time."""
WRITTEN = [ROOT / "README.md", *(p for p in sorted(DOCS.rglob("*.md")) if p.relative_to(DOCS).parts[0] not in HISTORY)]


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_gen", DOCS / "_gen.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(made: ModuleType) -> dict[str, str]:
    return made.pages()


# ------------------------------------------------------------------------------------------------ generated pages


def test_every_row_of_what_works_names_a_test_that_is_there(pages: dict[str, str]) -> None:
    rows = re.findall(r"^\| (?!\|)(.*) \|$", pages["reference/works.md"], re.MULTILINE)
    assert len(rows) > 80
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named or " | not run" in row, row
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), row


@pytest.mark.parametrize(
    "line",
    [
        "`lora.r`{ #lora.r } · integer ≥ 1 ≤ 65536 · default `8`",
        "`lora.dropout`{ #lora.dropout } · number ≥ 0 < 1 · default `0.05`",
        "`lora.ranks`{ #lora.ranks } · list of integer ≥ 1 ≤ 65536 or None · no default",
        "`model.dtype`{ #model.dtype } · `float32`, `bfloat16`, `float16` · default `float32`",
        "`evaluation.points`{ #evaluation.points } · list of `before`, `after` · default `[before, after]`",
        "`training.repeat_order`{ #training.repeat_order } · true or false · default `false`",
        "`fdlora.outer_momentum`{ #fdlora.outer_momentum } · number ≥ 0 < 1 · default `0.9`",
    ],
)
def test_a_setting_has_its_type_range_and_default(pages: dict[str, str], line: str) -> None:
    assert f"\n{line}\n:   " in pages["reference/settings.md"]


def test_all_settings_are_listed_once(pages: dict[str, str]) -> None:
    listed = re.findall(r"^`([\w.]+)`\{ #", pages["reference/settings.md"], re.MULTILINE)
    assert len(set(listed)) == len(listed)
    assert set(listed) >= set(_keys(RunConfig().model_dump()))


def _keys(values: dict[str, object], path: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def test_all_commands_and_their_options_are_listed(pages: dict[str, str]) -> None:
    page = pages["reference/commands.md"]
    for name, command in _commands():
        _, _, section = page.partition(f"### `{name}` ")
        assert section, name
        section = section.partition("\n### ")[0]
        flags = [param.opts[0] for param in command.params if isinstance(param, click.Option) and not param.hidden]
        assert [flag for flag in flags if flag != "--help" and flag not in section] == []


def _commands(group: click.Group | None = None, name: str = "fedalt") -> Iterator[tuple[str, click.Command]]:
    for key, command in (group or _root()).commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{name} {key}")
        else:
            yield f"{name} {key}", command


def _root() -> click.Group:
    return typer.main.get_command(app)  # type: ignore[return-value]


def test_all_methods_and_variants_are_listed(pages: dict[str, str]) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", pages["reference/methods.md"], re.MULTILINE)
    assert {name for name, _ in rows} == {entry.name for entry in METHODS.entries() if entry.origin == OURS}
    assert all(title == title_of(name) for name, title in rows)


def test_the_page_of_equations_has_every_method() -> None:
    named = set(re.findall(r"`(\w+)`", (DOCS / "methods.md").read_text(encoding="utf-8")))
    assert {entry.name for entry in METHODS.entries() if entry.origin == OURS} - named == set()


def test_all_public_names_are_documented(pages: dict[str, str]) -> None:
    documented = re.findall(r"heading: fedalt\.(\w+)", pages["reference/api.md"])
    assert documented == fedalt.__all__
    assert {"load_data", "run", "compare"} <= set(documented)


def test_text_is_shown_as_it_is(made: ModuleType) -> None:
    assert made.escaped("runs/<a>_b | c[d]") == r"runs/&lt;a&gt;\_b \| c\[d\]"


# ------------------------------------------------------------------------------------------------- what people type


def _typed(path: Path) -> Iterator[list[str]]:
    """Commands in code blocks; synopses with ``[--x]`` or ``…`` are none."""
    for block in re.findall(r"^```(?:bash)?\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"(?:[A-Z_]+=\S+ )*fedalt (?!.*(?:\[--|…))(.*)", line)
            if match:
                yield shlex.split(match[1], comments=True)


TYPED = [pytest.param(words, id=f"{p.stem}-{i}") for p in WRITTEN for i, words in enumerate(_typed(p))]


@pytest.mark.parametrize("words", TYPED)
def test_a_command_in_the_docs_is_accepted(words: list[str]) -> None:
    command: click.Command = _root()
    context = click.Context(command, info_name="fedalt")
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(command.name, list(words), parent=context)
    for text in context.params.get("sets") or ():
        key, value = parse_override(text)
        if not key.startswith("my_"):  # a section of a method in the reader's own file
            with_settings(RunConfig(), {key: value})


def test_there_are_commands_to_try() -> None:
    assert len(TYPED) > 50


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


MODULE = re.compile(r"(?:python -m |`)((?:fedalt|tools)(?:\.[a-z]\w*)+)\b(?!\.py)")
FILE = re.compile(r"`((?:src|tests|recipes|notebooks|tools|examples)/[\w./-]*)`")


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_modules_and_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    missing = [name for name in MODULE.findall(text) if not _is_there(name)]
    missing += [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    assert missing == []


def _is_there(name: str) -> bool:
    """Whether a dotted name is a module, something in one, or a setting of FedALT's own section."""
    head, _, last = name.rpartition(".")
    if name in {registry.group for registry in ALL}:  # where packages announce what they have
        return True
    if head == "fedalt" and last in METHODS.get("fedalt").Settings.model_fields:
        return True
    if name.startswith("tools."):
        return (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return hasattr(importlib.import_module(head), last)


# ---------------------------------------------------------------------------------------------------- how it is said


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_tables_are_narrow_and_words_are_those_of_the_glossary(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("|") and len(line) > 160] == []
    assert re.findall(r"\b(?:row\sLoRAs?|residents?|crew|likeness)", text) == []


def test_the_glossary_is_one() -> None:
    text = (DOCS / "concepts.md").read_text(encoding="utf-8").partition("## Glossary")[2]
    terms = re.findall(r"^(\S.*)\n:   ", text, re.MULTILINE)
    assert {"Row", "Individual LoRA", "RoW LoRA, rest-of-world LoRA", "Mixer", "Client", "Site", "Node"} <= set(terms)
    assert len(set(terms)) == len(terms)
    others = [path for path in WRITTEN if path.name != "concepts.md"]
    assert [path.name for path in others if "## Glossary" in path.read_text(encoding="utf-8")] == []


def test_the_model_in_plain_torch_is_the_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model", shared_model(), "--data", data_folder(tmp_path / "data"), "--rounds", "2", "--lr", "3e-2"]
    done = call("run", *flags, "--set", "evaluation.max_new_tokens=8", "--out", "run")
    assert done.code == 0, done.err
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "howto" / "export.md").read_text(), re.DOTALL | re.MULTILINE)
    (snippet,) = [block for block in blocks if "register_forward_hook" in block]
    found: dict[str, Any] = {}
    exec(re.sub(r'folder = ".*"', 'folder = "run/clients/1"', snippet), found)
    chat = Chat(Path("run"), 1)
    prompt = torch.tensor([chat.encoder.prompt("Is 7 more than 2? (1.3)")])
    tokenizer = chat.resident.base.tokenizer
    model = found["model"]
    ends = tokenizer.eos_token_id
    answer = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=ends, pad_token_id=ends)
    text = tokenizer.decode(answer[0, prompt.shape[1] :], skip_special_tokens=True)
    assert text.strip() == chat.ask("Is 7 more than 2? (1.3)").text.strip() != ""
