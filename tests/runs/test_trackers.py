"""The same numbers in TensorBoard, MLflow, Weights & Biases and trackio as in the log."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fedalt.runs.trackers import tracked
from micro import CLIENTS, METRICS, call, events, refused, settings, write_yaml

QUICK = {"federation__rounds": 2, "training__local_epochs": 1}
STAND_INS = {
    "wandb": """
import json, pathlib
class Run:
    def log(self, values, step): note("log", values=values, step=step)
    def finish(self): note("finish")
def init(config, **how):
    note("init", **how)
    note("config", values=config)
    return Run()
""",
    "trackio": None,
    "mlflow": """
class utils:
    class validation:
        MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH = 6000, 100
def search_experiments(filter_string): return []
def create_experiment(name, **_): return name
def start_run(experiment_id, run_name, **_): note("init", project=experiment_id, name=run_name)
def log_metrics(metrics, step): note("log", values=metrics, step=step)
def log_params(values): note("config", values=values)
def end_run(): note("finish")
""",
}
STAND_INS["trackio"] = STAND_INS["wandb"]
NOTE = """
import json, pathlib
def note(what, **about):
    with pathlib.Path(__file__).with_suffix(".jsonl").open("a") as file:
        file.write(json.dumps({"what": what, **about}) + chr(10))
"""


def expected(run: Path) -> dict[str, dict[int, float]]:
    """Tag → round → value, from the log."""
    values: dict[str, dict[int, float]] = {}

    def put(tag: str, event: dict[str, Any], name: str) -> None:
        if event[name] is not None:
            values.setdefault(tag, {})[event["round"]] = event[name]

    for event in events(run):
        if event["event"] == "client":
            put(f"loss/{event['client']}", event, "loss")
        elif event["event"] == "round":
            for name in ("seconds", "bytes_up", "bytes_down", "product_gap", "row_lora_drift"):
                put(name, event, name)
            put("loss/mean", event, "loss")
        elif event["event"] == "scores" and event["point"] == "after":
            for name in METRICS:
                put(f"{name}/{event['client']}", event, name)
    for name in METRICS:
        rounds = values[f"{name}/0"]
        values[f"{name}/mean"] = {r: sum(values[f"{name}/{c}"][r] for c in range(CLIENTS)) / CLIENTS for r in rounds}
    return values


def run_with(folder: Path, *trackers: str, **changes: Any) -> Path:
    values = settings(folder / "run", **QUICK, report__trackers=list(trackers), **changes)
    done = call("run", write_yaml(folder / "x.yaml", values))
    assert done.code == 0, done.err
    return folder / "run"


# --------------------------------------------------------------------------------------------------------- TensorBoard


def written(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself reads from a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder))
    reader.Reload()
    return {tag: {s.step: s.value for s in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


def same(found: dict[str, dict[int, float]], run: Path) -> None:
    wanted = expected(run)
    assert found.keys() == wanted.keys()
    for tag, values in wanted.items():
        assert found[tag] == pytest.approx(values, rel=1e-6), tag


def test_tensorboard_holds_the_logs_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = run_with(tmp_path, "tensorboard")
    same(written(run / "tensorboard"), run)


def test_a_resumed_run_goes_on_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = run_with(tmp_path, "tensorboard")
    assert call("run", "--out", run, "--resume", "--rounds", 3).code == 0
    same(written(run / "tensorboard"), run)
    assert len(written(run / "tensorboard")["loss/mean"]) == 3


def test_runs_of_several_jobs_are_apart(tmp_path: Path) -> None:
    """Their events come in any order, each with its job."""
    pytest.importorskip("tensorboard")
    run = run_with(tmp_path)
    own = [{"event": "member", "method": "x", "seed": 1}, *events(run)]
    with tracked(["tensorboard"], tmp_path, lambda event: None) as sink:
        for event in own:
            sink({**event, "job": 0})
            other = {**event, "job": 1}
            sink(other | {"method": "y"} if event["event"] == "member" else other)
    for name in ("x-seed1", "y-seed1"):
        same(written(tmp_path / "tensorboard" / name), run)


def test_a_comparisons_runs_are_apart_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    values = settings(tmp_path / "all", **QUICK, report__trackers=["tensorboard"])
    done = call("compare", write_yaml(tmp_path / "x.yaml", values), "--methods", "local,fedalt", "--seeds", "0,1")
    assert done.code == 0, done.err
    for name in ("local-seed0", "local-seed1", "fedalt-seed0", "fedalt-seed1"):
        same(written(tmp_path / "all" / "tensorboard" / name), tmp_path / "all" / name)


# ------------------------------------------------------------------------- the others, by what accelerate calls of them


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package of a tracker's name that writes down how accelerate's own tracker calls it."""

    def make(name: str) -> Path:
        packages = tmp_path / "packages"
        packages.mkdir(exist_ok=True)
        (packages / f"{name}.py").write_text(NOTE + str(STAND_INS[name]))
        monkeypatch.syspath_prepend(str(packages))
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return packages / f"{name}.jsonl"

    yield make
    for name in STAND_INS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", STAND_INS)
def test_a_tracker_is_told_the_logs_numbers(name: str, stand_in: Any, tmp_path: Path) -> None:
    path = stand_in(name)
    run = run_with(tmp_path, name)
    told = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["what"] for line in told] == ["init", "config", "log", "log", "log", "log", "finish"]
    assert (told[0]["project"], told[0]["name"]) == ("fedalt", "run")
    assert told[1]["values"]["method"] == "fedalt"
    found: dict[str, dict[int, float]] = {}
    for line in told[2:-1]:
        for tag, value in line["values"].items():
            found.setdefault(tag, {})[line["step"]] = value
    same(found, run)


def test_a_tracker_that_fails_does_not_take_the_run_along(stand_in: Any, tmp_path: Path) -> None:
    path = stand_in("wandb")
    package = path.with_suffix(".py")
    package.write_text(
        package.read_text().replace("def log(self", "def log(self, values, step): 1 / 0\n    def _(self")
    )
    values = settings(tmp_path / "run", **QUICK, report__trackers=["wandb"])
    done = call("run", write_yaml(tmp_path / "x.yaml", values))
    assert done.code == 0
    assert done.err.count("wandb failed (division by zero); the run goes on without it") == 1


def test_a_tracker_that_does_not_start_stops_the_run(stand_in: Any, tmp_path: Path) -> None:
    package = stand_in("wandb").with_suffix(".py")
    package.write_text("def init(**how): raise RuntimeError('no API key')")
    config = write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", report__trackers=["wandb"]))
    assert refused("run", config) == "report.trackers: wandb does not start (no API key)"


def test_a_run_that_breaks_off_closes_its_tracker(stand_in: Any, tmp_path: Path) -> None:
    path = stand_in("wandb")
    start = dict.fromkeys(("method", "source", "rounds", "metric", "base", "run"), "x") | {"event": "run_started"}
    with pytest.raises(KeyboardInterrupt), tracked(["wandb"], tmp_path, lambda event: None) as sink:
        sink(start)
        raise KeyboardInterrupt
    assert [json.loads(line)["what"] for line in path.read_text().splitlines()] == ["init", "config", "finish"]


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_tracker_that_is_not_installed_stops_the_run_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedalt.runs.trackers.find_spec", lambda name: None)
    config = write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", report__trackers=["wandb"]))
    for command in ("run", "compare", "validate"):
        assert refused(command, config) == 'report.trackers: "wandb" is not installed; pip install wandb'
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", report__trackers=["paper"]))
    assert 'report.trackers: "paper" must be tensorboard, mlflow, wandb or trackio' in refused("run", config)


def test_without_trackers_the_sink_is_the_same(tmp_path: Path) -> None:
    def sink(event: dict[str, Any]) -> None: ...

    with tracked([], tmp_path, sink) as found:
        assert found is sink
