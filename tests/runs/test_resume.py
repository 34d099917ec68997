"""``kill -9`` at any moment, then ``--resume``: the run ends as if nothing had happened, byte for byte.

The kills are real. A process of its own (this file, run as a script) imports the command once and forks for every
scenario: one child is killed by its own SIGKILL at a named file operation, another one resumes. What they leave behind
is compared with a run that was left in peace.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedalt.config import parse_config
from fedalt.runs.folder import claim_folder
from fedalt.runs.rounds import run as run_engine
from fedalt.runs.setup import prepare
from micro import (
    ENVIRONMENT,
    call,
    data_folder,
    events,
    fedalt,
    left_behind,
    of_kind,
    refused,
    run_here,
    settings,
    shared_data,
    shared_model,
    timeless,
    tree,
    write_yaml,
)
from trap import Kill, lay_trap

# --------------------------------------------------------------------------------------------- the process that kills


def forked(arguments: Sequence[str], folder: Path, kill: Kill | None, trace: Path | None = None) -> int:
    """Run the command in a child of this process; returns its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
    os.chdir(folder)
    with (folder / "output.txt").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    seen: list[str] = []
    lay_trap(kill, folder / "run", seen)
    done = call_main(arguments)
    if trace:
        trace.write_text(json.dumps(seen))
    os._exit(done)


def call_main(arguments: Sequence[str]) -> int:
    from fedalt.cli import main

    sys.argv = ["fedalt", *arguments]
    try:
        main()
    except SystemExit as leaving:
        sys.stdout.flush()
        sys.stderr.flush()
        return int(leaving.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        return 99
    return 0


EARLY = (
    "fedalt.cli.app",
    "fedalt.runs.rounds",
    "fedalt.report.html",
    "peft",
    "plotly.io",
    "rouge_score.rouge_scorer",
    "torch._dynamo",
    "transformers.generation",
    "transformers.models.llama.modeling_llama",
)


def drive(plan: Path) -> None:
    """Run every scenario of a plan: as many killed processes as it has kills, then one that finishes."""
    for module in EARLY:  # imported before the forks, so that none of them has to
        importlib.import_module(module)
    os.fsync = lambda descriptor: None  # the system has what a killed process wrote
    results = []
    for scenario in json.loads(plan.read_text()):
        folder = Path(scenario["folder"])
        kills = [Kill(*kill) for kill in scenario["kills"]]
        statuses = [forked(["run", "x.yaml", "--resume"], folder, kill) for kill in kills]
        if scenario.get("finish", True):
            statuses.append(forked(["run", "x.yaml", "--resume"], folder, None, folder / "trace.json"))
        results.append([os.waitstatus_to_exitcode(status) for status in statuses])
    plan.with_suffix(".results.json").write_text(json.dumps(results))


# ------------------------------------------------------------------------------------------------------ scenarios

QUICK = {
    "training__local_epochs": 1,
    "evaluation__max_new_tokens": 4,
    "data__test_limit": 2,
    "federation__rounds": 3,
}
METHODS: dict[str, dict[str, Any]] = {
    "fedalt": {"method": "fedalt", "federation__fraction": 0.67, "data__validation_rows": 3},
    "fedit": {"method": "fedit"},
}


def K(where: str, how: str) -> tuple[Kill, ...]:  # noqa: N802 - a row of the table below
    return (Kill(where, how),)


POINTS: dict[str, list[tuple[Kill, ...]]] = {
    "fedalt": [
        K("fsync .partition.json.tmp", "half"),
        K("replace .config.yaml.tmp", "before"),
        K("emit run_started 0", "half"),
        K("emit client 1 client 0", "before"),
        K("emit round 2", "half"),
        K("fsync results/.eval_client1_round2.jsonl.tmp", "half"),
        K("replace results/.scores_client1_round2.json.tmp", "before"),
        K("emit evaluated 2", "after"),
        K("write checkpoints/.round_0002.tmp/clients/1.safetensors", "half"),
        K("link checkpoints/.round_0002.tmp/clients/2.safetensors", "before"),
        K("link checkpoints/.round_0002.tmp/uploads/2.safetensors", "after"),
        K("write checkpoints/.round_0002.tmp/manifest.json", "half"),
        K("fsync checkpoints/.round_0002.tmp/manifest.json", "before"),
        K("rename checkpoints/.round_0002.tmp", "before"),
        K("rename checkpoints/.round_0002.tmp", "after"),
        K("write clients/.1.tmp/rest_of_world/adapter_model.safetensors", "half"),
        K("rename clients/.1.tmp", "before"),
        K("replace results/.final_scores.json.tmp", "before"),
        K("emit run_finished 3", "before"),
        K("emit run_finished 3", "after"),
        K("fsync .report.html.tmp", "half"),
        (*K("emit evaluated 2", "before"), *K("fsync .events.jsonl.tmp", "half")),
        (
            *K("rename checkpoints/.round_0001.tmp", "after"),
            *K("emit run_resumed 1", "half"),
            *K("emit round 3", "after"),
        ),
    ],
    "fedit": [
        K("emit client 2 client 2", "half"),
        K("write checkpoints/.round_0002.tmp/uploads/0.safetensors", "half"),
        K("fsync checkpoints/.round_0002.tmp/uploads/1.safetensors", "before"),
        K("rename checkpoints/.round_0002.tmp", "after"),
        K("rmtree checkpoints/round_0001", "half"),
        K("write clients/.2.tmp/fedalt_config.json", "after"),
    ],
}
SCENARIOS = [(method, kills) for method, points in POINTS.items() for kills in points]


def scenario(folder: Path, method: str) -> Path:
    """A folder with a configuration whose run goes into ``run`` beside it, so that all runs write the same paths."""
    values = settings(Path("run"), **QUICK, **METHODS[method])
    write_yaml(folder / "x.yaml", values)
    return folder


def execute(plan: Path, scenarios: Sequence[dict[str, Any]]) -> list[list[int]]:
    plan.write_text(json.dumps(list(scenarios)))
    done = subprocess.run(
        [sys.executable, __file__, str(plan)], env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(plan.with_suffix(".results.json").read_text())


ALONE = K("write checkpoints/.round_0003.tmp/clients/2.safetensors", "half")
CTRL_C = K("emit round 2", "interrupt")


def named(method: str, kills: Sequence[Kill]) -> str:
    return " and ".join([method, *map(str, kills)])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[int]]]:
    """All scenarios and one undisturbed run per method, by name."""
    root = tmp_path_factory.mktemp("resume")
    shared_model(), shared_data()
    cases = [*((method, ()) for method in METHODS), *SCENARIOS, ("fedalt", ALONE), ("fedalt", CTRL_C)]
    folders = [scenario(root / str(number), method) for number, (method, _) in enumerate(cases)]
    plan = [
        {"folder": str(folder), "kills": kills, "finish": kills != ALONE}
        for folder, (_, kills) in zip(folders, cases, strict=True)
    ]
    results = execute(root / "plan.json", plan)
    return {named(*case): (folder, codes) for case, folder, codes in zip(cases, folders, results, strict=True)}


@pytest.mark.parametrize(("method", "kills"), SCENARIOS, ids=[named(*case) for case in SCENARIOS])
def test_killed_and_resumed_is_as_if_nothing_had_happened(outcome: Any, method: str, kills: tuple[Kill, ...]) -> None:
    undisturbed, codes = outcome[method]
    assert codes == [0], (undisturbed / "output.txt").read_text()
    folder, codes = outcome[named(method, kills)]
    assert codes == [-signal.SIGKILL] * len(kills) + [0], (folder / "output.txt").read_text()
    (files, log), (expected, expected_log) = left_behind(folder / "run"), left_behind(undisturbed / "run")
    assert files.keys() == expected.keys()
    assert [name for name in files if files[name] != expected[name]] == []
    assert log == expected_log
    assert (folder / "run" / "report.html").is_file()


def test_the_undisturbed_runs_are_what_this_file_says(outcome: Any) -> None:
    """Partial participation, validation rows, checkpoints that move: otherwise the comparisons show little."""
    run = outcome["fedalt"][0] / "run"
    assert {len(event["clients"]) for event in of_kind(run, "round_started")} == {2}
    assert {event["point"] for event in of_kind(run, "scores")} == {"before", "after", "validation"}
    assert len(of_kind(outcome["fedit"][0] / "run", "client")) == 9
    first, last = (path.read_bytes() for path in sorted(run.glob("checkpoints/*/clients/0.safetensors"))[:2])
    assert first != last or 0 not in of_kind(run, "round_started")[-1]["clients"]


def test_a_killed_run_is_resumed_by_the_command_in_a_process_of_its_own(outcome: Any) -> None:
    folder, codes = outcome[named("fedalt", ALONE)]
    assert codes == [-signal.SIGKILL]
    assert not (folder / "run" / "results" / "final_scores.json").exists()
    done = fedalt("run", "x.yaml", "--resume", cwd=folder)
    assert done.code == 0, done.err
    assert left_behind(folder / "run") == left_behind(outcome["fedalt"][0] / "run")
    assert [event["round"] for event in of_kind(folder / "run", "run_resumed")] == [2]


def test_ctrl_c_says_how_to_go_on(outcome: Any) -> None:
    folder, codes = outcome[named("fedalt", CTRL_C)]
    text = (folder / "output.txt").read_text()
    assert codes == [130, 0], text
    assert "Traceback" not in text
    assert "stopped by Ctrl-C; finished rounds are safe, --resume goes on from there" in text
    assert left_behind(folder / "run") == left_behind(outcome["fedalt"][0] / "run")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_every_single_file_operation(outcome: Any, tmp_path: Path) -> None:
    operations = list(dict.fromkeys(json.loads((outcome["fedalt"][0] / "trace.json").read_text())))
    assert len(operations) > 150
    hows = dict.fromkeys(("fsync", "write", "emit", "rmtree"), "half") | {"replace": "before"}
    hows |= dict.fromkeys(("link", "rename"), "after")
    plan = []
    for number, where in enumerate(operations):
        folder = scenario(tmp_path / str(number), "fedalt")
        plan.append({"folder": str(folder), "kills": K(where, hows[where.split()[0]])})
    results = execute(tmp_path / "plan.json", plan)
    expected = left_behind(outcome["fedalt"][0] / "run")
    bad = [
        where
        for where, p, codes in zip(operations, plan, results, strict=True)
        if codes != [-signal.SIGKILL, 0] or left_behind(Path(p["folder"]) / "run") != expected
    ]
    assert bad == []


# ------------------------------------------------------------------------------------------ resuming what is not killed


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run into ``run`` of its folder, and its configuration beside it."""
    folder = tmp_path_factory.mktemp("original")
    write_yaml(folder / "x.yaml", settings(Path("run"), **QUICK))
    with contextlib.chdir(folder):
        ended = call("run", "x.yaml")
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def done(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run to play with; the test works inside its folder."""
    folder = tmp_path / "done"
    shutil.copytree(original, folder)
    monkeypatch.chdir(folder)
    return folder


def changed(folder: Path, **changes: Any) -> Path:
    return write_yaml(folder / "changed.yaml", settings(Path("run"), **(QUICK | changes)))


@contextlib.contextmanager
def stopped_at(values: dict[str, Any], event: str, round_: int, if_exists: Any = "ask") -> Iterator[None]:
    """Run until an event and stop there, as an exception in the middle would."""

    class Stop(Exception):  # noqa: N818 - not an error
        pass

    def sink(seen: dict[str, Any]) -> None:
        if (seen["event"], seen.get("round")) == (event, round_):
            raise Stop

    config = parse_config(values, "x")
    with pytest.raises(Stop):
        run_engine(prepare(config), claim_folder(config.folder, if_exists), sink)
    yield


def test_resume_into_a_folder_that_does_not_exist_starts_a_new_run(done: Path) -> None:
    config = write_yaml(done / "y.yaml", settings(Path("new"), **QUICK))
    assert call("run", config, "--resume").code == 0
    assert timeless(Path("new")) == timeless(Path("run"))
    assert of_kind(Path("new"), "run_resumed") == []


def test_resume_into_an_empty_folder_starts_a_new_run(done: Path) -> None:
    (Path("new")).mkdir()
    assert call("run", write_yaml(done / "y.yaml", settings(Path("new"), **QUICK)), "--resume").code == 0
    assert timeless(Path("new")) == timeless(Path("run"))


def test_resuming_a_finished_run_changes_nothing(done: Path) -> None:
    before = left_behind(Path("run"))
    assert call("run", "x.yaml", "--resume").code == 0
    assert call("run", "--out", "run", "--resume").code == 0, "its own settings are used without a YAML"
    assert left_behind(Path("run")) == before


def test_resuming_does_not_repeat_notes(tmp_path: Path) -> None:
    values = settings(tmp_path / "run", data=data_folder(tmp_path / "rows", clients=2), **QUICK)
    run_here(values)
    before = timeless(tmp_path / "run")
    assert len(of_kind(tmp_path / "run", "note")) == 2, "what was understood of the rows, and that two are two"
    run_here(values, "resume")
    assert timeless(tmp_path / "run") == before


def test_more_rounds_on_a_finished_run_equal_a_longer_run(done: Path) -> None:
    longer, _ = run_here(settings(done / "longer", **(QUICK | {"federation__rounds": 5})))
    assert call("run", "--out", "run", "--resume", "--rounds", 5).code == 0
    (files, log), (expected, expected_log) = left_behind(Path("run")), left_behind(longer.path)
    assert files.keys() == expected.keys()
    assert [name for name in files if files[name] != expected[name]] == ["config.yaml"], "which names its own folder"
    assert log[1:] == expected_log[1:]
    assert {k: v for k, v in log[0].items() if k != "rounds"} == {
        k: v for k, v in expected_log[0].items() if k != "rounds"
    }


def test_scores_of_a_round_that_is_run_again_and_no_longer_the_last_are_dropped(done: Path) -> None:
    """Killed after scoring round 3 of 3; in a run of 5 with scores every second round, there are none for round 3."""
    every = {"evaluation__every": 2}
    longer, _ = run_here(settings(done / "longer", **(QUICK | every | {"federation__rounds": 5})))
    with stopped_at(settings(Path("short"), **(QUICK | every)), "evaluated", 3):
        assert list(Path("short/results").glob("*round3*"))
    assert call("run", "--out", "short", "--resume", "--rounds", 5).code == 0
    assert not list(Path("short/results").glob("*round3*"))
    assert timeless(Path("short"))[1:] == timeless(longer.path)[1:]


def test_fewer_rounds_than_are_finished_are_refused(done: Path) -> None:
    before = tree(Path("run"))
    line = refused("run", "--out", "run", "--resume", "--rounds", 2)
    assert "3" in line
    assert "2" in line
    assert "rounds" in line
    assert tree(Path("run")) == before


def test_resuming_with_just_the_rounds_that_are_finished_scores_the_last_one(tmp_path: Path) -> None:
    """Stopped after round 2 of 4 with scores due at the end only; two rounds turn out to be enough."""
    values = settings(tmp_path / "run", **(QUICK | {"federation__rounds": 4, "evaluation__every": 4}))
    with stopped_at(values, "round_started", 3):
        pass
    ended = call("run", "--out", tmp_path / "run", "--resume", "--rounds", 2)
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "run/results/final_scores.json").read_text())["last"]["round"] == 2


def test_a_run_that_is_being_continued_is_not_finished(done: Path) -> None:
    """Its clients' folders are old, or half old, half new: nobody may be scored or talked to from them."""
    values = settings(Path("run"), **(QUICK | {"federation__rounds": 5}))
    with stopped_at(values, "evaluated", 4, "resume"):
        assert "has not finished" in refused("evaluate", "run")
        assert "has not finished" in refused("generate", Path("run"), "--client", 0, "x")
        assert "has not finished" in refused("export", Path("run"), "--client", 0, "--to", done / "x")
        assert call("run", "--out", "run", "--resume").code == 0
    assert call("evaluate", Path("run")).code == 0


OTHER: dict[str, Callable[[Path], dict[str, Any]]] = {
    "learning rate": lambda folder: {"training__lr": 0.03},
    "rank": lambda folder: {"lora__r": 2},
    "method": lambda folder: {"method": "fedit"},
    "seed": lambda folder: {"seed": 4},
    "model": lambda folder: {"model": shared_model("llama", 1)},
    "architecture": lambda folder: {"model": shared_model("gpt2")},
    "clients": lambda folder: {"data__clients": 2},
    "data": lambda folder: {"data": data_folder(folder / "rows", train=11)},
    "evaluation": lambda folder: {"evaluation__max_new_tokens": 3},
    "fraction": lambda folder: {"federation__fraction": 0.67},
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("rounds", [3, 5])
def test_a_checkpoint_of_another_run_is_refused_and_nothing_changes(done: Path, name: str, rounds: int) -> None:
    before = tree(Path("run"))
    config = changed(done, **OTHER[name](done), **{"federation__rounds": rounds})
    line = refused("run", config, "--resume")
    assert "checkpoint of another run" in line
    assert "run/checkpoints" in line
    assert tree(Path("run")) == before


def test_rows_changed_in_place_make_another_run(tmp_path: Path) -> None:
    data = data_folder(tmp_path / "rows")
    config = write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", data=data, **QUICK))
    assert call("run", config).code == 0
    before = tree(tmp_path / "run")
    path = data / "test" / "local_testing_2.jsonl"
    path.write_text(path.read_text().replace("yes", "no"))
    assert "checkpoint of another run" in refused("run", config, "--resume")
    assert tree(tmp_path / "run") == before


def test_a_run_that_moved_can_be_resumed(done: Path) -> None:
    (Path("run")).rename(done / "elsewhere")
    assert call("run", "--out", done / "elsewhere", "--resume", "--rounds", 4).code == 0
    assert of_kind(done / "elsewhere", "run_finished")[-1]["round"] == 4


# ------------------------------------------------------------------------------------------ what is in the way of a run


def test_a_rerun_without_flags_is_refused_and_nothing_changes(done: Path) -> None:
    before = tree(Path("run"))
    line = refused("run", "x.yaml")
    assert line == "run: holds a run already; add --resume to continue it or --overwrite to replace it"
    assert tree(Path("run")) == before


def test_overwrite_replaces_the_whole_run(done: Path) -> None:
    (Path("run") / "mine.txt").write_text("old")
    config = changed(done, method="local", federation__rounds=1)
    assert call("run", config, "--overwrite").code == 0
    assert not (Path("run") / "mine.txt").exists()
    assert [event["round"] for event in of_kind(Path("run"), "round")] == [1]
    assert events(Path("run"))[0]["method"] == "local"
    assert not list((Path("run")).rglob("*round3*"))


def test_overwrite_with_bad_settings_loses_nothing(done: Path) -> None:
    before = tree(Path("run"))
    for wrong in ({"lora__r": 0}, {"lora__targets": ["nonesuch"]}, {"data": done / "nowhere"}, {"method": "fedal"}):
        refused("run", changed(done, **wrong), "--overwrite")
    assert tree(Path("run")) == before


@pytest.mark.parametrize("flag", [None, "--resume", "--overwrite"])
@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml"])
def test_a_folder_that_holds_no_run_is_never_touched(done: Path, flag: str | None, name: str) -> None:
    """Plenty of projects have a config.yaml of their own; that does not make them a run."""
    folder = done / "project"
    folder.mkdir()
    (folder / name).write_text("method: ours\n")
    (folder / "src").mkdir()
    config = write_yaml(done / "y.yaml", settings(folder, **QUICK))
    line = refused("run", config, *([flag] if flag else []))
    assert line == f"{folder}: not empty and not a run folder; choose another --out"
    assert tree(folder) == {name: b"method: ours\n"}
    assert (folder / "src").is_dir()


def test_both_flags_exclude_each_other(done: Path) -> None:
    assert refused("run", "x.yaml", "--resume", "--overwrite") == "--resume and --overwrite exclude each other"


def test_a_file_in_the_place_of_the_run_folder(done: Path) -> None:
    (done / "file").write_text("x")
    for flag in ([], ["--resume"], ["--overwrite"]):
        line = refused("run", write_yaml(done / "y.yaml", settings(done / "file", **QUICK)), *flag)
        assert line == f"{done / 'file'}: is a file, not a folder"
    assert (done / "file").read_text() == "x"


# ------------------------------------------------------------------------------------------------- damaged checkpoints


@pytest.mark.parametrize("name", ["clients/1.safetensors", "uploads/2.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_a_damaged_checkpoint_says_what_to_do_and_that_works(done: Path, name: str, damage: str) -> None:
    expected = left_behind(Path("run"))
    checkpoint = Path("run") / "checkpoints" / "round_0003"
    path = checkpoint / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage == "cut" else b"\0" * 100)
    before = tree(Path("run"))
    line = refused("run", "x.yaml", "--resume")
    assert line.startswith(f"{checkpoint}")
    assert "damaged checkpoint" in line
    assert line.endswith("remove this folder to resume one round earlier")
    assert tree(Path("run")) == before
    shutil.rmtree(checkpoint)
    assert call("run", "x.yaml", "--resume").code == 0
    assert left_behind(Path("run")) == expected


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
