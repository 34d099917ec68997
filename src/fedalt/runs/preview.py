"""What a run will read and cost: rows as it reads them, without the model; time and memory, by taking its steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from types import SimpleNamespace
from typing import Any

from fedalt.config import RunConfig
from fedalt.data.batches import Plan
from fedalt.data.encode import ClientExamples, Example, encode_client, left_out, token_texts
from fedalt.data.federation import Federation, Row, labels_of
from fedalt.data.load import Rows, load_as_it_is
from fedalt.errors import UserError, listed
from fedalt.federation.client import cohort_size, cohorts, run_clients
from fedalt.federation.server import PerClient, sample_clients
from fedalt.model.base import load_about, load_tokenizer
from fedalt.model.source import resolve_source
from fedalt.model.state import ClientState
from fedalt.runs.clients import plans_of
from fedalt.runs.setup import Experiment, load_rows, read_settings, text_encoder
from fedalt.runtime import peak_memory


@dataclass(frozen=True)
class PreviewRow:
    """One training row.

    Attributes:
        tokens: Text of every token; none for an image, nor for a row that is skipped.
        trained: Whether each of them is trained.
        cut: Tokens that ``data.cutoff`` leaves out; all of them where the row is skipped.
    """

    prompt: str
    answer: str
    tokens: tuple[str, ...] = ()
    trained: tuple[bool, ...] = ()
    cut: int = 0


@dataclass(frozen=True)
class Preview:
    """What is made of rows.

    Attributes:
        notes: What was understood, first, and what else there is to know.
        cutoff: Longest row in tokens.
        rows: Training rows of one client.
        lengths: Client → tokens of its training rows.
        skipped: Client → rows of all splits whose prompt fills the cut-off.
        cut: Client → rows of all splits whose end is cut off.
    """

    notes: tuple[str, ...]
    template: str
    cutoff: int
    rows: tuple[PreviewRow, ...]
    tasks: dict[int, str]
    train: dict[int, int]
    validation: dict[int, int]
    test: dict[int, int]
    lengths: dict[int, list[int]]
    skipped: dict[int, int]
    cut: dict[int, int]


def preview(config: RunConfig, client: int, count: int) -> Preview:
    """Read rows as a run does, and show some of one client."""
    config, federation = _rows(config)
    if client not in federation.clients:
        raise UserError(f"--client {client}: {federation.source} has clients {listed(federation.ids)}")
    wanted, clients = federation.clients[client].train[:count], federation.clients.items()
    notes, rows = federation.notes, tuple(PreviewRow(row.instruction, row.output) for row in wanted)
    examples: dict[int, ClientExamples] = {}
    if config.model.task != "image_classification":
        name = resolve_source(config.model.name)
        tokenizer = load_tokenizer(name, not config.classifies)
        config, more = read_settings(config, federation, SimpleNamespace(config=load_about(name)), tokenizer)
        encoder = text_encoder(config, tokenizer)
        examples = {c: encode_client(encoder, data) for c, data in clients}
        rows = tuple(_row(encoder.example(row), row, tokenizer) for row in wanted)
        notes = (notes[0], *more, *notes[1:], *left_out(examples, config.data.cutoff))
    none = ClientExamples((), (), (), {})
    read = {c: examples.get(c, none) for c in federation.ids}
    return Preview(
        notes,
        config.data.template,
        config.data.cutoff,
        rows,
        tasks={c: data.train[0].task for c, data in clients},
        train={c: len(data.train) for c, data in clients},
        validation={c: len(data.validation) for c, data in clients},
        test={c: len(data.test) for c, data in clients},
        lengths={c: [len(example) for example in mine.train] for c, mine in read.items()},
        skipped={c: sum(mine.skipped.values()) for c, mine in read.items()},
        cut={c: sum(mine.cut.values()) for c, mine in read.items()},
    )


def _rows(config: RunConfig) -> tuple[RunConfig, Federation]:
    """The rows of all clients; of rows that nobody has yet, all as one client's."""
    rows, data = Rows(), config.data
    found = rows.read(data)
    if (
        isinstance(found, Federation)
        or data.clients
        or found.by
        or data.partition.by == "column"
        or data.partition.file
    ):
        return load_rows(config, rows)
    whole = load_as_it_is(data, config.seed)
    first, *others = whole.notes
    one = replace(whole, notes=(f"{first}; nobody's yet, data.clients=N deals them", *others))
    if config.classifies and not config.model.labels:
        labels = labels_of(one, Federation({}, one.source))
        config = config.having("model", labels=labels)
    return config, one


def _row(example: Example | None, row: Row, tokenizer: Any) -> PreviewRow:
    if example is None:
        return PreviewRow(row.instruction, row.output, cut=1)
    ids = (*example.prompt, *example.answer)
    trained = {place for place, _ in example.supervised} if example.answer else set()
    prompt = tokenizer.decode(example.prompt, clean_up_tokenization_spaces=False)
    marks = tuple(place in trained for place in range(len(ids)))
    return PreviewRow(prompt, example.row.output, tuple(token_texts(tokenizer, ids)), marks, example.cut)


_TIMED, _LOOKED_AT = 3, 1000
"""Steps that are timed; rounds that are planned, for which all others are taken to be like them."""


@dataclass(frozen=True)
class Estimate:
    """Cost of a run.

    Attributes:
        steps: Optimiser steps of the longest client in all rounds.
        seconds_per_step: Of one step of all clients that take part.
        scoring_seconds: Scoring in all, if answers are as long as allowed, as they are before training.
        cohort: Clients on the model at a time.
        peak_memory: Bytes, after the largest step of the run and the longest prompts.
        bytes_up: Uploads of one round, all clients.
    """

    steps: int
    seconds_per_step: float
    seconds: float
    scoring_seconds: float
    cohort: int
    peak_memory: dict[str, int]
    bytes_up: int


def estimate(experiment: Experiment) -> Estimate:
    """Find the run's largest step, take it, time some ordinary steps, and answer the longest prompts.

    Row order and participation follow from the seed, so every step of the run is known; tokens are the measure of
    its time.
    """
    federation = experiment.config.federation
    experiment = experiment.with_cohort(federation.cohort or experiment.fitting_cohort)
    largest: Sequence[Plan] = ()
    first: Sequence[Plan] = ()
    steps = tokens = 0
    looked_at = min(federation.rounds, _LOOKED_AT)
    for number in range(1, looked_at + 1):
        longest = 0
        for part in filter(None, _rounds_cohorts(experiment, number)):
            longest = max(longest, *(len(plan.steps) for plan in part))
            tokens += _tokens(part)
            first = first or [replace(plan, steps=plan.steps[:_TIMED]) for plan in part]
            largest = max(largest, _largest_step(part), key=_tokens)
        steps += longest
    steps, tokens = steps * federation.rounds // looked_at, tokens * federation.rounds // looked_at
    seconds = _seconds_per_token(experiment, largest, first) * tokens if tokens else 0.0
    scoring = _scoring_seconds(experiment)
    size = 4 * experiment.sent * max(int(federation.fraction * len(experiment.examples)), 1)
    cohort = cohort_size(experiment.config.federation, len(experiment.examples))
    return Estimate(steps, seconds / max(steps, 1), seconds, scoring, cohort, peak_memory(), size)


def _seconds_per_token(experiment: Experiment, largest: Sequence[Plan], first: Sequence[Plan]) -> float:
    """Take the largest step, for the memory, and time the first ones; moments that clients keep are there by then."""
    kept, _ = _train(experiment, largest, {})
    if experiment.config.training.optimizer_state == "persist":
        _train(experiment, largest, kept)
    started = time.perf_counter()
    _, phases = _train(experiment, first, {})
    return (time.perf_counter() - started) / max(1, phases * _tokens(first))


def _rounds_cohorts(experiment: Experiment, number: int) -> Iterator[list[Plan]]:
    config = experiment.config
    chosen = sample_clients(experiment.trainers, experiment.method.fraction(number), config.seed, number)
    for part in cohorts(chosen, cohort_size(config.federation, len(chosen))):
        plans = [plans_of(experiment, client, number) for client in part]
        yield [replace(mine[0], steps=sum((plan.steps for plan in mine), ())) for mine in plans if mine]


def _largest_step(plans: Sequence[Plan]) -> list[Plan]:
    steps = range(max(len(plan.steps) for plan in plans))
    taken = [[replace(plan, steps=plan.steps[s : s + 1]) for plan in plans if s < len(plan.steps)] for s in steps]
    return max(taken, key=_tokens)


def _tokens(plans: Iterable[Plan]) -> int:
    return sum(plan.tokens for plan in plans)


def _train(
    experiment: Experiment, plans: Sequence[Plan], known: Mapping[int, ClientState]
) -> tuple[dict[int, ClientState], int]:
    """Take the steps in every phase of a round; the states after them, and the number of phases."""
    by_client = {plan.client: plan for plan in plans}
    states = PerClient(by_client, lambda client: known.get(client) or experiment.initial_state(client))
    model, settings, count = experiment.resident.model, experiment.settings, len(by_client)
    number = min(2, experiment.config.federation.rounds)  # the first round may have fewer phases
    phases = len(settings.method.phases(number))

    def each(client: int) -> list[Plan]:
        return [by_client[client]] * phases

    results = run_clients(model, list(by_client), states, {}, each, settings=settings, round_=number, cohort=count)
    return {result.state.client: result.state for result in results}, phases


def _scoring_seconds(experiment: Experiment) -> float:
    """Answer the first batch of the first cohort, its longest rows, and take it for all."""
    config = experiment.config
    clients = experiment.federation.ids[: cohort_size(config.federation, len(experiment.examples))]
    rows = {
        c: sorted(experiment.examples[c].test, key=len, reverse=True)[: config.evaluation.batch_size] for c in clients
    }
    started = time.perf_counter()
    states = experiment.personalised([experiment.initial_state(c) for c in clients])
    experiment.resident.evaluate(states, rows, experiment.settings.answering, config)
    each = (time.perf_counter() - started) / sum(map(len, rows.values()))
    points = len(config.evaluation.points) if experiment.method.upload(experiment.initial_state(clients[0])) else 1
    scored = sum(points * len(mine.test) + len(mine.validation) for mine in experiment.examples.values())
    return each * scored * -(-config.federation.rounds // config.evaluation.every)


def row_table(experiment: Experiment) -> list[dict[str, Any]]:
    """Rows and tokens of every client."""
    return [
        {
            "client": client,
            "task": experiment.federation.clients[client].train[0].task,
            "train": len(mine.train),
            "validation": len(mine.validation),
            "test": len(mine.test),
            "skipped": sum(mine.skipped.values()),
            "tokens_mean": mean(map(len, mine.train)),
            "tokens_max": max(map(len, mine.train)),
        }
        for client, mine in experiment.examples.items()
    ]
