"""On a GPU: the same gradients as on the CPU, in bf16 as near as bf16 is, and every client's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedalt.data.batches import collate
from fedalt.data.encode import Example
from fedalt.model.adapted import AdaptedModel
from fedalt.model.state import ClientState
from fedalt.names import Key
from fedalt.training.loss import client_losses
from support import MODELS, example, method_of, placement, random_states, relative, shape_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SIZES = [(9, 3, 5), (4,), (8, 2), ()]
GROUPS = [tuple(example(size, 3, 10 * k + i) for i, size in enumerate(sizes)) for k, sizes in enumerate(SIZES)]
"""Tokens per client are unequal, and the last client sits out."""


def gradients(
    base: Any,
    groups: list[tuple[Example, ...]] = GROUPS,
    clients: tuple[int, ...] = (0, 1, 2, 3),
    dropout: float = 0.0,
    spoilt: int | None = None,
) -> tuple[AdaptedModel, dict[Key, Tensor]]:
    model, rule = AdaptedModel(base), method_of("fedalt")
    shape = shape_of(rule, model.layer_sizes)
    states = [broken(state) if state.client == spoilt else state for state in random_states(shape, clients)]
    model.load(states, placement(shape, dropout), [key for key in shape.shapes() if rule.trains(key)])
    model.train()
    batch = collate(groups, keys=clients) if dropout else collate(groups)
    client_losses(model, batch.to(model.device)).sum().backward()
    return model, {key: value.grad.cpu() for key, value in model.trainable.items()}  # type: ignore[union-attr]


def broken(state: ClientState) -> ClientState:
    return state.with_tensors({key: torch.full_like(value, torch.nan) for key, value in state.tensors.items()})


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_cpu(name: str) -> None:
    _, expected = gradients(MODELS[name]())
    _, found = gradients(MODELS[name]().cuda())
    for key, value in expected.items():
        assert relative(found[key], value) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_gradients_in_bf16_are_near_those_of_the_same_weights_in_fp32(name: str) -> None:
    model, found = gradients(MODELS[name]().bfloat16().cuda())
    assert model.packs, model.unpacked
    _, expected = gradients(MODELS[name]().bfloat16().float())
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        assert float((found[key] - value).norm() / value.norm()) < 0.05


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("name", MODELS)
def test_a_client_in_a_stack_has_the_gradient_of_the_client_alone(name: str, dropout: float) -> None:
    _, stacked = gradients(MODELS[name]().bfloat16().cuda(), dropout=dropout)
    assert not any(value[3].any() for value in stacked.values())
    for k, rows in enumerate(GROUPS[:3]):
        _, alone = gradients(MODELS[name]().bfloat16().cuda(), [rows], (k,), dropout)
        for key, value in alone.items():
            assert float((stacked[key][k] - value[0]).norm() / value.norm()) < 0.03


def test_a_client_that_is_not_finite_leaves_the_others_alone() -> None:
    _, sound = gradients(MODELS["llama"]().bfloat16().cuda())
    _, found = gradients(MODELS["llama"]().bfloat16().cuda(), spoilt=1)
    for key, value in found.items():
        assert not value[1].isfinite().any()
        for k in (0, 2):
            assert float((value[k] - sound[key][k]).norm() / sound[key][k].norm()) < 0.03
