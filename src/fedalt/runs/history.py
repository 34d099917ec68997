"""A run's course as plain numbers, for notebooks and scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedalt.errors import UserError
from fedalt.runs.events import Event, first_start, read_events
from fedalt.runs.folder import open_run

Course = dict[int, dict[int, float]]
"""Client → round → value."""


@dataclass(frozen=True)
class History:
    """What a run's log says, finished or not.

    Attributes:
        events: The log itself, which the report's figures are drawn from.
        method: Name of the method.
        metric: Name of the score.
        tasks: Client → task, as the log and the figures have them.
        losses: Mean training loss of every client's round.
        scores: Score on the client's own test rows after aggregation, in the rounds that were scored.
        alpha: Client → mean mixer weight of its first slot in every adapted layer, in its last round; empty without
            a mixer.
    """

    events: list[Event]
    method: str
    metric: str
    tasks: dict[str, str]
    losses: Course
    scores: Course
    alpha: dict[int, list[float]]


def read_history(run: Path) -> History:
    """Read ``events.jsonl`` of a run."""
    folder, _ = open_run(run)
    events = list(read_events(folder.events))
    start = first_start(events)
    if start is None:
        raise UserError(f"{run}: this run has not begun (no run_started in events.jsonl)")
    rounds = [event for event in events if event["event"] == "client"]
    scored = [event for event in events if event["event"] == "scores" and event["point"] == "after"]
    return History(
        events,
        start["method"],
        start["metric"],
        start["tasks"],
        _course(rounds, "loss"),
        _course(scored, start["metric"]),
        {event["client"]: event["alpha"] for event in rounds if event["alpha"]},
    )


def _course(events: list[Event], name: str) -> Course:
    course: Course = {}
    for event in events:
        course.setdefault(event["client"], {})[event["round"]] = event[name]
    return course
