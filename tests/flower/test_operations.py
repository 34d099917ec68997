"""Real processes: a site and a server are drained, and a run is followed by who did not begin it."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import micro
from fedalt.flower.deploy.metrics import PATIENCE as MISSED
from fedalt.flower.deploy.metrics import sites
from flower.deployment import CLOSE, PATIENCE, Deployment, failures, farthest, on_one_machine, values, wait


def test_nothing_runs_that_could_be_drained(tmp_path: Path) -> None:
    assert "no fedalt site or server runs with this --state" in micro.refused("drain", tmp_path)
    assert "no fedalt site or server runs with this --state" in micro.refused("drain", tmp_path / "none")


def test_a_run_is_followed_as_it_is(tmp_path: Path) -> None:
    line = micro.refused("submit", "--attach", "--rounds", 3)
    assert line.endswith("--rounds has no effect with --attach; leave it out")
    assert "no server answers" in micro.refused("submit", "--attach", 7, "--server", "127.0.0.1:9")


def test_heartbeats_are_counted_as_flower_does() -> None:
    from flwr.common.constant import HEARTBEAT_PATIENCE

    assert HEARTBEAT_PATIENCE == MISSED and not list(sites(Path("none")))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Sites of which the second has so many rows that it trains for seconds."""
    folder = tmp_path_factory.mktemp("operations")
    rows = micro.data_folder(folder / "much")
    micro.write_rows(rows / "train/local_training_1.json", micro.rows(1, 6 * micro.TRAIN), False)
    with Deployment(folder / "deployed") as deployment:
        deployment.give(rows)
        yield deployment


@pytest.mark.slow
def test_a_site_is_drained_and_a_run_is_followed(deployed: Deployment, tmp_path: Path) -> None:
    changes = {"data__source": str(deployed.rows)}
    settings = values(tmp_path, "drained", **changes)
    submitted = deployed.submit(settings)
    deployed.wait_for("site1", "Receiving: train message")
    deployed.wait_for_training(1, 0.5)
    assert deployed._start("drain", ["drain", str(deployed.state(1))]).wait(PATIENCE) == 0, deployed.log("drain")
    assert deployed.processes["site1"].wait(PATIENCE) == 0
    said = deployed.log("site1")
    assert "round 1: loss" in said and "round 2: loss" not in said, "the round at hand is finished"
    assert said.splitlines()[-1].endswith(
        f"drained: finished rounds are safe in {deployed.state(1)}; start it again to go on"
    )
    online = {name["site"]: value for kind, name, value in sites(deployed.folder / "server") if "online" in kind}
    assert list(online.values()) == [1, 1], "one without a key that has left is nobody any more"

    again = ["submit", str(deployed.folder / "drained.yaml"), "--server", deployed.address]
    second = deployed._start("second", again)
    deployed.wait_for("second", "round 1: loss")
    [run] = re.findall(r"following run (\d+), which has begun before; Ctrl-C leaves it going", deployed.log("second"))
    second.send_signal(signal.SIGINT)
    assert second.wait(PATIENCE) == 130
    line = f"stopped by Ctrl-C; run {run} goes on; fedalt submit --attach {run} --server {deployed.address} follows it"
    assert line in deployed.log("second").splitlines()[-1]
    third = deployed._start("third", ["submit", "--attach", "--server", deployed.address])
    deployed.start_site(1)
    assert (submitted.wait(PATIENCE), third.wait(PATIENCE)) == (0, 0), deployed.log("third")
    assert deployed.log("third").splitlines()[-1] == f"run {run} has finished"
    assert not failures(tmp_path / "drained"), "it was back in time"
    assert farthest(deployed.models("drained"), on_one_machine(tmp_path, **changes)) <= CLOSE


@pytest.mark.slow
def test_a_server_is_drained_and_its_run_goes_on_later(deployed: Deployment, tmp_path: Path) -> None:
    deployed.restore()
    settings, run = values(tmp_path, "later", data__source=str(deployed.rows)), tmp_path / "later"
    submitted = deployed.submit(settings)
    wait(lambda: (run / "events.jsonl").exists() and bool(micro.of_kind(run, "round_started")), lambda: "no round")
    drain = deployed._start("drain", ["drain", str(deployed.folder / "server")])
    assert deployed.processes["server"].wait(PATIENCE) == 0, deployed.log("server")
    assert drain.wait(PATIENCE) == 0 and "drained: finished rounds are in their run folders" in deployed.log("server")
    assert submitted.wait(PATIENCE) == 2
    assert "this server is drained; finished rounds are safe, submit with --resume" in deployed.log("submit")
    begun = [len(micro.of_kind(run, kind)) for kind in ("round_started", "round")]
    assert begun[0] == begun[1] < 3, "what was begun is finished"
    deployed.start_server()
    deployed.finish(settings, "--resume")
    assert [event["round"] for event in micro.of_kind(run, "round")] == [1, 2, 3]
