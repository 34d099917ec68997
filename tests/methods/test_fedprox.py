"""FedProx against torch on plain models, with the penalty written out."""

from __future__ import annotations

import torch

from fedalt.model.adapted import AdaptedModel
from fedalt.names import Key
from oracle.reference import PlainClient
from support import (
    PAD,
    SCALE,
    distance,
    examples,
    llama,
    method_of,
    plans_of,
    random_states,
    round_settings,
    run_all,
    shape_of,
    training,
)

ROWS = {client: examples(count, seed=client) for client, count in enumerate((7, 10, 3))}
CONFIG = training(max_grad_norm=0.5)
MU = 3.0


def test_a_round_is_sgd_on_the_loss_and_half_mu_times_the_squared_distance() -> None:
    """min_w f_k(w) + μ/2 Σ (w − w̄)², by torch's AdamW, clipped, client by client."""
    model, method = AdaptedModel(llama()), method_of("fedprox", fedprox__mu=MU)
    states, plans = random_states(shape_of(method, model.layer_sizes)), plans_of(ROWS, CONFIG)
    results = run_all(model, states, [None] * 3, plans, round_settings(method, CONFIG), 1)
    for state, plan, result in zip(states, plans, results, strict=True):
        alone = PlainClient(llama(), state.tensors, SCALE)
        free = PlainClient(llama(), state.tensors, SCALE)

        def penalty(alone: PlainClient = alone, state=state) -> torch.Tensor:
            return MU / 2 * sum(((w - state.tensors[key]) ** 2).sum() for key, w in alone.parameters.items())

        alone.train(plan.steps, PAD, CONFIG.lr, CONFIG.weight_decay, CONFIG.max_grad_norm, penalty)
        free.train(plan.steps, PAD, CONFIG.lr, CONFIG.weight_decay, CONFIG.max_grad_norm)
        expected, other = ({Key(*k): v.detach() for k, v in one.parameters.items()} for one in (alone, free))
        assert distance(result.state.tensors, expected) < 5e-5
        assert len(plan.steps) == 1 or distance(result.state.tensors, other) > 1e-3, "the penalty must matter here"


def test_a_large_mu_holds_a_client_where_it_began() -> None:
    model = AdaptedModel(llama())
    moved = []
    for mu in (0.0, 1.0, 100.0):
        method = method_of("fedprox", fedprox__mu=mu)
        states = random_states(shape_of(method, model.layer_sizes))
        settings = round_settings(method, training(weight_decay=0.0, local_epochs=6))
        plans = plans_of(ROWS, settings.training)
        results = run_all(model, states, [None] * 3, plans, settings, 1)
        gaps = [
            sum(float((v - s.tensors[k]).square().sum()) for k, v in r.state.tensors.items())
            for r, s in zip(results, states, strict=True)
        ]
        moved.append(gaps)
    assert all(a > b > c for a, b, c in zip(*moved, strict=True))
