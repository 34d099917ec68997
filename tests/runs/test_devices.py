"""Cohorts on several devices: two workers on the CPU give the run of one process, whatever happens to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fedalt.config import load_config, parse_config
from fedalt.errors import UserError
from fedalt.methods.base import Message
from fedalt.names import Key
from fedalt.runs.devices import Outbox, read
from fedalt.runs.folder import claim_folder
from fedalt.runs.rounds import run as run_engine
from fedalt.runs.setup import prepare
from micro import (
    ENVIRONMENT,
    data_folder,
    farthest,
    left_behind,
    model_folder,
    of_kind,
    refused,
    run_here,
    settings,
    write_yaml,
)

TWO = {"federation__devices": "cpu,cpu"}
QUICK: dict[str, Any] = {
    "training__local_epochs": 1,
    "evaluation__max_new_tokens": 2,
    "data__test_limit": 2,
    "federation__rounds": 3,
    "federation__cohort": 2,
}
PARTIAL = {"federation__fraction": 0.75}
"""Three of four clients, so a cohort of two and one of one."""
METHODS = [
    pytest.param("fedalt", PARTIAL | {"federation__rest_of_world_delivery": "unicast"}, id="fedalt"),
    pytest.param("fdlora", PARTIAL, id="fdlora"),
    pytest.param("feddpa_t", {}, id="feddpa_t", marks=pytest.mark.slow),
    pytest.param("pf2lora", {}, id="pf2lora", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_folder(tmp_path_factory.mktemp("rows"), 4, train=6, validation=2)


def run(out: Path, rows: Path, **changes: Any) -> Path:
    return run_here(settings(out, data=rows, **(QUICK | changes)))[0].path


def same_run(one: Path, other: Path) -> None:
    """Byte for byte, but for the settings, which name their folder, and the note on memory."""
    (mine, log), (theirs, their_log) = left_behind(one), left_behind(other)
    assert mine.keys() == theirs.keys()
    assert {name for name in mine if mine[name] != theirs[name]} == {"config.yaml"}
    said, theirs_said = ([event for event in one if event["event"] != "note"] for one in (log, their_log))
    assert said == theirs_said


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "--multiprocessing-fork" in child.cmdline()]


# ------------------------------------------------------------------------------------------------------ the same run


@pytest.mark.parametrize(("method", "more"), METHODS)
def test_two_workers_give_the_run_of_one_process(tmp_path: Path, rows: Path, method: str, more: dict[str, Any]) -> None:
    changes = {"method": method, **more}
    spread = run(tmp_path / "spread", rows, **changes, **TWO)
    same_run(spread, run(tmp_path / "one", rows, **changes))
    assert [note["text"] for note in of_kind(spread, "note") if "peak memory" in note["text"]]


@pytest.mark.slow
def test_two_workers_share_the_secret_of_a_private_run(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedalt.runs.folder.token_bytes", bytes)
    private = {"privacy__epsilon": 5.0, "federation__rounds": 1}
    spread = run(tmp_path / "spread", rows, **private, **TWO)
    same_run(spread, run(tmp_path / "one", rows, **private))
    assert all(event["epsilon"] > 0 for event in of_kind(spread, "client"))


def test_cohorts_are_made_so_that_every_device_has_one(tmp_path: Path, rows: Path) -> None:
    """At a learning rate at which AdamW does not blow rounding up."""
    changes = {"method": "fedit", "federation__cohort": None, "training__lr": 2e-4}
    spread, one = run(tmp_path / "spread", rows, **changes, **TWO), run(tmp_path / "one", rows, **changes)
    assert [load_config(path / "config.yaml").federation.cohort for path in (spread, one)] == [2, 4]
    assert farthest(spread, one) <= 1e-5


def test_those_who_are_told_the_same_share_a_file(tmp_path: Path) -> None:
    tensors = [{Key("a.b", "individual", "A"): torch.full((1, 2), float(i))} for i in range(3)]
    messages = {
        0: Message(tensors[0], 0.1),
        1: Message(tensors[0], 1 / 3),
        2: Message(tensors[1]),
        3: Message(tensors[2]),
    }
    outbox = Outbox(tmp_path, messages)
    first, second = outbox.of([0, 1, 7]), outbox.of([2, 3])
    assert len(list(tmp_path.iterdir())) == 3
    told = read(first) | read(second)
    assert told[0].tensors is told[1].tensors
    assert {client: message.share for client, message in told.items()} == {0: 0.1, 1: 1 / 3, 2: 0.0, 3: 0.0}
    for client, message in messages.items():
        assert all(torch.equal(told[client].tensors[key], value) for key, value in message.tensors.items())


# ------------------------------------------------------------------------------------------------ what can go wrong


def test_killed_and_stopped_and_resumed_is_the_same_run(tmp_path: Path, rows: Path) -> None:
    """Ctrl-C in one round, ``kill -9`` of a worker in a later one; then one process ends the run."""
    changes = QUICK | {"training__local_epochs": 15, "evaluation__every": 3, "federation__cohort": 1}
    folder, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    config = write_yaml(tmp_path / "x.yaml", settings(folder, data=rows, **changes))

    def disturbed(after: int, disturb: Callable[[psutil.Process], None]) -> tuple[int, str]:
        command = [Path(sys.executable).with_name("fedalt"), "run", config, "--resume", "--devices", "cpu,cpu"]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT, start_new_session=True
        )
        while not (checkpoints / f".round_{after + 1:04d}.tmp" / "clients").exists():  # one of four cohorts is done
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.02)
        workers = workers_of(psutil.Process(process.pid))
        assert len(workers) == 2
        disturb(workers[0])
        _, error = process.communicate(timeout=240)
        assert not any(worker.is_running() for worker in workers)
        assert [path.name for path in checkpoints.iterdir()] == [f"round_{after:04d}"] * (after > 0)
        assert "Traceback" not in error
        return process.returncode, error

    code, error = disturbed(0, lambda worker: os.killpg(os.getpgid(worker.pid), signal.SIGINT))
    assert (code, "stopped by Ctrl-C; finished rounds are safe" in error) == (130, True)
    code, error = disturbed(1, lambda worker: worker.kill())
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) == (2, 1)
    assert "--devices: the worker on cpu (training clients " in lines[0]
    assert " in round 2) was killed (signal 9), perhaps for lack of memory" in lines[0]
    run_here(settings(folder, data=rows, **changes), "resume")
    same_run(folder, run(tmp_path / "whole", rows, **changes))


def test_an_error_in_a_worker_says_whose_cohort_it_was(
    tmp_path: Path, rows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def damage(event: dict[str, Any]) -> None:
        if (event["event"], event.get("round")) == ("round_started", 2):
            file = tmp_path / "run" / "checkpoints" / "round_0001" / "clients" / "3.safetensors"
            file.write_bytes(b"half")

    config = parse_config(settings(tmp_path / "run", data=rows, **(QUICK | TWO)), "x")
    experiment = prepare(config)
    with pytest.raises(RuntimeError, match=r"^the worker on cpu \(training clients 2, 3 in round 2\): Safetensor"):
        run_engine(experiment, claim_folder(config.folder, "ask"), damage)
    assert "in round 2, clients [2, 3]" in capfd.readouterr().err, "the worker's own traceback"
    assert not workers_of(psutil.Process())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["round_0001"]


def test_a_worker_that_cannot_start_says_why_in_one_line(tmp_path: Path, rows: Path) -> None:
    model = model_folder(tmp_path / "model")
    config = parse_config(settings(tmp_path / "run", model, rows, **(QUICK | TWO)), "x")
    experiment = prepare(config)
    (model / "config.json").unlink()
    with pytest.raises(UserError, match=r"^model.name: .* has no config.json$"):
        run_engine(experiment, claim_folder(config.folder, "ask"))
    assert not workers_of(psutil.Process())


@pytest.mark.parametrize(
    ("devices", "line"),
    [
        ("cpu,gpu", '--devices cpu,gpu: "gpu" must be auto, cpu, cuda or cuda:N'),
        ("", '--devices : "" must be auto, cpu, cuda or cuda:N'),
        pytest.param(
            "cpu,cuda:1",
            "--devices: cuda:1 is not available on this machine; use cpu or auto",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it may be available"),
        ),
    ],
)
def test_devices_that_are_none(tmp_path: Path, rows: Path, devices: str, line: str) -> None:
    config = write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", data=rows))
    assert line in refused("run", config, "--devices", devices)
    assert not (tmp_path / "run").exists()
