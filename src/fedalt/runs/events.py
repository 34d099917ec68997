"""events.jsonl: one line per event, the source of every table, plot and report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fedalt.compat import event_today
from fedalt.errors import UserError
from fedalt.files import disk_errors, read_bytes, write_json_lines

Event = dict[str, Any]
Sink = Callable[[Event], None]


class EventLog:
    """Appends events to a file and passes them on."""

    def __init__(self, path: Path, sink: Sink = lambda event: None) -> None:
        self.path = path
        self.sink = sink

    def emit(self, kind: str, **fields: Any) -> None:
        """Write one event."""
        event = {"event": kind, **fields}
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
        self.sink(event)

    def truncate(self, last_round: int) -> None:
        """Forget everything after a round and the end of the run, including a line that a kill cut short."""
        kept = [e for e in read_events(self.path) if e.get("round", 0) <= last_round and e["event"] != "run_finished"]
        write_json_lines(self.path, kept)


def first_start(events: Iterable[Event]) -> Event | None:
    """The event with which a run, or what is left of its log, began."""
    return next((event for event in events if event["event"] in ("run_started", "run_resumed")), None)


def ended(events: Iterable[Event]) -> bool:
    """Whether the last thing that a run did was to end well; a site answers once more then."""
    return [event["event"] for event in events if event["event"] != "reply"][-1:] == ["run_finished"]


def run_ids(events: Iterable[Event]) -> set[str]:
    """What identifies a run in its checkpoints; nothing where one of its starts does not say so, as in fedalt 0.1."""
    found = {event.get("run") for event in events if event["event"] in ("run_started", "run_resumed")}
    return set() if None in found else set(map(str, found))


def read_events(path: Path) -> Iterator[Event]:
    """Events in order; a half-written last line is passed over."""
    if not path.is_file():
        return
    lines = read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        event = event_in(line)
        if event:
            yield event
        elif line and number < len(lines):
            raise UserError(f"{path}:{number}: damaged (no event)")


def event_in(line: bytes) -> Event | None:
    """The event of a line; nothing where it has none."""
    try:
        event = json.loads(line)
        return event_today(event) if "event" in event else None
    except (ValueError, TypeError, RecursionError):
        return None
