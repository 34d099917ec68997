"""Real SuperLink, SuperNodes and trainers on loopback: the run is that of one machine, whatever is killed meanwhile."""

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
from flower.deployment import PATIENCE, Deployment, wait
from flower.grid import LocalGrid, count_time
from flower.spoilt_site import LIES, REPLAYED

pytestmark = pytest.mark.slow
CLOSE = 1e-5


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployed")
    make_certs(folder / "tls", 3)
    with Deployment(folder, tls=folder / "tls") as deployment:
        yield deployment


@pytest.fixture(scope="module")
def without_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("plain")) as deployment:
        yield deployment


@pytest.fixture
def plain(without_tls: Deployment) -> Deployment:
    """Sites that may come back at once after a kill, as they have no keys."""
    without_tls.give(micro.shared_data())
    return without_tls


def values(folder: Path, name: str = "run", **changes: Any) -> dict[str, Any]:
    return micro.settings(folder / name, **{"data__clients": 3, "evaluation__every": 3, **changes})


def with_much_at(client: int, folder: Path) -> Path:
    """Rows of which one client has so many that it trains for seconds."""
    micro.data_folder(folder)
    micro.write_rows(folder / f"train/local_training_{client}.json", micro.rows(client, 15 * micro.TRAIN), False)
    return folder


def failures(run: Path) -> list[tuple[int, int, str]]:
    return [(e["round"], e["client"], e["reason"]) for e in micro.of_kind(run, "client_failed")]


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
    assert {e["event"] for e in micro.events(far)} | {"note"} == {e["event"] for e in micro.events(here)}


def test_a_site_killed_while_training_and_started_again_misses_nothing(plain: Deployment, tmp_path: Path) -> None:
    changes = {"data__source": str(with_much_at(1, tmp_path / "rows"))}
    plain.give(tmp_path / "rows")
    submitted = plain.submit(values(tmp_path, "killed", **changes))
    plain.wait_for("site1", "Receiving: train message", times=2)
    plain.wait_for_training(1)
    plain.kill("site1")
    assert "round 1: loss" in plain.log("site1") and "round 2: loss" not in plain.log("site1")
    plain.start_site(1)
    assert submitted.wait(PATIENCE) == 0, plain.log("submit")
    assert "round 2: loss" in plain.log("site1")
    assert not failures(tmp_path / "killed")
    assert farthest(plain.models("killed"), on_one_machine(tmp_path, **changes)) <= CLOSE


def test_a_server_killed_between_rounds_and_in_a_round_goes_on_with_resume(plain: Deployment, tmp_path: Path) -> None:
    changes = {"data__source": str(with_much_at(1, tmp_path / "rows"))}
    plain.give(tmp_path / "rows")
    settings, run = values(tmp_path, "resumed", **changes), tmp_path / "resumed"
    sites = {name: process for name, process in plain.processes.items() if name.startswith("site")}
    submitted = plain.submit(settings)
    wait((run / "checkpoints/round_0001").exists, lambda: plain.log("submit"))
    plain.kill("server")
    assert submitted.wait(PATIENCE) == 1, plain.log("submit")
    plain.start_server()
    submitted = plain.submit(settings, "--resume")
    log = run / "events.jsonl"
    wait(lambda: "round_started" in log.read_text().partition("run_resumed")[2], lambda: plain.log("submit"))
    plain.kill("server")
    assert submitted.wait(PATIENCE) == 1, plain.log("submit")
    plain.start_server()
    plain.finish(settings, "--resume")
    assert {name: plain.processes[name] for name in sites} == sites and all(map(plain.runs, sites)), "they stay"
    assert [event["round"] for event in micro.of_kind(run, "round")] == [1, 2, 3]
    assert farthest(plain.models("resumed"), on_one_machine(tmp_path, **changes)) <= CLOSE


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


def test_what_a_spoilt_site_sends_is_left_out_and_the_rest_go_on(plain: Deployment, tmp_path: Path) -> None:
    plain.end("site1")
    plain.start_site(1, spoilt="lies")
    plain.finish(values(tmp_path, "spoilt", federation__rounds=6, evaluation__every=6))
    plain.end("site1")
    expected = [
        *((number, reason) for number, (_, reason) in LIES.items()),
        (REPLAYED, "answer to train, round 1 of spoilt-"),
    ]
    said = failures(tmp_path / "spoilt")
    assert [(number, client) for number, client, _ in said] == [(number, 1) for number, _ in expected]
    for (_, _, line), (_, reason) in zip(said, expected, strict=True):
        assert reason in line and "\n" not in line
    counted = [(e["round"], e["client"]) for e in micro.of_kind(tmp_path / "spoilt", "client")]
    assert counted == [(n, c) for n in range(1, 7) for c in range(3) if c != 1 or n in (1, 6)]
    assert all(value.isfinite().all() for value in plain.models("spoilt").values())


def test_a_killed_trainer_is_started_again(plain: Deployment, tmp_path: Path) -> None:
    submitted = plain.submit(values(tmp_path, "revived"))
    plain.wait_for("site0", "round 1: loss")
    before = [plain.trainer(client).pid for client in range(3)]
    plain.trainer(0).kill()
    assert submitted.wait(PATIENCE) == 0, plain.log("submit")
    assert "trainer: ended (signal 9); starting it again" in plain.log("site0")
    after = [plain.trainer(client).pid for client in range(3)]
    assert after[0] != before[0] and after[1:] == before[1:], "a trainer lives as long as its site"
    assert farthest(plain.models("revived"), on_one_machine(tmp_path)) <= CLOSE


def test_what_a_site_has_of_a_finished_run_serves_it_like_any_run(plain: Deployment, tmp_path: Path) -> None:
    plain.finish(values(tmp_path, "used", federation__rounds=1))
    [own] = plain.state(1).glob("used-*")
    scored = micro.call("evaluate", own)
    assert scored.code == 0 and "equal to the run's own scores" in scored.out, scored.err
    assert micro.call("generate", own, "--client", 1, "Is 3 more than 1?").code == 0
    assert micro.call("export", own, "--client", 1, "--to", tmp_path / "away").code == 0
    assert (tmp_path / "away/individual/adapter_model.safetensors").is_file()
    assert "client 0" in micro.refused("generate", own, "--client", 0, "Hello")


def test_wrong_settings_are_one_line_and_code_2(plain: Deployment, tmp_path: Path) -> None:
    out = plain.finish(values(tmp_path, method="centralized"), code=2)
    assert out.count("error: ") == 1 and "trains on everybody's rows" in out
    out = plain.finish(values(tmp_path, method="fedalt_averaged_mixer"), code=2)
    assert out.splitlines()[-1].count("--share mixer") == 1
