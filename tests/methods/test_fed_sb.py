"""Fed-SB: a round against torch's AdamW on cores in plain layers, and what is fixed, sent and answered with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedalt.config import FederationConfig
from fedalt.data.batches import collate
from fedalt.data.encode import Example
from fedalt.errors import UserError
from fedalt.methods.fed_sb import FedSB
from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import BatchLayout
from fedalt.model.layer import Placement
from fedalt.model.state import ClientState
from fedalt.names import GLOBAL, A, B, Key, R
from fedalt.training.privacy import clipped_sum
from oracle.reference import PlainClient, merged
from support import (
    MODELS,
    PAD,
    RANK,
    SCALE,
    distance,
    examples,
    llama,
    method_of,
    plans_of,
    random_states,
    relative,
    run_rounds,
    shape_of,
    start_states,
    training,
)

ROWS = {client: examples(count, seed=client) for client, count in enumerate((7, 10, 3))}
CONFIG = training(lr=0.05, max_grad_norm=0.5, weight_decay=0.1)
SAMPLES = FederationConfig(weighting="samples")


class CoreLayer(nn.Module):
    """``y = W0 x + s B⁰ R A⁰ x``, of which R alone trains."""

    def __init__(self, base_layer: nn.Module, a: Tensor, r: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base_layer, self.a, self.b, self.r = base_layer, a, b, nn.Parameter(r.clone())

    def forward(self, x: Tensor) -> Tensor:
        h = (x @ self.a.T) @ self.r.T
        return self.base_layer(x) + SCALE * (h @ self.b.T)  # type: ignore[no-any-return]


class CoreClient(PlainClient):
    """A client's own copy of a model, with cores in place of LoRAs."""

    def __init__(self, base: Any, tensors: Any) -> None:
        super().__init__(base, {}, SCALE)
        self.cores = {}
        for module in dict.fromkeys(key.module for key in tensors):
            a, r, b = (tensors[Key(module, GLOBAL, factor)] for factor in (A, R, B))
            self.cores[module] = CoreLayer(self.model.get_submodule(module), a, r, b)
            self.model.set_submodule(module, self.cores[module])

    @property
    def parameters(self) -> dict[tuple[str, str, str], nn.Parameter]:
        return {(module, GLOBAL, R): layer.r for module, layer in self.cores.items()}


def began(method: FedSB, model: AdaptedModel) -> ClientState:
    [state] = start_states(method, shape_of(method, model.layer_sizes), [0])
    return state


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_two_rounds_are_those_of_torch_on_cores_and_of_their_mean(base: str) -> None:
    method, model = method_of("fed_sb"), AdaptedModel(MODELS[base]())
    history, _ = run_rounds(model, method, ROWS, CONFIG, 2, federation=SAMPLES)
    start = began(method, model).tensors
    for number, results in enumerate(history, 1):
        found = []
        for client, plan in enumerate(plans_of(ROWS, CONFIG, number)):
            plain = CoreClient(MODELS[base](), start)
            steps: Sequence[Sequence[Example]] = list(plan.steps)
            plain.train(steps, PAD, CONFIG.lr, 0.1, 0.5)
            found.append({Key(*key): value.detach() for key, value in plain.parameters.items()})
            assert results[client].upload.keys() == found[-1].keys()
            assert distance(results[client].upload, found[-1]) < 1e-4
        mean = {key: sum(len(ROWS[k]) / 20 * one[key] for k, one in enumerate(found)) for key in found[0]}
        start = {**start, **mean}  # type: ignore[dict-item]
        assert all(float(value.abs().max()) > 1e-2 for value in mean.values())  # type: ignore[union-attr]


def test_only_cores_move_and_only_they_are_sent() -> None:
    method, model = method_of("fed_sb"), AdaptedModel(llama())
    history, server = run_rounds(model, method, ROWS, CONFIG, 2)
    fixed = began(method, model).tensors
    for result in history[-1]:
        assert {(key.factor, tuple(value.shape)) for key, value in result.upload.items()} == {(R, (RANK, RANK))}
        for key, value in result.state.tensors.items():
            assert torch.equal(value, fixed[key]) == (key.factor != R)
    told = server.messages([0])[0]
    assert told.bytes == 4 * RANK**2 * len(model.layer_sizes)


def test_b_has_orthonormal_columns_of_its_own_in_every_layer() -> None:
    tensors = began(method_of("fed_sb"), AdaptedModel(llama())).tensors
    outer = [value for key, value in tensors.items() if key.factor == B]
    for i, one in enumerate(outer):
        torch.testing.assert_close(one.T @ one, torch.eye(RANK))
        assert not any(one.shape == other.shape and torch.allclose(one, other) for other in outer[:i])


def test_it_answers_as_an_ordinary_lora() -> None:
    """The base with W0 + s B⁰ R̄ A⁰ in its weights; the answering state has A and B alone, for PEFT."""
    method, model = method_of("fed_sb"), AdaptedModel(llama())
    history, server = run_rounds(model, method, ROWS, CONFIG, 1)
    states = [method.receive(result.state, server.messages([0, 1, 2])[result.state.client]) for result in history[0]]
    placed = Placement(*method.inference, SCALE, 0.0)
    answering = method.personalise(model, states, ROWS, placed)
    assert {key.factor for key in answering[0].tensors} == {A, B}
    plain, ids = merged(llama(), answering[0].tensors, GLOBAL, SCALE), torch.tensor(ROWS[1][0].prompt)
    with torch.no_grad():
        expected = plain.get_decoder()(input_ids=ids[None]).last_hidden_state[0]
        base = llama().get_decoder()(input_ids=ids[None]).last_hidden_state[0]
        for state in (answering[0], states[0]):
            model.load([state], placed)
            got = model.hidden(ids, BatchLayout((1,), (len(ids),))).last_hidden_state
            assert relative(got, expected) < 1e-4 < relative(base, expected)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_private_steps_clip_the_gradient_of_the_core(packing: bool) -> None:
    """Σ min(1, C/‖g‖) g over rows, g a row's gradient to all cores, in plain layers."""
    method, model = method_of("fed_sb"), AdaptedModel(llama(), packing=packing)
    shape, clips = shape_of(method, model.layer_sizes), (0.1, 0.02, 3.0)
    states = random_states(shape)
    trained = [key for key in shape.shapes() if method.trains(key)]
    model.load(states, Placement((GLOBAL,), method.mixing, SCALE, 0.0), trained)
    sums = dict(zip(model.trainable, clipped_sum(model, collate(list(ROWS.values())), clips)[1], strict=True))
    assert sums.keys() == set(trained)
    for k, (state, clip) in enumerate(zip(states, clips, strict=True)):
        plain, total = CoreClient(llama(), state.tensors), dict.fromkeys(sums, torch.zeros(RANK, RANK))
        for row in ROWS[k]:
            values = [plain.parameters[key] for key in sums]
            grads = torch.autograd.grad(plain.loss([row], PAD), values)
            length = torch.cat([grad.flatten() for grad in grads]).norm()
            for key, grad in zip(sums, grads, strict=True):
                total[key] = total[key] + grad * (clip / length).clamp(max=1)
        for key, expected in total.items():
            assert relative(sums[key][k], expected) < 1e-5


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"lora__init": "per_client"}, r"lora\.init: per_client .* use shared"),
        ({"model__adapter": "somewhere", "model__adapter_as": "start"}, r"model\.adapter_as: start .* use merged"),
    ],
)
def test_starts_that_would_be_lost_are_refused(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError, match=error):
        method_of("fed_sb", **settings)


def test_ranks_beyond_a_layers_size_are_refused() -> None:
    bound = FedSB().bind(3, method_of("fed_sb").config, {"wide": (9, 9), "narrow": (9, 3)})
    with pytest.raises(UserError, match=r"lora\.r: 4 is more than the 3 outputs of narrow"):
        bound.remarks()
