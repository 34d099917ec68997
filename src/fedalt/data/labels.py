"""The classes of a run: found in the rows of all its clients, or named and then held by somebody."""

from __future__ import annotations

from collections.abc import Sequence

from fedalt.data.rows import Federation
from fedalt.errors import UserError, did_you_mean, listed


def labels_of(federation: Federation, others: Federation) -> tuple[str, ...]:
    """The outputs of all training rows, sorted; also of clients that join later.

    Raises:
        UserError: There is one only, or so many that they are no labels.
    """
    outputs = _outputs(federation, others)
    labels = tuple(sorted(set(outputs)))
    if len(labels) < 2:
        raise UserError(f'{federation.source}: all training rows have the label "{labels[0]}"; nothing to classify')
    if len(labels) > max(20, len(outputs) // 2):
        raise UserError(
            f"{federation.source}: {len(labels)} different outputs in {len(outputs)} training rows are no labels; "
            "for answers in free text use model.task=causal_lm"
        )
    return labels


def check_labels(labels: Sequence[str], federation: Federation, others: Federation) -> None:
    """Refuse a class that no training row of the whole federation has; a site, which sees one client, cannot tell."""
    known = set(_outputs(federation, others))
    for label in labels:
        if label not in known:
            raise UserError(
                f'model.labels: no training row of {federation.source} has the label "{label}"'
                f"{did_you_mean(label, known)}; labels: {listed(sorted(known))}"
            )


def _outputs(*federations: Federation) -> list[str]:
    return [row.output for made in federations for data in made.clients.values() for row in data.train]
