"""RoLoRA and FedEx-LoRA: rounds against literal ones, and their mean of products, which is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fedalt.config import FederationConfig
from fedalt.methods.base import Gathered, Message
from fedalt.methods.fedex_lora import FedExLoRA, residual
from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import BatchLayout
from fedalt.model.layer import Placement
from fedalt.model.state import ClientState
from fedalt.names import GLOBAL, MERGED, A, B, Key, Tensors, W
from oracle.reference import merged
from support import (
    MODELS,
    RANK,
    SCALE,
    bitwise,
    examples,
    llama,
    method_of,
    random_states,
    relative,
    run_rounds,
    shape_of,
    start_states,
    training,
)

ROWS = {client: examples(count, seed=client) for client, count in enumerate((7, 10, 3))}
SHARES = {client: len(rows) / 20 for client, rows in ROWS.items()}
CONFIG = training(max_grad_norm=0.5, weight_decay=0.1)
SAMPLES = FederationConfig(weighting="samples")
LAYERS = {"x.one": (6, 5), "x.two": (3, 8)}


def dense(parts: Mapping[int, Tensors], shares: Mapping[int, float] = SHARES) -> dict[str, Tensor]:
    """Module → Σ p_k B_k A_k in fp64."""
    modules = dict.fromkeys(key.module for key in next(iter(parts.values())))
    return {
        m: sum(
            p * parts[k][Key(m, GLOBAL, B)].double() @ parts[k][Key(m, GLOBAL, A)].double() for k, p in shares.items()
        )
        for m in modules
    }  # type: ignore[misc]


def effect(state: ClientState, module: str) -> Tensor:
    """What a client's base gains, over s: W + B A."""
    own = dense({0: state.tensors}, {0: 1.0})[module]
    full = state.tensors.get(Key(module, MERGED, W))
    return own if full is None else own + full.double()


# ---------------------------------------------------------------------------------------------------------- RoLoRA


def test_rolora_trains_the_factors_by_turns_and_what_rests_is_everybodys() -> None:
    """With weight decay, which would move what is not frozen; A rests in odd rounds, B in even ones."""
    method, model = method_of("rolora"), AdaptedModel(llama())
    history, server = run_rounds(model, method, ROWS, CONFIG, 4, federation=SAMPLES)
    before = start_states(method, shape_of(method, model.layer_sizes), [0])[0].tensors
    for number, results in enumerate(history, 1):
        frozen, trained = (A, B) if number % 2 else (B, A)
        now = [result.upload for result in results]
        for key, value in now[0].items():
            alike = all(torch.equal(value, other[key]) for other in now[1:])
            assert alike == (key.factor == frozen)
            assert not alike or torch.equal(value, before[key])
        mean = literal_mean(now)
        before = {key: mean[key] if key.factor == trained else value for key, value in now[0].items()}
    assert bitwise(server.mean(), before)


def literal_mean(uploads: Sequence[Tensors]) -> dict[Key, Tensor]:
    return {
        key: (sum(len(ROWS[k]) * one[key].double() for k, one in enumerate(uploads)) / 20).float()  # type: ignore[union-attr]
        for key in uploads[0]
    }


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_rolora_s_product_of_means_is_the_mean_of_products(rounds: int) -> None:
    method = method_of("rolora")
    history, server = run_rounds(AdaptedModel(llama()), method, ROWS, CONFIG, rounds, federation=SAMPLES)
    exact = dense({result.state.client: result.upload for result in history[-1]})
    state = method.receive(history[-1][0].state, server.messages([0])[0])
    for module, expected in exact.items():
        assert relative(effect(state, module), expected) < 1e-6


def test_a_client_that_rested_in_rolora_finds_both_factors() -> None:
    method, chosen = method_of("rolora"), [(0, 1, 2), (0, 1), (0, 1)]
    history, server = run_rounds(AdaptedModel(llama()), method, ROWS, CONFIG, 3, chosen=chosen)
    told = server.messages([0, 2])
    rested = method.receive(history[0][2].state, told[2])
    assert bitwise(rested.tensors, method.receive(history[-1][0].state, told[0]).tensors)


# ------------------------------------------------------------------------------------------------------- FedEx-LoRA


def uploads(seed: int, clients: Sequence[int] = (0, 1, 2)) -> dict[int, Tensors]:
    states = random_states(shape_of(method_of("fedex_lora"), LAYERS), [10 * seed + client for client in clients], 1.0)
    return {
        client: {key: value for key, value in state.tensors.items() if key.slot == GLOBAL}
        for client, state in zip(clients, states, strict=True)
    }


def test_a_residual_is_the_mean_of_products_less_the_product_of_means() -> None:
    parts = [(*(one[Key("x.one", GLOBAL, factor)] for factor in (A, B)), SHARES[k]) for k, one in uploads(1).items()]
    a, b = residual(parts)  # type: ignore[arg-type]
    assert (len(a), b.shape[1]) == (2 * RANK, 2 * RANK)
    means = [sum(p * part[i].double() for *part, p in parts) for i in (0, 1)]
    products = sum(p * b_k.double() @ a_k.double() for a_k, b_k, p in parts)
    torch.testing.assert_close(b @ a, products - means[1] @ means[0], rtol=0, atol=1e-12)  # type: ignore[operator]


def test_means_and_residuals_of_three_rounds_are_those_of_a_literal_server() -> None:
    """Client 2 rests in round 2, client 0 is alone in round 3: (Ā, B̄) of the last round on W0 + all residuals."""
    method, rested = method_of("fedex_lora"), ClientState(2, 1, blank())
    everybody, base, memory = ClientState(0, 0, blank()), dict.fromkeys(LAYERS, torch.zeros(())), {}
    for number, clients in enumerate([(0, 1, 2), (0, 1), (0,)], 1):
        sent = uploads(number, clients)
        weights = {client: float(len(ROWS[client])) for client in clients}
        memory = dict(method.server_update(Gathered(sent, weights, memory, number)))
        shares = {client: weight / sum(weights.values()) for client, weight in weights.items()}
        answer = method.client_messages(Gathered(sent, weights, memory, number))
        everybody = method.receive(everybody, answer(0, number))
        for module, exact in dense(sent, shares).items():
            a, b = (sum(p * sent[k][Key(module, GLOBAL, f)].double() for k, p in shares.items()) for f in (A, B))
            assert relative(effect(everybody, module), base[module] + exact) < 1e-6
            assert relative(everybody.tensors[Key(module, GLOBAL, B)].double(), b) < 1e-6  # type: ignore[arg-type]
            base = {**base, module: base[module] + exact - b @ a}  # type: ignore[operator]
    late = method.receive(rested, answer(2, 1)).tensors
    assert all(relative(value, everybody.tensors[key]) < 1e-6 for key, value in late.items())
    assert {key.slot for key in answer(2, 1).tensors} == {GLOBAL, "round1", "round2"}, "one client leaves no residual"
    assert {key.slot for key in answer(0, 3).tensors} == {GLOBAL}


def blank() -> Tensors:
    return {key: torch.zeros(size) for key, size in shape_of(method_of("fedex_lora"), LAYERS).shapes().items()}


class Inexact(FedExLoRA):
    """FedEx-LoRA that merges nothing."""

    def receive(self, state: ClientState, message: Message) -> ClientState:
        means = {key: value for key, value in message.tensors.items() if key.slot == GLOBAL}
        return super().receive(state, Message(means))


def test_without_a_residual_it_is_fedit() -> None:
    plain = method_of("fedit")
    runs = [
        run_rounds(AdaptedModel(llama()), method, ROWS, CONFIG, 3, 0.2, federation=SAMPLES)[0]
        for method in (Inexact().bind(3, plain.config), plain)
    ]
    for results, expected in zip(*runs, strict=True):
        for one, other in zip(results, expected, strict=True):
            assert bitwise(one.upload, other.upload)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_the_model_that_answers_is_the_base_with_the_mean_of_products(base: str) -> None:
    """After one round, where nothing has been merged before: W0 + s Σ p_k B_k A_k; GPT-2 transposes its weights."""
    method = method_of("fedex_lora")
    history, server = run_rounds(AdaptedModel(MODELS[base]()), method, ROWS, CONFIG, 1, federation=SAMPLES)
    sent = {result.state.client: result.upload for result in history[0]}
    whole = {
        key: torch.cat(
            [(SHARES[k] if key.factor == B else 1) * one[key] for k, one in sent.items()], "AB".index(key.factor)
        )
        for key in sent[0]
    }
    plain, ids = merged(MODELS[base](), whole, GLOBAL, SCALE), torch.tensor(ROWS[1][0].prompt)
    model = AdaptedModel(MODELS[base]())
    state = method.receive(history[0][1].state, server.messages([1])[1])
    assert max(float(v.abs().max()) for k, v in state.tensors.items() if k.slot == MERGED) > 1e-6
    model.load([state], Placement(*method.inference, SCALE, 0.0))
    with torch.no_grad():
        got = model.hidden(ids, BatchLayout((1,), (len(ids),))).last_hidden_state
        expected = plain.get_decoder()(input_ids=ids[None]).last_hidden_state[0]
    assert relative(got, expected) < 1e-4
