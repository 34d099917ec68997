"""Methods that choose on held-out rows: the choices against literal ones, corrections against the written layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedalt.config import FederationConfig
from fedalt.data.batches import collate
from fedalt.data.encode import Example
from fedalt.methods.base import Message, Method
from fedalt.methods.held_out import HeldOut, corrected, corrections, held_out_losses, one_standard_error, weighed
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import NEVER, Placement, alone
from fedalt.model.state import ClientState
from fedalt.names import EVIDENCE, GLOBAL, INDIVIDUAL, MIXER, REST_OF_WORLD, A, B, C, E, G, Key
from oracle.reference import PlainClient, mean_of_others
from support import (
    PAD,
    SCALE,
    bitwise,
    distance,
    examples,
    llama,
    method_of,
    plans_of,
    quick,
    random_states,
    round_settings,
    run_all,
    run_rounds,
    shape_of,
    training,
)

ROWS = {client: examples(count, seed=client) for client, count in enumerate((7, 10, 3))}
CHOOSING = ("select", "fedalt_calibrated", "fedalt_joint")


def states_of(method: Method, model: AdaptedModel, spread: float = 0.2) -> list[ClientState]:
    return random_states(shape_of(method, model.layer_sizes), spread=spread)


def answering(method: Method) -> Placement:
    return Placement(*method.inference, SCALE, 0.0)


def literal_loss(state: ClientState, row: Example) -> float:
    """Nats of one answer under a copy of the model with the LoRAs written out."""
    plain = PlainClient(llama(), {k: v for k, v in state.tensors.items() if k.factor not in (C, E)}, SCALE)
    for path, layer in plain.layers.items():
        if (shift := state.tensors.get(Key(path, MIXER, C))) is not None:
            layer.forward = _shifted(layer, shift)
    ids = torch.tensor([row.prompt + row.answer])
    with torch.no_grad():
        log_p = plain.model(ids).logits[0].log_softmax(-1)
    places = range(len(row.prompt) - 1, ids.shape[1] - 1)
    return -sum(float(log_p[at, ids[0, at + 1]]) for at in places)


def _shifted(layer: Any, shift: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weights = torch.softmax(x @ layer.mixer_G.T + shift[:, 0], dim=-1)
        y = layer.base_layer(x)
        for i, name in enumerate(layer.names):
            a, b = getattr(layer, f"{name}_A"), getattr(layer, f"{name}_B")
            y = y + SCALE * weights[..., i : i + 1] * ((x @ a.T) @ b.T)
        return y

    return forward


@pytest.mark.parametrize("change", [{"temperature": 1.0, "shift": 0.0}, {"temperature": 0.0, "shift": -2.0}])
def test_losses_under_a_corrected_mixer_are_the_written_layers(change: dict[str, float]) -> None:
    """Row by row, of clients with unlike numbers of rows, over the client's mean number of answer tokens."""
    method, model = method_of("fedalt_calibrated"), AdaptedModel(llama())
    states = [corrected(state, change) for state in states_of(method, model)]
    model.load(states, answering(method))
    rows = [ROWS[state.client] for state in states]
    for state, mine, found in zip(states, rows, held_out_losses(model, rows), strict=True):
        tokens = sum(len(row.answer) for row in mine) / len(mine)
        expected = [literal_loss(state, row) / tokens for row in mine]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_the_ends_of_a_correction_are_one_lora_alone() -> None:
    method, model = method_of("fedalt_calibrated"), AdaptedModel(llama())
    batch = collate([ROWS[c] for c in (0, 1, 2)])

    def seen(states: list[ClientState], placement: Placement) -> Tensor:
        model.load(states, placement)
        return model.hidden(batch.inputs, batch.rows).last_hidden_state

    states = states_of(method, model)
    plain = answering(method)
    for change, slot in zip(corrections()[-2:], method.slot_names, strict=True):
        alone_ = Placement((slot,), method_of("local").mixing, SCALE, 0.0)
        torch.testing.assert_close(seen([corrected(s, change) for s in states], plain), seen(states, alone_))
    assert torch.equal(seen([corrected(s, corrections()[0]) for s in states], plain), seen(states, plain))


@quick
@given(st.integers(2, 12), st.integers(2, 6), st.integers(0, 99), st.sampled_from([0.0, 1.0, 3.0]))
def test_the_rule_of_one_standard_error(rows: int, count: int, seed: int, width: float) -> None:
    losses = np.random.default_rng(seed).normal(size=(count, rows))
    best = min(range(count), key=lambda c: losses[c].mean())
    for c in range(count):
        gap = [losses[c][i] - losses[best][i] for i in range(rows)]
        mean = sum(gap) / rows
        error = math.sqrt(sum((one - mean) ** 2 for one in gap) / (rows - 1)) / math.sqrt(rows)
        if mean <= width * error:
            break
    assert one_standard_error(torch.tensor(losses), width) == c


def test_a_loss_that_is_no_number_is_never_chosen() -> None:
    losses = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [3.0, 2.0]])
    assert [one_standard_error(losses, 0.0), one_standard_error(losses[:2], 0.0)] == [2, 0]


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("width", [0.0, 1.0])
def test_a_client_answers_with_its_own_choice(name: str, width: float) -> None:
    """Whoever it is on the model with, and with the losses beside it."""
    method, model = method_of(name, **{f"{name}__standard_errors": width}), AdaptedModel(llama())
    assert isinstance(method, HeldOut)
    states, chosen = states_of(method, model, 0.4), set()
    for state, made in zip(states, method.personalise(model, states, ROWS, answering(method)), strict=True):
        mine, losses = ROWS[state.client], []
        for change in method.candidates():
            model.load([method.candidate(state, change)], answering(method))
            losses.append(held_out_losses(model, [mine])[0])
        best = one_standard_error(torch.stack(losses), width)
        chosen.add(best)
        kept = made.tensors[Key("", EVIDENCE, E)]
        torch.testing.assert_close(kept.double(), torch.stack([losses[i] for i in (-2, best, -1)]), rtol=1e-4, atol=0)
        wanted = method.candidate(state, method.candidates()[best])
        assert bitwise({k: v for k, v in made.tensors.items() if k.factor != E}, wanted.tensors)
    assert chosen != {0} or width, "something is chosen"


@pytest.mark.parametrize("name", CHOOSING)
def test_without_rows_a_client_falls_back(name: str) -> None:
    method, model = method_of(name), AdaptedModel(llama())
    states = states_of(method, model)
    for rows in ({0: (), 1: (), 2: ()}, {0: ROWS[0][:1], 1: (), 2: ROWS[2]}):
        made = method.personalise(model, states, rows, answering(method))
        for state, one in zip(states[:2], made[:2], strict=True):
            expected = method.candidate(state, method.candidates()[0])
            assert bitwise({k: v for k, v in one.tensors.items() if k.factor != E}, expected.tensors)


def test_select_has_fedit_and_local_among_its_candidates() -> None:
    method, model = method_of("select"), AdaptedModel(llama())
    for state in states_of(method, model):
        for change, slot in zip(method.candidates()[1:], (INDIVIDUAL, GLOBAL), strict=True):
            assert bitwise(
                {k: v for k, v in weighed(state, change).tensors.items() if k.slot == slot},
                {k: v for k, v in state.tensors.items() if k.slot == slot},
            )
            others = [v for k, v in weighed(state, change).tensors.items() if k.slot != slot and k.factor == B]
            assert not any(v.any() for v in others)


def test_joint_trains_both_loras_at_once() -> None:
    """Without slot dropout: torch's own steps on a model with both LoRAs and the mixer written out."""
    config = training(max_grad_norm=0.5)
    model, method = AdaptedModel(llama()), method_of("fedalt_joint", fedalt_joint__slot_dropout=0)
    states, plans = states_of(method, model), plans_of(ROWS, config)
    results = run_all(model, states, [None] * 3, plans, round_settings(method, config), 1)
    for state, plan, result in zip(states, plans, results, strict=True):
        plain = PlainClient(llama(), state.tensors, SCALE)
        plain.train(plan.steps, PAD, config.lr, config.weight_decay, config.max_grad_norm)
        expected = {Key(*key): value.detach() for key, value in plain.parameters.items()}
        assert distance(result.state.tensors, expected) < 1e-4
        assert {key.slot for key in result.upload} == {GLOBAL}


def test_slot_dropout_leaves_one_lora_in_a_step() -> None:
    """As a step without the other one, for each client by its own key; the shares are as asked for."""
    shifts = alone(tuple(range(4000)), 2, 0.5)
    kinds = [(shifts == torch.tensor(row)).all(1).float().mean() for row in ([0, 0], [0, NEVER], [NEVER, 0])]
    torch.testing.assert_close(torch.tensor(kinds), torch.tensor([0.5, 0.25, 0.25]), atol=0.03, rtol=0)
    assert torch.equal(alone((5, 6), 2, 0.5)[1], alone((6,), 2, 0.5)[0])
    config = training(local_epochs=1, batch_size=20)
    model, method = AdaptedModel(llama()), method_of("fedalt_joint", fedalt_joint__slot_dropout=1)
    states, plans = states_of(method, model), plans_of(ROWS, config)
    results = run_all(model, states, [None] * 3, plans, round_settings(method, config), 1)
    seen = set()
    for state, plan, result in zip(states, plans, results, strict=True):
        moved = {k.slot for k, v in result.state.tensors.items() if distance({k: v}, {k: state.tensors[k]}) > 1e-3}
        assert len(moved) == 1, f"client {plan.client}"
        seen |= moved
    assert seen <= {INDIVIDUAL, GLOBAL}


@pytest.mark.parametrize("delivery", ["broadcast", "unicast"])
def test_a_shared_a_makes_the_row_loras_product_exact(delivery: str) -> None:
    method, model = method_of("fedalt_shared_a"), AdaptedModel(llama())
    config = FederationConfig(rest_of_world_delivery=delivery)
    history, server = run_rounds(model, method, ROWS, training(), 2, federation=config)
    uploads = {result.state.client: {k: v.numpy() for k, v in result.upload.items()} for result in history[-1]}
    for result in history[-1]:
        k = result.state.client
        now = method.receive(result.state, server.messages([k])[k]).tensors
        others = mean_of_others(uploads, k, dict.fromkeys(uploads, 1.0))
        for key, value in now.items():
            if key.slot == REST_OF_WORLD and key.factor == B:
                a = np.mean([mine[Key(key.module, INDIVIDUAL, A)] for mine in uploads.values()], axis=0)
                np.testing.assert_allclose(now[key._replace(factor=A)].numpy(), a, atol=1e-6)
                assert torch.equal(now[key._replace(factor=A)], now[Key(key.module, INDIVIDUAL, A)])
                np.testing.assert_allclose(value.numpy(), others[Key(key.module, INDIVIDUAL, B)], atol=1e-6)
            if (key.slot, key.factor) in ((INDIVIDUAL, B), (MIXER, G)):
                assert torch.equal(value, result.state.tensors[key])
    nobody = method.receive(history[-1][0].state, Message({}, 1.0))
    assert nobody is history[-1][0].state


def test_a_mixer_trains_on_held_out_rows_alone() -> None:
    """The LoRA stays in the second phase, the mixer in the first; a run's plans give each its own rows."""
    config = training(max_grad_norm=0.5)
    model, method = AdaptedModel(llama()), method_of("fedalt_heldout_mixer")
    held = {client: examples(4, seed=50 + client) for client in ROWS}
    states = states_of(method, model)
    phases = plans_of(ROWS, config), plans_of(held, config, phase=1)
    plans = list(zip(*phases, strict=True))
    results = run_all(model, states, [None] * 3, plans, round_settings(method, config), 1)
    assert [phase.held_out for phase in method.phases(1)] == [False, True]
    for state, plan, result in zip(states, plans, results, strict=True):
        now = state.tensors
        for steps, slot in zip(plan, (INDIVIDUAL, MIXER), strict=True):
            plain = PlainClient(llama(), now, SCALE)
            for key, value in plain.parameters.items():
                value.requires_grad_(key[1] == slot)
            plain.train(steps.steps, PAD, config.lr, config.weight_decay, config.max_grad_norm)
            now = {**now, **{Key(*key): value.detach() for key, value in plain.parameters.items()}}
        assert distance(result.state.tensors, now) < 1e-4
