"""What leaves a client and what comes back, key by key and byte by byte; and what methods refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedalt.config import FederationConfig, parse_config
from fedalt.errors import UserError
from fedalt.methods.base import Message
from fedalt.model.adapted import AdaptedModel
from fedalt.names import A, B
from support import METHODS, RANK, VARIANTS, bitwise, examples, llama, method_of, run_rounds, training

ROWS = {client: examples(count, seed=client) for client, count in enumerate((4, 6, 3))}
CONFIG = training(local_epochs=1)
SIZES = AdaptedModel(llama()).layer_sizes
D_IN, D_OUT = (sum(size[i] for size in SIZES.values()) for i in (0, 1))


def n(r: int = RANK) -> int:
    """Parameters of one LoRA: N(r) = N_A(r) + N_B(r)."""
    return r * D_IN + r * D_OUT


M = 2 * D_IN
LORA, IND, ROW2 = (
    {("global", "A"), ("global", "B")},
    {("individual", "A"), ("individual", "B")},
    {("rest_of_world", "A"), ("rest_of_world", "B")},
)
MIX = {("mixer", "G")}
PARTS = {(f"part{i}", factor) for i in range(2) for factor in "AB"}
UP = {
    "local": (set(), 0),
    "fedit": (LORA, n()),
    "fedit_split": (PARTS | MIX, n() + M),
    "ffa_lora": ({("global", "B")}, RANK * D_OUT),
    "fedsa_lora": ({("global", "A")}, RANK * D_IN),
    "feddpa_f": (LORA, n()),
    "feddpa_t": (LORA, n()),
    "pf2lora": (LORA, n()),
    "fdlora": (LORA, n()),
    "fedalt": (IND, n()),
    "lora_fair": (LORA, n()),
    "fedprox": (LORA, n()),
    "ditto": (LORA, n()),
    "fedit_ft": (LORA, n()),
    "select": (LORA, n()),
    "fedalt_calibrated": (IND, n()),
    "fedalt_joint": (LORA, n()),
    "fedalt_shared_a": (IND, n()),
    "fedalt_heldout_mixer": (IND, n()),
    "fedrot_lora": (LORA, n()),
    "rolora": (LORA, n()),
    "fedex_lora": (LORA, n()),
    "fed_sb": ({("global", "R")}, RANK**2 * len(SIZES)),
    "zero_pad": (LORA, n()),
    "hetlora": (LORA, n()),
    "flexlora": (LORA, n()),
    "flora": (LORA, n()),
    "centralized": (LORA, n()),
    "zero_shot": (set(), 0),
    **dict.fromkeys(VARIANTS, (IND, n())),
    "fedalt_row_update_half": (IND, n(RANK // 2)),
    "fedalt_averaged_mixer": (IND | MIX, n() + M),
}
"""Slot and factor of what every client sends, and how many parameters these are."""
DOWN = {name: size for name, (_, size) in UP.items()} | {
    "fedalt_stack": 2 * n(),
    "fedalt_clusters": 2 * n(),
    "flora": 3 * n(),
    "fedex_lora": 3 * n(),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "hetlora": {"hetlora__prune": False},
    "lora_fair": {"lora_fair__steps": 3},
}


def test_the_tables_are_complete() -> None:
    assert UP.keys() == DOWN.keys() == {*METHODS, *VARIANTS}
    assert D_IN != D_OUT, "or A could not be told from B"


@pytest.mark.parametrize("name", UP)
def test_payloads_and_bytes_of_a_round(name: str) -> None:
    """Parameters × 4, up in every round and down from the second round on."""
    payload, size = UP[name]
    history, _ = run_rounds(AdaptedModel(llama()), method_of(name, **SETTINGS.get(name, {})), ROWS, CONFIG, 2)
    for results, first in zip(history, (True, False), strict=True):
        for result in results:
            assert {(key.slot, key.factor) for key in result.upload} == payload
            assert {key.module for key in result.upload} == (set(SIZES) if payload else set())
            assert Message(result.upload).bytes == 4 * size
            assert result.bytes_down == (0 if first else 4 * DOWN[name])


@pytest.mark.parametrize(
    ("name", "settings", "up", "down"),
    [
        ("fedit_split", {"fedit_split__router_average": False}, n(), n()),
        ("fedit_split", {"fedit_split__router": "none"}, n(), n()),
        ("fedit_split", {"fedit_split__parts": 4}, n() + 2 * M, n() + 2 * M),
        ("fedalt", {"fedalt__rest_of_world_update": "average"}, 2 * n(), 2 * n()),
        ("fedalt_svd", {"fedalt__rest_of_world_rank": 2}, n(), n(2)),
        ("fedalt_svd", {"fedalt__rest_of_world_rank": 6}, n(), n(6)),
        ("pf2lora", {"pf2lora__private_rank": 3}, n(), n()),
    ],
)
def test_bytes_under_settings(name: str, settings: dict[str, Any], up: int, down: int) -> None:
    history, _ = run_rounds(AdaptedModel(llama()), method_of(name, **settings), ROWS, CONFIG, 2)
    for result in history[1]:
        assert (Message(result.upload).bytes, result.bytes_down) == (4 * up, 4 * down)


RANKS = (1, 4, 2)
UNEQUAL = {
    "local": ((0, 0, 0), (0, 0, 0)),
    "zero_pad": (RANKS, RANKS),
    "hetlora": (RANKS, RANKS),
    "flexlora": (RANKS, RANKS),
    "flora": (RANKS, (7, 7, 7)),
    "fedalt_stack": (RANKS, (6, 3, 5)),
    "fedalt_svd": (RANKS, (4, 4, 4)),
}
"""By client, the ranks that go up and come down; an SVD row has rank ``lora.r``, of which the last may be zeros."""


@pytest.mark.parametrize("name", UNEQUAL)
def test_bytes_of_unequal_ranks(name: str) -> None:
    method = method_of(name, lora__ranks=RANKS, hetlora__prune=False)
    history, _ = run_rounds(AdaptedModel(llama()), method, ROWS, CONFIG, 2)
    for client, result in enumerate(history[1]):
        up, down = (ranks[client] for ranks in UNEQUAL[name])
        assert Message(result.upload).bytes == 4 * n(up)
        assert result.bytes_down == 4 * n(down)


@pytest.mark.parametrize("name", UNEQUAL)
def test_nothing_grows_beyond_a_clients_own_rank(name: str) -> None:
    """Weight decay, clipping and three rounds leave zeros where a client has no rank."""
    method = method_of(name, lora__ranks=RANKS)
    history, server = run_rounds(AdaptedModel(llama()), method, ROWS, training(weight_decay=0.5), 3)
    last = [result.state for result in history[-1]]
    messages = server.messages([0, 1, 2])
    installed = [method.receive(s, messages[s.client]) for s in last if s.client in messages]
    for state in [*(result.state for results in history for result in results), *installed]:
        for key, value in state.tensors.items():
            if key.slot in ("global", "individual"):
                beyond = value[RANKS[state.client] :] if key.factor == A else value[:, RANKS[state.client] :]
                assert not beyond.any()


@pytest.mark.parametrize("name", [name for name in (*METHODS, *VARIANTS) if name not in UNEQUAL])
def test_methods_without_a_rule_refuse_unequal_ranks(name: str) -> None:
    with pytest.raises(UserError, match=r"lora\.ranks: .* has no rule for clients of different ranks"):
        method_of(name, lora__ranks=RANKS).rank_of(0)


# ---------------------------------------------------------------------------------------------- what stays where it is


def test_ffas_a_never_moves_and_is_the_same_for_all() -> None:
    history, _ = run_rounds(AdaptedModel(llama()), method_of("ffa_lora"), ROWS, training(weight_decay=0.5), 2)
    states = [result.state for results in history for result in results]
    frozen = [{k: v for k, v in state.tensors.items() if k.factor == A} for state in states]
    assert all(bitwise(one, frozen[0]) for one in frozen)
    assert all(v.any() for state in states for k, v in state.tensors.items() if k.factor == B)


def test_fedsas_b_stays_with_its_client() -> None:
    method = method_of("fedsa_lora")
    history, server = run_rounds(AdaptedModel(llama()), method, ROWS, CONFIG, 2, federation=FederationConfig())
    messages = server.messages([0, 1, 2])
    after = [method.receive(result.state, messages[result.state.client]) for result in history[-1]]
    for result, state in zip(history[-1], after, strict=True):
        for key, value in state.tensors.items():
            assert torch.equal(value, result.state.tensors[key]) == (key.factor == B)
            same = [torch.equal(value, other.tensors[key]) for other in after if other is not state]
            assert all(same) if key.factor == A else not any(same)


@pytest.mark.parametrize("name", ["zero_shot", "local"])
def test_methods_that_send_nothing_are_told_nothing(name: str) -> None:
    history, server = run_rounds(AdaptedModel(llama()), method_of(name), ROWS, CONFIG, 2)
    assert dict(server.messages([0, 1, 2])) == {}
    trained = any(v.any() for v in (v for k, v in history[-1][0].state.tensors.items() if k.factor == B))
    assert trained == (name == "local")


# ------------------------------------------------------------------------------------------------------------ refusals


SECTIONS = (
    "fedalt", "fedit_split", "feddpa", "pf2lora", "fdlora", "hetlora", "lora_fair", "fedprox", "ditto", "fedit_ft",
    "fedrot_lora", "select", "fedalt_calibrated", "fedalt_joint", "fedalt_heldout_mixer",
)  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_options_are_refused(section: str) -> None:
    with pytest.raises(UserError, match=rf'unknown key "{section}\.nonesuch"'):
        parse_config({section: {"nonesuch": 1}}, "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fedalt.rest_of_world_aggregator", "mean"),
        ("fedalt.trim", 0.5),
        ("fedalt.clusters", 0),
        ("fedit_split.parts", 1),
        ("feddpa.most", 1.5),
        ("feddpa.samples", 0),
        ("pf2lora.private_rank", 0),
        ("fdlora.outer_momentum", 1),
        ("fdlora.budget", 8),
        ("hetlora.tail", 0),
        ("lora_fair.solver", "adam"),
        ("fedprox.mu", -0.1),
        ("ditto.weight", -1),
        ("fedit_ft.alone", 0),
        ("fedrot_lora.fit", "C"),
        ("select.held_out", 0),
        ("fedalt_calibrated.standard_errors", -1),
        ("fedalt_joint.slot_dropout", 1.5),
        ("lora.ranks", [4, 0]),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: Any) -> None:
    section, name = key.split(".")
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        parse_config({section: {name: value}}, "x")


@pytest.mark.parametrize(
    "settings",
    [
        {"fedalt__rest_of_world_aggregator": "svd", "fedalt__rest_of_world_from": "all"},
        {"fedalt__rest_of_world_aggregator": "median", "fedalt__rest_of_world_update": "average"},
        {"fedalt__clusters": 2, "fedalt__mixer_average": True},
        {"fedalt__clusters": 2, "fedalt__mixing": "half"},
        {"fedalt__clusters": 2, "fedalt__rest_of_world_aggregator": "stack"},
        {"fedalt__rest_of_world_from": "all", "fedalt__rest_of_world_update": "average"},
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="fedalt"):
        method_of("fedalt", **settings)


@pytest.mark.parametrize("name", ["hetlora", "fedalt_median", "fedalt_trimmed_mean", "fedalt_krum"])
def test_weights_that_would_have_no_effect_are_refused(name: str) -> None:
    for weighting in ("uniform", "samples"):
        with pytest.raises(UserError, match=rf"federation\.weighting: {weighting} has no effect on .*; leave it out"):
            method_of(name, federation__weighting=weighting)
    method_of("fedalt", federation__weighting="samples")


@pytest.mark.parametrize("init", ["code_like", "per_client"])
@pytest.mark.parametrize("name", ["ffa_lora", "rolora"])
def test_means_of_b_need_an_a_that_all_share(name: str, init: str) -> None:
    with pytest.raises(UserError, match=rf"lora\.init: {init} .* use shared"):
        method_of(name, lora__init=init)
