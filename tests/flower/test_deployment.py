"""Real SuperLink, SuperNodes and trainers on loopback: the run is that of one machine, whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import micro
from fedalt.flower.certs import make_certs
from flower.deployment import Deployment, wait

pytestmark = pytest.mark.slow
CLOSE = 1e-5


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployed")
    make_certs(folder / "tls", 3)
    with Deployment(folder, tls=folder / "tls") as deployment:
        yield deployment


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path / "deployed") as deployment:
        yield deployment


def values(folder: Path, name: str = "run", **changes: Any) -> dict[str, Any]:
    return micro.settings(folder / name, **{"data__clients": 3, "evaluation__every": 3, **changes})


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys() and one
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def on_one_machine(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    micro.run_here(values(folder, "here", **changes))
    return micro.adapters(folder / "here")


@pytest.mark.parametrize("method", ["fedalt", "fedit", "fedsa_lora", "fdlora"])
def test_the_same_run_with_tls_and_authenticated_sites(method: str, deployed: Deployment, tmp_path: Path) -> None:
    out = deployed.finish(values(tmp_path, method, method=method))
    assert f"run started: {method}, 3 clients" in out
    assert farthest(deployed.models(method), on_one_machine(tmp_path, method=method)) <= CLOSE
    far, here = tmp_path / method, tmp_path / "here"
    read = [json.loads((run / "results/final_scores.json").read_text()) for run in (far, here)]
    assert read[0] == read[1]
    assert not list(far.rglob("eval_client*")) and not (far / "clients").exists(), "these stay at the sites"
    assert {e["event"] for e in micro.events(far)} == {e["event"] for e in micro.events(here)}


def test_a_site_killed_in_a_round_and_started_again_misses_nothing(plain: Deployment, tmp_path: Path) -> None:
    settings = values(tmp_path)
    submitted = plain.submit(settings)
    plain.wait_for("site1", "round 1: loss")
    plain.kill("site1")
    plain.start_site(1)
    assert submitted.wait(240) == 0, plain.log("submit")
    assert not [e for e in micro.events(tmp_path / "run") if e["event"] == "client_failed"]
    assert farthest(plain.models("run"), on_one_machine(tmp_path)) <= CLOSE


def test_a_server_killed_in_a_round_goes_on_with_resume(plain: Deployment, tmp_path: Path) -> None:
    settings = values(tmp_path)
    submitted = plain.submit(settings)
    log = tmp_path / "run/events.jsonl"
    wait(lambda: log.exists() and '"round_started", "round": 2' in log.read_text(), 120, lambda: plain.log("submit"))
    plain.kill("server")
    assert submitted.wait(120) == 1, plain.log("submit")
    plain.start_server()
    for client in range(3):
        if plain.processes[f"site{client}"].poll() is not None:
            plain.start_site(client)
    plain.finish(settings, "--resume")
    assert farthest(plain.models("run"), on_one_machine(tmp_path)) <= CLOSE


def test_a_site_that_is_gone_is_left_out_and_the_rest_go_on(plain: Deployment, tmp_path: Path) -> None:
    settings = values(tmp_path, flower__round_deadline=15.0, flower__min_sites=2, federation__rounds=3)
    submitted = plain.submit(settings)
    plain.wait_for("site2", "round 1: loss")
    plain.kill("site2")
    assert submitted.wait(240) == 0, plain.log("submit")
    failed = [(e["client"], e["reason"]) for e in micro.events(tmp_path / "run") if e["event"] == "client_failed"]
    assert failed and {client for client, _ in failed} == {2}
    assert [e["client"] for e in micro.events(tmp_path / "run") if e["event"] == "client" and e["round"] == 3] == [0, 1]


def test_a_killed_trainer_is_started_again(plain: Deployment, tmp_path: Path) -> None:
    settings = values(tmp_path)
    submitted = plain.submit(settings)
    plain.wait_for("site0", "round 1: loss")
    os.kill(json.loads((plain.state(0) / "trainer.json").read_text())["pid"], signal.SIGKILL)
    assert submitted.wait(240) == 0, plain.log("submit")
    assert "trainer: ended (signal 9); starting it again" in plain.log("site0")
    assert farthest(plain.models("run"), on_one_machine(tmp_path)) <= CLOSE


def test_wrong_settings_are_one_line_and_code_2(plain: Deployment, tmp_path: Path) -> None:
    out = plain.finish(values(tmp_path, method="centralized"), code=2)
    assert out.count("error: ") == 1 and "trains on everybody's rows" in out
    out = plain.finish(values(tmp_path, method="fedalt_averaged_mixer"), code=2)
    assert out.splitlines()[-1].count("--share mixer") == 1
