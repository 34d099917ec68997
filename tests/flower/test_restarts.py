"""Real SuperLink, SuperNodes and trainers on loopback, without keys: whatever is killed meanwhile, all ends as without.

Sites that have no keys may come back at once after a kill. The last two tests share rows, for which sites start again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import micro
from flower.deployment import CLOSE, PATIENCE, Deployment, failures, farthest, on_one_machine, values, wait
from flower.spoilt_site import LIES, REPLAYED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def without_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("plain")) as deployment:
        yield deployment


@pytest.fixture
def plain(without_tls: Deployment) -> Deployment:
    without_tls.restore()
    return without_tls


@pytest.fixture(scope="module")
def much(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of which client 1 has so many that it trains for seconds."""
    folder = micro.data_folder(tmp_path_factory.mktemp("much"))
    micro.write_rows(folder / "train/local_training_1.json", micro.rows(1, 15 * micro.TRAIN), False)
    return folder


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
    """This is refused when the sites have answered; ``test_simulation.py`` has what is refused before."""
    out = plain.finish(values(tmp_path, method="fedalt_averaged_mixer"), code=2)
    assert out.splitlines()[-1].count("--share mixer") == 1 and out.count("error: ") == 1


def test_a_site_killed_while_training_and_started_again_misses_nothing(
    plain: Deployment, tmp_path: Path, much: Path
) -> None:
    changes = {"data__source": str(much)}
    plain.give(much)
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


def test_a_server_killed_between_rounds_and_in_a_round_goes_on_with_resume(
    plain: Deployment, tmp_path: Path, much: Path
) -> None:
    changes = {"data__source": str(much)}
    plain.give(much)
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
