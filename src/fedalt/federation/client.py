"""One round of one or more clients: the same function for every executor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedalt.config import TrainingConfig
from fedalt.data.batches import Plan
from fedalt.methods.base import Message, Method
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import Placement
from fedalt.model.state import ClientState
from fedalt.names import Tensors
from fedalt.training.local import OnStep, TrainingStats, train


@dataclass(frozen=True)
class ClientResult:
    """What a client hands over at the end of its round.

    Attributes:
        state: Its new private state, or its old one when it failed.
        upload: What the server gets; empty for a method that shares nothing and for a client that failed.
        stats: Loss, steps, tokens, mixer weights.
        failure: Why the client is set aside for this round, or nothing.
    """

    state: ClientState
    upload: Tensors
    stats: TrainingStats
    failure: str | None = None


@dataclass(frozen=True)
class RoundSettings:
    """What is the same for all clients and rounds of a run."""

    method: Method
    placement: Placement
    training: TrainingConfig


def client_round(
    model: AdaptedModel,
    states: Sequence[ClientState],
    messages: Sequence[Message | None],
    plans: Sequence[Plan],
    settings: RoundSettings,
    round_: int,
    on_step: OnStep = lambda done, total: None,
) -> list[ClientResult]:
    """Install the server's message, train, and prepare the upload, for a cohort of clients on one model.

    Pure in its arguments: states come in and new states go out; the model is only where the arithmetic happens. A
    client whose loss or adapter is not finite keeps the state it came with, and the others are not affected by it.
    """
    installed = [
        settings.method.install(state, message) if message else state
        for state, message in zip(states, messages, strict=True)
    ]
    trainable = [key for key in installed[0].tensors if settings.method.trains(key)]
    model.load(installed, settings.placement, trainable)
    stats = train(model, plans, settings.training, on_step)
    after = [
        replace(new.with_tensors(tensors), round=round_)
        for new, tensors in zip(installed, model.unstack(), strict=True)
    ]
    return [_result(settings.method, *client) for client in zip(states, after, stats, strict=True)]


def _result(method: Method, old: ClientState, new: ClientState, stats: TrainingStats) -> ClientResult:
    failure = None if math.isfinite(stats.loss) else f"loss is {stats.loss}"
    bad = next((key for key, value in new.tensors.items() if not value.isfinite().all()), None)
    if failure is None and bad is not None:
        failure = f"{bad} is not finite after training"
    if failure:
        return ClientResult(old, {}, stats, failure=failure)
    sent = method.sent(new)
    return ClientResult(sent, sent.sent or {}, stats)
