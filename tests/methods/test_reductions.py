"""Methods that are other methods at some settings, over whole rounds; and what a round leaves at every client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedalt.config import FederationConfig
from fedalt.errors import UserError
from fedalt.federation.client import ClientResult
from fedalt.federation.server import Server
from fedalt.methods.aggregators import cluster_rows
from fedalt.methods.base import Gathered, Message, Method, Phase, Slot
from fedalt.methods.fedalt import FedALT
from fedalt.methods.fedalt_variants import FedALTVariants
from fedalt.methods.fedsa_lora import FedSALoRA
from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import BatchLayout
from fedalt.model.layer import Mixing, Placement
from fedalt.model.state import ClientState
from fedalt.names import (
    GLOBAL,
    INDIVIDUAL,
    MERGED,
    MIXER,
    PERSONAL,
    PRIVATE,
    REST_OF_WORLD,
    A,
    B,
    G,
    Key,
    Tensors,
    W,
)
from oracle.reference import merged
from support import (
    MODELS,
    RANK,
    SCALE,
    bitwise,
    distance,
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
ONE = {0: ROWS[0]}
CONFIG = training(max_grad_norm=0.5)
UNIFORM, SAMPLES = FederationConfig(weighting="uniform"), FederationConfig(weighting="samples")
History = list[list[ClientResult]]


def rounds(
    method: Method,
    rows: Mapping[int, Any] = ROWS,
    federation: FederationConfig = UNIFORM,
    states: Sequence[ClientState] = (),
    count: int = 3,
    base: str = "llama",
) -> tuple[History, Server]:
    """Three rounds with dropout, weight decay and clipping."""
    return run_rounds(AdaptedModel(MODELS[base]()), method, rows, CONFIG, count, 0.2, federation, states)


def fedit(federation: FederationConfig = UNIFORM, **options: Any) -> tuple[History, Server]:
    return rounds(method_of("fedit"), federation=federation, **options)


def slot(tensors: Tensors, name: str) -> Tensors:
    """One slot's tensors, as the global one's."""
    return {key._replace(slot=GLOBAL): value for key, value in tensors.items() if key.slot == name}


def same_states(one: History, other: History, name: str = GLOBAL, limit: float = 2e-5) -> None:
    """A slot follows FedIT's global LoRA at every client in every round."""
    for results, expected in zip(one, other, strict=True):
        for a, b in zip(results, expected, strict=True):
            assert distance(slot(a.state.tensors, name), slot(b.state.tensors, GLOBAL)) < limit


def installed(history: History, server: Server) -> list[ClientState]:
    """Every client at the start of the next round."""
    states = [result.state for result in history[-1]]
    messages = server.messages([state.client for state in states])
    return [server.method.receive(s, messages[s.client]) if s.client in messages else s for s in states]


def products(tensors: Tensors, name: str = GLOBAL) -> dict[str, torch.Tensor]:
    return {
        key.module: tensors[key._replace(factor=B)].double() @ value.double()
        for key, value in tensors.items()
        if (key.slot, key.factor) == (name, A)
    }


# ------------------------------------------------------------------------------------------------- one is another


def test_fdlora_without_an_outer_optimiser_is_fedit() -> None:
    """The mean of personal LoRAs after round 1 is FedIT's, and so is every later one."""
    method = method_of("fdlora", fdlora__outer_lr=1.0, fdlora__outer_momentum=0.0, fdlora__sync_every=99)
    (history, server), (expected, other) = rounds(method), fedit()
    same_states(history, expected)
    memory = {key: value for key, value in server.memory.items() if key.slot == GLOBAL}
    assert distance(memory, other.mean()) < 2e-5
    for first, last in zip(history[0], history[-1], strict=True):
        assert bitwise(slot(first.state.tensors, PERSONAL), slot(last.state.tensors, PERSONAL)), "θ_p is left alone"


def test_pf2lora_whose_private_lora_stands_still_is_fedit() -> None:
    (history, server), (expected, other) = rounds(method_of("pf2lora", pf2lora__private_lr=1e-30)), fedit()
    same_states(history, expected)
    assert distance(server.mean(), other.mean()) < 2e-5


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(("router", "scaling"), [("none", "rank"), ("mean", "part")])
def test_fedit_split_without_a_router_is_fedit(parts: int, router: str, scaling: str) -> None:
    """Blocks of rows of A and of columns of B, under one dropout mask, with clipping over all of them.

    The mean of n parts, each at n times the scale, is their sum.
    """
    options = {"fedit_split__router": router, "fedit_split__scaling": scaling}
    method = method_of("fedit_split", **options, fedit_split__parts=parts)
    sizes = AdaptedModel(llama()).layer_sizes
    plain = method_of("fedit")
    starts = start_states(plain, shape_of(plain, sizes), list(ROWS))

    def split(tensors: Tensors) -> Tensors:
        r = RANK // parts
        return {
            Key(key.module, f"part{i}", key.factor): value.narrow(0 if key.factor == A else 1, i * r, r).contiguous()
            for key, value in tensors.items()
            for i in range(parts)
        }

    history, _ = rounds(method, states=[ClientState(s.client, 0, split(s.tensors)) for s in starts])
    expected, _ = fedit(states=starts)
    for results, others in zip(history, expected, strict=True):
        for one, other in zip(results, others, strict=True):
            assert distance(one.state.tensors, split(other.state.tensors)) < 2e-5
            assert one.stats.loss == pytest.approx(other.stats.loss, rel=1e-4)


@pytest.mark.parametrize("federation", [UNIFORM, SAMPLES], ids=["uniform", "samples"])
@pytest.mark.parametrize("ranks", [None, (RANK,), (RANK, RANK)])
def test_zero_padding_of_equal_ranks_is_fedit(ranks: tuple[int, ...] | None, federation: FederationConfig) -> None:
    history, _ = rounds(method_of("zero_pad", lora__ranks=ranks), federation=federation)
    expected, _ = fedit(federation)
    same_states(history, expected, limit=1e-6)


def test_fedprox_without_its_penalty_is_fedit() -> None:
    """Bit for bit: zero times a distance adds zeros to every gradient."""
    (history, server), (expected, other) = rounds(method_of("fedprox", fedprox__mu=0.0)), fedit()
    same_states(history, expected, limit=1e-30)
    assert bitwise(server.mean(), other.mean())


@pytest.mark.parametrize("solver", ["sgd", "ridge"])
def test_lora_fair_that_may_not_correct_anything_is_fedit(solver: str) -> None:
    method = method_of("lora_fair", lora_fair__solver=solver, lora_fair__weight=1e12, lora_fair__steps=3)
    history, _ = rounds(method, federation=SAMPLES)
    expected, _ = fedit(SAMPLES)
    same_states(history, expected, limit=1e-5)


def test_hetlora_without_its_penalty_trains_as_fedit_and_averages_by_size() -> None:
    method = method_of("hetlora", hetlora__decay=0.0, hetlora__prune=False)
    (history, server), (expected, _) = rounds(method, count=1), fedit(count=1)
    same_states(history, expected, limit=1e-6)
    uploads = [result.upload for result in history[0]]
    sizes = [sum(float((p**2).sum()) for p in products(tensors).values()) ** 0.5 for tensors in uploads]
    for state in installed(history, server):
        for key, value in state.tensors.items():
            literal = sum(size * tensors[key].double() for size, tensors in zip(sizes, uploads, strict=True))
            assert relative(value, (literal / sum(sizes)).float()) < 1e-5  # type: ignore[union-attr]


def test_feddpa_f_is_fedit_until_the_last_round() -> None:
    method = method_of("feddpa_f", federation__rounds=4)
    starts = start_states(method, shape_of(method, AdaptedModel(llama()).layer_sizes), list(ROWS))
    plain = [ClientState(start.client, 0, slot(start.tensors, GLOBAL)) for start in starts]
    (history, _), (expected, _) = rounds(method, states=starts), fedit(states=plain)
    same_states(history, expected)
    for result in history[-1]:
        assert bitwise(slot(result.state.tensors, "local"), slot(result.state.tensors, GLOBAL))


def test_fedalt_with_one_client_is_local() -> None:
    """No row, no mixer."""
    (history, server), (expected, _) = (
        rounds(method_of("fedalt", 1), ONE),
        rounds(method_of("local", 1), ONE),
    )
    for (one,), (other,) in zip(history, expected, strict=True):
        assert bitwise(one.state.tensors, other.state.tensors)
        assert one.stats == other.stats
    assert len(server.messages([0])) == 0


def test_fedalt_without_weight_on_the_row_is_local() -> None:
    """α_L ≡ 1: the row is there and nobody looks at it."""
    method = method_of("fedalt_fixed_half")
    method.mixing = Mixing("fixed", (1.0, 0.0))
    (history, server), (expected, _) = rounds(method), rounds(method_of("local"))
    assert any(value.any() for key, value in installed(history, server)[0].tensors.items() if key.slot == REST_OF_WORLD)
    for results, others in zip(history, expected, strict=True):
        for one, other in zip(results, others, strict=True):
            assert distance(slot(one.state.tensors, INDIVIDUAL), slot(other.state.tensors, INDIVIDUAL)) < 2e-5


class Clustered(FedALTVariants):
    """FedALT whose server groups clients even where there is one group."""

    def client_messages(self, gathered: Gathered) -> Callable[[int, int], Message]:
        rows = cluster_rows(gathered, self.rows)
        return lambda client, last: Message(rows(client))


def test_the_papers_method_alone_is_the_registered_one_with_its_defaults() -> None:
    registered = method_of("fedalt")
    (one, server), (other, plain) = rounds(FedALT().bind(3, registered.config)), rounds(registered)
    for a, b in zip(installed(one, server), installed(other, plain), strict=True):
        assert bitwise(a.tensors, b.tensors)


def test_fedalt_of_one_cluster_is_fedalt() -> None:
    method = Clustered().bind(3, method_of("fedalt").config)
    method.needs_uploads = True
    (one, server), (other, plain) = rounds(method), rounds(method_of("fedalt"))
    assert all(message.share == 0 for message in server.messages(tuple(ROWS)).values()), "rows, each for one client"
    for a, b in zip(installed(one, server), installed(other, plain), strict=True):
        assert distance(a.tensors, b.tensors) < 2e-5


class Frozen(FedSALoRA):
    """FedSA whose A stays at its start, so that B is what is left to average."""

    slots = (Slot(GLOBAL, share=frozenset(B)),)

    def phases(self, round_: int) -> tuple[Phase, ...]:
        (phase,) = super().phases(round_)
        return (replace(phase, train={name: factors - {A} for name, factors in phase.train.items()}),)


def test_fedsa_whose_a_is_frozen_at_the_shared_start_is_ffa() -> None:
    frozen = Frozen().bind(3, method_of("fedsa_lora").config)
    (history, server), (expected, other) = rounds(frozen), rounds(method_of("ffa_lora"))
    same_states(history, expected, limit=1e-6)
    assert distance(server.mean(), other.mean()) < 1e-6
    assert all(key.factor == B for result in history[-1] for key in result.upload)


@pytest.mark.parametrize("federation", [UNIFORM, SAMPLES], ids=["uniform", "samples"])
def test_the_aggregate_of_identical_clients_is_each_of_them(federation: FederationConfig) -> None:
    method = method_of("fedit")
    history, _ = rounds(method, ONE, count=1)
    upload = history[0][0].upload
    shapes = {key: tuple(value.shape) for key, value in upload.items()}
    server = Server(method, federation, {client: len(mine) for client, mine in ROWS.items()}, shapes)
    server.receive(set(ROWS), dict.fromkeys(ROWS, upload).__getitem__, 1)
    assert bitwise(server.mean(), upload)


def test_local_is_as_many_runs_of_one_client() -> None:
    """Bit for bit, where clients take turns."""
    together, _ = run_rounds(AdaptedModel(llama()), method_of("local"), ROWS, CONFIG, 3, 0.2, executor="loop")
    for place, (client, mine) in enumerate(ROWS.items()):
        method = method_of("local", 1)
        alone, _ = run_rounds(AdaptedModel(llama()), method, {client: mine}, CONFIG, 3, 0.2, executor="loop")
        for results, (single,) in zip(together, alone, strict=True):
            assert bitwise(results[place].state.tensors, single.state.tensors)
            assert results[place].stats == single.stats


# ------------------------------------------------------------------------------------------------- exact products


@pytest.mark.parametrize("name", ["flexlora", "flora"])
def test_the_mean_of_one_client_is_its_product(name: str) -> None:
    history, server = rounds(method_of(name, 1), ONE, count=1)
    (state,) = installed(history, server)
    sent = products(history[0][0].upload)
    got = {m: state.tensors[Key(m, MERGED, W)] for m in sent} if name == "flora" else products(state.tensors)
    for module, expected in sent.items():
        assert relative(got[module].double(), expected) < 1e-5


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_flora_merges_what_all_have_trained_into_everybodys_base(base: str) -> None:
    """After one round: W0 + s Σ p_k B_k A_k, with a new LoRA that adds nothing yet; GPT-2 transposes its weights."""
    method = method_of("flora")
    history, server = rounds(method, federation=SAMPLES, count=1, base=base)
    parts = [products(result.upload) for result in history[0]]
    for state in installed(history, server):
        for module in parts[0]:
            literal = sum(len(ROWS[k]) * part[module] for k, part in enumerate(parts)) / sum(map(len, ROWS.values()))
            assert relative(state.tensors[Key(module, MERGED, W)], literal.float()) < 1e-5  # type: ignore[union-attr]
            assert not state.tensors[Key(module, GLOBAL, B)].any()
        plain = merged(MODELS[base](), server.messages([0])[0].tensors, "round1", SCALE)
        ids = torch.tensor(ROWS[1][0].prompt)
        model = AdaptedModel(MODELS[base]())
        model.load([state], Placement(*method.inference, SCALE, 0.0))
        with torch.no_grad():
            got = model.hidden(ids, BatchLayout((1,), (len(ids),))).last_hidden_state
            expected = plain.get_decoder()(input_ids=ids[None]).last_hidden_state[0]
        assert relative(got, expected) < 1e-4


def test_flora_starts_anew_in_every_round_on_a_base_that_is_the_same_for_all() -> None:
    history, server = rounds(method_of("flora"), federation=SAMPLES, count=2)
    states = installed(history, server)
    for key, value in states[0].tensors.items():
        if key.slot == MERGED:
            assert all(torch.equal(value, state.tensors[key]) for state in states)
            assert not torch.equal(value, history[1][0].state.tensors[key]), "the second round added to it"
        elif key.factor == A:
            assert float(value.abs().max()) <= value.shape[1] ** -0.5, "drawn like any new A"
            assert not any(torch.equal(value, result.state.tensors[key]) for result in history[1])


def test_a_client_that_flora_has_missed_gets_every_stack() -> None:
    """Client 2 rests in round 2; what it is told after round 2 is that round's stack, or both when it never came."""
    method = method_of("flora")
    _, server = rounds(method, count=2)
    server.seen = {**server.seen, 2: 1}
    told = server.messages([0, 2, 3])
    slots = {client: {key.slot for key in message.tensors} for client, message in told.items()}
    assert slots == {0: {"round2"}, 2: {"round1", "round2"}, 3: {"round1", "round2"}}


def test_ffas_mean_of_products_is_the_product_of_means() -> None:
    history, server = rounds(method_of("ffa_lora"), federation=SAMPLES)
    weights = {k: len(mine) / sum(map(len, ROWS.values())) for k, mine in ROWS.items()}
    parts = [products(result.state.tensors) for result in history[-1]]
    for state in installed(history, server):
        for module, got in products(state.tensors).items():
            exact = sum(weights[k] * part[module] for k, part in enumerate(parts))
            assert relative(got, exact) < 1e-6  # type: ignore[arg-type]


def test_fixed_weights_of_one_over_k_on_exact_rows_answer_with_the_mean_of_products() -> None:
    """Every client, after whole rounds, is one and the same model."""
    method = method_of("fedalt_fixed_one_over_k", fedalt__rest_of_world_aggregator="stack")
    history, server = rounds(method)
    parts = [products(result.upload, INDIVIDUAL) for result in history[-1]]
    dense = {Key(m, "mean", A): (sum(p[m] for p in parts) / 3).float() for m in parts[0]}
    dense |= {key._replace(factor=B): torch.eye(len(value)) for key, value in dense.items()}
    expected = hidden(merged(llama(), dense, "mean", SCALE))
    for state in installed(history, server):
        assert relative(answered(state, *method.inference), expected) < 1e-4


def hidden(plain: Any) -> torch.Tensor:
    """What an unwrapped model makes of a prompt."""
    with torch.no_grad():
        states: torch.Tensor = plain.model(input_ids=torch.tensor(ROWS[1][0].prompt)[None]).last_hidden_state[0]
    return states


def answered(state: ClientState, slots: tuple[str, ...], mixing: Mixing) -> torch.Tensor:
    """What a client's model makes of it."""
    model, ids = AdaptedModel(llama()), torch.tensor(ROWS[1][0].prompt)
    model.load([state], Placement(slots, mixing, SCALE, 0.0))
    with torch.no_grad():
        return model.hidden(ids, BatchLayout((1,), (len(ids),))).last_hidden_state


def test_the_global_averages_row_alone_answers_as_one_lora_of_mean_factors() -> None:
    """α_R ≡ 1: FedIT's model, made of LoRAs that were trained as individual ones."""
    method = method_of("fedalt_global_average")
    history, server = rounds(method)
    factors = mean([slot(result.upload, INDIVIDUAL) for result in history[-1]])
    expected = hidden(merged(llama(), {key: value.float() for key, value in factors.items()}, GLOBAL, SCALE))
    for state in installed(history, server):
        assert relative(answered(state, method.slot_names, Mixing("fixed", (0.0, 1.0))), expected) < 1e-4


def test_a_private_lora_may_have_the_scale_of_its_own_rank() -> None:
    """alpha/r on the common one, alpha/r̃ on the private one."""
    method = method_of("pf2lora", pf2lora__private_scale="own_rank", pf2lora__private_rank=2)
    (state,) = random_states(shape_of(method, AdaptedModel(llama()).layer_sizes), [0])
    common = merged(llama(), state.tensors, GLOBAL, SCALE)
    expected = hidden(merged(common, state.tensors, PRIVATE, SCALE * RANK / 2))
    assert relative(answered(state, *method.inference), expected) < 1e-4
    same = method_of("pf2lora", pf2lora__private_rank=2)
    assert relative(answered(state, *same.inference), expected) > 1e-2


# ------------------------------------------------------------------------------------------------------- ablations


def row(state: ClientState) -> Tensors:
    return slot(state.tensors, REST_OF_WORLD)


def mean(parts: Sequence[Tensors]) -> Tensors:
    return {key: sum(part[key].double() for part in parts) / len(parts) for key in parts[0]}  # type: ignore[misc]


@pytest.mark.parametrize("delivery", ["broadcast", "unicast"])
def test_global_average_rows_are_the_mean_of_all(delivery: Any) -> None:
    federation = FederationConfig(rest_of_world_delivery=delivery)
    history, server = rounds(method_of("fedalt_global_average"), federation=federation)
    expected = mean([slot(result.upload, INDIVIDUAL) for result in history[-1]])
    states = installed(history, server)
    assert all(distance(row(state), expected) < 1e-6 for state in states)
    assert all(bitwise(row(state), row(states[0])) for state in states)


@pytest.mark.parametrize("delivery", ["broadcast", "unicast"])
def test_a_row_that_trains_is_thrown_away(delivery: Any) -> None:
    federation = FederationConfig(rest_of_world_delivery=delivery)
    history, server = rounds(method_of("fedalt_row_update"), federation=federation)
    for k, (result, state) in enumerate(zip(history[-1], installed(history, server), strict=True)):
        assert {key.slot for key in result.upload} == {INDIVIDUAL}
        others = [slot(r.upload, INDIVIDUAL) for c, r in enumerate(history[-1]) if c != k]
        assert distance(row(state), mean(others)) < 1e-6
    before = installed(history[:1], rounds(method_of("fedalt_row_update"), federation=federation, count=1)[1])
    for start, result in zip(before, history[1], strict=True):
        change = [float((row(start)[key] - value).abs().max()) for key, value in row(result.state).items()]
        assert min(change) > 1e-4, "every row tensor trains"


@pytest.mark.parametrize("delivery", ["broadcast", "unicast"])
def test_rows_that_train_may_be_averaged_over_the_others(delivery: Any) -> None:
    federation = FederationConfig(rest_of_world_delivery=delivery)
    history, server = rounds(method_of("fedalt", fedalt__rest_of_world_update="average"), federation=federation)
    for k, (result, state) in enumerate(zip(history[-1], installed(history, server), strict=True)):
        assert {key.slot for key in result.upload} == {INDIVIDUAL, REST_OF_WORLD}
        assert bitwise(slot(result.upload, INDIVIDUAL), slot(state.tensors, INDIVIDUAL)), "never overwritten"
        others = [slot(r.upload, REST_OF_WORLD) for c, r in enumerate(history[-1]) if c != k]
        assert distance(row(state), mean(others)) < 1e-6


@pytest.mark.parametrize("delivery", ["broadcast", "unicast"])
def test_averaged_mixers_are_those_of_all_and_rows_those_of_the_others(delivery: Any) -> None:
    federation = FederationConfig(rest_of_world_delivery=delivery)
    history, server = rounds(method_of("fedalt_averaged_mixer"), federation=federation)
    states = installed(history, server)
    expected = mean([slot(result.upload, MIXER) for result in history[-1]])
    assert all(distance(slot(state.tensors, MIXER), expected) < 1e-6 for state in states)
    for k, state in enumerate(states):
        others = [slot(r.upload, INDIVIDUAL) for c, r in enumerate(history[-1]) if c != k]
        assert distance(row(state), mean(others)) < 1e-6


@pytest.mark.parametrize("settings", [("fedalt", {}), ("fedit_split", {"fedit_split__router_average": False})])
def test_mixers_stay_apart_where_they_are_not_averaged(settings: tuple[str, dict[str, Any]]) -> None:
    history, server = rounds(method_of(settings[0], **settings[1]))
    mixers = [slot(state.tensors, MIXER) for state in installed(history, server)]
    assert all(bitwise(mixer, slot(r.state.tensors, MIXER)) for mixer, r in zip(mixers, history[-1], strict=True))
    assert distance(mixers[0], mixers[1]) > 1e-4


def test_halved_ranks_have_the_same_scale() -> None:
    method, plain = method_of("fedalt_row_update_half"), method_of("fedalt")
    assert method.ranks == {INDIVIDUAL: RANK // 2, REST_OF_WORLD: RANK // 2}
    assert plain.ranks == {INDIVIDUAL: RANK, REST_OF_WORLD: RANK}
    assert method.scale == plain.scale == SCALE
    with pytest.raises(UserError, match=r"lora\.r = 7 is odd"):
        assert method_of("fedalt_row_update_half", lora__r=7).ranks


@pytest.mark.parametrize(
    ("name", "weights"), [("fedalt_fixed_half", (1 / 2,) * 2), ("fedalt_fixed_one_over_k", (1 / 3, 2 / 3))]
)
def test_fixed_weights_have_no_mixer(name: str, weights: tuple[float, float]) -> None:
    method = method_of(name)
    assert method.mixing.weights == pytest.approx(weights)
    assert not any(key.factor == G for key in shape_of(method, {"m": (4, 3)}).shapes())


def test_a_full_start_gives_the_individual_lora_fedits_scale() -> None:
    lora = method_of("fedalt").config.lora
    assert method_of("fedalt", fedalt__full_start=True).scale == 2 * lora.alpha / lora.r
    assert method_of("fedalt", fedalt__full_start=True, fedalt__clusters=2).scale == 3 * lora.alpha / lora.r
    assert method_of("fedalt", 1, fedalt__full_start=True).scale == lora.alpha / lora.r
