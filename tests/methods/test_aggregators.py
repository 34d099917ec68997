"""Rows made from single uploads against their formulas in NumPy, client by client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedalt.errors import UserError
from fedalt.methods.aggregators import cluster_rows, groups, similarities
from fedalt.methods.base import Gathered
from fedalt.model.state import ClientState
from fedalt.names import INDIVIDUAL, REST_OF_WORLD, A, B, Key, Tensors
from fedalt.registry import AGGREGATORS
from support import method_of, quick, shape_of

Array = np.ndarray[Any, Any]
Factors = tuple[Array, Array]
LAYERS = {"x.one": (6, 5), "x.two": (3, 8)}
ROBUST = ("median", "trimmed_mean", "krum")
BY_WEIGHT = ("factor_mean", "stack", "svd", "fair")


def uploads(clients: int, seed: int = 0, ranks: tuple[int, ...] = (2,)) -> dict[int, dict[Key, torch.Tensor]]:
    draw = np.random.default_rng(seed)
    return {
        client: {
            Key(module, INDIVIDUAL, factor): torch.tensor(draw.normal(size=size), dtype=torch.float32)
            for module, (d_in, d_out) in LAYERS.items()
            for factor, size in ((A, (ranks[client % len(ranks)], d_in)), (B, (d_out, ranks[client % len(ranks)])))
        }
        for client in range(clients)
    }


def gathered(sent: Mapping[int, Tensors], weights: Mapping[int, float] | None = None) -> Gathered:
    return Gathered(sent, weights or dict.fromkeys(sent, 1.0), {}, 1)


def rows(
    aggregator: str, sent: Mapping[int, Tensors], weights: Mapping[int, float] | None = None, **settings: Any
) -> Callable[[int], dict[str, Factors]]:
    """Client → module → (A, B) of its row."""
    method = method_of(
        "fedalt",
        len(sent),
        fedalt__rest_of_world_aggregator=aggregator,
        **{"lora__r": 2, "lora__alpha": 4.0} | settings,
    )
    known = gathered(sent, weights)
    if aggregator == "factor_mean":
        build = cluster_rows(known, (REST_OF_WORLD,))  # FedALT's own rows, answered one by one
    else:
        answer = method.client_messages(known)
        build = lambda client: dict(answer(client, 1).tensors)  # noqa: E731

    def row(client: int) -> dict[str, Factors]:
        tensors = build(client)
        assert {key.slot for key in tensors} == {REST_OF_WORLD}
        assert {value.dtype for value in tensors.values()} == {torch.float32}
        return {
            m: (tensors[Key(m, REST_OF_WORLD, A)].numpy(), tensors[Key(m, REST_OF_WORLD, B)].numpy()) for m in LAYERS
        }

    return row


def others(sent: Mapping[int, Tensors], client: int, module: str) -> tuple[list[Array], list[Array]]:
    return tuple(  # type: ignore[return-value]
        [tensors[Key(module, INDIVIDUAL, f)].double().numpy() for c, tensors in sent.items() if c != client]
        for f in (A, B)
    )


def shares(weights: Mapping[int, float], client: int) -> Array:
    q = np.array([weight for c, weight in weights.items() if c != client])
    return q / q.sum()


def means(q: Array, a: list[Array], b: list[Array]) -> Factors:
    return np.tensordot(q, a, 1), np.tensordot(q, b, 1)


def dense(q: Array, a: list[Array], b: list[Array]) -> Array:
    return sum(w * y @ x for w, x, y in zip(q, a, b, strict=True))  # type: ignore[return-value]


def weighted(draw: st.DrawFn) -> dict[int, float]:
    return dict(enumerate(draw(st.lists(st.floats(0.1, 5), min_size=2, max_size=6))))


weights_of = st.composite(weighted)()


@quick
@given(weights_of, st.integers(0, 99))
def test_stacked_rows_are_the_mean_of_products(weights: dict[int, float], seed: int) -> None:
    sent = uploads(len(weights), seed)
    row = rows("stack", sent, weights)
    for client in weights:
        for module, (a, b) in row(client).items():
            assert len(a) == 2 * (len(weights) - 1)
            expected = dense(shares(weights, client), *others(sent, client, module))
            np.testing.assert_allclose(b.astype(float) @ a, expected, atol=1e-5)


@quick
@given(weights_of, st.integers(0, 99), st.integers(1, 4))
def test_svd_rows_are_their_best_approximation(weights: dict[int, float], seed: int, rank: int) -> None:
    sent = uploads(len(weights), seed)
    row = rows("svd", sent, weights, fedalt__rest_of_world_rank=rank)
    for client in weights:
        for module, (a, b) in row(client).items():
            exact = dense(shares(weights, client), *others(sent, client, module))
            tail = np.linalg.svd(exact, compute_uv=False)[rank:]
            assert len(a) <= rank
            assert np.linalg.norm(exact - b.astype(float) @ a) == pytest.approx(np.sqrt((tail**2).sum()), abs=1e-4)


@pytest.mark.parametrize("aggregator", ["stack", "svd"])
def test_rows_of_unequal_ranks(aggregator: str) -> None:
    sent = uploads(4, 3, ranks=(1, 4, 2))
    settings = {"lora__ranks": (1, 4, 2), "fedalt__rest_of_world_rank": 99 if aggregator == "svd" else None}
    row = rows(aggregator, sent, **settings)
    for client in sent:
        for module, (a, b) in row(client).items():
            expected = dense(np.full(3, 1 / 3), *others(sent, client, module))
            np.testing.assert_allclose(b.astype(float) @ a, expected, atol=1e-5)


@quick
@given(weights_of, st.integers(0, 99), st.floats(1e-3, 10))
def test_fitted_rows(weights: dict[int, float], seed: int, ridge: float) -> None:
    sent = uploads(len(weights), seed)
    row = rows("fair", sent, weights, fedalt__ridge=ridge)
    for client in weights:
        for module, (a, b) in row(client).items():
            q, parts = shares(weights, client), others(sent, client, module)
            mean_a, mean_b = means(q, *parts)
            change = (dense(q, *parts) - mean_b @ mean_a) @ mean_a.T
            change = change @ np.linalg.inv(mean_a @ mean_a.T + ridge * np.eye(len(mean_a)))
            np.testing.assert_allclose(a, mean_a, atol=1e-5)
            np.testing.assert_allclose(b, mean_b + change, rtol=1e-4, atol=1e-4)


@quick
@given(weights_of, st.integers(0, 99))
def test_one_cluster_is_fedalts_mean_of_the_others(weights: dict[int, float], seed: int) -> None:
    sent = uploads(len(weights), seed)
    row = rows("factor_mean", sent, weights)
    for client in weights:
        for module, (a, b) in row(client).items():
            for got, expected in zip(
                (a, b), means(shares(weights, client), *others(sent, client, module)), strict=True
            ):
                np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("clients", [2, 3, 4, 5, 6])
def test_medians(clients: int) -> None:
    sent = uploads(clients, 1)
    for client in sent:
        for module, got in rows("median", sent)(client).items():
            for value, parts in zip(got, others(sent, client, module), strict=True):
                np.testing.assert_allclose(value, np.median(parts, axis=0), atol=1e-6)


@pytest.mark.parametrize(("clients", "trim", "cut"), [(6, 0.2, 1), (5, 0.2, 0), (5, 0.25, 1), (6, 0.4, 2), (4, 0.0, 0)])
def test_trimmed_means(clients: int, trim: float, cut: int) -> None:
    sent = uploads(clients, 2)
    for client in sent:
        for module, got in rows("trimmed_mean", sent, fedalt__trim=trim)(client).items():
            for value, parts in zip(got, others(sent, client, module), strict=True):
                kept = np.sort(parts, axis=0)[cut : clients - 1 - cut]
                np.testing.assert_allclose(value, kept.mean(0), atol=1e-6)


def literal_krum(sent: Mapping[int, Tensors], client: int, faulty: int) -> int:
    """Blanchard et al.: the score of a vector is the sum of squared distances to its n − f − 2 closest ones."""
    flat = {c: np.concatenate([v.double().numpy().ravel() for v in t.values()]) for c, t in sent.items() if c != client}
    near = max(1, len(flat) - faulty - 2)
    scores = {c: sum(sorted(((x - y) ** 2).sum() for o, y in flat.items() if o != c)[:near]) for c, x in flat.items()}
    return min(scores, key=scores.__getitem__)


@quick
@given(st.integers(4, 8), st.integers(0, 3), st.integers(0, 99))
def test_krum(clients: int, faulty: int, seed: int) -> None:
    sent = uploads(clients, seed)
    row = rows("krum", sent, fedalt__byzantine=faulty)
    for client in sent:
        chosen = sent[literal_krum(sent, client, faulty)]
        for module, (a, b) in row(client).items():
            assert (a == chosen[Key(module, INDIVIDUAL, A)].numpy()).all()
            assert (b == chosen[Key(module, INDIVIDUAL, B)].numpy()).all()


@pytest.mark.parametrize("aggregator", AGGREGATORS.names())
def test_a_row_depends_on_everybody_but_its_own_client(aggregator: str) -> None:
    """Krum takes one upload as it is; the one that changes is the one that it took for somebody else."""
    sent = uploads(5, 7)
    mine = literal_krum(sent, 0, 1) if aggregator == "krum" else 2
    moved = sent | {mine: {key: value + 3 for key, value in sent[mine].items()}}
    one, other = (rows(aggregator, each) for each in (sent, moved))
    for client in sent:
        change = max(
            float(abs(x - y).max())
            for module in LAYERS
            for x, y in zip(_comparable(one(client)[module]), _comparable(other(client)[module]), strict=True)
        )
        if client == mine:
            assert change < 1e-5
        elif aggregator != "krum" or literal_krum(sent, client, 1) == mine:
            assert change > 1e-3


def _comparable(factors: Factors) -> tuple[Array, ...]:
    """Products, which say more than factors: singular vectors have no sign."""
    a, b = factors
    return (b.astype(float) @ a,)


@pytest.mark.parametrize("mad", [0, 3, 5])
@pytest.mark.parametrize("aggregator", ROBUST)
def test_one_client_gone_mad_does_not_bend_rows(aggregator: str, mad: int) -> None:
    sent = uploads(6, 4)
    sent[mad] = {key: 1e6 * value for key, value in sent[mad].items()}
    row = rows(aggregator, sent)
    for client in sent:
        sane = {c: tensors for c, tensors in sent.items() if c != mad}
        for module, got in row(client).items():
            for value, parts in zip(got, others(sane, client, module), strict=True):
                low, high = np.min(parts, axis=0) - 1e-6, np.max(parts, axis=0) + 1e-6
                assert ((low <= value) & (value <= high)).all()


@pytest.mark.parametrize("aggregator", BY_WEIGHT)
def test_it_does_bend_means(aggregator: str) -> None:
    sent = uploads(6, 4)
    sent[3] = {key: 1e6 * value for key, value in sent[3].items()}
    assert abs(np.concatenate([x.ravel() for x in rows(aggregator, sent)(0)["x.one"]])).max() > 1e3


@pytest.mark.parametrize("aggregator", ["median", "trimmed_mean"])
def test_two_others_are_averaged(aggregator: str) -> None:
    sent = uploads(3, 5)
    for module, got in rows(aggregator, sent)(1).items():
        for value, parts in zip(got, others(sent, 1, module), strict=True):
            np.testing.assert_allclose(value, (parts[0] + parts[1]) / 2, atol=1e-6)


@pytest.mark.parametrize("clients", [2, 3])
def test_krum_of_one_or_two_others_takes_the_first(clients: int) -> None:
    sent = uploads(clients, 5)
    for client, first in {0: 1, 1: 0}.items():
        for module, (a, b) in rows("krum", sent)(client).items():
            assert (a == sent[first][Key(module, INDIVIDUAL, A)].numpy()).all()
            assert (b == sent[first][Key(module, INDIVIDUAL, B)].numpy()).all()


@pytest.mark.parametrize("aggregator", AGGREGATORS.names())
def test_rows_of_untrained_uploads_are_zero_and_finite(aggregator: str) -> None:
    sent = uploads(4, 6)
    sent = {c: {k: v * (k.factor == A) for k, v in tensors.items()} for c, tensors in sent.items()}
    for a, b in rows(aggregator, sent)(1).values():
        assert np.isfinite(a).all()
        assert not (b @ a).any()


def test_a_narrower_row_leaves_nothing_of_the_old_one() -> None:
    """Four uploads in one round, two in the next: a stack has fewer rows."""
    method = method_of("fedalt_stack", 4, lora__r=2)
    old = {key: torch.ones(size) for key, size in shape_of(method, LAYERS, 2).shapes().items()}
    state = ClientState(0, 1, old)
    sent = {c: tensors for c, tensors in uploads(4, 8).items() if c in (0, 3)}
    row = method.receive(state, method.client_messages(gathered(sent))(0, 1)).tensors
    for module in LAYERS:
        a, b = row[Key(module, REST_OF_WORLD, A)], row[Key(module, REST_OF_WORLD, B)]
        assert a.shape == old[Key(module, REST_OF_WORLD, A)].shape
        (expected_a,), (expected_b,) = others(sent, 0, module)
        np.testing.assert_allclose(a[:2], expected_a)
        np.testing.assert_allclose(b[:, :2], expected_b)
        assert not a[2:].any() and not b[:, 2:].any()


# ------------------------------------------------------------------------------------------------------------- clusters


def planted(noise: float = 0.1) -> dict[int, dict[Key, torch.Tensor]]:
    """Clients 0, 2, 4 are alike, and so are 1, 3."""
    centers, spread = uploads(2, 11), uploads(5, 12)
    return {
        client: {key: centers[client % 2][key] + noise * value for key, value in mine.items()}
        for client, mine in spread.items()
    }


def test_similarity_is_the_cosine_of_products() -> None:
    sent = uploads(3, 10)
    dense_ = [
        np.concatenate(
            [(t[Key(m, INDIVIDUAL, B)].double() @ t[Key(m, INDIVIDUAL, A)].double()).numpy().ravel() for m in LAYERS]
        )
        for t in sent.values()
    ]
    unit = np.array([x / np.linalg.norm(x) for x in dense_])
    np.testing.assert_allclose(similarities(gathered(sent)), unit @ unit.T, atol=1e-7)


def test_planted_groups_are_found_and_the_own_one_comes_first() -> None:
    sent = planted()
    labels = groups(similarities(gathered(sent)), 2)
    assert len({labels[c] for c in (0, 2, 4)}) == len({labels[c] for c in (1, 3)}) == 1
    assert labels[0] != labels[1]
    method = method_of("fedalt_clusters", 5)
    answer = method.client_messages(gathered(sent))
    assert method.slot_names == (INDIVIDUAL, REST_OF_WORLD, "rest_of_world1")
    for client in sent:
        tensors = answer(client, 1).tensors
        own = [c for c in sent if c % 2 == client % 2 and c != client]
        rest = [c for c in sent if c % 2 != client % 2]
        for slot, members in ((REST_OF_WORLD, own), ("rest_of_world1", rest)):
            for key in sent[0]:
                expected = sum(sent[c][key] for c in members) / len(members)
                torch.testing.assert_close(tensors[key._replace(slot=slot)], expected, rtol=0, atol=1e-6)


def test_clustered_rows_do_not_depend_on_the_own_upload_while_groups_stay() -> None:
    sent = planted()
    moved = sent | {2: {key: value + 0.05 * torch.sign(value) for key, value in sent[2].items()}}
    one, other = (cluster_rows(gathered(each), (REST_OF_WORLD, "rest_of_world1")) for each in (sent, moved))
    for client in sent:
        change = {key.slot: 0.0 for key in one(client)}
        for key, value in one(client).items():
            change[key.slot] = max(change[key.slot], float((value - other(client)[key]).abs().max()))
        assert (change[REST_OF_WORLD] > 1e-3) == (client in (0, 4))
        assert (change["rest_of_world1"] > 1e-3) == (client in (1, 3))
        assert client != 2 or max(change.values()) == 0


def test_a_group_of_its_own_has_an_empty_row_first() -> None:
    sent = {c: t for c, t in planted().items() if c in (0, 1, 3)}
    tensors = cluster_rows(gathered(sent), (REST_OF_WORLD, "rest_of_world1"))(0)
    assert not any(value.any() for key, value in tensors.items() if key.slot == REST_OF_WORLD)
    for key in sent[1]:
        torch.testing.assert_close(tensors[key._replace(slot="rest_of_world1")], (sent[1][key] + sent[3][key]) / 2)


@pytest.mark.parametrize("count", [2, 3, 9])
def test_groups_of_untrained_uploads_are_finite(count: int) -> None:
    sent = {c: {k: 0 * v for k, v in tensors.items()} for c, tensors in uploads(3).items()}
    row = cluster_rows(gathered(sent), [f"row{i}" for i in range(count)])
    tensors = row(1)
    assert {key.slot for key in tensors} == {f"row{i}" for i in range(count)}
    assert not any(value.any() for value in tensors.values())


# ------------------------------------------------------------------------------------------------------ too few clients


@pytest.mark.parametrize(
    ("name", "changes", "fewest", "line"),
    [
        ("fedalt_trimmed_mean", {}, 6, r"^fedalt.trim: 0.2 of 4 other clients drops nobody.*set fedalt.trim to 0.25"),
        ("fedalt_trimmed_mean", {"fedalt__trim": 0.4}, 4, "fedalt.trim: 0.4 of 2 other clients"),
        ("fedalt_krum", {}, 6, r"^fedalt.byzantine: 1 faulty clients need 5 uploads for krum .*there are 4 others"),
        ("fedalt_krum", {"fedalt__byzantine": 2}, 8, "need 7 uploads"),
    ],
)
def test_robust_rules_need_enough_clients(name: str, changes: dict[str, Any], fewest: int, line: str) -> None:
    assert not method_of(name, fewest, **changes).remarks()
    with pytest.raises(UserError, match=line):
        method_of(name, fewest - 1, **changes).remarks()
