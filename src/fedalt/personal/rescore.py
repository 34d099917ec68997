"""Scores of a finished run again, from the saved adapters, on its own test rows or on others."""

from __future__ import annotations

from pathlib import Path

from fedalt.config import RunConfig
from fedalt.data.encode import encode_federation
from fedalt.data.federation import ClientData, Federation
from fedalt.data.load import elsewhere, load_federation, read
from fedalt.errors import UserError, listed
from fedalt.evaluation.evaluate import Evaluation
from fedalt.federation.client import cohort_size, cohorts
from fedalt.runs.client_folder import client_folder, client_ids, read_client
from fedalt.runs.folder import RunFolder, Which, final_scores, finished_run
from fedalt.runs.setup import load_resident


def clients_of(folder: RunFolder, client: int | None) -> list[int]:
    """All clients of a run, or one."""
    clients = [int(one) for one in final_scores(folder)["last"]["clients"]] if client is None else [client]
    if not client_ids(folder):
        raise UserError(f"{folder.path}: no client's model is here; of a run across sites each site has its own")
    for one in clients:
        client_folder(folder, one)
    return clients


def rescore(
    path: Path,
    client: int | None = None,
    data: str | None = None,
    central: bool = False,
    which: Which | None = None,
) -> dict[int, Evaluation]:
    """Score the clients of a run from their folders.

    Args:
        path: Run folder.
        client: Only this client; all when not given.
        data: Other rows in place of the run's own, all test rows of their clients; rows that are nobody's are scored by
            every model, those of a source without test rows all.
        central: Score every model on the test rows of all clients together.
        which: The best round on validation rows, or the last one; the one that is kept when not given.
    """
    folder, config = finished_run(path)
    clients = clients_of(folder, client)
    federation, shared = _rows(config, data)
    central = central or shared
    resident = load_resident(config)
    missing = [c for c in clients if c not in federation.clients and not central]
    if missing:
        raise UserError(
            f"{federation.source}: no rows for client {missing[0]}; it has clients [{listed(federation.ids)}]; "
            "score one with --client, or every model on all rows with --central"
        )
    examples = encode_federation(federation, resident.encoder(config), config.data)
    everything = [example for mine in examples.values() for example in mine.test] if central else []
    scored: dict[int, Evaluation] = {}
    for cohort in cohorts(clients, cohort_size(config.federation, len(clients))):
        personal = [read_client(folder, c, resident.base, which) for c in cohort]
        rows = {c: everything if central else examples[c].test for c in cohort}
        evaluations = resident.evaluate([p.state for p in personal], rows, personal[0].placement, config)
        scored |= {evaluation.client: evaluation for evaluation in evaluations}
    return scored


def _rows(config: RunConfig, data: str | None) -> tuple[Federation, bool]:
    """The clients' rows, and whether they are nobody's and so everybody's."""
    if data is None:
        return load_federation(config.data, config.seed), False
    found = read(elsewhere(config.data, data))
    if isinstance(found, Federation):
        return found, False
    rows = found.test or (*found.train, *found.validation)
    return Federation({0: ClientData(rows, test=rows)}, found.source), True
