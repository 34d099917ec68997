"""Who imports what: Flower stays in its room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fedalt

SOURCE = Path(fedalt.__file__).parent
ROOM = SOURCE / "flower"
EXCEPTION = SOURCE / "benchmarks/sides/round_flower.py"
"""Runs Flower's own round, to compare with ours; in a process of its own."""


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def test_only_the_room_of_flower_imports_it() -> None:
    users = {path for path in SOURCE.rglob("*.py") if any(name.split(".")[0] == "flwr" for name in imported(path))}
    assert {path for path in users if ROOM not in path.parents} == {EXCEPTION}
    assert ROOM / "server_app.py" in users
