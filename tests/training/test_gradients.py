"""One step's gradients under dropout: a client's in the stack are those of the same client alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fedalt.data.batches import collate
from fedalt.data.encode import Example
from fedalt.model.adapted import AdaptedModel
from fedalt.model.fast import patches
from fedalt.names import Key
from fedalt.training.loss import client_losses
from support import LAYERS, MODELS, bert, examples, llama, method_of, placement, random_states, relative, shape_of

ALL = {**MODELS, "bert": bert}
ROWS = [examples(count, seed=k, longest=6 + 3 * k) for k, count in enumerate((3, 2, 4))]
KEYS = (101, 102, 103)
"""Seeds of the clients' dropout."""


def gradients(model: AdaptedModel, chosen: Sequence[int], dropout: float = 0.3) -> list[dict[Key, Tensor]]:
    """Of one step of some clients, stacked; client by client."""
    rule = method_of("fedalt")
    shape = shape_of(rule, model.layer_sizes)
    model.load(random_states(shape, chosen), placement(shape, dropout), [k for k in shape.shapes() if rule.trains(k)])
    model.train()
    groups: list[Sequence[Example]] = [ROWS[k] for k in chosen]
    client_losses(model, collate(groups, [KEYS[k] for k in chosen])).sum().backward()
    grads = {key: parameter.grad for key, parameter in model.trainable.items() if parameter.grad is not None}
    assert grads.keys() == model.trainable.keys()
    return [{key: grad[k] for key, grad in grads.items()} for k in range(len(chosen))]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_stacked_gradients_under_dropout_are_those_of_each_client_alone(
    name: str, packing: bool, checkpointing: bool
) -> None:
    """Alone means no other rows, no padding for them, and nothing recomputed: only the dropout seed is the same."""
    model = AdaptedModel(ALL[name](), packing=packing, gradient_checkpointing=checkpointing)
    assert model.packs is packing
    stacked, plain = gradients(model, (0, 1, 2)), gradients(model, (0, 1, 2), dropout=0.0)
    single = AdaptedModel(ALL[name](), packing=packing)
    for k, mine in enumerate(stacked):
        (alone,) = gradients(single, [k])
        assert all(relative(mine[key], expected) < 1e-5 for key, expected in alone.items())
        assert all(relative(plain[k][key], expected) > 1e-2 for key, expected in alone.items()), "it must drop"


@pytest.mark.parametrize("name", MODELS)
def test_a_bf16_base_has_the_same_gradients_stacked_and_alone(name: str) -> None:
    """Up to the rounding of a base with 8 bits; adapters and their gradients are fp32."""
    stacked = gradients(AdaptedModel(MODELS[name]().bfloat16()), (0, 1, 2))
    single = AdaptedModel(MODELS[name]().bfloat16())
    for k, mine in enumerate(stacked):
        (alone,) = gradients(single, [k])
        for key, expected in alone.items():
            assert mine[key].dtype == torch.float32
            assert float((mine[key] - expected).norm() / expected.norm()) < 2e-2


def test_nothing_is_propagated_below_the_first_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters on the last layer's queries only: of the base, what is above them and no more goes backwards."""
    calls: list[int] = []
    own = patches._Product.backward

    def counted(*arguments: Tensor) -> object:
        calls.append(1)
        return own(*arguments)

    monkeypatch.setattr(patches._Product, "backward", staticmethod(counted))
    last = f"model.layers.{LAYERS - 1}.self_attn.q_proj"
    found = []
    for targets in ([last], ["q_proj"]):
        calls.clear()
        gradients(AdaptedModel(llama(), targets=targets), (0, 1))
        found.append(len(calls))
    above = 1 + 1 + 3  # the head, o_proj, and the feed-forward layer; keys and values are beside the queries
    assert found[0] == above
    assert found[1] > above + 5, "adapters on every layer's queries need the whole last layer and the one below"


def test_clients_cost_their_adapters_and_never_another_base() -> None:
    def size(clients: int) -> int:
        model = AdaptedModel(llama())
        shape = shape_of(method_of("fedalt"), model.layer_sizes)
        states = random_states(shape, range(clients))
        model.load(states, placement(shape), list(shape.shapes()))
        tensors = {id(t): t.numel() * t.element_size() for t in (*model.base.parameters(), *model.base.buffers())}
        return sum(tensors.values())

    shape = shape_of(method_of("fedalt"), AdaptedModel(llama()).layer_sizes)
    mine = sum(value.numel() * value.element_size() for value in random_states(shape, [0])[0].tensors.values())
    assert size(8) - size(1) == 7 * mine
