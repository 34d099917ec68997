"""What a run's LoRAs tell of the rows that they were trained on, measured by attacks.

Somebody who has the base model and one of the LoRAs below scores a row x with answer y by how much likelier the LoRA
makes the answer, per token, than the base alone does, and takes rows with a high score for training rows:

    s(x, y) = [log p_LoRA(y | x) − log p_base(y | x)] / |y|

    upload     the client's upload alone, which the server sees unless sums are secure
    sum        the mean of all uploads, which is what a server sees of a secure sum
    others     the mean without one other client, which is what that client is told
    personal   the client's personal model, for whoever is given it

Calibrated by the base alone it needs no model more. With shadows, which are the same run on other halves of the same
rows, it is the likelihood ratio of Carlini et al. (S&P 2022). Either is a lower bound. Planted secrets
(``data.canaries``) are ranked among others by the same LoRAs, and asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from fedalt.data.canaries import alternatives
from fedalt.data.encode import Example
from fedalt.data.federation import CANARY, ClientData
from fedalt.errors import UserError
from fedalt.evaluation.choices import reference_losses
from fedalt.evaluation.evaluate import probabilities
from fedalt.evaluation.generate import answer_all
from fedalt.evaluation.prompt_similarity import load_to_answer
from fedalt.federation.server import Server
from fedalt.files import only_one
from fedalt.methods.base import drawn
from fedalt.model.layer import SUM, Placement
from fedalt.model.state import ClientState
from fedalt.names import Tensors
from fedalt.personal.leaks import (
    VIEWS,
    Array,
    Audit,
    Exposure,
    Leak,
    exposure,
    leak,
    least_epsilon,
    likelihood_ratios,
    write_audit,
)
from fedalt.runs.checkpoint import Checkpoint, load_checkpoint
from fedalt.runs.client_folder import client_ids, read_client
from fedalt.runs.folder import RunFolder, finished_run, kept_scores
from fedalt.runs.rounds import run as run_engine
from fedalt.runs.setup import Experiment, load_resident, prepare
from fedalt.seeding import rng

CANDIDATES = 128
"""Secrets that a planted one is ranked among, itself included."""
_SECRET = 12
"""Most tokens of an answer in which a secret is looked for."""
View = tuple[ClientState, Placement]


@dataclass(frozen=True)
class _Tried:
    """A client's rows that an attack is tried on: training rows, and rows that are of no client's training."""

    inside: Sequence[Example]
    outside: Sequence[Example]

    @property
    def rows(self) -> list[Example]:
        """All of them."""
        return [*self.inside, *self.outside]


def audit(
    run: Path,
    client: int | None = None,
    rows: int = 200,
    shadows: int = 0,
    told: Callable[[str], None] = lambda line: None,
) -> Audit:
    """Attack a finished run by every view of every client, or of one, and keep what came out for its report.

    Args:
        run: Its folder.
        client: Only this client.
        rows: Most training rows, and most others, of a client.
        shadows: Runs to train for the second attack; an even number, for every row is in one half of them.
        told: Gets a line before each of these.

    Raises:
        UserError: The run has no such client, or the client has no rows that it was not trained on.
    """
    if shadows and (shadows < 4 or shadows % 2):
        raise UserError(f"--shadows: {shadows} asked for; an even number from 4, half of them with each row")
    folder, config = finished_run(run)
    known = client_ids(folder)
    if not known:
        raise UserError(f"{run}: no client's model is here; of a run across sites each site has its own")
    if client is not None and client not in known:
        raise UserError(f"{run}: no client {client} here; known: {known}")
    experiment = prepare(config, load_resident(config))
    tried = {one: _tried(experiment, one, rows) for one in (known if client is None else [client])}
    found, exposures = list[Leak](), list[Exposure]()
    seen: dict[int, dict[str, Array]] = {}
    spent = {one: read_client(folder, one, experiment.resident.base).privacy or {} for one in tried}
    for one, mine in tried.items():
        views = dict(_views(experiment, folder, one))
        seen[one] = {view: _scores(experiment, how, mine.rows) for view, how in views.items()}
        alone = np.zeros(len(mine.rows)) if config.classifies else _scores(experiment, None, mine.rows)
        for view, scores in seen[one].items():
            found.append(_leak(one, view, scores - alone, len(mine.inside), spent[one]))
        exposures += _exposures(experiment, one, views)
    if shadows:
        found += _by_shadows(experiment, tried, seen, spent, shadows, told=told)
    order = list(VIEWS)
    found.sort(key=lambda x: (x.client, order.index(x.view)))
    secure, number = config.federation.secure, kept_scores(folder)["round"]
    whole = Audit(number, secure, shadows, tuple(found), tuple(exposures))
    with only_one(folder.path):
        write_audit(folder, whole)
    return whole


def _tried(experiment: Experiment, client: int, rows: int) -> _Tried:
    mine, seed = experiment.examples[client], experiment.config.seed
    texts = {(row.prompt, row.answer) for row in mine.train}
    fresh = [row for row in (*mine.test, *mine.validation) if (row.prompt, row.answer) not in texts]
    own = [row for row in mine.train if not _planted(experiment, row)]
    found = _Tried(drawn(own, rows, seed, "audit", client), drawn(fresh, rows, seed, "audit", client))
    if not found.inside or not found.outside:
        raise UserError(f"client {client}: needs training rows, and test rows that are not among them")
    return found


def _planted(experiment: Experiment, example: Example) -> bool:
    return experiment.config.data.canaries > 0 and example.row.category == CANARY


def _leak(client: int, view: str, scores: Array, members: int, spent: Mapping[str, float], **more: str) -> Leak:
    inside, outside = scores[:members], scores[members:]
    least = least_epsilon(inside, outside, spent.get("delta", 0.0))
    return leak(client, view, inside, outside, epsilon=least, promised=spent.get("epsilon"), **more)


# --------------------------------------------------------------------------------------------------- what can be seen


def _views(experiment: Experiment, folder: RunFolder, client: int) -> Iterator[tuple[str, View]]:
    """By name, in the order of ``VIEWS``."""
    yield from _shared(experiment, load_checkpoint(folder.checkpoints), client)
    personal = read_client(folder, client, experiment.resident.base)
    yield "personal", (personal.state, personal.placement)


def _shared(experiment: Experiment, last: Checkpoint | None, client: int) -> Iterator[tuple[str, View]]:
    """Uploads and their means as adapters on the base, where they are enough to answer with."""
    method, info = experiment.method, experiment.info
    shared = tuple(slot.name for slot in method.slots if slot.share)
    if last is None or client not in last.uploads or not shared or experiment.config.classifies:
        return
    server = Server(method, experiment.config.federation, info.samples, info.shapes)
    last.restore(server)
    start = experiment.initial_state(client)
    needed = {key for key in start.tensors if key.slot in shared}

    def view(tensors: Tensors) -> View:
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


def _scores(experiment: Experiment, view: View | None, rows: Sequence[Example], *, whole: bool = False) -> Array:
    """Log-likelihood of every row's answer, per token unless ``whole``; without a view, under the base alone.

    Of a class it is log p − log(1 − p), which is nearer to normal.
    """
    model, config = experiment.resident.model, experiment.config.evaluation
    if view is None:
        model.clear()
        weights = None
    else:
        state, placement = view
        weights = load_to_answer(model, [state], [[row.input for row in rows]], placement)
    if experiment.config.classifies:
        [chances] = probabilities(model, [[row.input for row in rows]], config.batch_size, weights)
        found = (min(max(float(p[row.label]), 1e-30), 1 - 1e-7) for row, p in zip(rows, chances, strict=True))
        return np.array([math.log(p) - math.log1p(-p) for p in found])
    [nats] = reference_losses(model, [rows], config, weights)
    return np.array([-loss / (1 if whole else max(1, len(row.answer))) for loss, row in zip(nats, rows, strict=True)])


# ---------------------------------------------------------------------------------------------------- planted secrets


def _exposures(experiment: Experiment, client: int, views: Mapping[str, View]) -> Iterator[Exposure]:
    """Of the secrets that a client was trained on."""
    config, resident = experiment.config, experiment.resident
    planted = [example for example in experiment.examples[client].train if _planted(experiment, example)]
    encoder = resident.encoder(config)
    others = [[*map(encoder.example, alternatives(one.row, CANDIDATES - 1, config.seed))] for one in planted]
    ranked = [example for one, more in zip(planted, others, strict=True) for example in (one, *more) if example]
    greedy = config.evaluation.model_copy(update={"num_beams": 1, "max_new_tokens": _SECRET})
    for view, how in views.items() if planted else ():
        losses = -_scores(experiment, how, ranked, whole=True).reshape(len(planted), CANDIDATES)
        weights = load_to_answer(resident.model, [how[0]], [[one.input for one in planted]], how[1])
        prompts = [[one.prompt for one in planted]]
        [answers] = answer_all(resident.model, resident.base.tokenizer, prompts, greedy, weights)
        repeated = sum(one.row.output in answer for one, answer in zip(planted, answers, strict=True))
        yield Exposure(client, view, CANDIDATES, tuple(map(exposure, losses)), repeated)


# ------------------------------------------------------------------------------------------------------------ shadows


def _by_shadows(
    experiment: Experiment,
    tried: Mapping[int, _Tried],
    seen: Mapping[int, Mapping[str, Array]],
    spent: Mapping[int, Mapping[str, float]],
    count: int,
    *,
    told: Callable[[str], None],
) -> Iterator[Leak]:
    """The attack that knows how scores of every row are spread if it was trained on, and if it was not."""
    pools = {c: _Tried(mine.inside, mine.outside[: len(mine.inside)]) for c, mine in tried.items()}
    inside = {c: _halves(experiment.config.seed, c, len(pool.rows), count) for c, pool in pools.items()}
    scores: dict[tuple[int, str], list[Array]] = {(c, view): [] for c in seen for view in seen[c]}
    for shadow in range(count):
        told(f"shadow run {shadow + 1} of {count}")
        half = {c: [row for row, mine in zip(pools[c].rows, inside[c][shadow], strict=True) if mine] for c in pools}
        with TemporaryDirectory(prefix="fedalt-shadow-") as scratch:
            trained, folder = _trained(experiment, pools, half, RunFolder(Path(scratch)))
            for client, pool in pools.items():
                for view, how in _views(trained, folder, client):
                    scores[client, view].append(_scores(trained, how, pool.rows))
    for (client, view), found in scores.items():
        pool = pools[client]
        here = seen[client][view][: len(pool.rows)]
        ratios = likelihood_ratios(here, np.array(found), inside[client])
        yield _leak(client, view, ratios, len(pool.inside), spent[client], attack="shadows")


def _halves(seed: int, client: int, rows: int, count: int) -> NDArray[np.bool_]:
    """Which rows every shadow is trained on: a random half, and then those that it left out."""
    halves = [
        torch.randperm(rows, generator=rng(seed, "shadows", client, i)).numpy() < rows / 2 for i in range(count // 2)
    ]
    return np.array([mine for half in halves for mine in (half, ~half)])


def _trained(
    experiment: Experiment, pools: Mapping[int, _Tried], half: Mapping[int, Sequence[Example]], folder: RunFolder
) -> tuple[Experiment, RunFolder]:
    """The same run where clients have, of the rows that are tried, those of one half."""
    clients = dict(experiment.federation.clients)
    for client, pool in pools.items():
        mine, out = experiment.examples[client], {row.row for row in pool.rows}
        kept = {
            split: tuple(x.row for x in getattr(mine, split) if x.row not in out) for split in ("train", "validation")
        }
        train = (*kept["train"], *(example.row for example in half[client]))
        clients[client] = ClientData(train, kept["validation"], clients[client].test[:1])
    rounds = experiment.config.federation.rounds
    quick = {"every": rounds, "points": ("after",), "max_new_tokens": 1, "num_beams": 1, "early_stop": None}
    config = experiment.config.having("evaluation", **quick, options=None, loss=False, metric=None, metrics=())
    shadow = prepare(config, experiment.resident, replace(experiment.federation, clients=clients))
    run_engine(shadow, folder)
    return shadow, folder
