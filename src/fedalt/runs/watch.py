"""Runs of a folder as they are now, in progress or not: quick where there are hundreds, with logs of many megabytes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedalt.errors import UserError
from fedalt.evaluation.metrics import group_mean
from fedalt.runs.events import Event, ended, event_in, first_start
from fedalt.runs.folder import RunFolder

COMPARISON = "comparison.json"
_DEPTH, _TAIL = 4, 1 << 16
_AFTER = {"round", "scores", "evaluated", "run_started", "run_resumed", "run_finished"}
"""Events that say of a round that it is over."""
_ROUNDS = re.compile(r"^federation:\n(?:  .*\n)*?  rounds: (\d+)", re.MULTILINE)


def found(root: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Folders of runs and of comparisons below a folder, or the folder itself; links are not followed."""
    with suppress(OSError):
        inside = list(os.scandir(root))
        names = {entry.name for entry in inside}
        if names & {"events.jsonl", COMPARISON}:
            yield root
        if depth and "events.jsonl" not in names:
            for entry in sorted(inside, key=lambda entry: entry.name):
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    yield from found(Path(entry.path), depth - 1)


def holders() -> dict[str, int]:
    """Folder → the Python process that has it open, as one does that holds a run's lock; looking takes no lock."""
    held, proc = dict[str, int](), Path("/proc")
    for number in (int(path.name) for path in proc.glob("[0-9]*") if path.name != str(os.getpid())):
        with suppress(OSError):  # somebody else's, or gone
            if "python" in (proc / f"{number}/exe").readlink().name:
                opened = (link.readlink() for link in (proc / f"{number}/fd").iterdir())
                held |= {str(path): number for path in opened if path.is_absolute()}
    return held


class Log:
    """A run's events, of which only new ones are read.

    Mixer weights are kept of each client's last round, the only ones that are shown.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin(0)

    def _begin(self, inode: int) -> None:
        self.inode, self.at, self.lines = inode, 0, 0
        self.events: list[Event] = []
        self._alpha: dict[int, Event] = {}

    def read(self) -> list[Event]:
        """All events that are whole."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self.inode or about.st_size < self.at:  # resumed: the log was written anew
                self._begin(about.st_ino)
            file.seek(self.at)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.at += len(whole)
        for line in whole.splitlines():
            self.lines += 1
            event = event_in(line)
            if event is None:
                raise UserError(f"{self.path}:{self.lines}: damaged (no event)")
            if event.get("alpha"):
                self._alpha.get(event["client"], {})["alpha"] = ()
                self._alpha[event["client"]] = event
            self.events.append(event)
        return self.events

    @property
    def version(self) -> str:
        """What changes whenever the events do."""
        return f"{self.inode}-{self.at}"


@dataclass(frozen=True)
class Summary:
    """A run in a line.

    Attributes:
        state: ``running``, ``finished`` or ``stopped``.
        eta: Seconds to the end, as the last rounds went.
        heard: Seconds since its log grew.
        error: The last client that was set aside, and why.
    """

    path: str
    method: str
    source: str
    clients: int
    round: int
    rounds: int
    metric: str
    mean: float | None
    worst: float | None
    loss: float | None
    bytes: int
    memory: float
    state: str
    eta: float | None
    heard: float
    error: str


class Watch:
    """A folder of runs that is looked at again and again; what has not changed is not read anew."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[Path, tuple[Any, dict[str, Any]]] = {}

    def folders(self) -> tuple[list[Path], list[Path]]:
        """Runs and comparisons."""
        both = list(found(self.root))
        return [p for p in both if not (p / COMPARISON).is_file()], [p for p in both if (p / COMPARISON).is_file()]

    def summaries(self) -> list[Summary]:
        """Every run, the one that was heard of last first."""
        held = holders()
        each = (self.summary(path, held) for path in self.folders()[0])
        return sorted((one for one in each if one), key=lambda one: one.heard)

    def summary(self, path: Path, held: Mapping[str, int] | None = None) -> Summary | None:
        """One run; nothing where the log says nothing."""
        log = RunFolder(path).events
        try:
            about = log.stat()
            key = (about.st_ino, about.st_size, about.st_mtime_ns)
            if self._known.get(path, (None,))[0] != key:
                self._known[path] = key, _gist(path)
        except OSError:
            return None
        known, since = dict(self._known[path][1]), time.time() - about.st_mtime
        if not known:
            return None
        running = str(path.resolve()) in (holders() if held is None else held)
        state = "finished" if known.pop("over") else "running" if running else "stopped"
        left, each = known["rounds"] - known["round"], known.pop("each")
        eta = max(left * each - since, 0.0) if state == "running" and each else None
        name = path.relative_to(self.root).as_posix()
        return Summary(path=name, state=state, eta=eta, heard=since, **known)


def _gist(path: Path) -> dict[str, Any]:
    """What a log's first line and its end say; of rounds in the middle nothing is needed."""
    folder = RunFolder(path)
    with folder.events.open("rb") as file:
        first = [event for line in (file.readline(), file.readline()) if (event := event_in(line))]
        start, size = first_start(first), file.seek(0, os.SEEK_END)
        if start is None:
            return {}
        for length in (_TAIL, 64 * _TAIL):
            file.seek(max(size - length, 0))
            events = [event for line in file.read().split(b"\n") if (event := event_in(line))]
            if any(event["event"] == "round" for event in events):
                break
    last: dict[str, Event] = {event["event"]: event for event in events}
    rounds = [event for event in events if event["event"] == "round"]
    asked = _ROUNDS.search(folder.config.read_text(encoding="utf-8")) if folder.config.is_file() else None
    over, trained = ended(events), rounds[-1] if rounds else {}
    scored = [e for e in events if e["event"] == "scores" and e["point"] == "after"]
    scores = [e[start["metric"]] for e in scored if e["round"] == scored[-1]["round"] and start["metric"] in e]
    seconds = sum(e["seconds"] for e in events if e["event"] in ("round", "evaluated"))
    failed = last.get("client_failed", {})
    return {
        "method": start.get("title") or start["method"],
        "source": start["source"],
        "clients": len(start["clients"]),
        "round": max((e["round"] for e in events if e["event"] in _AFTER), default=0),
        "rounds": int(asked[1]) if asked else start["rounds"],
        "metric": start["metric"],
        "mean": last["run_finished"]["mean"] if over else group_mean(scores),
        "worst": last["run_finished"]["worst"] if over else None,
        "loss": trained.get("loss"),
        "bytes": trained.get("bytes_up", 0) + trained.get("bytes_down", 0),
        "memory": max(trained.get("peak_memory", {"": 0}).values()) / 1e9,
        "error": f"client {failed['client']}, round {failed['round']}: {failed['reason']}" if failed else "",
        "over": over,
        "each": seconds / len(rounds) if rounds else None,
    }
