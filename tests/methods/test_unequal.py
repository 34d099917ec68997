"""Unequal ranks: what shrinks, what is cut, and directions that must not die."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedalt.methods.base import Gathered, Method
from fedalt.methods.hetlora import rank_in, size
from fedalt.model.adapted import AdaptedModel
from fedalt.model.state import ClientState
from fedalt.names import GLOBAL, A, B, Key, Tensors
from support import examples, llama, method_of, random_states, run_rounds, shape_of, training

LAYERS = {"x.one": (6, 5), "x.two": (3, 8)}
RANKS = (1, 4, 2)
ROWS = {client: examples(count, seed=client) for client, count in enumerate((4, 6, 3))}


def uploads(method: Method, clients: Sequence[int] = (0, 1, 2)) -> dict[int, Tensors]:
    """Random factors of every client's own rank."""
    states = random_states(shape_of(method, LAYERS, 4), clients, spread=1.0)
    return {
        s.client: {k: v[: RANKS[s.client]] if k.factor == A else v[:, : RANKS[s.client]] for k, v in s.tensors.items()}
        for s in states
    }


def unequal(name: str, **settings: Any) -> Method:
    return method_of(name, lora__ranks=RANKS, **settings)


def blank(method: Method, client: int) -> ClientState:
    return ClientState(client, 0, {key: torch.zeros(s) for key, s in shape_of(method, LAYERS, 4).shapes().items()})


def answered(method: Method, sent: Mapping[int, Tensors], weights: Mapping[int, float]) -> dict[int, Tensors]:
    answer = method.client_messages(Gathered(sent, weights, {}, 1))
    return {client: answer(client, 1).tensors for client in range(3)}


WEIGHTS = {0: 1.0, 1: 2.0, 2: 5.0}


def test_zero_padding_dilutes_what_only_clients_of_high_rank_have() -> None:
    method = unequal("zero_pad")
    sent = uploads(method)
    for client, tensors in answered(method, sent, WEIGHTS).items():
        for key, value in tensors.items():
            whole = torch.zeros(shape_of(method, LAYERS, 4).shapes()[key], dtype=torch.float64)
            for other, weight in WEIGHTS.items():
                r = RANKS[other]
                (whole[:r] if key.factor == A else whole[:, :r]).add_(sent[other][key].double() * weight / 8)
            expected = whole[: RANKS[client]] if key.factor == A else whole[:, : RANKS[client]]
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


def dense(sent: Mapping[int, Tensors], module: str) -> np.ndarray[Any, Any]:
    parts = (
        WEIGHTS[c] / 8 * (t[Key(module, GLOBAL, B)].double() @ t[Key(module, GLOBAL, A)].double())
        for c, t in sent.items()
    )
    return sum(part.numpy() for part in parts)  # type: ignore[return-value]


def test_flexlora_decomposes_the_mean_of_products_for_every_rank() -> None:
    """B has the singular values, A's rows are orthonormal."""
    method = unequal("flexlora")
    sent = uploads(method)
    for client, tensors in answered(method, sent, WEIGHTS).items():
        r = RANKS[client]
        for module, sides in LAYERS.items():
            u, sigma, v = np.linalg.svd(dense(sent, module), full_matrices=False)
            a, b = (tensors[Key(module, GLOBAL, f)].double().numpy() for f in (A, B))
            kept = min(r, *sides)
            assert a.shape[0] == b.shape[1] == kept
            np.testing.assert_allclose(b @ a, (u[:, :r] * sigma[:r]) @ v[:r], atol=1e-5)
            np.testing.assert_allclose(a @ a.T, np.eye(kept), atol=1e-5)
            np.testing.assert_allclose(b.T @ b, np.diag(sigma[:r] ** 2), atol=1e-4)


def test_flexlora_with_untrained_uploads_keeps_every_direction_alive() -> None:
    """The mean is zero: B is zero, and A stays as it was, since it could not train from zero."""
    method = unequal("flexlora")
    sent = {c: {k: v * (k.factor == A) for k, v in tensors.items()} for c, tensors in uploads(method).items()}
    for client, state in enumerate(random_states(shape_of(method, LAYERS, 4))):
        after = method.receive(state, method.client_messages(Gathered(sent, WEIGHTS, {}, 1))(client, 1))
        for key, value in after.tensors.items():
            assert value.isfinite().all()
            assert torch.equal(value, state.tensors[key]) if key.factor == A else not value.any()


@pytest.mark.parametrize("name", ["zero_pad", "flexlora", "hetlora"])
def test_a_round_of_clients_of_low_rank_does_not_end_what_others_train(name: str) -> None:
    """Only client 0, of rank 1, took part: client 1 keeps its A beyond that, or it would never train there again."""
    method = unequal(name)
    sent = {0: uploads(method)[0]}
    state = random_states(shape_of(method, LAYERS, 4))[1]
    after = method.receive(state, method.client_messages(Gathered(sent, {0: 1.0}, {}, 1))(1, 0)).tensors
    for key, value in after.items():
        if key.factor == A:
            assert value[:1].any()
            assert torch.equal(value[1:], state.tensors[key][1:])
        else:
            assert not value[:, 1:].any()


# -------------------------------------------------------------------------------------------------------------- HetLoRA


def zeroed(tensors: Tensors, rank: int) -> dict[Key, Tensor]:
    """The same with nothing beyond a rank."""
    kept = {key: value.clone() for key, value in tensors.items()}
    for key, value in kept.items():
        (value[rank:] if key.factor == A else value[:, rank:]).zero_()
    return kept


def test_rank_and_size_of_an_upload() -> None:
    method = method_of("hetlora")
    (state, *_) = random_states(shape_of(method, LAYERS, 4))
    assert [rank_in(zeroed(state.tensors, r)) for r in (0, 1, 3, 4)] == [1, 1, 3, 4]
    literal = sum(
        float((state.tensors[Key(m, GLOBAL, B)] @ state.tensors[Key(m, GLOBAL, A)]).square().sum()) for m in LAYERS
    )
    assert size(state.tensors) == pytest.approx(literal**0.5, rel=1e-5)


@pytest.mark.parametrize(("change", "rank"), [(0.9, 2), (1.1, 4), (1.0, 4)])
def test_a_tail_is_dropped_when_it_has_become_smaller(change: float, rank: int) -> None:
    method = method_of("hetlora", hetlora__tail=0.5)
    (began, *_) = random_states(shape_of(method, LAYERS, 4))
    tail = {k: torch.cat([v[:2], change * v[2:]]) if k.factor == A else v for k, v in began.tensors.items()}
    after = method.after_training(began.with_tensors(tail), began, 1).tensors
    assert rank_in(after) == rank
    for key, value in after.items():
        assert torch.equal(value, zeroed(tail, rank)[key])
    kept = method_of("hetlora", hetlora__tail=0.5, hetlora__prune=False)
    assert rank_in(kept.after_training(began.with_tensors(tail), began, 1).tensors) == 4


def test_a_rank_of_one_is_kept() -> None:
    method = method_of("hetlora", hetlora__tail=0.5)
    (state, *_) = random_states(shape_of(method, LAYERS, 4))
    began = state.with_tensors(zeroed(state.tensors, 1))
    after = method.after_training(began.with_tensors({k: 0.5 * v for k, v in began.tensors.items()}), began, 1)
    assert rank_in(after.tensors) == 1
    assert any(value.any() for value in after.tensors.values())


@pytest.mark.parametrize("ranks", [None, RANKS])
def test_ranks_shrink_and_never_grow(ranks: tuple[int, ...] | None) -> None:
    """A strong penalty and weight decay; what is beyond a rank stays zero while it trains, and is not sent."""
    settings = {"hetlora__tail": 0.75, "hetlora__decay": 20.0, "lora__ranks": ranks}
    history, server = run_rounds(
        AdaptedModel(llama()), method_of("hetlora", **settings), ROWS, training(weight_decay=0.5, lr=0.02), 5
    )
    for client in ROWS:
        seen = [rank_in(results[client].state.tensors) for results in history]
        assert seen == sorted(seen, reverse=True)
        for rank, results in zip(seen, history, strict=True):
            assert {v.shape[k.factor == B] for k, v in results[client].upload.items()} == {rank}
            state = results[client].state.tensors
            assert all(torch.equal(value, zeroed(state, rank)[key]) for key, value in state.items())
        assert rank_in(server.messages([client])[client].tensors) <= seen[-1]
    first, last = ([rank_in(result.state.tensors) for result in history[i]] for i in (0, -1))
    assert sum(last) < sum(first), "some have shrunk, or this shows nothing"


def test_everything_untrained_is_averaged_evenly() -> None:
    method = method_of("hetlora")
    states = random_states(shape_of(method, LAYERS, 4))
    sent = {s.client: {k: v * (k.factor == A) for k, v in s.tensors.items()} for s in states}
    for key, value in answered(method, sent, WEIGHTS)[0].items():
        torch.testing.assert_close(value, sum(tensors[key] for tensors in sent.values()) / 3)  # type: ignore[arg-type]
