"""Every method and variant, stopped between two rounds and resumed, with a client resting in each round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedalt.config import parse_config
from fedalt.runs.folder import claim_folder
from fedalt.runs.rounds import run as run_engine
from fedalt.runs.setup import prepare
from micro import left_behind, of_kind, run_here, settings, shared_data
from support import METHODS, VARIANTS

SHORT = {
    "federation__rounds": 3,
    "federation__fraction": 0.67,
    "training__local_epochs": 1,
    "training__batch_size": 6,
    "data__test_limit": 1,
    "evaluation__every": 3,
    "evaluation__max_new_tokens": 2,
}
OWN: dict[str, dict[str, Any]] = {
    "fedalt_clusters": {"federation__rest_of_world_participation": "staleness_decay"},
    "fdlora": {"fdlora__budget": 9, "fdlora__sync_every": 2, "fdlora__few_shot": 2},
    "fedalt_trimmed_mean": {"data__source": str(shared_data(clients=6)), "fedalt__trim": 0.25},
    "fedalt_krum": {"data__source": str(shared_data(clients=6))},
    "feddpa_f": {"feddpa__samples": 2},
    "feddpa_t": {"feddpa__samples": 2},
    "hetlora": {"hetlora__tail": 0.5, "hetlora__decay": 1.0},
    "lora_fair": {"lora_fair__steps": 5},
    "pf2lora": {"pf2lora__hypergrad": "unrolled"},
}
UNEQUAL: dict[str, dict[str, Any]] = {
    f"{name}, unequal": {"method": name, "lora__ranks": [1, 4, 2]}
    for name in ("zero_pad", "hetlora", "flexlora", "flora", "local", "fedalt_stack", "fedalt_svd")
}
CASES = {name: {"method": name, **OWN.get(name, {})} for name in (*METHODS, *VARIANTS)} | UNEQUAL


PRESENT = {"centralized": [1, 1, 1], "feddpa_f": [2, 2, 3], "fedit_ft": [2, 2, 3]} | {
    name: [4, 4, 4] for name in ("fedalt_trimmed_mean", "fedalt_krum")
}
"""Clients in each round, where it is not two: one model for all, and a private phase for everybody."""


class Stop(Exception):  # noqa: N818 - not an error
    pass


def stop(event: dict[str, Any]) -> None:
    """An interruption as the third round starts: FDLoRA has a velocity by then."""
    if (event["event"], event.get("round")) == ("round_started", 3):
        raise Stop


@pytest.mark.parametrize("name", CASES)
def test_stopped_between_rounds_and_resumed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for place in ("undisturbed", "resumed"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        values = settings(Path("run"), **SHORT, **CASES[name])
        if place == "resumed":
            config = parse_config(values, "settings")
            with pytest.raises(Stop):
                run_engine(prepare(config), claim_folder(config.folder, "ask"), stop)
        run_here(values, "resume" if place == "resumed" else "ask")
        runs.append(tmp_path / place / "run")
    assert [event["round"] for event in of_kind(runs[1], "run_resumed")] == [2]
    (files, log), (expected, expected_log) = left_behind(runs[1]), left_behind(runs[0])
    assert files.keys() == expected.keys()
    assert [path for path in files if files[path] != expected[path]] == []
    assert log == expected_log
    present = [len(event["clients"]) for event in of_kind(runs[0], "round_started")]
    assert present == PRESENT.get(name, [2, 2, 2])
