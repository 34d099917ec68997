"""Scores of a finished run again, from the saved adapters, on its own test rows or on others."""

from __future__ import annotations

from pathlib import Path

from fedalt.data.encode import encode_federation
from fedalt.data.load import load_federation
from fedalt.errors import UserError, listed
from fedalt.evaluation.evaluate import Evaluation, evaluate
from fedalt.experiment.clients import client_ids, read_client
from fedalt.experiment.folder import finished_run
from fedalt.experiment.prepare import load_resident
from fedalt.federation.cohort import cohort_size, cohorts


def rescore(
    path: Path, client: int | None = None, data: str | None = None, central: bool = False
) -> dict[int, Evaluation]:
    """Score the clients of a run from their folders.

    Args:
        path: Run folder.
        client: Only this client; all when not given.
        data: Other rows in place of the run's own.
        central: Score every model on the test rows of all clients together.

    Raises:
        UserError: No finished run, no such client, rows or base missing.
    """
    folder, config = finished_run(path)
    if data is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"source": data, "clients": None})})
    clients = client_ids(folder) if client is None else [client]
    federation = load_federation(config.data, config.seed)
    resident = load_resident(config)
    missing = [c for c in clients if c not in federation.clients and not central]
    if missing:
        raise UserError(
            f"{federation.source}: no rows for client {missing[0]}; it has clients [{listed(federation.ids)}]"
        )
    examples = encode_federation(federation, resident.encoder(config), config.data)
    everything = [example for mine in examples.values() for example in mine.test] if central else []
    scored: dict[int, Evaluation] = {}
    for cohort in cohorts(clients, cohort_size(config.federation, len(clients))):
        personal = [read_client(folder, c, resident.base) for c in cohort]
        evaluations = evaluate(
            resident.model,
            resident.base.tokenizer,
            [p.state for p in personal],
            {c: everything if central else examples[c].test for c in cohort},
            personal[0].placement,
            config.evaluation,
        )
        scored |= {evaluation.client: evaluation for evaluation in evaluations}
    return scored
