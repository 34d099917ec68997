"""Two rounds of every method and variant against numbers that were recorded once, in ``trajectories/NAME.json``.

A change of any number means that runs are no longer comparable with older ones. Where that is meant, record anew with
``python tests/methods/test_trajectories.py NAME …`` (``PYTHONPATH=src:tests``) and say so in the change log. Methods of
installed packages have no record here and are passed over.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedalt.model.adapted import AdaptedModel
from fedalt.names import Tensors
from fedalt.registry import METHODS as REGISTRY
from fedalt.registry import OURS
from support import METHODS, VARIANTS, examples, llama, method_of, run_rounds, shape_of, start_states, training

RECORDS = Path(__file__).with_name("trajectories")
NAMES = [name for name in (*METHODS, *VARIANTS) if REGISTRY.entry(name).origin == OURS]
ROWS = {client: examples(count, seed=30 + client) for client, count in enumerate((10, 6, 4, 8))}
CONFIG = training(local_epochs=1, batch_size=2, max_grad_norm=0.5, weight_decay=0.05)
"""Five, three, two and four steps a round."""
SETTINGS: dict[str, dict[str, Any]] = {
    "pf2lora": {"pf2lora__hypergrad": "unrolled", "pf2lora__private_lr": 0.05},
    "fdlora": {"fdlora__sync_every": 1},
    "hetlora": {"hetlora__tail": 0.5, "hetlora__decay": 0.5},
    "lora_fair": {"lora_fair__steps": 20, "lora_fair__lr": 0.1},
    "feddpa_f": {"federation__rounds": 2},
    "fedit_ft": {"federation__rounds": 2},
    "fedprox": {"fedprox__mu": 1.0},
    "ditto": {"ditto__weight": 1.0},
}


def moved(tensors: Tensors, start: Tensors) -> float:
    """How far some tensors are from where they started."""
    return float(torch.stack([(v - start[key]).double().square().sum() for key, v in tensors.items()]).sum().sqrt())


def trajectory(name: str) -> dict[str, list[float]]:
    """Losses of both rounds, and how far the first upload and the next round's start have moved, client by client."""
    method, model = method_of(name, len(ROWS), **SETTINGS.get(name, {})), AdaptedModel(llama())
    starts = [state.tensors for state in start_states(method, shape_of(method, model.layer_sizes), list(ROWS))]
    history, server = run_rounds(model, method, ROWS, CONFIG, 2, dropout=0.2)
    messages = server.messages(tuple(ROWS))
    states = [
        method.receive(r.state, messages[r.state.client]) if r.state.client in messages else r.state
        for r in history[-1]
    ]
    numbers = {
        "loss": [result.stats.loss for results in history for result in results],
        "upload": [moved(r.upload, start) for r, start in zip(history[0], starts, strict=True) if r.upload],
        "state": [moved(state.tensors, start) for state, start in zip(states, starts, strict=True)],
    }
    return {kind: [float(f"{value:.4g}") for value in values] for kind, values in numbers.items()}


def recorded(name: str) -> dict[str, list[float]]:
    numbers: dict[str, list[float]] = json.loads((RECORDS / f"{name}.json").read_text())
    return numbers


@pytest.mark.parametrize("name", NAMES)
def test_two_rounds_are_what_they_were(name: str) -> None:
    expected, now = recorded(name), trajectory(name)
    assert now.keys() == expected.keys()
    for kind, values in now.items():
        assert values == pytest.approx(expected[kind], rel=1e-3), kind


def test_the_records_tell_methods_apart() -> None:
    """Except for those that are the same here: no value of three is trimmed, corrections are for answers alone, …"""
    assert {path.stem for path in RECORDS.glob("*.json")} == set(NAMES)
    lines: dict[str, list[str]] = {}
    for name in NAMES:
        lines.setdefault(json.dumps(recorded(name)), []).append(name)
    assert sorted(sorted(names) for names in lines.values() if len(names) > 1) == TWINS


TWINS = [["centralized", "fedit", "zero_pad"], ["fedalt", "fedalt_calibrated", "fedalt_trimmed_mean"]]


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        lines = [f'  "{kind}": {json.dumps(values)}' for kind, values in trajectory(name).items()]
        (RECORDS / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
