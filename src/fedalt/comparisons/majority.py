"""What always giving one answer scores: a line below every table, without a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fedalt.config import RunConfig
from fedalt.data.federation import ClientData
from fedalt.data.load import Rows
from fedalt.evaluation.choices import options_of
from fedalt.evaluation.metrics import Measure, Metric, measure_of

Scores = dict[str, dict[str, float]]
"""Label of a run → client → score."""


def majority(runs: Iterable[tuple[str, RunConfig]], metric: Metric, rows: Rows) -> Scores | None:
    """What every client's most frequent training answer scores on its own test rows, by the run's own metric.

    None for a metric that looks at probabilities, of which an answer has none.
    """
    if metric.reads not in ("answer", "option"):
        return None
    found: Scores = {}
    for label, config in runs:
        asked = measure_of(metric.name, config.evaluation)
        clients = rows.both(config.data, config.seed)[0].clients.items()
        found[label] = {str(client): _constant(data, asked) for client, data in clients}
    return found


def _constant(data: ClientData, asked: Measure) -> float:
    answer = Counter(row.output for row in data.train).most_common(1)[0][0]
    scored = [row for row in data.test if asked.metric.reads == "answer" or options_of(row.instruction)]
    references = [row.output for row in scored]
    if asked.metric.corpus:
        return asked([answer] * len(references), references)
    return sum(asked(answer, reference) for reference in references) / len(references)
