"""``fedalt advise``: what it says of losses, and of a run's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedalt.comparisons.advice import advice_of
from fedalt.model.peft_files import read_folder
from fedalt.names import EVIDENCE, MIXER, C, E, Key
from micro import CLIENTS, TRAIN, call, events, finished, refused

ROWS = torch.linspace(0.5, 1.5, 12).tolist()


def shifted(by: float, noise: float = 0.01) -> list[float]:
    return [value + by + (noise if i % 2 else -noise) for i, value in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("mixed", "together", "advice"),
    [
        (shifted(0.2), shifted(0.5), "alone"),
        (shifted(-0.2), shifted(-0.5), "together"),
        (shifted(-0.5), shifted(-0.2), "mixed"),
        (shifted(-0.2), shifted(0.0, 0.9), "mixed"),
        (shifted(0.0, 0.8), shifted(0.0, 0.9), "undecided"),
    ],
)
def test_advice_follows_the_intervals(mixed: list[float], together: list[float], advice: str) -> None:
    found = advice_of([ROWS, mixed, together])
    assert found["advice"] == advice
    assert found["rows"] == 12
    assert found["sharing"]["mean"] == pytest.approx(sum(ROWS) / 12 - sum(together) / 12)


def test_one_row_decides_nothing() -> None:
    found = advice_of([[1.0], [0.5], [0.1]])
    assert (found["advice"], found["sharing"]["ci95"]) == ("undecided", None)


@pytest.mark.parametrize("method", ["select", "fedalt_calibrated", "fedalt_joint"])
@pytest.mark.parametrize("validation", [0, 3])
def test_a_run_keeps_what_it_chose_by(method: str, validation: int) -> None:
    """A line per client; the saved models answer as the run's did, corrections included."""
    run = finished(method, validation=validation)
    held = validation or max(1, round(0.1 * TRAIN))
    found = call("advise", run, "--json").json
    assert (found["method"], len(found["clients"])) == (method, CLIENTS)
    for client, one in found["clients"].items():
        kept = read_folder(run / "clients" / client, (), False) if (run / "clients" / client).is_dir() else {}
        assert one["rows"] == held
        if kept:
            assert kept[Key("", EVIDENCE, E)].shape == (3, held)
    notes = [event["text"] for event in events(run) if event["event"] == "note"]
    assert any("held out" in note for note in notes) == (not validation)
    assert "equal to the run's own scores" in call("evaluate", run).out
    assert f"of {CLIENTS} clients" in call("advise", run).out
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "Who should share" in report
    assert all(one["words"] in report for one in call("advise", run, "--json").json["clients"].values())


def test_shifts_are_in_the_mixers_file(tmp_path: Path) -> None:
    run = finished("fedalt_calibrated", validation=3)
    folders = sorted(path.parent for path in run.glob("clients/*/mixer.safetensors"))
    assert len(folders) == CLIENTS
    for folder in folders:
        about = json.loads((folder / "fedalt_config.json").read_text())
        tensors = read_folder(folder, about["slots"], True)
        shifts = [value for key, value in tensors.items() if (key.slot, key.factor) == (MIXER, C)]
        assert shifts, folder
        assert all(shift.shape == (2, 1) and torch.equal(shift, shifts[0]) for shift in shifts)


def test_other_runs_have_nothing_to_say() -> None:
    assert "fedalt keeps no losses on held-out rows" in refused("advise", finished("fedalt"))
