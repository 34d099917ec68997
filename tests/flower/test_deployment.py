"""Real SuperLink, SuperNodes and trainers on loopback, with TLS and keys: the run is that of one machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import micro
from fedalt.config import parse_config
from fedalt.flower.certs import make_certs
from fedalt.flower.server_app import serve
from flower.deployment import CLOSE, PATIENCE, Deployment, failures, farthest, on_one_machine, values, wait
from flower.grid import LocalGrid, count_time

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployed")
    make_certs(folder / "tls", 3)
    with Deployment(folder, tls=folder / "tls") as deployment:
        yield deployment


@pytest.mark.parametrize("method", ["fedalt", "fdlora"])
def test_the_same_run_with_tls_and_authenticated_sites(method: str, deployed: Deployment, tmp_path: Path) -> None:
    out = deployed.finish(values(tmp_path, method, method=method))
    assert f"run started: {method}, 3 clients" in out
    assert farthest(deployed.models(method), on_one_machine(tmp_path, method=method)) <= CLOSE
    far, here = tmp_path / method, tmp_path / "here"
    read = [json.loads((run / "results/final_scores.json").read_text()) for run in (far, here)]
    assert read[0] == read[1]
    assert not list(far.rglob("eval_client*")) and not (far / "clients").exists(), "these stay at the sites"
    assert {e["event"] for e in micro.events(far)} | {"note"} == {e["event"] for e in micro.events(here)}


def test_a_site_that_dies_over_its_reply_and_misses_rounds_comes_back_with_its_state(
    deployed: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a key it is let in again a minute after the kill; until then rounds go on without it."""
    settings = values(tmp_path, "gone", flower__round_deadline=15.0, flower__min_sites=2, federation__rounds=10)
    settings["evaluation"]["every"] = 10
    run = tmp_path / "gone"
    deployed.end("site2")
    deployed.start_site(2, spoilt="dies")
    submitted = deployed.submit(settings)
    wait(lambda: not deployed.runs("site2"), lambda: deployed.log("site2"))
    assert "round 1: loss" in deployed.log("site2"), "its state is on its disk"
    deployed.start_site(2)
    assert submitted.wait(PATIENCE) == 0, deployed.log("submit")
    missed = [number for number, _, _ in failures(run)]
    assert failures(run) == [(number, 2, "no answer within 15 s") for number in missed]
    assert len(missed) >= 2 and missed[0] == 1
    came = [event["round"] for event in micro.of_kind(run, "client") if event["client"] == 2]
    assert came == [number for number in range(1, 11) if number not in missed] and came[-1] == 10
    [own] = deployed.state(2).glob("gone-*")
    trained = {event["round"] for event in micro.of_kind(own, "client")}
    faults = {number: "late" if number in trained else "lost" for number in missed}
    assert faults[1] == "late"
    assert farthest(deployed.models("gone"), in_memory(tmp_path, settings, faults, monkeypatch)) <= CLOSE


def in_memory(
    folder: Path, settings: dict[str, Any], faults: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """The models of a run in this process, in which client 2 misses the same rounds."""
    count_time(monkeypatch)
    grid = LocalGrid(folder / "sites", range(3))
    grid.fault = lambda client, request: faults.get(request.round) if (client, request.do) == (2, "train") else None
    serve(
        grid,
        parse_config({**settings, "out": str(folder / "memory")}, "s").model_dump(mode="json"),
        "ask",
        lambda event: None,
    )
    return grid.models()
