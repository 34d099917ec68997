"""A run's log as plain numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedalt.errors import UserError
from fedalt.runs.folder import RunFolder, final_scores, read_history
from micro import CLIENTS, finished, of_kind, settings, write_yaml


def test_losses_scores_and_weights_are_those_of_the_log() -> None:
    run = finished()
    history = read_history(run)
    assert (history.method, history.metric) == ("fedalt", "rouge1")
    assert history.tasks == {str(k): f"task{k}" for k in range(CLIENTS)}
    assert set(history.losses) == set(history.scores) == set(history.alpha) == set(range(CLIENTS))
    for event in of_kind(run, "client"):
        assert history.losses[event["client"]][event["round"]] == event["loss"]
    last = final_scores(RunFolder(run))["last"]
    assert {str(k): rounds[last["round"]] for k, rounds in history.scores.items()} == {
        client: scores["rouge1"] for client, scores in last["clients"].items()
    }
    assert all(list(rounds) == [1, 2, 3] for rounds in (*history.losses.values(), *history.scores.values()))
    latest = [event for event in of_kind(run, "client") if event["round"] == 3]
    assert history.alpha == {event["client"]: event["alpha"] for event in latest}


def test_a_method_without_a_mixer_has_no_weights() -> None:
    assert read_history(finished("local")).alpha == {}


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        read_history(tmp_path)
    write_yaml(tmp_path / "config.yaml", settings(tmp_path))
    with pytest.raises(UserError, match="has not begun"):
        read_history(tmp_path)
