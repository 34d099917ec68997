"""Flower's command ``flwr``, with a configuration of its own: runs, nodes, keys."""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from fedalt.errors import UserError
from fedalt.flower.deploy.address import Connection, check_server
from fedalt.flower.deploy.processes import flower_environment, program, shortened

NAME = "fedalt"
"""What the connection is called in ``config.toml``."""
_TAKEN = "[code: 23]"
"""Flower's number for a public key that is registered already."""


class Control:
    """Asks a SuperLink through ``flwr … --format json``.

    Args:
        tell: Called with every command, as one would type it; once where it is repeated.
    """

    def __init__(self, home: Path, connection: Connection, tell: Callable[[str], None]) -> None:
        self.address, self.tell, self._told = connection.address, tell, ""
        self.environment = flower_environment(home)
        trust: dict[str, Any] = (
            {"root-certificates": str(connection.ca.absolute())} if connection.ca else {"insecure": True}
        )
        there = {"address": str(connection.address), **trust}
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": {NAME: there}}), encoding="utf-8")

    def command(self, *arguments: str) -> list[str]:
        """A command of ``flwr``'s, told and ready to be started."""
        line = f"$ {shlex.join(['flwr', *arguments])}"
        if line != self._told:
            self.tell(line)
        self._told = line
        return [program("flwr"), *arguments]

    def runs(self) -> list[dict[str, Any]]:
        """Every run, the latest first."""
        runs: list[dict[str, Any]] = self._ask("list")["runs"]
        return runs

    def nodes(self) -> list[dict[str, Any]]:
        """Every site that is or may be there."""
        nodes: list[dict[str, Any]] = self._ask("supernode", "list")["nodes"]
        return [node for node in nodes if node["status"] not in ("unregistered", "deleted")]

    def register(self, public_key: Path) -> int | None:
        """Let the owner of a key join; its node id, or nothing if it may already."""
        try:
            return int(
                self._ask("supernode", "register", str(public_key), options=("--name", public_key.stem))["node-id"]
            )
        except UserError as error:
            if _TAKEN in str(error):
                return None
            raise

    def unregister(self, node: int) -> None:
        """Never let a node join again."""
        self._ask("supernode", "unregister", str(node))

    def stop(self, run: str) -> None:
        """Stop a run."""
        self._ask("stop", run)

    def _ask(self, *arguments: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
        command = self.command(*arguments, NAME, *options, "--format", "json")
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError:
            answer = {"success": False, "error-message": done.stderr or done.stdout}
        if not answer["success"]:
            lines = [line for text in answer["error-message"].splitlines() if (line := shortened(text))]
            raise UserError(f"{self.address}: {' '.join(lines).rstrip('.')}")
        return answer


def going_on(run: Mapping[str, Any]) -> bool:
    """Whether a run of ``Control.runs`` has not ended."""
    return not run["status"].startswith("finished")


@contextmanager
def control(connection: Connection, tell: Callable[[str], None] = lambda line: None) -> Iterator[Control]:
    """A ``Control`` for a SuperLink that answers; what it runs is told."""
    check_server(connection)
    with tempfile.TemporaryDirectory(prefix="fedalt-") as home:
        yield Control(Path(home), connection, tell)
