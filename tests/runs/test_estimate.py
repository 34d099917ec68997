"""What ``fedalt validate`` foretells is what ``fedalt run`` then takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedalt.config import parse_config
from fedalt.runs.clients import plans_of
from fedalt.runs.preview import estimate
from fedalt.runs.setup import prepare
from micro import fedalt, of_kind, settings, write_yaml


def test_steps_are_those_of_the_clients_that_take_part(tmp_path: Path) -> None:
    values = settings(tmp_path / "run", federation__rounds=3, federation__fraction=0.34, federation__cohort=1)
    experiment = prepare(parse_config(values, "x"))
    cost = estimate(experiment)
    epochs = values["training"]["local_epochs"]
    assert cost.cohort == 1
    assert cost.steps == 3 * epochs * len(plans_of(experiment, 0, 1)[0].steps) // epochs
    assert cost.seconds == pytest.approx(cost.steps * cost.seconds_per_step)
    assert cost.scoring_seconds > 0


def test_moments_that_clients_keep_take_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"lora__targets": ["all-linear"], "lora__r": 64, "training__batch_size": 1}
    kinds = {
        kind: prepare(parse_config(settings(tmp_path / "run", training__optimizer_state=kind, **given), "x"))
        for kind in ("reset", "persist")
    }
    trained = kinds["reset"].trained
    free = 2 * 3 * 4 * 7 * trained  # half of it, for three clients whose adapters have seven copies and more
    monkeypatch.setattr("fedalt.federation.client.free_memory", lambda device: free)
    sizes = {kind: experiment.fitting_cohort for kind, experiment in kinds.items()}
    assert sizes["persist"] < sizes["reset"]
    assert estimate(kinds["persist"].with_cohort(1)).steps == estimate(kinds["reset"].with_cohort(1)).steps


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 64])
def test_peak_memory_is_foretold_within_a_fifth(tmp_path: Path, rows: int) -> None:
    """In processes of their own: with steps that take more than everything else, and with many small ones."""
    values = {
        "out": str(tmp_path / "run"),
        "data": {"train_limit": 128, "test_limit": 32},
        "training": {"local_epochs": 1, "batch_size": rows},
        "federation": {"rounds": 2, "cohort": 8},
        "evaluation": {"max_new_tokens": 16},
    }
    write_yaml(tmp_path / "x.yaml", values)
    told = fedalt("validate", "x.yaml", "--json", cwd=tmp_path)
    assert told.code == 0, told.err
    assert fedalt("run", "x.yaml", cwd=tmp_path).code == 0
    taken = of_kind(tmp_path / "run", "evaluated")[-1]["peak_memory"]["process"]
    assert told.json["estimate"]["peak_memory"]["process"] == pytest.approx(taken, rel=0.2)
