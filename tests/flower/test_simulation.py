"""Flower's simulation gives what one machine gives, for every kind of method; one Ray session for all of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import micro
from fedalt.config import parse_config
from fedalt.errors import UserError
from flower.test_parity import CHANGES, settings_of

CLOSE = 1e-5
NAMES = ("fedalt", "fedit_split", "fdlora", "feddpa_f", "hetlora", "fedsa_lora")
"""One of each kind of message and state; ``test_parity.py`` holds all methods to one machine, without Ray."""


def values(out: Path, method: str) -> dict[str, Any]:
    changes = {"federation__rounds": 2, "evaluation__every": 2, **CHANGES.get(method, {})}
    return micro.settings(out, method=method, data__clients=3, **changes)


@pytest.mark.slow
def test_every_kind_of_method_in_flowers_simulation_is_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from fedalt.flower.simulate import simulate

    configs = [parse_config(values(tmp_path / "far" / name, name), name) for name in NAMES]
    scores = simulate(configs, "ask")
    assert [each["method"] for each in scores] == list(NAMES)
    for name in NAMES:
        micro.run_here(values(tmp_path / "here" / name, name))
        far, here = tmp_path / "far" / name, tmp_path / "here" / name
        files = {n: d for n, d in micro.tree(here).items() if n.startswith(("clients/", "results/"))}
        assert files.keys() <= micro.tree(far).keys(), name
        scores = [file for file in files if file.startswith("results/") and "scores" in file]
        assert {file: micro.tree(far)[file] for file in scores} == {file: files[file] for file in scores}, name
        assert settings_of(far) == settings_of(here), name
        assert micro.farthest(far, here) <= CLOSE, name


@pytest.mark.slow
def test_sites_on_a_ray_cluster_of_two_nodes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        config = micro.write_yaml(tmp_path / "x.yaml", values(tmp_path / "far", "fedalt"))
        command = [sys.executable, "-c", "from fedalt.cli import main; main()", "submit", str(config), "--simulation"]
        environment = os.environ | {"RAY_ADDRESS": cluster.address, "RAY_DEDUP_LOGS": "0"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stderr
    actors = set(re.findall(r"\(ClientAppActor pid=(\d+)\)", done.stdout + done.stderr))
    assert len(actors) == 2, "a node has one core, and room for one actor"
    micro.run_here(values(tmp_path / "here", "fedalt"))
    assert micro.farthest(tmp_path / "far", tmp_path / "here") <= CLOSE


def test_what_does_not_suit_sites_is_refused_before_ray_starts(tmp_path: Path) -> None:
    from fedalt.flower.simulate import simulate

    with pytest.raises(UserError, match="trains on everybody's rows"):
        simulate([parse_config(micro.settings(tmp_path, method="centralized", data__clients=3), "s")], "ask")
    with pytest.raises(UserError, match=r"data.clients: say how many sites there are"):
        simulate([parse_config(micro.settings(tmp_path), "s")], "ask")
    with pytest.raises(UserError, match="--allow-two"):
        simulate([parse_config(micro.settings(tmp_path, data__clients=2), "s")], "ask")
