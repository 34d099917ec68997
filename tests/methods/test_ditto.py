"""Ditto: the global LoRA is FedIT's, the personal one is torch's on the loss and its distance from the mean."""

from __future__ import annotations

import pytest
import torch

from fedalt.methods.base import Message
from fedalt.model.adapted import AdaptedModel
from fedalt.names import GLOBAL, PERSONAL, Key, Tensors
from oracle.reference import PlainClient
from support import (
    PAD,
    SCALE,
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

ROWS = {client: examples(count, seed=client) for client, count in enumerate((7, 10, 3))}
CONFIG = training(max_grad_norm=0.5)
WEIGHT = 3.0


def slot(tensors: Tensors, name: str) -> Tensors:
    return {key._replace(slot=GLOBAL): value for key, value in tensors.items() if key.slot == name}


@pytest.mark.parametrize("weight", [0.0, WEIGHT])
def test_the_personal_lora_is_pulled_to_the_mean_that_was_received(weight: float) -> None:
    """min_v f_k(v) + λ/2 Σ (v − w̄)²: w̄ as received, not as the global LoRA is after it has trained."""
    model, method = AdaptedModel(llama()), method_of("ditto", ditto__weight=weight)
    starts = random_states(shape_of(method, model.layer_sizes))
    states = [type(s)(s.client, 1, s.tensors) for s in starts]  # they have trained before
    generator = torch.Generator().manual_seed(9)
    mean = {k: 0.2 * torch.randn(v.shape, generator=generator) for k, v in method.upload(states[0]).items()}
    phases = [plans_of(ROWS, CONFIG, 2, phase=phase) for phase in (0, 1)]
    plans = list(zip(*phases, strict=True))
    results = run_all(model, states, [Message(mean, 1 / 3)] * 3, plans, round_settings(method, CONFIG), 2)
    for state, plan, result in zip(states, phases[1], results, strict=True):
        alone = PlainClient(llama(), slot(state.tensors, PERSONAL), SCALE)

        def penalty(alone: PlainClient = alone) -> torch.Tensor:
            return weight / 2 * sum(((v - mean[key]) ** 2).sum() for key, v in alone.parameters.items())

        alone.train(plan.steps, PAD, CONFIG.lr, CONFIG.weight_decay, CONFIG.max_grad_norm, penalty)
        expected = {Key(*key): value.detach() for key, value in alone.parameters.items()}
        assert distance(slot(result.state.tensors, PERSONAL), expected) < 5e-5
        assert bitwise(result.upload, slot(result.state.tensors, GLOBAL))


def test_the_global_lora_is_fedits() -> None:
    """Bit for bit where clients take turns: the first phase has FedIT's row order and dropout."""
    runs = [
        run_rounds(AdaptedModel(llama()), method_of(name), ROWS, CONFIG, 3, 0.2, executor="loop")[0]
        for name in ("ditto", "fedit")
    ]
    for results, expected in zip(*runs, strict=True):
        for one, other in zip(results, expected, strict=True):
            assert bitwise(slot(one.state.tensors, GLOBAL), other.state.tensors)
            assert bitwise(one.upload, other.upload)


def test_without_its_penalty_the_personal_lora_trains_alone() -> None:
    """Whatever the others do, client 0's personal LoRA is the same; with the penalty it is not."""
    runs = {}
    for weight in (0.0, 1.0):
        for rows in (ROWS, ROWS | {2: examples(8, seed=77)}):
            method = method_of("ditto", ditto__weight=weight)
            history, _ = run_rounds(AdaptedModel(llama()), method, rows, CONFIG, 2, 0.2, executor="loop")
            runs[weight, len(rows[2])] = slot(history[-1][0].state.tensors, PERSONAL)
    assert bitwise(runs[0.0, 3], runs[0.0, 8])
    assert distance(runs[1.0, 3], runs[1.0, 8]) > 1e-6


def test_a_client_that_comes_late_starts_from_the_first_mean_it_gets() -> None:
    method = method_of("ditto")
    history, server = run_rounds(AdaptedModel(llama()), method, ROWS, CONFIG, 1, chosen=[(0, 1)])
    (late,) = (s for s in random_states(shape_of(method, AdaptedModel(llama()).layer_sizes)) if s.client == 2)
    message = server.messages([2])[2]
    installed = method.receive(late, message)
    assert bitwise(slot(installed.tensors, PERSONAL), slot(message.tensors, GLOBAL))
    trained = history[0][0].state
    kept = method.receive(trained, message)
    assert bitwise(slot(kept.tensors, PERSONAL), slot(trained.tensors, PERSONAL)), "others keep their own"
