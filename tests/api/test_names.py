"""What ``import fedalt`` offers: the names of a user, imported when they are needed, each with an example that runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedalt
from fedalt.registry import ALL

NAMES = sorted(fedalt._WHERE)
HEAVY = ("torch", "numpy", "pydantic", "transformers", "rich", "yaml")


def _examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(recurse=False)
    made = {name: getattr(fedalt, name) for name in NAMES}
    made |= {name: value for name, value in vars(fedalt.api).items() if inspect.isclass(value) and _is_ours(value)}
    return [finder.find(value, name)[0] for name, value in made.items() if not inspect.ismodule(value)]


def _is_ours(value: type) -> bool:
    return value.__module__ == "fedalt.api" and not value.__name__.startswith("_")


def test_the_import_is_quick_and_light() -> None:
    code = (
        "import sys, time; start = time.process_time(); import fedalt; took = time.process_time() - start\n"
        f"print(took, [name for name in {HEAVY} if name in sys.modules], 'run' in dir(fedalt))"
    )
    command = [sys.executable, "-c", code]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(" ", 1) for _ in range(3)]
    assert min(float(took) for took, _ in said) < 0.1
    assert {rest for _, rest in said} == {"[] True\n"}


def test_a_name_that_is_none() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode_data'"):
        fedalt.lode_data  # noqa: B018


def test_no_module_takes_a_public_name() -> None:
    """The import of a submodule sets an attribute of the package: ``fedalt.run`` must stay the function."""
    for name in NAMES:
        getattr(fedalt, name)
    inside = {module.name for module in pkgutil.iter_modules([str(Path(fedalt.__file__).parent)])}
    assert not [name for name in inside.intersection(NAMES) if not inspect.ismodule(getattr(fedalt, name))]


def test_every_name_is_typed_for_checkers() -> None:
    """The imports that a type checker reads are those that ``__getattr__`` makes."""
    imports = [node for node in ast.walk(ast.parse(inspect.getsource(fedalt))) if isinstance(node, ast.ImportFrom)]
    read = {alias.name: node.module for node in imports for alias in node.names if alias.name in fedalt._WHERE}
    assert read == fedalt._WHERE


@pytest.fixture
def registries() -> Iterator[None]:
    """What an example gives a name is gone afterwards."""
    before = [{entry.name: entry for entry in registry.entries()} for registry in ALL]
    yield
    for registry, entries in zip(ALL, before, strict=True):
        registry._entries = entries


@pytest.mark.parametrize("example", _examples(), ids=lambda example: example.name)
def test_every_docstring_starts_with_an_example_that_runs(example: doctest.DocTest, registries: None) -> None:
    paragraphs = (example.docstring or "").split("\n\n")
    assert paragraphs[1].strip().startswith(">>> import fedalt as fa")
    example.globs = {"__name__": "__main__"}  # as at a prompt
    said: list[str] = []
    failed, tried = doctest.DocTestRunner().run(example, out=said.append)
    assert tried and not failed, "".join(said)


def test_examples_are_found_wherever_a_name_comes_from() -> None:
    assert {example.name for example in _examples()} >= {"run", "Simulation", "Dirichlet", "Data", "Comparison"}
    assert importlib.import_module("fedalt.api").run is fedalt.run
