"""The cohort that is chosen when none is asked for: by tokens for speed, and by the memory that is free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fedalt.data.batches import collate
from fedalt.federation import client
from fedalt.federation.client import fitting_cohort
from fedalt.model.adapted import AdaptedModel
from fedalt.training.loss import client_losses
from support import MODELS, examples, llama, method_of, placement, random_states, shape_of

LENGTHS = [20.0, 40.0] * 50
BATCH = 4
STEP = 4 * 30
"""Tokens of a client and step."""
PLENTY = 1 << 40


@pytest.fixture
def model() -> AdaptedModel:
    return AdaptedModel(llama())


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the bytes that are free."""
    yield lambda size: monkeypatch.setattr(client, "free_memory", lambda device: size)


def test_with_plenty_of_memory_the_cohort_is_as_large_as_speed_asks_for(model: AdaptedModel, free: Any) -> None:
    free(PLENTY)
    assert fitting_cohort(model, LENGTHS, BATCH) == round(2_048 / STEP) == 17
    assert fitting_cohort(model, LENGTHS[:5], BATCH) == 5
    assert fitting_cohort(model, [5_000.0] * 3, BATCH) == 1


def test_activations_take_half_of_what_is_free_and_no_more(model: AdaptedModel, free: Any) -> None:
    each = STEP * model.bytes_per_token
    for size, clients in ((2 * 6 * each, 6), (2 * 6 * each - 1, 5), (0, 1)):
        free(size)
        assert fitting_cohort(model, LENGTHS, BATCH) == clients


def test_adapters_and_their_optimiser_count(model: AdaptedModel, free: Any) -> None:
    """Large ranks: what a client trains takes more than its activations."""
    free(2 * 6 * STEP * model.bytes_per_token)
    parameters = STEP * model.bytes_per_token // (4 * 6)  # all of them train: six copies take what activations do
    assert fitting_cohort(model, LENGTHS, BATCH, parameters, parameters) == 3
    assert fitting_cohort(model, LENGTHS, BATCH, parameters, 0) == 4
    assert fitting_cohort(model, LENGTHS, BATCH, 100 * parameters, parameters) == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_token_keeps_no_more_bytes_than_foretold_and_not_far_less(name: str) -> None:
    """Everything that the forward pass of a step keeps for the backward pass, weights and adapters apart."""
    model, rule = AdaptedModel(MODELS[name]()), method_of("fedalt")
    shape = shape_of(rule, model.layer_sizes)
    model.load(random_states(shape), placement(shape, 0.1), [key for key in shape.shapes() if rule.trains(key)])
    model.train()
    rows = [examples(8, seed=k, longest=40) for k in range(3)]
    kept: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in (*model.base.parameters(), *model.base.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = client_losses(model, collate(rows, (1, 2, 3))).sum()
    tokens = sum(len(row) for mine in rows for row in mine)
    assert loss.requires_grad
    share = sum(kept.values()) / (tokens * model.bytes_per_token)
    assert 0.25 < share < 0.8, "the rest is for what the backward pass itself takes"
