"""Scores of all clients of a run after a round: cohort by cohort, from their states to files and events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedalt.evaluation.evaluate import Evaluation
from fedalt.evaluation.metrics import group_mean, metrics_in, over_clients
from fedalt.federation.client import cohort_size, cohorts
from fedalt.model.state import ClientState
from fedalt.runs.events import EventLog
from fedalt.runs.folder import RunFolder
from fedalt.runs.setup import Experiment


@dataclass(frozen=True)
class Scores:
    """Scores of all clients on their own test rows.

    Attributes:
        metric: The score in tables, for example ``rouge1``.
        round: The round after which clients were scored.
        mean: Of the metric, over clients.
        worst: Of the metric.
        p10: 10th percentile of the metric over clients.
        clients: Client → its metric.
        details: Client → every score that was taken.
    """

    metric: str
    round: int
    mean: float
    worst: float
    p10: float
    clients: dict[int, float]
    details: dict[int, dict[str, float]]

    @staticmethod
    def of(metric: str, round_: int, details: Mapping[int, dict[str, float]]) -> Scores:
        """From every client's scores."""
        clients = {client: scores[metric] for client, scores in details.items()}
        means = over_clients(list(clients.values()), metric)
        return Scores(metric, round_, **means, clients=clients, details=dict(details))


Points = dict[str, dict[int, dict[str, Any]]]
"""Scores by point in time (``after``, ``before``, ``validation``) and client."""


def score_clients(
    experiment: Experiment,
    folder: RunFolder,
    number: int,
    before: Mapping[int, ClientState],
    after: Mapping[int, ClientState],
    *,
    changed: bool,
) -> Points:
    """Score clients and write their answers and scores of a round, but no events."""
    config, points = experiment.config, Points(after={}, before={}, validation={})
    clients = list(after)
    for cohort in cohorts(clients, cohort_size(config.federation, len(clients))):
        states = experiment.personalised([after[client] for client in cohort])
        scored = scored_on(experiment, states, "test")
        points["after"] |= _scores(scored)
        points["validation"] |= _scores(scored_on(experiment, states, "validation"))
        if "before" in config.evaluation.points:
            earlier = scored
            if changed:
                unaggregated = experiment.personalised([before[client] for client in cohort])
                earlier = scored_on(experiment, unaggregated, "test")
            points["before"] |= _scores(earlier)
        for one in scored:
            others = {
                "before_aggregation": points["before"].get(one.client),
                "validation": points["validation"].get(one.client),
            }
            folder.write_scores(one.client, number, one.lines, one.scores | others)
    return points


def scored_on(experiment: Experiment, states: Sequence[ClientState], split: str) -> list[Evaluation]:
    """Answers and scores of a cohort's models on one split of their own rows; clients without any are left out."""
    rows = {state.client: getattr(experiment.examples[state.client], split) for state in states}
    scored = [state for state in states if rows[state.client]]
    return experiment.resident.evaluate(scored, rows, experiment.settings.answering, experiment.config)


def log_points(log: EventLog, number: int, points: Points, metric: str) -> float | None:
    """Log the scores of a round; their mean on validation rows, or None when there are none."""
    for point, clients in points.items():
        for client, scores in clients.items():
            log.emit("scores", round=number, client=client, point=point, **metrics_in(scores))
    return group_mean(scores[metric] for scores in points["validation"].values())


def _scores(evaluations: Sequence[Evaluation]) -> dict[int, dict[str, Any]]:
    return {evaluation.client: evaluation.scores for evaluation in evaluations}
