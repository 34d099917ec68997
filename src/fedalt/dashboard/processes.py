"""Runs as processes of their own: a dashboard that ends leaves them alone, and finds them again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from fedalt.config import RunConfig
from fedalt.errors import UserError
from fedalt.files import read_json, write_json, write_text
from fedalt.runs.folder import check_folder
from fedalt.runs.watch import holders

OWN = ".dashboard"
"""Folder among the runs: the settings, the output and the process of every run that was started here."""
_STOPPED = "error: stopped by "
"""How the last line of a run begins that somebody has stopped, which is no failure."""
_NAME = re.compile(r"\w[\w.=,+-]{0,99}")


class Processes:
    """What was started from a folder of runs, by this dashboard or one before it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, config: RunConfig, methods: str = "", seeds: str = "") -> str:
        """Start a run, or with several methods or seeds a comparison, in a new folder of this name."""
        name = name or f"{config.folder.name}{'-compared' if methods or seeds else ''}"
        if not _NAME.fullmatch(name):
            raise UserError(f"name: {name!r} is no name of a folder: letters, digits and any of . _ = , + -")
        path = self.root / name
        check_folder(path, "ask", "another name")
        if self._alive(self._own(path)):
            raise UserError(f"name: {name} is starting already")
        settings = self._settings(self._own(path) / "settings.yaml", config, path)
        several = [f"--{key}={value}" for key, value in (("methods", methods), ("seeds", seeds)) if value]
        self._launch(path, ["compare" if several else "run", str(settings), *several])
        return name

    def resume(self, path: Path) -> None:
        """Go on with a run."""
        if self.pid(path):
            raise UserError(f"{path}: runs already")
        settings = self._own(path) / "settings.yaml"
        known = [] if (path / "config.yaml").is_file() or not settings.is_file() else [str(settings)]
        self._launch(path, ["run", *known, "--out", str(path), "--resume"])

    def stop(self, path: Path) -> None:
        """End the process of a run, as Ctrl-C would: finished rounds are safe."""
        pid = self.pid(path)
        if pid is None:
            raise UserError(f"{path}: no process holds this run")
        os.kill(pid, signal.SIGTERM)

    def forget(self, path: Path) -> None:
        """Drop what is known of a start that came to nothing; a run's folder stays."""
        if self._alive(self._own(path)):
            raise UserError(f"{path}: goes on; stop it first")
        shutil.rmtree(self._own(path), ignore_errors=True)

    def pid(self, path: Path) -> int | None:
        """The process of a run: the one that was started here, or that holds its folder."""
        return self._alive(self._own(path)) or holders().get(str(path.resolve()))

    def known(self) -> Iterator[dict[str, Any]]:
        """Everything that was started here."""
        for file in sorted((self.root / OWN).rglob("process.json")):
            path = file.parent.relative_to(self.root / OWN)
            yield {"path": path.as_posix(), **(self.started(self.root / path) or {})}

    def started(self, path: Path) -> dict[str, Any] | None:
        """Whether what was started here goes on, and how it ended if not well; nothing of other runs."""
        own = self._own(path)
        alive = self._alive(own) is not None
        there = (own / "process.json").is_file()
        return {"alive": alive, "error": "" if alive else self._error(own)} if there else None

    def _settings(self, file: Path, config: RunConfig, out: Path) -> Path:
        text = yaml.safe_dump(config.model_dump(mode="json") | {"out": str(out)}, sort_keys=False, allow_unicode=True)
        write_text(file, text)
        return file

    def estimating(self, config: RunConfig) -> list[str]:
        """The command that checks settings and estimates their cost."""
        file = self._settings(self.root / OWN / "estimate.yaml", config, self.root / OWN / "nothing")
        return [sys.executable, "-m", "fedalt", "validate", str(file), "--json"]

    def _launch(self, path: Path, words: Sequence[str]) -> None:
        own = self._own(path)
        own.mkdir(parents=True, exist_ok=True)
        with (own / "output.txt").open("wb") as output:
            command = [sys.executable, "-m", "fedalt", *words]
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._children.append(child)
        write_json(own / "process.json", {"pid": child.pid, "created": psutil.Process(child.pid).create_time()})

    def _own(self, path: Path) -> Path:
        return self.root / OWN / path.relative_to(self.root)

    def _alive(self, own: Path) -> int | None:
        self._children = [child for child in self._children if child.poll() is None]  # takes leave of those that ended
        if (own / "process.json").is_file():
            known = read_json(own / "process.json")
            with suppress(psutil.Error):
                process = psutil.Process(known["pid"])
                if process.create_time() == known["created"] and process.status() != psutil.STATUS_ZOMBIE:
                    return int(process.pid)
        return None

    def _error(self, own: Path) -> str:
        """The line with which it ended, if that was an error's."""
        output = own / "output.txt"
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines() if output.is_file() else []
        told = [line for line in lines if line.startswith("error: ") and not line.startswith(_STOPPED)]
        crashed = any(line.startswith("Traceback") for line in lines)
        return told[-1].removeprefix("error: ") if told else lines[-1] if crashed else ""
