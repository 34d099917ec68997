"""A run's folder: what is where, and who may write into it; its course as plain numbers, for notebooks."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_bytes
from typing import Any, Literal, get_args

import yaml

from fedalt.compat import as_recorded
from fedalt.config import RunConfig, load_config, outside_code, read_yaml
from fedalt.errors import UserError, listed
from fedalt.files import (
    disk_errors,
    intact,
    only_one,
    read_bytes,
    read_json,
    sha256,
    write_bytes,
    write_json,
    write_json_lines,
    write_text,
)
from fedalt.model.source import TINY_BASE
from fedalt.registry import OURS, SOURCES, TEMPLATES
from fedalt.runs.events import Event, first_start, read_events

IfExists = Literal["ask", "resume", "overwrite"]
Which = Literal["best", "last"]
"""The best round on validation rows, or the last one."""


class RunFolder:
    """Paths of a run, with the file names of the official README."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # all settings
        self.partition = path / "partition.json"  # which row went to which client
        self.events = path / "events.jsonl"
        self.final_scores = path / "results" / "final_scores.json"  # of the last round, and of the best on validation
        self.onboarding = path / "results" / "onboarding.json"  # of newcomers to a run
        self.digests = path / "digests.json"  # of the files of a run that has ended
        self.checkpoints = path / "checkpoints"
        self.key = path / "privacy.key"  # of sampled rows and noise, as long as a private run goes on
        self.report = path / "report.html"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunFolder) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def client(self, client: int) -> Path:
        """A client's adapters as PEFT folders, and its mixer, of the round that is kept."""
        return self.path / "clients" / str(client)

    def other_round(self, client: int, which: Which) -> Path:
        """The same of the best round, or of the last one, where that is not the one that is kept."""
        return self.path / which / str(client)

    def answers(self, client: int, round_: int) -> Path:
        """A client's answers to its test rows."""
        return self.path / "results" / f"eval_client{client}_round{round_}.jsonl"

    def scores(self, client: int, round_: int) -> Path:
        """A client's scores."""
        return self.path / "results" / f"scores_client{client}_round{round_}.json"

    def write_scores(self, client: int, round_: int, lines: list[dict[str, Any]], scores: dict[str, Any]) -> None:
        """Write a client's answers and scores of a round."""
        write_json_lines(self.answers(client, round_), lines)
        write_json(self.scores(client, round_), {"round": round_, **scores})

    def write_config(self, config: RunConfig, header: list[str]) -> None:
        """Write the resolved configuration, with versions and such as comments, so that it can be run again."""
        body = yaml.safe_dump(placed(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
        write_text(self.config, "".join(f"# {line}\n" for line in header) + body)

    def secret(self) -> bytes:
        """The key of a private run, which only its owner may read; drawn by the operating system if there is none.

        It is gone when the run has ended: nobody can take the noise away then.
        """
        if not self.key.is_file():
            write_bytes(self.key, token_bytes(32), 0o600)
        key = read_bytes(self.key)
        if len(key) != 32:
            raise UserError(f"{self.key}: damaged; remove it, and another key takes its place")
        return key

    def seal(self, *more: Path) -> None:
        """Note what the files of a run are that has ended, or files that have been added since."""
        known = read_json(self.digests) if more and self.digests.is_file() else {}
        parts = (self.path / part for part in ("results", "clients", *get_args(Which)))
        files = more or [
            self.config,
            self.partition,
            self.events,
            *(file for part in parts for file in part.rglob("*")),
        ]
        known |= {file.relative_to(self.path).as_posix(): sha256(file) for file in files if file.is_file()}
        write_json(self.digests, known)

    def changed(self, *parts: str) -> Path | None:
        """A file that is not what it was when the run ended: of those that are so named, or lie in a part."""
        ended = self.digests.is_file() and self.final_scores.is_file()
        known = read_json(self.digests) if ended else {}
        with intact(self.digests):
            files = {self.path / name: digest for name, digest in known.items() if name.startswith(parts)}
        return next((file for file, digest in files.items() if not file.is_file() or sha256(file) != digest), None)

    def check(self, *parts: str) -> None:
        """Refuse files that are not what they were.

        Raises:
            UserError: There is one.
        """
        if file := self.changed(*parts):
            how = "has changed" if file.is_file() else "is gone"
            raise UserError(
                f"{file}: {how} since the run ended; put back what was there, or remove {self.digests.name} "
                "if you meant it"
            )

    def clean_results(self, last_round: int) -> None:
        """Drop results of rounds that a killed run had not finished, and half-written ones."""
        for path in (self.path / "results").glob("*_round*.json*"):
            match = re.search(r"_round(\d+)\.jsonl?$", path.name)
            if match is None or int(match[1]) > last_round:
                path.unlink()


def placed(values: dict[str, Any]) -> dict[str, Any]:
    """Settings with whole paths for those that start in the present folder: a run can be used from anywhere."""
    model, data, deal = dict(values["model"]), dict(values["data"]), dict(values["data"]["partition"])
    kept, ours = model["name"] == TINY_BASE, data["source"] in SOURCES
    kept_source = ours and SOURCES.entry(data["source"]).origin != OURS
    for part, key, known in (
        (model, "name", kept),
        (data, "source", kept_source),
        (data, "template", data["template"] in TEMPLATES),
        (deal, "file", False),
    ):
        if part[key] and not known and (path := Path(part[key]).expanduser()).exists():
            part[key] = str(path.absolute())
    return {**values, "model": model, "data": {**data, "partition": deal}}


def settings_of(
    path: Path | None,
    overrides: Sequence[tuple[str, Any]],
    if_exists: IfExists,
    typed: Mapping[str, str] | None = None,
) -> RunConfig:
    """The settings of a YAML file with some replaced; a run that is resumed without one takes those of its folder."""
    out = dict(overrides).get("out")
    if path is None and if_exists == "resume" and out and (Path(out) / "config.yaml").is_file():
        path = Path(out) / "config.yaml"
    config = load_config(path, overrides, typed)
    if if_exists == "resume":
        kept = (file for depth in ("", "*/", "*/*/") for file in sorted(config.folder.glob(f"{depth}config.yaml")))
        run = next(map(read_yaml, kept), None)
        config = load_config(path, overrides, typed, run) if run and run != as_recorded(run) else config
    return config


def open_run(path: Path) -> tuple[RunFolder, RunConfig]:
    """An existing run and its configuration."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise UserError(f"{path}: not a run folder (no config.yaml)")
    folder.check("config.yaml", "partition.json", "events.jsonl", "results/final_scores.json")
    config = load_config(folder.config, recorded=True)
    check_code(folder, config)
    return folder, config


def check_code(folder: RunFolder, config: RunConfig) -> None:
    """Refuse to go on with a run whose methods, metrics and so on from outside are not those that it was made with."""
    start = first_start(read_events(folder.events)) or (folder.onboarding.is_file() and read_json(folder.onboarding))
    known = (start or {}).get("code")
    if not known:
        return
    try:
        now = outside_code(config)
    except UserError as error:
        raise UserError(f"{folder.path}: {error}; this run has its code from {listed(config.plugins)}") from None
    for thing in known.keys() & now.keys():
        if known[thing] != now[thing].digest:
            raise UserError(f"{folder.path}: {thing} of {now[thing].origin} has changed since; put the old code back")


def finished_run(path: Path) -> tuple[RunFolder, RunConfig]:
    """An existing run that has reached its end."""
    folder, config = open_run(path)
    if not folder.final_scores.is_file():
        raise UserError(f"{path}: this run has not finished; continue it with: fedalt run --out {path} --resume")
    return folder, config


def check_folder(
    path: Path, if_exists: IfExists, ways: str = "--resume to continue it or --overwrite to replace it"
) -> RunFolder:
    """Say whether a run may go into a folder, and touch nothing. ``ways`` are the options that an error names."""
    folder = RunFolder(path)
    file = next((parent for parent in (path, *path.parents) if parent.exists() and not parent.is_dir()), None)
    if file:
        raise UserError(f"{file}: is a file, not a folder")
    filled = path.is_dir() and any(not p.name.endswith(".tmp") for p in path.iterdir())  # a kill may leave one
    if filled and not folder.partition.is_file():  # the first file that a run writes
        raise UserError(f"{path}: not empty and not a run folder; choose another --out")
    if filled and if_exists == "ask":
        raise UserError(f"{path}: holds a run already; add {ways}")
    return folder


def claim_folder(path: Path, if_exists: IfExists) -> RunFolder:
    """Make the folder ready for a new run, or leave it as it is to be resumed."""
    folder = check_folder(path, if_exists)
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with only_one(path):
            for inside in sorted(path.iterdir(), key=folder.partition.__eq__) if if_exists == "overwrite" else ():
                shutil.rmtree(inside) if inside.is_dir() and not inside.is_symlink() else inside.unlink()
    return folder


def kept_scores(folder: RunFolder) -> dict[str, Any]:
    """The final scores of the models that clients keep: those of the last round, or with early stopping of the best."""
    return kept(final_scores(folder))


def kept(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The same of the content of ``final_scores.json``."""
    chosen: dict[str, Any] = scores[scores.get("kept", "last")]
    return chosen


def final_scores(folder: RunFolder) -> dict[str, Any]:
    """The final scores of a finished run."""
    scores: dict[str, Any] = read_json(folder.final_scores)
    with intact(folder.final_scores):
        if not (scores["metric"] and kept(scores)["round"] and all(map(dict, scores["last"]["clients"].values()))):
            raise ValueError("no scores")
    return scores


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
