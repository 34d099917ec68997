"""A round of many clients: cohort by cohort on one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from fedalt.data.batches import Plan
from fedalt.federation.client import ClientResult, RoundSettings, client_round
from fedalt.federation.cohort import cohorts
from fedalt.methods.exchange import Message
from fedalt.model.adapted import AdaptedModel
from fedalt.model.state import ClientState
from fedalt.training.local import OnStep


def run_clients(
    model: AdaptedModel,
    clients: Sequence[int],
    states: Mapping[int, ClientState],
    messages: Mapping[int, Message],
    plans: Callable[[int], Sequence[Plan]],
    settings: RoundSettings,
    round_: int,
    cohort: int,
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
                round_,
                partial(_step, on_step, number, count),
            )
        except Exception as error:
            error.add_note(f"in round {round_}, clients {list(part)}")
            raise


def _step(on_step: OnStep, cohort: int, cohorts: int, done: int, total: int) -> None:
    """Progress over all cohorts of a round, as if each had as many steps as the present one."""
    on_step(cohort * total + done, cohorts * total)
