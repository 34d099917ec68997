"""FedDPA: which LoRA trains when, what it is trained beside, and what the last round leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedalt.federation.client import ClientResult
from fedalt.methods.base import Method
from fedalt.model.adapted import AdaptedModel
from fedalt.model.state import ClientState
from fedalt.names import ANCHOR, GLOBAL, LOCAL, A, B, Key, Tensors
from fedalt.training.loop import train
from support import (
    bitwise,
    distance,
    examples,
    llama,
    method_of,
    plans_of,
    random_states,
    round_settings,
    run_all,
    run_rounds,
    shape_of,
    training,
)

ROWS = {client: examples(count, seed=client) for client, count in enumerate((6, 9, 4))}
CONFIG = training(local_epochs=1)


def slot(tensors: Tensors, name: str) -> Tensors:
    return {key._replace(slot=""): value for key, value in tensors.items() if key.slot == name}


def starts(method: Method, **scale: float) -> list[ClientState]:
    """Random states, with some slots' tensors scaled."""
    states = random_states(shape_of(method, AdaptedModel(llama()).layer_sizes))
    return [s.with_tensors({k: scale.get(k.slot, 1.0) * v for k, v in s.tensors.items()}) for s in states]


def second_round(method: Method, states: list[ClientState]) -> list[ClientResult]:
    plans = list(zip(*(plans_of(ROWS, CONFIG, 2, phase=phase) for phase in (0, 1)), strict=True))
    model = AdaptedModel(llama())
    settings = round_settings(method, CONFIG, dropout=0.2)
    return run_all(model, states, [None] * 3, plans, settings, 2)


def local_phase(method: Method, states: list[ClientState]) -> list[dict[Key, Any]]:
    model = AdaptedModel(llama())
    phase, _ = method.phases(2)
    settings = round_settings(method, CONFIG, dropout=0.2)
    trainable = [key for key in states[0].tensors if phase.trains(key)]
    model.load(states, settings.placement(phase), trainable)
    train(model, plans_of(ROWS, CONFIG, 2), CONFIG, rule=phase.rule)
    assert all(not value.requires_grad for value in _buffers(model))
    return model.unstack()


def _buffers(model: AdaptedModel) -> list[torch.Tensor]:
    return [layer.factor(GLOBAL, factor) for layer in model.layers.values() for factor in (A, B)]


def test_t_trains_the_local_lora_from_the_second_round_on() -> None:
    method = method_of("feddpa_t")
    assert [[phase.slots for phase in method.phases(round_)] for round_ in (1, 2, 3)] == [
        [(GLOBAL,)],
        [(LOCAL, GLOBAL), (GLOBAL,)],
        [(LOCAL, GLOBAL), (GLOBAL,)],
    ]
    history, _ = run_rounds(AdaptedModel(llama()), method, ROWS, CONFIG, 2)
    for first, second in zip(*history, strict=True):
        assert not any(v.any() for k, v in slot(first.state.tensors, LOCAL).items() if k.factor == B)
        assert all(v.any() for v in slot(second.state.tensors, LOCAL).values())
        assert second.stats.steps == 2 * first.stats.steps


def test_only_the_local_lora_trains_in_the_local_phase() -> None:
    method = method_of("feddpa_t")
    for tensors, start in zip(local_phase(method, starts(method)), starts(method), strict=True):
        assert {key.slot for key in tensors} == {LOCAL}
        assert all(not torch.equal(value, start.tensors[key]) for key, value in tensors.items())


def test_the_global_lora_is_beside_the_local_one_while_that_trains() -> None:
    method = method_of("feddpa_t")
    one, other = (local_phase(method, starts(method, **{GLOBAL: scale})) for scale in (1.0, 2.0))
    assert all(distance(a, b) > 1e-4 for a, b in zip(one, other, strict=True))


def test_with_all_weight_on_the_local_lora_the_global_one_is_nowhere() -> None:
    method = method_of("feddpa_t", feddpa__local_weight=1.0)
    one, other = (local_phase(method, starts(method, **{GLOBAL: scale})) for scale in (1.0, 2.0))
    assert all(bitwise(a, b) for a, b in zip(one, other, strict=True))


def test_the_local_lora_is_not_there_in_the_global_phase() -> None:
    method = method_of("feddpa_t")
    one, other = (second_round(method, starts(method, **{LOCAL: scale})) for scale in (1.0, 5.0))
    for a, b in zip(one, other, strict=True):
        assert bitwise(slot(a.state.tensors, GLOBAL), slot(b.state.tensors, GLOBAL))
        assert bitwise(a.upload, b.upload)
        assert distance(slot(a.state.tensors, LOCAL), slot(b.state.tensors, LOCAL)) > 1e-3


def test_f_trains_in_private_in_the_last_round_and_sends_nothing() -> None:
    method = method_of("feddpa_f", federation__rounds=3)
    history, server = run_rounds(AdaptedModel(llama()), method, ROWS, CONFIG, 3)
    assert all(result.upload for results in history[:2] for result in results)
    messages = server.messages([0, 1, 2])
    for before, result in zip(history[1], history[2], strict=True):
        state = result.state
        assert result.upload == {} and state.sent is None
        mean = slot(messages[state.client].tensors, GLOBAL)
        assert bitwise(slot(state.tensors, GLOBAL), mean), "the mean of round 2, untouched since"
        assert distance(slot(state.tensors, LOCAL), mean) > 1e-4
        assert distance(slot(before.state.tensors, GLOBAL), mean) > 1e-4
        after = method.receive(state, messages[state.client])
        assert bitwise(after.tensors, state.tensors), "and the answer to nothing changes nothing"


@pytest.mark.parametrize("name", ["feddpa_f", "feddpa_t"])
def test_anchors_and_local_loras_never_leave(name: str) -> None:
    method = method_of(name)
    (state, *_) = starts(method)
    state = state.with_tensors({Key("", ANCHOR, "E"): torch.ones(1, 3)})
    assert {key.slot for key in method.upload(state)} == {GLOBAL}
    assert {key.slot for key in method.uploaded(state).sent or {}} == {GLOBAL}
