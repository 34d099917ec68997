"""Builders shared by tests: tiny random models, rows in tokens, client states, settings, and strict comparisons."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import hypothesis
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from fedalt.config import FederationConfig, LoraConfig, RunConfig, TrainingConfig, with_settings
from fedalt.data.batches import Plan, plan_round
from fedalt.data.encode import Example
from fedalt.data.rows import Row
from fedalt.federation.client import ClientResult, RoundSettings
from fedalt.federation.cohort import cohort_size
from fedalt.federation.executor import run_clients
from fedalt.federation.server import Server
from fedalt.methods.base import Method
from fedalt.methods.exchange import Message
from fedalt.methods.registry import build, configured, method_names, variant_names
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import Placement
from fedalt.model.mixing import SOFTMAX, SUM
from fedalt.model.state import AdapterShape, ClientState, initial_state
from fedalt.names import Tensors

VOCAB, HIDDEN, LAYERS = 64, 32, 2
PAD = 0
RANK = 4
SCALE = 2.0
WIDE = 0.2
"""Standard deviation of random base weights: ten times the usual, so that gradients are far from zero."""

quick = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 48,
    "num_attention_heads": 4,
}
SPECIAL = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(num_key_value_heads=2, initializer_range=WIDE, **SMALL, **SPECIAL)
    return _seeded(LlamaForCausalLM, config)


def bloom() -> BloomForCausalLM:
    config = BloomConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        n_layer=LAYERS,
        n_head=4,
        initializer_range=WIDE,
        hidden_dropout=0.1,
        **SPECIAL,
    )
    return _seeded(BloomForCausalLM, config)


def gpt2() -> GPT2LMHeadModel:
    """GPT-2 with its usual dropout of 0.1, which a frozen base must not use."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        initializer_range=WIDE,
        **SPECIAL,
    )
    return _seeded(GPT2LMHeadModel, config)


def opt() -> OPTForCausalLM:
    """OPT drops activations inside its decoder layer, by the layer's own training flag."""
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        ffn_dim=48,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=HIDDEN,
        init_std=WIDE,
        dropout=0.1,
        **SPECIAL,
    )
    return _seeded(OPTForCausalLM, config)


def bert() -> BertForMaskedLM:
    """An encoder: every token sees its whole row, so a leak between rows would show at once."""
    config = BertConfig(max_position_embeddings=64, initializer_range=0.75 * WIDE, pad_token_id=PAD, **SMALL)
    return _seeded(BertForMaskedLM, config)


MODELS = {"llama": llama, "bloom": bloom, "gpt2": gpt2}


def _seeded(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return model_class(config).float().eval()


def example(prompt: int, answer: int, seed: int) -> Example:
    """A row of random tokens, none of them special."""
    draw = random.Random(seed)
    ids = tuple(draw.randrange(3, VOCAB) for _ in range(prompt + answer))
    return Example(ids[:prompt], ids[prompt:], Row("", ""))


def examples(count: int, seed: int, longest: int = 9) -> tuple[Example, ...]:
    """Rows of many lengths."""
    draw = random.Random(seed)
    return tuple(example(draw.randint(3, longest), draw.randint(1, 4), 1000 * seed + i) for i in range(count))


METHODS, VARIANTS = method_names(), variant_names()
LORA = LoraConfig(r=RANK, alpha=SCALE * RANK, dropout=0.0)


def method_of(name: str, clients: int = 3, **settings: Any) -> Method:
    """A method or a variant; settings are dotted keys with ``__`` for the dot."""
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    config = with_settings(RunConfig(lora=LORA), changes)
    return build(configured(config, name), clients)


def shape_of(method: Method, layers: Mapping[str, tuple[int, int]], r: int | None = None) -> AdapterShape:
    """The tensors of one client of a method, on these layers and perhaps of this rank."""
    config = method.config if r is None else with_settings(method.config, {"lora.r": r})
    placed = copy(method)
    placed.config, placed.layers = config, layers
    return placed.shape


def random_states(shape: AdapterShape, clients: Sequence[int] = (0, 1, 2), spread: float = 0.2) -> list[ClientState]:
    """States in which nothing is zero: B, row and mixer included."""
    states = []
    for client in clients:
        generator = torch.Generator().manual_seed(1000 + client)
        tensors = {key: spread * torch.randn(size, generator=generator) for key, size in shape.shapes().items()}
        states.append(ClientState(client, 0, tensors))
    return states


def start_states(
    method: Method, shape: AdapterShape, clients: Sequence[int], init: Any = "shared"
) -> list[ClientState]:
    return [
        initial_state(shape, client, 7, init, "kaiming", method.frozen, method.rank_of(client)) for client in clients
    ]


def placement(shape: AdapterShape, dropout: float = 0.0, scale: float = SCALE) -> Placement:
    return Placement(shape.slots, SOFTMAX if shape.mixed else SUM, scale, dropout)


def training(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**({"lr": 5e-3, "batch_size": 4, "local_epochs": 2} | changes))


def round_settings(method: Method, shape: AdapterShape, config: TrainingConfig, dropout: float = 0.0) -> RoundSettings:
    dropped = with_settings(method.config, {"lora.dropout": dropout})
    method = copy(method)
    method.config = dropped
    return RoundSettings(method, config)


def plans_of(
    rows: Mapping[int, Sequence[Example]], config: TrainingConfig, round_: int = 1, seed: int = 5, phase: int = 0
) -> list[Plan]:
    return [plan_round(mine, client, config, seed, round_, phase) for client, mine in rows.items()]


def run_all(
    model: AdaptedModel,
    states: Sequence[ClientState],
    messages: Sequence[Message | None],
    plans: Sequence[Plan | Sequence[Plan]],
    settings: RoundSettings,
    round_: int,
    **federation: Any,
) -> list[ClientResult]:
    """``run_clients`` with everything in memory; ``federation`` are its settings, say ``cohort=2``.

    A plan stands for a round of one phase.
    """
    clients = [state.client for state in states]
    told = {client: message for client, message in zip(clients, messages, strict=True) if message}
    mine = dict(zip(clients, states, strict=True))
    phases = [[plan] if isinstance(plan, Plan) else plan for plan in plans]
    plan = dict(zip(clients, phases, strict=True))
    cohort = cohort_size(FederationConfig(**federation), len(clients))
    return list(run_clients(model, clients, mine, told, plan.__getitem__, settings, round_, cohort))


def run_rounds(
    model: AdaptedModel,
    method: Method,
    rows: Mapping[int, Sequence[Example]],
    config: TrainingConfig,
    rounds: int = 2,
    dropout: float = 0.0,
    federation: FederationConfig | None = None,
    states: Sequence[ClientState] = (),
    chosen: Sequence[Sequence[int]] = (),
    **executor: Any,
) -> tuple[list[list[ClientResult]], Server]:
    """A whole federation in memory, without files: every round's results, and the server after the last round.

    Clients start from ``states``, or as in a run; ``chosen`` are those of each round, or all take part in all.
    """
    shape = shape_of(method, model.layer_sizes)
    now = {state.client: state for state in states or start_states(method, shape, list(rows))}
    shared = {key: size for key, size in shape.shapes().items() if method.shares(key)}
    server = Server(method, federation or FederationConfig(), {c: len(mine) for c, mine in rows.items()}, shared)
    settings, history = round_settings(method, shape, config, dropout), []
    uploads: dict[int, Tensors] = {}
    for round_ in range(1, rounds + 1):
        here = {client: rows[client] for client in (chosen[round_ - 1] if chosen else rows)}
        messages = server.messages(tuple(here))
        told = [messages.get(client) for client in here]
        phases = [plans_of(here, config, round_, phase=phase) for phase, _ in enumerate(method.phases(round_))]
        plans = list(zip(*phases, strict=True)) or [()] * len(here)
        results = run_all(model, [now[client] for client in here], told, plans, settings, round_, **executor)
        arrived = {r.state.client: r.upload for r in results if r.upload}
        uploads |= arrived
        server.receive(arrived, uploads.__getitem__, round_)
        now |= {result.state.client: result.state for result in results}
        history.append(results)
    return history, server


def bitwise(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def distance(one: Tensors, other: Tensors) -> float:
    """Largest absolute difference; both sides must hold the same keys."""
    assert one.keys() == other.keys()
    return max(float((value - other[key]).abs().max()) for key, value in one.items())


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected entry, which must not be zero."""
    size = float(expected.detach().abs().max())
    assert size > 0
    return float((actual - expected).detach().abs().max()) / size


def tokenizer(eos: int = VOCAB - 1) -> Any:
    """One word per id: ``t0 t1 …``; padding is ``t0`` and ``eos`` ends an answer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t1"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=f"t{PAD}", eos_token=f"t{eos}", unk_token="t1")
