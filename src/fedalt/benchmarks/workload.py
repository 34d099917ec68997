"""The work that both sides of a comparison are given: base, rows, order, adapters. Building it is never timed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedalt.benchmarks import shapes
from fedalt.benchmarks.rows import client_examples
from fedalt.benchmarks.task import Spec
from fedalt.config import FederationConfig, LoraConfig, RunConfig, TrainingConfig
from fedalt.data.batches import Plan, plan_round
from fedalt.data.encode import Example, Prompt
from fedalt.federation.server import Server
from fedalt.methods.base import Method
from fedalt.methods.exchange import Message
from fedalt.methods.registry import build
from fedalt.model.base import positions
from fedalt.model.state import AdapterShape, ClientState, initial_state
from fedalt.names import INDIVIDUAL, B, Tensors
from fedalt.seeding import rng

LORA = LoraConfig()
SCALE = LORA.alpha / LORA.r
ROUND = 2
"""The measured round is the second one: B is not zero any more and there is a row to install."""


@dataclass(frozen=True)
class Workload:
    """What both sides get.

    Attributes:
        spec: Whose work it is.
        base: Frozen causal LM, in eval mode.
        tokenizer: Its tokenizer.
        train: Training rows of every client, in tokens.
        test: Rows to answer.
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
        shape: Shapes of one client's adapters.
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
    base, tokenizer = shapes.load(spec)
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
    return sum(tokens(step) for plan in plans for step in plan.steps)


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
    states = [method.uploaded(_moved(_initial(shape, k, spec.seed, method), spec.seed)) for k in range(spec.clients)]
    uploads: dict[int, Tensors] = {state.client: state.sent or {} for state in states}
    sizes = {key: size for key, size in shape.shapes().items() if method.shares(key)}
    server = Server(method, FederationConfig(), dict.fromkeys(uploads, spec.rows), sizes)
    server.receive(uploads, uploads.__getitem__, ROUND - 1)
    return Federation(method, shape, states, server, server.messages(tuple(uploads)))


def _initial(shape: AdapterShape, client: int, seed: int, method: Method) -> ClientState:
    return initial_state(shape, client, seed, LORA.init, LORA.mixer_init, method.frozen)


def _moved(state: ClientState, seed: int) -> ClientState:
    """Give every individual B some weight of its own."""
    return state.with_tensors(
        {
            key: 0.02 * torch.randn(value.shape, generator=rng(seed, "bench", state.client, str(key)))
            for key, value in state.tensors.items()
            if key.slot == INDIVIDUAL and key.factor == B
        }
    )
