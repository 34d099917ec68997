"""Clients' tensors live in files: who is written, linked or read when, and that nothing of it shows in the numbers."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedalt.config import parse_config
from fedalt.model.state import load_state
from fedalt.runs import checkpoint as checkpoints
from fedalt.runs.checkpoint import Checkpoint, load_checkpoint
from fedalt.runs.folder import claim_folder
from fedalt.runs.rounds import run as run_engine
from fedalt.runs.setup import prepare
from micro import (
    ENVIRONMENT,
    call,
    data_folder,
    events,
    farthest,
    left_behind,
    of_kind,
    refused,
    run_here,
    settings,
    tree,
    write_yaml,
)

CLIENTS = 8
QUICK: dict[str, Any] = {
    "training__local_epochs": 1,
    "training__lr": 2e-3,
    "evaluation__max_new_tokens": 2,
    "evaluation__every": 2,
    "data__test_limit": 2,
    "federation__rounds": 4,
}
PARTIAL = QUICK | {"federation__fraction": 0.4}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_folder(tmp_path_factory.mktemp("rows"), CLIENTS, train=6, validation=2)


def run(out: Path, rows: Path, **changes: Any) -> Path:
    return run_here(settings(out, data=rows, **changes))[0].path


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """A run of four rounds with three of eight clients each; no test changes it."""
    return run(tmp_path_factory.mktemp("partial") / "run", rows, **PARTIAL)


def took_part(path: Path, round_: int) -> list[int]:
    return next(e["clients"] for e in of_kind(path, "round_started") if e["round"] == round_)


def files(path: Path, round_: int, part: str) -> dict[int, Path]:
    inside = path / "checkpoints" / f"round_{round_:04d}" / part
    return {int(file.stem): file for file in inside.iterdir()}


# ------------------------------------------------------------------------------------------------------ what is on disk


@pytest.mark.parametrize("part", ["clients", "uploads"])
def test_resting_clients_are_linked_and_the_others_are_new(partial: Path, part: str) -> None:
    before, after = files(partial, 3, part), files(partial, 4, part)
    resting = before.keys() - took_part(partial, 4)
    assert resting and resting != before.keys()
    assert after.keys() == before.keys() | set(took_part(partial, 4))
    for client, file in after.items():
        same = client in resting
        assert (file.stat().st_nlink > 1) == same
        assert (client in before and file.samefile(before[client])) == same


def test_who_has_not_taken_part_has_no_file_and_starts_from_the_seed(partial: Path) -> None:
    absent = set(range(CLIENTS)) - {c for number in range(1, 5) for c in took_part(partial, number)}
    assert absent, "choose another seed"
    assert not absent & files(partial, 4, "clients").keys()
    config = parse_config(settings(partial, data=Path(events(partial)[0]["source"]), **PARTIAL), "x")
    start = prepare(config).initial_state(min(absent))
    for factor in "AB":
        saved = load_file(partial / f"clients/{min(absent)}/individual/adapter_model.safetensors")
        for key, value in start.tensors.items():
            if (key.slot, key.factor) == ("individual", factor):
                assert torch.equal(saved[f"base_model.model.{key.module}.lora_{factor}.weight"], value)


def test_without_hard_links_files_are_copied(
    tmp_path: Path, rows: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise OSError(errno.EPERM, "no hard links on this file system")

    monkeypatch.setattr(os, "link", refuse)
    copied = run(tmp_path / "run", rows, **PARTIAL)
    assert tree(copied / "checkpoints").keys() == tree(partial / "checkpoints").keys()
    assert {p.stat().st_nlink for p in (copied / "checkpoints").rglob("*.safetensors")} == {1}
    names = [n for n in tree(partial) if n.endswith(".safetensors")]
    assert all((copied / name).read_bytes() == (partial / name).read_bytes() for name in names)


# ------------------------------------------------------------------------------------------------------- what is read


def test_states_are_read_when_their_clients_turn_comes(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a round of cohorts of two, training reads two states between two results."""
    seen: list[str] = []
    original: dict[str, Callable[..., Any]] = {"state": Checkpoint.state, "put": Checkpoint.put_state}

    def state(self: Checkpoint, client: int) -> Any:
        seen.append(f"read {client}")
        return original["state"](self, client)

    def put(self: Checkpoint, state: Any) -> None:
        seen.append(f"write {state.client}")
        original["put"](self, state)

    config = parse_config(settings(tmp_path / "run", data=rows, **(QUICK | {"federation__cohort": 2})), "x")

    def sink(event: dict[str, Any]) -> None:
        if (event["event"], event.get("round")) == ("round_started", 3):
            seen.clear()
        if (event["event"], event.get("round")) == ("client", 3):
            seen.append("log")

    monkeypatch.setattr(Checkpoint, "state", state)
    monkeypatch.setattr(Checkpoint, "put_state", put)
    run_engine(prepare(config), claim_folder(config.folder, "ask"), sink)
    expected = [
        f"{what} {c}" for first in range(0, CLIENTS, 2) for what in ("read", "write") for c in (first, first + 1)
    ]
    assert seen[: len(expected)] == expected
    drifts = [f"read {client}" for client in range(CLIENTS)]
    assert seen[len(expected) : seen.index("log")] == drifts, "once more for row_lora_drift"


# ----------------------------------------------------------------------------------------------- what does not show


@pytest.mark.parametrize("fraction", [1.0, 0.4], ids=["everybody", "some"])
@pytest.mark.parametrize("method", ["fedalt", "fedit"])
def test_the_size_of_cohorts_changes_nothing(tmp_path: Path, rows: Path, method: str, fraction: float) -> None:
    """At a learning rate at which AdamW does not blow rounding up."""
    changes = QUICK | {"method": method, "federation__fraction": fraction, "training__lr": 2e-4}
    ways = {
        "eight": {"federation__cohort": 8},
        "default": {},
        "three": {"federation__cohort": 3},
        "loop": {"federation__executor": "loop"},
    }
    runs = {name: run(tmp_path / name, rows, **changes, **way) for name, way in ways.items()}
    expected, log = left_behind(runs["eight"])
    for name, path in runs.items():
        mine, my_log = left_behind(path)
        assert mine.keys() == expected.keys()
        assert farthest(path, runs["eight"]) <= (0 if name == "default" else 1e-6)
        for file in mine:
            if file.startswith("checkpoints/") and file.endswith(".safetensors"):
                one, other = load_file(path / file), load_file(runs["eight"] / file)
                assert all(torch.allclose(one[key], other[key], rtol=0, atol=1e-6) for key in other)
            elif file.startswith("results/"):
                assert mine[file] == expected[file]
        assert [(e["event"], e.get("client")) for e in my_log] == [(e["event"], e.get("client")) for e in log]


@pytest.mark.parametrize("rule", ["last_known", "participants", "staleness_decay"])
def test_rows_from_files_are_the_formulas(tmp_path: Path, rows: Path, rule: str) -> None:
    """The mean of the others' uploads, taken from every round's files while these are there."""
    decay = 0.5
    changes = PARTIAL | {"federation__rest_of_world_participation": rule, "federation__staleness_decay": decay}
    uploads: dict[int, tuple[int, dict[str, torch.Tensor]]] = {}
    config = parse_config(settings(tmp_path / "run", data=rows, **changes), "x")

    def sink(event: dict[str, Any]) -> None:
        """After training, the new uploads lie in the temporary folder."""
        if event["event"] == "client":
            folder = tmp_path / "run" / "checkpoints" / f".round_{event['round']:04d}.tmp" / "uploads"
            uploads[event["client"]] = (event["round"], load_file(folder / f"{event['client']}.safetensors"))

    run_engine(prepare(config), claim_folder(config.folder, "ask"), sink)
    last = config.federation.rounds
    weights = {
        client: {"last_known": 1.0, "participants": float(round_ == last), "staleness_decay": decay ** (last - round_)}[
            rule
        ]
        for client, (round_, _) in uploads.items()
    }
    for client in range(CLIENTS):
        row = load_file(tmp_path / f"run/clients/{client}/rest_of_world/adapter_model.safetensors")
        others = {c: w for c, w in weights.items() if c != client and w}
        for name, value in row.items():
            key = name.removeprefix("base_model.model.").replace(".lora_", ".individual.").removesuffix(".weight")
            expected = sum(w * uploads[c][1][key].double() for c, w in others.items()) / sum(others.values())
            assert torch.allclose(value.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["last_known", "participants", "staleness_decay"])
def test_stopped_in_any_round_of_some_and_resumed_is_the_same_run(tmp_path: Path, rows: Path, rule: str) -> None:
    class Stop(Exception):  # noqa: N818 - not an error
        pass

    changes = PARTIAL | {"federation__rest_of_world_participation": rule, "federation__cohort": 2}
    expected = run(tmp_path / "whole" / "run", rows, **changes)
    config = parse_config(settings(tmp_path / "run", data=rows, **changes), "x")
    for number in range(1, 5):

        def sink(event: dict[str, Any], number: int = number) -> None:
            if (event["event"], event.get("round")) == ("round", number):
                raise Stop

        with pytest.raises(Stop):
            run_engine(prepare(config), claim_folder(config.folder, "resume"), sink)
        assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    run_engine(prepare(config), claim_folder(config.folder, "resume"))
    (mine, log), (whole, whole_log) = left_behind(tmp_path / "run"), left_behind(expected)
    assert {name for name in whole if mine[name] != whole[name]} == {"config.yaml"}, "which names its own folder"
    assert log == whole_log


def test_a_round_in_which_everybody_failed_leaves_nothing_behind(tmp_path: Path, rows: Path) -> None:
    changes = PARTIAL | {"training__lr": 1e38, "training__schedule": "constant", "training__weight_decay": 1e30}
    config = write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", data=rows, **changes))
    assert "every client failed" in refused("run", config)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_damaged_file_of_a_resting_client_is_found(tmp_path: Path, rows: Path) -> None:
    path = run(tmp_path / "run", rows, **PARTIAL)
    resting = min(files(path, 4, "clients").keys() - took_part(path, 4))
    file = files(path, 4, "clients")[resting]
    file.unlink()
    file.write_bytes(b"half")
    config = write_yaml(tmp_path / "x.yaml", settings(path, data=rows, **PARTIAL))
    line = refused("run", config, "--resume", "--rounds", 5)
    assert line.startswith(f"{path / 'checkpoints' / 'round_0004'}: damaged checkpoint (")


def test_loading_a_checkpoint_reads_no_numbers(partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are opened and their headers checked; the tensors stay where they are."""
    run_ = json.loads((partial / "checkpoints" / "round_0004" / "manifest.json").read_text())["run"]
    opened: list[Path] = []
    monkeypatch.setattr(checkpoints, "load_state", lambda path: opened.append(path) or load_state(path))
    loaded = load_checkpoint(partial / "checkpoints", run_)
    assert loaded
    assert len(opened) == len(loaded.clients) < CLIENTS
    assert not any(isinstance(value, torch.Tensor) for value in vars(loaded).values())


# ------------------------------------------------------------------------------------------------- the command itself


def tinyworld(out: Path, clients: int) -> list[Any]:
    values = {
        "data.train_limit": 4,
        "data.test_limit": 1,
        "training.local_epochs": 1,
        "evaluation.max_new_tokens": 1,
        "lora.r": 2,
    }
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return ["run", "--clients", clients, "--rounds", 2, "--out", out, *sets]


def test_twenty_four_clients_of_tinyworld(tmp_path: Path) -> None:
    """Tables stay short, and every client has its own rows and model."""
    done = call(*tinyworld(tmp_path / "run", 24))
    assert done.code == 0, done.err
    partition = json.loads((tmp_path / "run" / "partition.json").read_text())["clients"]
    assert [len(mine[split]) for mine in partition.values() for split in ("train", "validation", "test")] == [
        4,
        1,
        1,
    ] * 24
    digests = [digest for mine in partition.values() for split in mine.values() for digest in split]
    assert len(set(digests)) == len(digests)
    assert sorted(int(path.name) for path in (tmp_path / "run" / "clients").iterdir()) == list(range(24))
    assert len(done.out.splitlines()) < 40
    for word in ("first 8", "worst 6", "best 6", "of 24 clients"):
        assert word in done.out
    assert "first 8, worst 6, best 6 of 24 clients; means are over all" in (tmp_path / "run/report.html").read_text()
    assert call("evaluate", tmp_path / "run").out.count("equal to the run's own scores") == 1
    assert call("generate", tmp_path / "run", "--client", 23, "What is this?").code == 0
    assert "(24 in all)" in refused("generate", tmp_path / "run", "--client", 24, "x")


LAUNCH = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A small process that starts the command: Linux counts the memory of whoever starts a process as its own peak."""


@pytest.mark.slow
def test_memory_does_not_depend_on_the_number_of_clients(tmp_path: Path) -> None:
    """The peak of the command's whole process, and the one in its log, at 8 clients and at 200 of the same size."""
    command = [sys.executable, "-c", LAUNCH, str(Path(sys.executable).with_name("fedalt"))]
    peaks: dict[int, tuple[int, int]] = {}
    for clients in (8, 200):
        arguments = [*tinyworld(tmp_path / str(clients), clients), "--set", "federation.cohort=8"]
        done = subprocess.run(
            [*command, *map(str, arguments)], env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        logged = max(event["peak_memory"]["process"] for event in of_kind(tmp_path / str(clients), "round"))
        peaks[clients] = (1024 * int(done.stdout), logged)
    for few, many in zip(peaks[8], peaks[200], strict=True):
        assert many - few < 100e6, peaks
