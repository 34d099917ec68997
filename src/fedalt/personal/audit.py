"""What a run's LoRAs tell of the rows that they were trained on, measured by an attack.

Somebody who has the base model and one of the LoRAs below scores a row x with answer y by how much likelier the LoRA
makes the answer, per token, than the base alone does, and takes rows with a high score for training rows:

    s(x, y) = [log p_LoRA(y | x) − log p_base(y | x)] / |y|

    upload     the client's upload alone, which the server sees unless sums are secure
    sum        the mean of all uploads, which is what a server sees of a secure sum
    others     the mean without one other client, which is what that client is told
    personal   the client's personal model, for whoever is given it

The attack is calibrated by the base alone (Carlini et al., S&P 2022, without shadow models), so it is a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fedalt.data.encode import Example
from fedalt.errors import UserError
from fedalt.evaluation.choices import reference_losses
from fedalt.evaluation.evaluate import probabilities
from fedalt.evaluation.prompt_similarity import load_to_answer
from fedalt.federation.server import Server
from fedalt.methods.base import drawn
from fedalt.model.layer import SUM, Placement
from fedalt.model.state import ClientState
from fedalt.names import Tensors
from fedalt.runs.checkpoint import Checkpoint, load_checkpoint
from fedalt.runs.client_folder import client_ids, read_client
from fedalt.runs.folder import finished_run
from fedalt.runs.setup import Experiment, load_resident, prepare

VIEWS = {"upload": "its upload", "sum": "mean of all", "others": "mean for another", "personal": "personal model"}
FALSE = 0.01
"""Rate of false alarms at which true ones are counted."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Leak:
    """How well training rows are told from others.

    Attributes:
        client: Whose rows.
        view: By what, one of ``VIEWS``.
        members: Training rows tried.
        others: Test and validation rows tried.
        auc: Share of pairs of a training row and another in which the training row has the higher score; .5 is chance.
        low: Lower end of the 95 % interval of ``auc`` (DeLong et al., Biometrics 1988).
        high: Upper end.
        found: Share of training rows with a score above all but 1 % of the others.
        epsilon: What the run must have told of a row at least, with a confidence of 95 %; see ``least_epsilon``.
        promised: What it says it has told at most (``privacy.epsilon``), if it says so.
    """

    client: int
    view: str
    members: int
    others: int
    auc: float
    low: float
    high: float
    found: float
    epsilon: float = 0.0
    promised: float | None = None


def audit(run: Path, client: int | None = None, rows: int = 200) -> list[Leak]:
    """Attack a finished run by every view of every client, or of one.

    Args:
        run: Its folder.
        client: Only this client.
        rows: Most training rows, and most others, of a client.

    Raises:
        UserError: The run has no such client, or the client has no rows that it was not trained on.
    """
    folder, config = finished_run(run)
    known = client_ids(folder)
    if client is not None and client not in known:
        raise UserError(f"{run}: no client {client} here; known: {known}")
    experiment = prepare(config, load_resident(config))
    last = load_checkpoint(folder.checkpoints)
    found = []
    for one in known if client is None else [client]:
        examples = experiment.examples[one]
        inside = drawn(examples.train, rows, config.seed, "audit", one)
        texts = {(row.prompt, row.answer) for row in examples.train}
        fresh = [row for row in (*examples.test, *examples.validation) if (row.prompt, row.answer) not in texts]
        outside = drawn(fresh, rows, config.seed, "audit", one)
        if not inside or not outside:
            raise UserError(f"client {one}: needs training rows, and test rows that are not among them")
        both = [*inside, *outside]
        personal = read_client(folder, one, experiment.resident.base)
        alone = np.zeros(len(both)) if config.classifies else _losses(experiment, None, both)
        views = {"personal": (personal.state, personal.placement), **dict(_views(experiment, last, one))}
        for view in VIEWS.keys() & views.keys():
            scores = alone - _losses(experiment, views[view], both)
            leak = _leak(one, view, scores[: len(inside)], scores[len(inside) :])
            spent = personal.privacy or {}
            least = least_epsilon(scores[: len(inside)], scores[len(inside) :], spent.get("delta", 0.0))
            found.append(replace(leak, epsilon=least, promised=spent.get("epsilon")))
    order = list(VIEWS)
    return sorted(found, key=lambda leak: (leak.client, order.index(leak.view)))


def _views(
    experiment: Experiment, last: Checkpoint | None, client: int
) -> Iterator[tuple[str, tuple[ClientState, Placement]]]:
    """Uploads and their means as adapters on the base, where they are enough to answer with."""
    method, info = experiment.method, experiment.info
    shared = tuple(slot.name for slot in method.slots if slot.share)
    if last is None or client not in last.uploads or not shared or experiment.config.classifies:
        return
    server = Server(method, experiment.config.federation, info.samples, info.shapes)
    last.restore(server)
    start = experiment.initial_state(client)
    needed = {key for key in start.tensors if key.slot in shared}

    def view(tensors: Tensors) -> tuple[ClientState, Placement]:
        return replace(start, tensors={**start.tensors, **tensors}), Placement(shared, SUM, method.scale, 0.0)

    sent = server.read(client) if not last.summed else (last.state(client).sent or {})
    if any(key not in sent and method.trains(key) for key in needed):
        return  # a factor that stays at the client
    if any(sent[key].shape != start.tensors[key].shape for key in needed & sent.keys()):
        return  # of a rank of its own
    yield "upload", view(sent)
    if method.needs_uploads or len(last.uploads) < 3:
        return
    yield "sum", view(server.mean())
    other = next(c for c in last.uploads if c != client)
    yield "others", view(server.mean_without(other))


def _losses(experiment: Experiment, view: tuple[ClientState, Placement] | None, rows: Sequence[Example]) -> Array:
    """Nats per token of every row's answer; without a view, under the base alone."""
    model, config = experiment.resident.model, experiment.config.evaluation
    if view is None:
        model.clear()
        weights = None
    else:
        state, placement = view
        weights = load_to_answer(model, [state], [[row.input for row in rows]], placement)
    if experiment.config.classifies:
        [chances] = probabilities(model, [[row.input for row in rows]], config.batch_size, weights)
        return np.array([-math.log(max(float(p[row.label]), 1e-30)) for row, p in zip(rows, chances, strict=True)])
    [nats] = reference_losses(model, [rows], config, weights)
    return np.array([loss / max(1, len(row.answer)) for loss, row in zip(nats, rows, strict=True)])


def _leak(client: int, view: str, inside: Array, outside: Array) -> Leak:
    auc, spread = area(inside, outside)
    reach = NormalDist().inv_cdf(0.975) * spread
    limit = np.sort(outside)[::-1][int(FALSE * len(outside))]
    found = float((inside > limit).mean())
    return Leak(client, view, len(inside), len(outside), auc, max(0.0, auc - reach), min(1.0, auc + reach), found)


def least_epsilon(inside: Array, outside: Array, delta: float = 0.0, confidence: float = 0.95) -> float:
    """The least ε that an attacker's success allows: true positives ≤ e^ε · false ones + δ, and negatives alike.

    The threshold is the one that does best on half of the rows; the other half counts, by the ends of intervals of
    Clopper and Pearson for all four rates. Rows are taken as independent, members and others as of one kind.
    """
    best, limit = 0.0, np.inf
    for candidate in np.unique([*inside[::2], *outside[::2]]):
        apart = float(np.mean(inside[::2] >= candidate) - np.mean(outside[::2] >= candidate))
        best, limit = max((best, limit), (apart, float(candidate)))
    hits, alarms = inside[1::2] >= limit, outside[1::2] >= limit
    risk = (1 - confidence) / 4
    bounds = (
        (_end(hits, risk, high=False) - delta, _end(alarms, risk, high=True)),
        (_end(~alarms, risk, high=False) - delta, _end(~hits, risk, high=True)),
    )
    return max([0.0, *(math.log(true / false) for true, false in bounds if true > 0)])


def _end(found: NDArray[np.bool_], risk: float, *, high: bool) -> float:
    """One end of the interval of a rate (Clopper and Pearson, 1934)."""
    from scipy.stats import beta

    count, total = int(found.sum()), len(found)
    if high:
        return 1.0 if count == total else float(beta.ppf(1 - risk, count + 1, total - count))
    return 0.0 if count == 0 else float(beta.ppf(risk, count, total - count + 1))


def area(inside: Array, outside: Array) -> tuple[float, float]:
    """Area under the ROC curve, ties counted half, and its standard error by DeLong's components."""
    above = (inside[:, None] > outside).astype(float) + 0.5 * (inside[:, None] == outside)
    parts = (above.mean(1), above.mean(0))
    variance = sum(part.var(ddof=1) / len(part) for part in parts if len(part) > 1)
    return float(above.mean()), float(np.sqrt(variance))


def means(leaks: Sequence[Leak]) -> Mapping[str, tuple[float, float]]:
    """View → mean of ``auc`` over clients, and half of its 95 % interval by Student's t; NaN for one client."""
    from scipy.stats import t

    found = {}
    for view in VIEWS:
        values = np.array([leak.auc for leak in leaks if leak.view == view])
        if len(values):
            half = (
                t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
            )
            found[view] = float(values.mean()), float(half)
    return found
