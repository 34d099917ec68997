"""Builders shared by tests: tiny random models, rows in tokens, client states, settings, and strict comparisons."""

from __future__ import annotations

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
    OPTConfig,
    OPTForCausalLM,
)

from fedalt.config import FederationConfig, RunConfig, TrainingConfig, with_settings
from fedalt.data.batches import Plan
from fedalt.data.encode import Example
from fedalt.federation.client import ClientResult, RoundSettings, cohort_size, run_clients
from fedalt.federation.server import Server
from fedalt.methods.base import Message, Method
from fedalt.methods.registry import Variant, build, configured, method_names
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import SOFTMAX, SUM, Placement
from fedalt.model.state import AdapterShape, ClientState
from fedalt.names import Tensors
from fedalt.registry import METHODS as REGISTERED
from fedalt.testing import (
    HIDDEN,
    LAYERS,
    LORA,
    PAD,
    RANK,
    SCALE,
    VOCAB,
    WIDE,
    TinyFederation,
    distance,
    example,
    examples,
    plans_of,
    round_settings,
    start_states,
    training,
)
from fedalt.testing import tiny_model as llama

quick = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 48,
    "num_attention_heads": 4,
}
SPECIAL = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}


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


METHODS = method_names()
VARIANTS = tuple(entry.name for entry in REGISTERED.entries() if isinstance(entry.value, Variant))


def method_of(name: str, clients: int = 3, **settings: Any) -> Method:
    """A method or a variant; settings are dotted keys with ``__`` for the dot."""
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    config = with_settings(RunConfig(lora=LORA), changes)
    return build(configured(config, name), clients)


def random_states(shape: AdapterShape, clients: Sequence[int] = (0, 1, 2), spread: float = 0.2) -> list[ClientState]:
    """States in which nothing is zero: B, row and mixer included."""
    states = []
    for client in clients:
        generator = torch.Generator().manual_seed(1000 + client)
        tensors = {key: spread * torch.randn(size, generator=generator) for key, size in shape.shapes().items()}
        states.append(ClientState(client, 0, tensors))
    return states


def shape_of(method: Method, layers: Mapping[str, tuple[int, int]], r: int | None = None) -> AdapterShape:
    """The tensors of one client of a method, on these layers and perhaps of this rank."""
    placed = copy(method)
    placed.layers = layers
    if r is not None:
        placed.config = with_settings(method.config, {"lora.r": r})
    return placed.shape


def bitwise(one: Tensors, other: Tensors) -> bool:
    """Whether both hold the same keys and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def placement(shape: AdapterShape, dropout: float = 0.0, scale: float = SCALE) -> Placement:
    return Placement(shape.slots, SOFTMAX if shape.mixed else SUM, scale, dropout)


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
    return list(
        run_clients(model, clients, mine, told, plan.__getitem__, settings=settings, round_=round_, cohort=cohort)
    )


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
    tiny = TinyFederation(
        model, method, rows, config, federation=federation, dropout=dropout, states=states, **executor
    )
    history = [tiny.round(n, chosen[n - 1] if chosen else None) for n in range(1, rounds + 1)]
    return history, tiny.server


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
