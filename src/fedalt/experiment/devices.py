"""Clients on several devices of one machine: their cohorts are worked on by processes with a base each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedalt.experiment.checkpoint import Checkpoint
from fedalt.experiment.crew import Outcome
from fedalt.experiment.messages import Outbox, Told
from fedalt.experiment.orders import Order, outcomes, points, score_order, train_order
from fedalt.experiment.residents import Residents
from fedalt.experiment.scoring import Points, log_points
from fedalt.experiment.workers import Workers
from fedalt.federation.cohort import cohort_size, cohorts
from fedalt.files import scratch_folder
from fedalt.methods.exchange import Message


@dataclass(frozen=True)
class Devices:
    """The crew of a run on several devices. Training and scoring are spread; this process aggregates.

    Workers read states from the last checkpoint and write new ones into the next, as this process would.

    Attributes:
        here: The crew of this process, whose own base writes the clients' folders at the end.
        workers: A worker per device.
    """

    here: Residents
    workers: Workers

    def train(
        self, chosen: Sequence[int], messages: Mapping[int, Message], last: Checkpoint, new: Checkpoint
    ) -> list[Outcome]:
        """Train cohort by cohort, wherever there is a free device."""
        made = self._spread(chosen, messages, new, lambda part, told: train_order(part, told, last, new))
        done = [outcome for answer in made for outcome in outcomes(answer)]
        new.clients |= {outcome.client for outcome in done if not outcome.failure}
        new.keep(last, states=last.clients - new.clients)
        return done

    def row_lora_drifts(self, new: Checkpoint, messages: Mapping[int, Message]) -> dict[int, float | None]:
        """How far the messages move every client's row."""
        return self.here.row_lora_drifts(new, messages)

    def score(self, new: Checkpoint, messages: Mapping[int, Message]) -> float | None:
        """Score everybody, wherever there is a free device."""
        clients = self.here.experiment.federation.ids
        everything: Points = {}
        for answer in self._spread(clients, messages, new, lambda part, told: score_order(part, told, new)):
            for point, mine in points(answer).items():
                everything.setdefault(point, {}).update(mine)
        return log_points(self.here.log, new.round, everything, self.here.experiment.config.metric)

    def save(self, last: Checkpoint, messages: Mapping[int, Message]) -> None:
        """Write every client's folder."""
        self.here.save(last, messages)

    def _spread(
        self,
        clients: Sequence[int],
        messages: Mapping[int, Message],
        new: Checkpoint,
        order: Callable[[Sequence[int], Told], Order],
    ) -> list[Any]:
        size = cohort_size(self.here.experiment.config.federation, len(clients))
        count = -(-len(clients) // size)

        def orders(outbox: Outbox) -> Iterator[Order]:
            for part in cohorts(clients, size):
                yield order(part, outbox.of(part))

        def on_progress(done: float) -> None:
            self.here.log.sink({"event": "step", "round": new.round, "done": done, "total": count})

        with scratch_folder(new.path.with_name(f".round_{new.round:04d}.messages")) as folder:
            return self.workers.answers(orders(Outbox(folder, messages)), on_progress)
