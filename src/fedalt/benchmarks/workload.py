"""The work that both sides of a comparison are given: base, rows, adapters, uploads."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedalt.benchmarks.task import Spec
from fedalt.config import (
    EvaluationConfig,
    FederationConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    with_settings,
)
from fedalt.config.data import DataConfig
from fedalt.data.batches import Plan, plan_round
from fedalt.data.encode import AnswerEncoder, Example, Prompt, encode_client
from fedalt.data.load import load_federation
from fedalt.errors import UserError, choose
from fedalt.federation.server import Server
from fedalt.methods.base import Message, Method
from fedalt.methods.registry import build
from fedalt.model.base import load_base, positions, resolve_device
from fedalt.model.layer import features
from fedalt.model.source import TINY_BASE, resolve_source
from fedalt.model.state import AdapterShape, ClientState, initial_state
from fedalt.model.targets import find_targets
from fedalt.names import INDIVIDUAL, B, Tensors
from fedalt.seeding import rng

_PIECES = re.compile(r"\w{1,6}|[^\w\s]|\n")


class HashTokenizer:
    """Pieces of up to six letters, punctuation and line ends, hashed into a vocabulary.

    Lengths resemble those of a BPE (about four characters a token); ids mean nothing, which random weights do not mind.
    It has what ``AnswerEncoder`` and ``answer_all`` ask of a Hugging Face tokenizer.
    """

    pad_token_id = 0
    eos_token_id = 1
    _reserved = 2

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        """Token ids; there are no special tokens to add."""
        span = self.vocabulary - self._reserved
        return {"input_ids": [self._reserved + zlib.crc32(piece.encode()) % span for piece in _PIECES.findall(text)]}

    def batch_decode(self, ids: Tensor | Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The ids themselves, as text."""
        rows: Iterable[Iterable[int]] = ids.tolist() if isinstance(ids, Tensor) else ids
        lowest = self._reserved if skip_special_tokens else 0
        return [" ".join(str(token) for token in row if token >= lowest) for row in rows]


def client_examples(
    spec: Spec, tokenizer: object, cutoff: int
) -> tuple[list[tuple[Example, ...]], list[tuple[Example, ...]]]:
    """Training and test rows of every client.

    With more clients than the federation has, client k gets the rows of client k mod n, each time the next ones.
    """
    data = DataConfig(source=spec.data)
    encoder = AnswerEncoder(tokenizer, data.template, cutoff)
    federation = load_federation(data, spec.seed)
    encoded = [encode_client(encoder, mine) for mine in list(federation.clients.values())[: spec.clients]]
    turns = [(encoded[k % len(encoded)], k // len(encoded)) for k in range(spec.clients)]
    train = [_window(mine.train, turn, spec.rows) for mine, turn in turns]
    test = [_window(mine.test, turn, spec.rows) for mine, turn in turns]
    return train, test


def _window(rows: Sequence[Example], turn: int, size: int) -> tuple[Example, ...]:
    start = turn * size % len(rows)
    return tuple(islice(cycle(rows), start, start + size))


TINY = "tiny"
_IDS: dict[str, Any] = {
    "pad_token_id": HashTokenizer.pad_token_id,
    "eos_token_id": HashTokenizer.eos_token_id,
    "bos_token_id": None,
}


def _llama(hidden: int, layers: int, heads: int, inner: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=2048,
        **_IDS,
    )


def _bloom(hidden: int, layers: int, heads: int) -> Any:
    from transformers import BloomConfig

    return BloomConfig(vocab_size=250_880, hidden_size=hidden, n_layer=layers, n_head=heads, **_IDS)


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_IDS)


SHAPES: dict[str, Callable[[], Any]] = {
    "llama-25m": lambda: _llama(512, 8, 8, 1376),  # 25 M in the blocks, 33 M in embedding and head
    "llama-7b": lambda: _llama(4096, 32, 32, 11_008),
    "bloom-560m": lambda: _bloom(1024, 24, 16),
    "gpt2-small": _gpt2,
}
"""Name → configuration; nothing is downloaded."""


def load_model(spec: Spec) -> tuple[Any, Any]:
    """The frozen base in eval mode, and its tokenizer."""
    if spec.model in SHAPES:
        base = build_model(spec.model, spec.dtype, spec.seed, resolve_device("auto"))
        return base, HashTokenizer(base.config.vocab_size)
    loaded = load_base(ModelConfig(name=source(spec.model), dtype=spec.dtype))
    return loaded.model, loaded.tokenizer


def skeleton(spec: Spec) -> Any:
    """The base without weights, for the sizes of its layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if spec.model in SHAPES:
        return build_model(spec.model, spec.dtype, spec.seed, "meta")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve_source(source(spec.model))))


def build_model(shape: str, dtype: str, seed: int, device: str) -> Any:
    """Random weights by seed."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def check(model: str) -> None:
    """Complain before anything is started."""
    if model not in SHAPES:
        source(model)


def source(model: str) -> str:
    """What ``model.name`` is called for a model that is no shape."""
    if model == TINY or Path(model).expanduser().is_dir():
        return TINY_BASE if model == TINY else model
    return choose("--model", model, [TINY, *SHAPES, "a model folder"])


LORA = LoraConfig()
SCALE = LORA.alpha / LORA.r
ROUND = 2
"""The measured round is the second one: B is not zero any more and there is a row to install."""


@dataclass(frozen=True)
class Workload:
    """What both sides get.

    Attributes:
        first: Whom the first client stands for: its rows are in the order of that client's.
    """

    spec: Spec
    base: Any
    tokenizer: Any
    train: list[tuple[Example, ...]]
    test: list[tuple[Example, ...]]
    first: int = 0

    def plans(self) -> list[Plan]:
        """Every client's steps: one epoch in seeded order; for ``step``, its first batch again and again."""
        spec = self.spec
        plans = [
            replace(plan_round(mine, self.first + k, training(spec), spec.seed, ROUND), client=k)
            for k, mine in enumerate(self.train)
        ]
        if spec.what == "step":
            plans = [replace(plan, steps=plan.steps[:1] * len(plan.steps)) for plan in plans]
        return plans

    def prompts(self) -> list[list[Prompt]]:
        """Every client's prompts."""
        return [[example.prompt for example in mine] for mine in self.test]


@dataclass(frozen=True)
class Federation:
    """Where the clients and the server stand before the measured round.

    Attributes:
        method: FedALT for K clients, for two when there is one (with one it has no second LoRA).
        states: Every client's state, as if after a round: nothing that trains is zero.
        server: Has every client's upload.
        messages: What it tells them; empty when there is one client.
    """

    method: Method
    shape: AdapterShape
    states: list[ClientState]
    server: Server
    messages: Mapping[int, Message]

    def installed(self) -> list[ClientState]:
        """The states with every client's row in place."""
        return [self.method.receive(s, self.messages[s.client]) if self.messages else s for s in self.states]


def load(spec: Spec) -> Workload:
    """Build the base and tokenise the rows."""
    base, tokenizer = load_model(spec)
    limit = positions(base)
    cutoff = 512 if limit is None else min(512, limit - spec.max_new_tokens)
    everybody = replace(spec, clients=spec.among or spec.clients)
    work = Workload(spec, base, tokenizer, *client_examples(everybody, tokenizer, cutoff))
    return _largest(work) if spec.among else work


def _largest(work: Workload) -> Workload:
    """The client with the most tokens in a step, alone."""
    most = [max(map(tokens, plan.steps)) for plan in work.plans()]
    k = most.index(max(most))
    return replace(work, train=[work.train[k]], test=[work.test[k]], first=k)


def tokens(rows: Iterable[Example]) -> int:
    """Tokens of some rows."""
    return sum(map(len, rows))


def all_tokens(plans: Iterable[Plan]) -> int:
    """Tokens of all steps."""
    return sum(plan.tokens for plan in plans)


def first_step(plan: Plan) -> Plan:
    """What warms a side up."""
    return replace(plan, steps=plan.steps[:1])


def training(spec: Spec) -> TrainingConfig:
    """The paper's settings, one epoch."""
    return TrainingConfig(local_epochs=1, batch_size=spec.batch_size)


def federation(spec: Spec, layers: Mapping[str, tuple[int, int]]) -> Federation:
    """Clients and server before the measured round, from the seed alone."""
    method = build(RunConfig(lora=LORA.model_copy(update={"dropout": spec.dropout})), max(spec.clients, 2), layers)
    shape = method.shape
    drawn = (spec.seed, LORA.init, LORA.mixer_init)
    starts = [initial_state(shape, k, *drawn, frozen=method.frozen) for k in range(spec.clients)]
    states = [method.uploaded(_moved(state, spec.seed)) for state in starts]
    uploads: dict[int, Tensors] = {state.client: state.sent or {} for state in states}
    sizes = {key: size for key, size in shape.shapes().items() if method.shares(key)}
    server = Server(method, FederationConfig(), dict.fromkeys(uploads, spec.rows), sizes)
    server.receive(uploads, uploads.__getitem__, ROUND - 1)
    return Federation(method, shape, states, server, server.messages(tuple(uploads)))


def _moved(state: ClientState, seed: int) -> ClientState:
    """Give every individual B some weight of its own."""
    return state.with_tensors(
        {
            key: 0.02 * torch.randn(value.shape, generator=rng(seed, "bench", state.client, str(key)))
            for key, value in state.tensors.items()
            if key.slot == INDIVIDUAL and key.factor == B
        }
    )


SERVED = 8
"""Clients whose row the official server computes; each costs the same, so K of them are extrapolated from these."""


def shape(spec: Spec) -> AdapterShape:
    """Shapes of a client's adapters; the model itself is never built.

    The rank is the usual one, or the lowest that makes an upload of ``spec.parameters`` or more.
    """
    if spec.clients < 2:
        raise UserError(f"--clients {spec.clients}: an aggregation needs two clients or more")
    base = skeleton(spec)
    sizes = {path: features(base.get_submodule(path)) for path in find_targets(base)}
    each = sum(map(sum, sizes.values()))  # parameters of an upload by rank
    rank = LORA.r if spec.parameters is None else -(-spec.parameters // each)
    return build(with_settings(RunConfig(), {"lora.r": rank}), spec.clients, sizes).shape


def upload(spec: Spec, adapters: AdapterShape, client: int) -> Tensors:
    """A client's random individual LoRA, by seed."""
    generator = rng(spec.seed, "bench", client, "upload")
    sizes = {key: size for key, size in adapters.shapes().items() if key.slot == INDIVIDUAL}
    return {key: torch.randn(size, generator=generator) for key, size in sizes.items()}


def norm(tensors: Tensors) -> float:
    """Norm of everything in a row, to compare the two sides by."""
    return float(sum(value.double().square().sum() for value in tensors.values()) ** 0.5)


def answer_settings(spec: Spec) -> EvaluationConfig:
    """How answers are generated."""
    return EvaluationConfig(num_beams=spec.num_beams, max_new_tokens=spec.max_new_tokens)


def digests(answers: Sequence[Sequence[str]]) -> list[str]:
    """Eight hexadecimal digits for every answer of every client, in order."""
    return [hashlib.sha256(text.encode()).hexdigest()[:8] for mine in answers for text in mine]
