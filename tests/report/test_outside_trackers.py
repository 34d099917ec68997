"""Trackers from a file outside the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from micro import call, refused, settings, write_yaml

pytestmark = pytest.mark.usefixtures("forgotten")

FILE = """
import json
from fedalt.registry import TRACKERS
from fedalt.config.section import Section


@TRACKERS.register("lines")
class Lines:
    class Settings(Section):
        name: str = "numbers.jsonl"

    def start(self, run, about, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / self.settings.name
        self.write(["start", run, about["method"]])

    def log(self, values, step):
        self.write(["log", step, sorted(values)])

    def finish(self):
        self.write(["finish"])

    def write(self, what):
        with self.path.open("a") as file:
            file.write(json.dumps(what) + chr(10))


class Failing(Lines):
    def log(self, values, step):
        raise RuntimeError("disconnected")


class Half:
    def start(self, run, about, folder): ...
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def config(folder: Path) -> Path:
    quick = {"federation__rounds": 2, "training__local_epochs": 1, "evaluation__every": 1}
    return write_yaml(folder / "x.yaml", settings(folder / "run", **quick))


def lines(path: Path) -> list[list[object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_tracker_is_told_of_a_run_and_of_its_continuation(file: Path, tmp_path: Path) -> None:
    done = call("run", config(tmp_path), "--set", f"report.trackers={file}:Lines")
    assert done.code == 0, done.err
    told = lines(tmp_path / "run" / "lines" / "numbers.jsonl")
    assert [line[0] for line in told] == ["start", "log", "log", "log", "log", "finish"]
    assert told[0] == ["start", "run", "fedalt"] and told[1][1] == 1
    assert "loss/mean" in told[1][2] and "rouge1/mean" in told[2][2]  # type: ignore[operator]
    file.write_text(FILE + "# what a tracker does changes no number\n")
    assert call("run", "--out", tmp_path / "run", "--resume", "--rounds", 3).code == 0
    told = lines(tmp_path / "run" / "lines" / "numbers.jsonl")
    assert [line[0] for line in told[6:]] == ["start", "log", "log", "finish"]


def test_its_settings(file: Path, tmp_path: Path) -> None:
    own = ("--set", f"plugins=[{file}]", "--set", "report.trackers=[lines]", "--set", "lines.name=mine.txt")
    assert call("compare", config(tmp_path), *own, "--methods", "local", "--seeds", "0,1").code == 0
    for seed in (0, 1):
        assert lines(tmp_path / "run" / "lines" / f"local-seed{seed}" / "mine.txt")[-1] == ["finish"]


def test_one_that_fails_is_left_out(file: Path, tmp_path: Path) -> None:
    done = call("run", config(tmp_path), "--set", f"report.trackers={file}:Failing")
    assert done.code == 0
    assert done.err.count("failing failed (disconnected); the run goes on without it") == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("{file}:Half", "tracker: Half in {file} is not a class with start, log and finish"),
        ("{file}:Linse", 'tracker: {file} has no "Linse" (did you mean "Lines"?)'),
        ("tensorbord", '(did you mean "tensorboard"?)'),
    ],
)
def test_typos(file: Path, tmp_path: Path, name: str, line: str) -> None:
    given = f"report.trackers={name.format(file=file)}"
    assert line.format(file=file) in refused("run", config(tmp_path), "--set", given)
