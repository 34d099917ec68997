"""Help pages: nothing is cut, everything is explained, examples are accepted, and nobody waits for torch."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import click
import pytest
import typer

from fedalt.cli.app import GROUPS, app
from fedalt.cli.flags import OLD

ROOT: Any = typer.main.get_command(app)


def commands(group: Any = ROOT, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Words of every command → the command, groups among them."""
    yield words, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


ALL = dict(commands())
LEAVES = {words: command for words, command in ALL.items() if not hasattr(command, "commands")}


def page(words: tuple[str, ...], columns: int) -> str:
    out = io.StringIO()
    with mock.patch.dict(os.environ, {"COLUMNS": str(columns)}), contextlib.redirect_stdout(out):
        assert app([*words, "--help"], prog_name="fedalt", standalone_mode=False) in (None, 0)
    return out.getvalue()


def test_there_are_as_many_commands_as_are_listed() -> None:
    assert len(LEAVES) == sum(map(len, GROUPS.values())) + 5, "prepare and data are groups of their own"


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_no_column_is_cut(words: tuple[str, ...], columns: int) -> None:
    text = page(words, columns)
    assert "Usage: fedalt" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_argument_and_option_is_explained(words: tuple[str, ...]) -> None:
    for param in LEAVES[words].params:
        assert getattr(param, "help", None), param.name
        assert (
            getattr(param, "hidden", False)
            or not isinstance(param, click.Argument)
            or param.help in " ".join(page(words, 200).replace("│", " ").split())
        ), param.name


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_command_has_an_example_that_it_accepts(words: tuple[str, ...]) -> None:
    example = (LEAVES[words].epilog or "").split("\n\n")[0].removeprefix("Example: ").replace("\\[", "[")
    first, *rest = shlex.split(example)
    assert [first, *rest[: len(words)]] == ["fedalt", *words]
    assert LEAVES[words].make_context(words[-1], rest[len(words) :]).params
    assert f"Example: {example}" in page(words, 80), "in one line"


def test_commands_stand_in_groups() -> None:
    text = page((), 80)
    assert "Commands" not in text
    places = [text.index(f"─ {panel} ─") for panel in GROUPS]
    assert places == sorted(places)
    assert list(GROUPS) == ["Experiments", "Models", "Data", "Across sites", "Tools"]


def test_one_page_names_the_other_spellings() -> None:
    run = " ".join(page(("run",), 80).split())
    assert all(f"{old} for {new}" in run for old, new in OLD.items())
    assert [words for words in ALL if "Other spellings" in page(words, 80)] == [("run",)]


@pytest.mark.parametrize("old", OLD)
def test_an_old_spelling_means_the_same_wherever_the_option_is(old: str) -> None:
    seen = 0
    for words, command in LEAVES.items():
        flags = {flag: param for param in command.params for flag in param.opts}
        if OLD[old] not in flags or old in flags:
            continue
        seen += 1
        values = []
        for flag in (old, OLD[old]):
            context = command.context_class(command, info_name=words[-1])
            values.append(command.make_parser(context).parse_args([flag, "7"])[0])
        assert values[0] == values[1]
        assert values[0][flags[OLD[old]].name] == "7"
    assert seen


def test_one_and_several_names_are_the_same_option() -> None:
    run, compare = ALL["run",], ALL["compare",]
    assert run.make_context("run", ["--methods", "fedit"]).params["method"] == "fedit"
    assert compare.make_context("compare", ["--method", "fedit", "--seed", "3"]).params["methods"] == "fedit"


def test_help_version_and_recipes_do_not_wait_for_torch() -> None:
    code = """
import contextlib, io, sys
from fedalt.cli import main
for line in LINES:
    sys.argv = ["fedalt", *line]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main()
    assert "torch" not in sys.modules, line
    assert "transformers" not in sys.modules, line
"""
    lines = [[*words, "--help"] for words in ALL] + [["--version"], ["recipes"]]
    done = subprocess.run(
        [sys.executable, "-c", f"LINES = {lines!r}{code}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
