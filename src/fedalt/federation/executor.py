"""Executors: how the clients of a round are put on the model. All give the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from fedalt.data.batches import Plan
from fedalt.federation.client import ClientResult, RoundSettings, client_round
from fedalt.methods.base import Message
from fedalt.model.adapted import AdaptedModel
from fedalt.model.state import ClientState
from fedalt.training.local import OnStep


def run_clients(
    model: AdaptedModel,
    states: Sequence[ClientState],
    messages: Sequence[Message | None],
    plans: Sequence[Plan],
    settings: RoundSettings,
    round_: int,
    executor: Literal["stacked", "loop"] = "stacked",
    cohort: int | None = None,
    on_step: OnStep = lambda done, total: None,
) -> list[ClientResult]:
    """Run ``client_round`` for all clients at once (``stacked``), in cohorts of some, or one after another (``loop``).

    An exception in a loop of one names the client it happened in.
    """
    size = 1 if executor == "loop" else cohort or len(states)
    results: list[ClientResult] = []
    for start in range(0, len(states), size):
        part = slice(start, start + size)
        report = partial(_step, on_step, start // size, -(-len(states) // size))
        try:
            results += client_round(model, states[part], messages[part], plans[part], settings, round_, report)
        except Exception as error:
            error.add_note(f"in round {round_}, clients {[state.client for state in states[part]]}")
            raise
    return results


def _step(on_step: OnStep, cohort: int, cohorts: int, done: int, total: int) -> None:
    """Progress over all cohorts of a round, as if each had as many steps as the present one."""
    on_step(cohort * total + done, cohorts * total)
