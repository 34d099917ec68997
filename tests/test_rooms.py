"""Who imports what: rooms build on those before them, and some never meet."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedalt

SOURCE = Path(fedalt.__file__).parent

ORDER = (
    {"names", "errors", "files", "seeding", "runtime", "compat", "hub"},
    {"registry"},
    {"config"},
    {"model"},
    {"data", "datasets"},
    {"training"},
    {"evaluation"},
    {"methods"},
    {"federation"},
    {"runs"},
    {"comparisons", "personal"},
    {"report"},
    {"flower"},
    {"benchmarks", "testing", "progress", "start", "decorators", "dashboard"},
    {"cli", "api"},
    {"__main__"},
)
"""Rooms in the order in which they may use each other. Those of one line may, too, if they are of the first or data."""
NEIGHBOURS = ({"names", "errors", "files", "seeding", "runtime", "compat", "hub"}, {"data", "datasets"}, {"cli", "api"})

NEVER = {
    "model": {"fedalt.data", "fedalt.methods"},
    "methods": {"fedalt.files", "fedalt.flower", "fedalt.cli", "pathlib", "typer", "rich"},
    "federation": {"fedalt.files", "fedalt.runs", "pathlib"},
    "report": {"fedalt.model", "fedalt.training", "fedalt.federation", "fedalt.runs.setup", "torch", "transformers"},
}
"""Room → what no file of it imports."""

EXCEPTIONS = {
    ("benchmarks/first_step.py", "fedalt.cli"): "a program around the command, to be timed",
    ("report/insights.py", "fedalt.runs.setup"): "has models answer, where a report asks for that and no file has it",
}
"""(File, module) → why it may."""

FLWR = "benchmarks/side_flower.py"
"""Runs Flower's own round, to compare with ours; in a process of its own."""
PRINTING = {"print", "rich", "typer"}
SPEAKS = {"progress.py", "api.py"}
"""Progress bars, which the command line and Python share, and where Python shows them."""


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Every file of the package, by its path below it."""
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported anywhere, inside functions, too; not what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))
        yield from imported(node)


def within(name: str, modules: set[str]) -> str | None:
    """The module among ``modules`` that ``name`` is, or lies in."""
    return next((module for module in modules if name == module or name.startswith(f"{module}.")), None)


def room(path: str) -> str:
    """The folder or file at the top that a file is in."""
    return path.partition("/")[0].removesuffix(".py")


def rank(name: str) -> int:
    """Place of a room in the order."""
    places = [place for place, rooms in enumerate(ORDER) if name in rooms]
    assert places, f"{name}: a room without a place in ORDER"
    return places[0]


def upward(path: str, tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Imports from rooms that come later, or that lie beside this one and are no neighbour."""
    own = room(path)
    for name in imported(tree):
        first, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if first != "fedalt" or other == own or not any((SOURCE / kind).exists() for kind in (other, f"{other}.py")):
            continue
        beside = rank(other) == rank(own) and not any({own, other} <= pair for pair in NEIGHBOURS)
        if rank(other) > rank(own) or beside:
            yield path, f"fedalt.{other}"


def test_a_room_uses_only_those_before_it() -> None:
    found = {arrow for path, tree in trees() if path != "__init__.py" for arrow in upward(path, tree)}
    assert found - EXCEPTIONS.keys() == set()


@pytest.mark.parametrize("name", NEVER)
def test_some_rooms_never_meet(name: str) -> None:
    files = [(path, tree) for path, tree in trees() if room(path) == name]
    assert files
    found = {(path, module) for path, tree in files for used in imported(tree) if (module := within(used, NEVER[name]))}
    assert found - EXCEPTIONS.keys() == set()


def test_every_exception_is_one() -> None:
    files = dict(trees())
    unused = [key for key in EXCEPTIONS if not any(within(name, {key[1]}) for name in imported(files[key[0]]))]
    assert unused == []


def test_only_the_room_of_flower_imports_it() -> None:
    users = {path for path, tree in trees() if any(name.split(".")[0] == "flwr" for name in imported(tree))}
    assert {path for path in users if room(path) != "flower"} == {FLWR}
    assert "flower/server_app.py" in users


def test_only_the_command_line_prints() -> None:
    calls = {
        (path, "print")
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    libraries = {(path, name.split(".")[0]) for path, tree in trees() for name in imported(tree)}
    printing = calls | {pair for pair in libraries if pair[1] in PRINTING}
    assert {path for path, _ in printing if room(path) != "cli"} <= SPEAKS
    assert ("cli/show.py", "rich") in printing


def test_the_package_does_without_the_tools() -> None:
    assert (SOURCE.parents[1] / "tools").is_dir()
    assert [path for path, tree in trees() if any(name.split(".")[0] == "tools" for name in imported(tree))] == []


def test_an_arrow_that_goes_up_is_found_wherever_it_is() -> None:
    bad = "import fedalt.cli\ndef late():\n    from fedalt.runs import folder\n    from fedalt import methods\n"
    assert {name for _, name in upward("model/x.py", ast.parse(bad))} == {"fedalt.cli", "fedalt.runs", "fedalt.methods"}
    assert not list(upward("runs/x.py", ast.parse("from fedalt.model.base import load_base\nimport torch\n")))
