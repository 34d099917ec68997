"""What clients may do in training, and early stopping, give at sites what they give on one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedalt.config import parse_config
from fedalt.flower.consent import Consent
from fedalt.flower.server_app import serve
from fedalt.model.state import load_state
from fedalt.runs.setup import Bases
from flower.grid import LocalGrid
from micro import TRAINED, run_here, settings, shared_data, tree

EARLY: dict[str, Any] = {
    "training__lr": 0.3,
    "training__local_epochs": 1,
    "training__optimizer_state": "persist",
    "evaluation__metric": "answer_loss",
    "evaluation__early_stop": 2,
    "federation__rounds": 9,
}


RESTING = EARLY | {"federation__fraction": 0.7, "flower__allow_two": True, "flower__min_sites": 1}
"""Two of three take part, so that a site may have trained last some rounds before the best one."""
CASES = {
    "all": (TRAINED, ("clients",)),
    "early": (EARLY, ("clients", "last")),
    "resting": (RESTING, ("clients", "last")),
}


@pytest.mark.parametrize(("changes", "parts"), CASES.values(), ids=CASES)
def test_sites_end_as_one_machine_does(changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    """With early stopping the server alone knows which round was the best, and sites have its state."""
    values = settings(tmp_path / "far", data=shared_data(4), data__clients=3, **changes)
    grid = LocalGrid(tmp_path / "sites", range(3), Bases(), consent=Consent(allow_two=True))
    serve(grid, parse_config(values, "s").model_dump(mode="json"), "ask", lambda event: None)
    here = tmp_path / "here"
    run_here(settings(here, data=shared_data(4), data__clients=3, federation__executor="loop", **changes))
    sites = [next(p for p in (grid.folder / str(client)).iterdir() if p.is_dir()) for client in grid.sites]
    for part in parts:
        far = {name: data for site in sites for name, data in tree(site / part).items()}
        assert far == tree(here / part) and far
    final, own = (json.loads((run / "results/final_scores.json").read_text()) for run in (tmp_path / "far", here))
    assert final == own
    moments = load_state(next((sites[0] / "checkpoints").glob("*/clients/0.safetensors"))).optimizer
    assert moments["first"] and not any("/clients/" in name for name in tree(tmp_path / "far" / "checkpoints"))
    assert not any("optimizer" in reply.header for _, _, reply in grid.sent)
