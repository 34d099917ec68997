"""What a worker is asked to do with a cohort, and what it answers: JSON, with tensors in the files of checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedalt.errors import listed
from fedalt.experiment.checkpoint import Checkpoint
from fedalt.experiment.crew import Outcome
from fedalt.experiment.messages import Told, read
from fedalt.experiment.residents import Residents
from fedalt.experiment.scoring import Points
from fedalt.files import filling
from fedalt.training.local import TrainingStats

Order = dict[str, Any]


def train_order(clients: Sequence[int], told: Told, last: Checkpoint, new: Checkpoint) -> Order:
    """Train a cohort from the states in ``last`` and put what comes of it into ``new``."""
    return {**score_order(clients, told, new), "last": _part(last, clients)}


def score_order(clients: Sequence[int], told: Told, new: Checkpoint) -> Order:
    """Score a cohort by the states in ``new``."""
    return {"clients": list(clients), "told": told, "new": _part(new, clients)}


def described(order: Order) -> str:
    """What the order is, in a few words."""
    doing = "training" if "last" in order else "scoring"
    return f"{doing} clients {listed(order['clients'])} in round {order['new']['round']}"


def follow(order: Order, crew: Residents) -> Any:
    """Do it; the answer is for ``outcomes`` or ``points``."""
    clients, messages, new = order["clients"], read(order["told"]), _checkpoint(order["new"])
    if "last" not in order:
        return crew.scored(clients, new, messages)
    with filling(new.path):
        return [asdict(outcome) for outcome in crew.trained(clients, messages, _checkpoint(order["last"]), new)]


def outcomes(answer: Any) -> list[Outcome]:
    """How a cohort's training went."""
    return [Outcome(**one | {"stats": _stats(one["stats"])}) for one in answer]


def points(answer: Any) -> Points:
    """A cohort's scores."""
    return {point: {int(client): scores for client, scores in mine.items()} for point, mine in answer.items()}


def _stats(value: Any) -> TrainingStats:
    return TrainingStats(**value | {"alpha": tuple(value["alpha"])})


def _part(checkpoint: Checkpoint, clients: Collection[int]) -> dict[str, Any]:
    known = sorted(checkpoint.clients.intersection(clients))
    return {"path": str(checkpoint.path), "round": checkpoint.round, "clients": known}


def _checkpoint(value: dict[str, Any]) -> Checkpoint:
    return Checkpoint(Path(value["path"]), value["round"], set(value["clients"]))
