"""One round of one or more clients: the same function for every executor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean

import torch
from torch import Tensor

from fedalt.config import FederationConfig, TrainingConfig
from fedalt.data.batches import Plan
from fedalt.federation.fixed import on_grid
from fedalt.methods.base import Message, Method, Phase
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import Placement
from fedalt.model.offload import free_memory
from fedalt.model.state import ClientState
from fedalt.names import Tensors, parted
from fedalt.runtime import release_freed_memory
from fedalt.training.loop import OnStep, TrainingStats, Turn, moved, train
from fedalt.training.optimizer import Penalty, optimizer_of, recall, remember
from fedalt.training.privacy import spent

SPENT = "its privacy budget is spent"
"""Why a client trains no more."""


def finite(value: Tensor) -> bool:
    """Whether every number is; a sum that is finite says so in one pass, and one that is not may only be too large."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


@dataclass(frozen=True)
class ClientResult:
    """What a client hands over at the end of its round.

    Attributes:
        state: Its new private state, or its old one when it failed.
        upload: What the server gets; empty for a method that shares nothing and for a client that failed.
        failure: Why the client is set aside for this round, or None.
        cut: Numbers of the upload that a secure sum has no room for.
    """

    state: ClientState
    upload: Tensors
    stats: TrainingStats
    bytes_down: int = 0
    failure: str | None = None
    cut: int = 0


@dataclass(frozen=True)
class RoundSettings:
    """What is the same for all clients and rounds of a run; heads go along with an upload, if there is one."""

    method: Method
    training: TrainingConfig
    shares_heads: bool = False

    def placement(self, phase: Phase) -> Placement:
        """How adapters sit on the model in a phase."""
        scale = self.method.scale
        dropout = self.method.config.lora.dropout
        return Placement(phase.slots, phase.mixing, scale, dropout, phase.detached, phase.slot_dropout)

    def turn(self, round_: int | None) -> Turn:
        """Where the schedule of the learning rate is in a round; a newcomer has one of its own."""
        whole = self.training.schedule_scope == "run" and round_ is not None
        return (round_, self.method.config.federation.rounds) if round_ and whole else (1, 1)

    @property
    def answering(self) -> Placement:
        """How adapters sit on the model for answers."""
        return Placement(*self.method.inference, self.method.scale, 0.0)


Install = Callable[[ClientState, Message | None], ClientState]
"""Puts what the server tells a client into the client's state."""


def client_round(
    model: AdaptedModel,
    states: Sequence[ClientState],
    messages: Sequence[Message | None],
    plans: Sequence[Sequence[Plan]],
    settings: RoundSettings,
    *,
    round_: int,
    install: Install | None = None,
    on_step: OnStep = lambda done, total: None,
) -> list[ClientResult]:
    """Install the server's message, train phase by phase, and prepare the upload, for a cohort of clients on one model.

    Pure in its arguments: states come in and new states go out; the model is only where the arithmetic happens. A
    client whose loss or adapter is not finite keeps the state it came with, and the others are not affected by it.
    ``install`` puts messages into states in place of ``installed``, which it may remember.
    """
    method = settings.method
    over = [_over(state, mine) for state, mine in zip(states, plans, strict=True)]
    if any(over):
        stay = [i for i, spends in enumerate(over) if not spends]
        going = iter(
            client_round(
                model,
                [states[i] for i in stay],
                [messages[i] for i in stay],
                [plans[i] for i in stay],
                settings,
                round_=round_,
                install=install,
                on_step=on_step,
            )
            if stay
            else ()
        )
        none = TrainingStats(0.0, 0, 0)
        return [
            ClientResult(state, {}, none, failure=SPENT) if spends else next(going)
            for state, spends in zip(states, over, strict=True)
        ]
    install = install or partial(installed, method)
    now = [method.before_training(install(*client), round_) for client in zip(states, messages, strict=True)]
    trained, stats = train_phases(model, now, method.phases(round_), plans, settings, on_step=on_step, round_=round_)
    down = [message.bytes if message else 0 for message in messages]
    clients = zip(states, now, trained, zip(stats, down, strict=True), strict=True)
    return [_result(settings, *client, round_=round_) for client in clients]


def _over(state: ClientState, plans: Sequence[Plan]) -> bool:
    """Whether a client's round would go beyond its privacy budget."""
    noise = plans[0].noise if plans else None
    if noise is None or noise.epsilon is None:
        return False
    return spent(noise, state.private_steps + sum(len(plan.steps) for plan in plans)) > noise.epsilon


def train_phases(
    model: AdaptedModel,
    states: Sequence[ClientState],
    phases: Sequence[Phase],
    plans: Sequence[Sequence[Plan]],
    settings: RoundSettings,
    *,
    on_step: OnStep = lambda done, total: None,
    round_: int | None = None,
) -> tuple[list[ClientState], list[TrainingStats]]:
    """Train a cohort on its own rows, phase by phase; arguments as in ``client_round``, no round for newcomers."""
    now, stats = list(states), [TrainingStats(0.0, 0, 0) for _ in states]
    penalty = _penalty(settings, states, model)
    for number, phase in enumerate(phases):
        trainable = [key for key in now[0].tensors if phase.trains(key)] + list(now[0].heads)
        model.load(now, settings.placement(phase), trainable)
        mine = [plan[number] for plan in plans]
        rule = phase.rule if penalty is None else phase.rule.with_penalty(penalty)
        trains, noise = moved(model, rule), mine[0].noise
        training = settings.training.model_copy(update={"max_grad_norm": math.inf} if noise else {})
        optimizer = optimizer_of(training, list(trains.values()))
        recall(optimizer, trains, [state.optimizer for state in now])
        step = partial(_step, on_step, number, len(phases))
        done = train(model, mine, settings.training, step, rule=rule, optimizer=optimizer, turn=settings.turn(round_))
        if settings.training.optimizer_state == "persist":
            memories = remember(optimizer, trains, [state.optimizer for state in now])
            now = [replace(state, optimizer=memory) for state, memory in zip(now, memories, strict=True)]
        now = [state.with_tensors(*parted(tensors)) for state, tensors in zip(now, model.unstack(), strict=True)]
        stats = [new.following(old) for new, old in zip(done, stats, strict=True)]
        if noise:
            each = zip(now, mine, strict=True)
            now = [replace(state, private_steps=state.private_steps + len(plan.steps)) for state, plan in each]
            costs = [
                spent(plan.noise, state.private_steps) for state, plan in zip(now, mine, strict=True) if plan.noise
            ]
            stats = [replace(of, epsilon=cost) for of, cost in zip(stats, costs, strict=True)]
    return now, stats


def _penalty(settings: RoundSettings, states: Sequence[ClientState], model: AdaptedModel) -> Penalty | None:
    """The method's penalty against where the states began, if it has one; a head is in it where heads are shared."""
    method = settings.method
    if type(method).penalty is Method.penalty:
        return None
    began = [{**state.tensors, **(state.heads if settings.shares_heads else {})} for state in states]
    start = {key: torch.stack([tensors[key] for tensors in began]).to(model.device) for key in began[0]}
    return lambda trained: method.penalty({key: value for key, value in trained.items() if key in start}, start)


def installed(method: Method, state: ClientState, message: Message | None) -> ClientState:
    """The state with what the server tells the client: heads overwrite its own, the rest is the method's matter."""
    if message is None:
        return state
    tensors, heads = parted(message.tensors)
    return method.receive(state, replace(message, tensors=tensors)).with_tensors({}, heads)


def _step(on_step: OnStep, part: int, parts: int, done: int, total: int) -> None:
    """Progress over all phases, or all cohorts, as if each had as many steps as the present one."""
    on_step(part * total + done, parts * total)


def _result(
    settings: RoundSettings,
    old: ClientState,
    began: ClientState,
    trained: ClientState,
    known: tuple[TrainingStats, int],
    *,
    round_: int,
) -> ClientResult:
    method, (stats, bytes_down) = settings.method, known
    failure = f"loss is {stats.loss}" if not math.isfinite(stats.loss) else _not_finite(trained)
    if failure is None:
        new = replace(method.after_training(trained, began, round_), round=round_)
        failure = _not_finite(new)
    if failure is not None:
        return ClientResult(old, {}, stats, bytes_down, failure)
    sent = method.uploaded(new)
    upload, cut = sent.sent or {}, 0
    if upload and settings.shares_heads:
        upload = {**upload, **sent.heads}
    if upload and method.config.federation.secure:
        upload, cut = on_grid(upload)
        sent = replace(sent, sent=parted(upload)[0])
    return ClientResult(sent, upload, stats, bytes_down, cut=cut)


def _not_finite(state: ClientState) -> str | None:
    """What is wrong with a state's numbers, if anything is."""
    bad = next((key for key, value in {**state.tensors, **state.heads}.items() if not finite(value)), None)
    return None if bad is None else f"{bad} is not finite after training"


def run_clients(
    model: AdaptedModel,
    clients: Sequence[int],
    states: Mapping[int, ClientState],
    messages: Mapping[int, Message],
    plans: Callable[[int], Sequence[Plan]],
    *,
    settings: RoundSettings,
    round_: int,
    cohort: int,
    install: Install | None = None,
    on_step: OnStep = lambda done, total: None,
) -> Iterator[ClientResult]:
    """Run ``client_round`` cohort by cohort and yield the results in the order of the clients.

    States and messages are looked up when their cohort's turn comes, and only its results are held, so memory does
    not depend on the number of clients. An exception names the cohort it happened in.
    """
    count = -(-len(clients) // cohort)
    for number, part in enumerate(cohorts(clients, cohort)):
        try:
            yield from client_round(
                model,
                [states[client] for client in part],
                [messages.get(client) for client in part],
                [plans(client) for client in part],
                settings,
                round_=round_,
                install=install,
                on_step=partial(_step, on_step, number, count),
            )
        except Exception as error:
            error.add_note(f"in round {round_}, clients {list(part)}")
            raise


_TOKENS = {"cpu": 2_048, "cuda": 16_384}
"""Tokens in a step beyond which more clients at a time are no faster on two cores. A guess for GPUs: on an H100 with a
7B model 17,800 tokens a second with 5,000 of them in a step, 19,700 with 10,000; more were not tried."""
_SHARE = 0.5
"""Most of the free memory that a step may take: activations, adapters, optimiser."""
_COPIES, _TRAINED = 2, 4
"""Copies of an adapter: in the state, on the model; of what trains, also gradient, two moments, and the new state."""


def cohort_size(config: FederationConfig, clients: int) -> int:
    """Clients on the model at a time, of so many: one with the executor ``loop``, else ``cohort`` or all."""
    return 1 if config.executor == "loop" else min(clients, config.cohort or clients)


def cohorts(clients: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The clients in order, some at a time; memory that one cohort freed is given back before the next."""
    for start in range(0, len(clients), size):
        release_freed_memory()
        yield clients[start : start + size]


def fitting_cohort(
    model: AdaptedModel, lengths: Sequence[float], batch_size: int, parameters: int = 0, trained: int = 0
) -> int:
    """Clients whose rows of one step, together, are enough for full speed and fit well into free memory; at least one.

    More clients at a time would only take more memory: a cohort's tensors are all that a run holds.
    """
    step = batch_size * mean(lengths)  # tokens of a client
    each = step * model.bytes_per_token + 4 * (_COPIES * parameters + _TRAINED * trained)
    room = _SHARE * free_memory(model.device) / each
    return max(1, min(len(lengths), round(_TOKENS[model.device.type] / step), int(room)))
