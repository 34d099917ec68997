"""Flower's simulation gives what one machine gives, for every method; one Ray session for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import micro
from fedalt.config import parse_config
from fedalt.errors import UserError
from flower.test_parity import CHANGES, METHODS_HERE

CLOSE = 1e-5


def values(out: Path, method: str) -> dict[str, Any]:
    changes = {"federation__rounds": 2, "evaluation__every": 2, **CHANGES.get(method, {})}
    return micro.settings(out, method=method, data__clients=3, **changes)


@pytest.mark.slow
def test_every_method_in_flowers_simulation_is_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from fedalt.flower.simulate import simulate

    configs = [parse_config(values(tmp_path / "far" / name, name), name) for name in METHODS_HERE]
    scores = simulate(configs, "ask")
    assert [each["method"] for each in scores] == METHODS_HERE
    for name in METHODS_HERE:
        micro.run_here(values(tmp_path / "here" / name, name))
        far, here = tmp_path / "far" / name, tmp_path / "here" / name
        files = {n: d for n, d in micro.tree(here).items() if n.startswith(("clients/", "results/"))}
        assert files.keys() <= micro.tree(far).keys(), name
        assert micro.farthest(far, here) <= CLOSE, name


def test_what_does_not_suit_sites_is_refused_before_ray_starts(tmp_path: Path) -> None:
    from fedalt.flower.simulate import simulate

    with pytest.raises(UserError, match="trains on everybody's rows"):
        simulate([parse_config(micro.settings(tmp_path, method="centralized", data__clients=3), "s")], "ask")
    with pytest.raises(UserError, match=r"data.clients: say how many sites there are"):
        simulate([parse_config(micro.settings(tmp_path), "s")], "ask")
    with pytest.raises(UserError, match="--allow-two"):
        simulate([parse_config(micro.settings(tmp_path, data__clients=2), "s")], "ask")
