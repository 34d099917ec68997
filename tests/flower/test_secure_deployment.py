"""A secure sum with real processes, TLS and keys: the numbers of one machine, and a site that is killed over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import micro
from fedalt.flower.certs import make_certs
from flower.deployment import PATIENCE, Deployment

pytestmark = pytest.mark.slow
SITES = 4


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("secure")
    make_certs(folder / "tls", SITES)
    with Deployment(folder, clients=SITES, tls=folder / "tls") as deployment:
        deployment.give(micro.shared_data(clients=SITES))
        yield deployment


def values(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    source = str(micro.shared_data(clients=SITES))
    secure = {"data__source": source, "data__clients": SITES, "federation__secure": True, "evaluation__every": 3}
    return micro.settings(folder / name, **{**secure, **changes})


def test_the_same_models_as_on_one_machine_and_no_upload_at_the_server(deployed: Deployment, tmp_path: Path) -> None:
    out = deployed.finish(values(tmp_path, "far"))
    assert "run started: fedalt, 4 clients" in out
    micro.run_here(values(tmp_path, "here", federation__executor="loop"))
    far, here = deployed.models("far"), micro.adapters(tmp_path / "here")
    assert far.keys() == here.keys() and far
    assert max(float((value - here[name]).abs().max()) for name, value in far.items()) <= 1e-5
    kept = {path.name for path in (tmp_path / "far/checkpoints/round_0003").rglob("*.safetensors")}
    assert kept == {"sum.safetensors"}
    assert "masked for 4 clients" in deployed.log("site2")


def test_a_site_that_wants_secure_sums_alone_joins_no_other_run(deployed: Deployment, tmp_path: Path) -> None:
    deployed.end("site3")
    deployed.start_site(3, "--set", "secure=true")
    deployed.wait_for("site3", "Starting Flower SuperNode")
    plain = values(tmp_path, "plain", federation__secure=False, federation__rounds=1, evaluation__every=1)
    out = deployed.finish({**plain, "flower": {"min_sites": 3, "round_deadline": 60}})
    assert "client 3" in out and "it takes part only where the server sees no single upload" in out
    out = deployed.finish(values(tmp_path, "again", federation__rounds=1, evaluation__every=1))
    assert "left out" not in out and "masked for 4 clients" in deployed.log("site3")


def test_a_site_killed_over_its_masks_costs_the_others_nothing(deployed: Deployment, tmp_path: Path) -> None:
    settings = values(tmp_path, "killed", federation__rounds=3, evaluation__every=3)
    submitted = deployed.submit({**settings, "flower": {"min_sites": 3, "round_deadline": 45}})
    deployed.wait_for("site1", "round 2: masked")
    deployed.kill("site1")
    deployed.start_site(1)
    assert submitted.wait(PATIENCE) == 0, deployed.log("submit")
    events = micro.events(tmp_path / "killed")
    assert [e["round"] for e in events if e["event"] == "round"] == [1, 2, 3]
    assert events[-1]["event"] == "run_finished"
