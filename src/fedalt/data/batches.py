"""Batches: the seeded order of each client's rows, and the tensors of one step of a cohort."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedalt.config import TrainingConfig
from fedalt.data.encode import Example, Prompt, laid_out
from fedalt.model.batch_layout import BatchLayout
from fedalt.seeding import derive_key, derive_seed, rng, secret_uniform

_WINDOW = 16
"""Batches whose rows are sorted by length together, with the order ``bucketed``."""


@dataclass(frozen=True)
class Noise:
    """What makes a client's steps private: sampled rows, clipped gradients, Gaussian noise.

    Attributes:
        key: Of whom sampling, dropout and noise can be told; it never leaves the client.
        rate: Probability that a row is in a step.
        expected: Rows in a step on average, by which sums are divided.
        clip: Longest gradient of a row.
        multiplier: Standard deviation of the noise on a sum, as a multiple of ``clip``.
        delta: δ at which ε is counted.
        epsilon: Most that may be spent, or None.
    """

    key: bytes
    rate: float
    expected: float
    clip: float
    multiplier: float
    delta: float
    epsilon: float | None


@dataclass(frozen=True)
class Plan:
    """One client's steps of one round: which of its rows, in which order.

    Attributes:
        steps: Rows of every step; the last step of an epoch may be smaller.
        key: Seed of the client's dropout in this round.
        noise: What makes the steps private, if they are.
    """

    client: int
    steps: tuple[tuple[Example, ...], ...]
    key: int
    noise: Noise | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all steps, prompts included."""
        return sum(len(row) for rows in self.steps for row in rows)


def steps_of(rows: int, config: TrainingConfig) -> int:
    """Steps of a client with so many rows in every phase of a round."""
    return config.max_steps or config.local_epochs * -(-rows // (config.batch_size * config.accumulate))


def plan_round(
    examples: Sequence[Example],
    client: int,
    config: TrainingConfig,
    seed: int,
    round_: int,
    *,
    phase: int = 0,
    noise: Noise | None = None,
) -> Plan:
    """Shuffle a client's rows anew for every epoch, from (seed, round, client, phase) alone.

    ``repeat_order`` restarts the same permutations every round, as the official code does because each round's
    trainer reseeds with 42. A step has the rows of ``accumulate`` batches; with ``max_steps``, epochs go on for so many
    steps. With the order ``bucketed``, rows of like length share a batch: of every 16 batches' rows
    in the shuffled order, sorted by length, batches are cut and put into an order that is the same for all clients,
    so that long batches meet long ones. Only models that cannot pack rows are faster by it.

    With ``noise`` a step has every row with the same probability, by a secret of the client, and may have none.
    """
    if noise is not None:
        noise = replace(noise, key=derive_key(noise.key, client, round_, phase))
        sampled = (
            secret_uniform(derive_key(noise.key, "rows", step), len(examples)) < noise.rate
            for step in range(steps_of(len(examples), config))
        )
        chosen = tuple(tuple(examples[i] for i in mask.nonzero().flatten().tolist()) for mask in sampled)
        return Plan(client, chosen, derive_seed(int.from_bytes(noise.key, "big"), "dropout"), noise)
    steps: list[tuple[Example, ...]] = []
    later = (phase,) if phase else ()
    size, most = config.batch_size * config.accumulate, config.max_steps
    for epoch in count() if most else range(config.local_epochs):
        if most and len(steps) >= most:
            break
        turn = (0 if config.repeat_order else round_, epoch, *later)
        order = torch.randperm(len(examples), generator=rng(seed, "order", turn[0], client, epoch, *later)).tolist()
        rows = [examples[i] for i in order]
        if config.order == "bucketed":
            for at in range(0, len(rows), _WINDOW * size):
                batches = list(_batches(sorted(rows[at : at + _WINDOW * size], key=len), size))
                shuffled = torch.randperm(len(batches), generator=rng(seed, "buckets", *turn, at))
                steps += [batches[i] for i in shuffled.tolist()]
        else:
            steps += _batches(rows, size)
    return Plan(client, tuple(steps[:most]), derive_seed(seed, "dropout", round_, client, *later))


def _batches(rows: Sequence[Example], size: int) -> Iterator[tuple[Example, ...]]:
    return (tuple(rows[at : at + size]) for at in range(0, len(rows), size))


@dataclass(frozen=True)
class Batch:
    """The rows of one step of a cohort, client by client, one after another with nothing between them.

    Attributes:
        inputs: Tokens of all rows; or images.
        rows: Whose they are and how long each is.
        place: Position in ``inputs`` whose logits predict ``target``: a token before an answer's, or a row.
        target: Token, or class, to predict.
        owner: Stack index of the client of every target.
    """

    inputs: Int[Tensor, " t"] | Float[Tensor, "n c h w"]
    rows: BatchLayout
    place: Int[Tensor, " s"]
    target: Int[Tensor, " s"]
    owner: Int[Tensor, " s"]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {name: getattr(self, name).to(device) for name in self.__dataclass_fields__ if name != "rows"}
        return Batch(**moved, rows=self.rows)


def collate(groups: Sequence[Sequence[Example]], keys: Sequence[int] = ()) -> Batch:
    """Lay the rows of a cohort end to end; supervised are tokens of answers only, or the rows' classes."""
    examples = [(owner, example) for owner, group in enumerate(groups) for example in group]
    rows = BatchLayout(tuple(map(len, groups)), tuple(len(example) for _, example in examples), tuple(keys))
    supervised: list[tuple[int, int, int]] = []
    start = 0
    for row, (owner, example) in enumerate(examples):
        if example.answer:
            supervised += [(start + at - 1, token, owner) for at, token in example.supervised]
        else:
            supervised.append((row, example.label, owner))
        start += len(example)
    place, target, owner_ = torch.tensor(supervised).unbind(1)
    inputs = laid_out([value for _, e in examples for value in ((e.image,) if e.image else (e.prompt, e.answer))])
    return Batch(inputs, rows, place, target, owner_)


def cohort_steps(plans: Sequence[Plan], size: int) -> Iterator[list[Batch]]:
    """Step s of the cohort is step s of every client that has one; the others have no rows in it.

    A step comes in parts of ``size`` rows per client.
    """
    for step in range(max(len(plan.steps) for plan in plans)):
        groups = [plan.steps[step] if step < len(plan.steps) else () for plan in plans]
        keys = [derive_seed(plan.key, step) for plan in plans]
        yield [_part(groups, keys, at, size) for at in range(0, max(map(len, groups)), size)]


def _part(groups: Sequence[Sequence[Example]], keys: Sequence[int], at: int, size: int) -> Batch:
    batch = collate([rows[at : at + size] for rows in groups], keys)
    if max(map(len, groups)) <= size:
        return batch
    whole = BatchLayout(tuple(map(len, groups)), tuple(len(row) for rows in groups for row in rows))
    tokens = iter(torch.arange(sum(whole.lengths)).split(list(whole.lengths)))
    each = [[next(tokens) for _ in rows][at : at + size] for rows in groups]
    places = torch.cat([place for mine in each for place in mine])
    return replace(batch, rows=replace(batch.rows, part=(whole, places)))


def pad_prompts(prompts: Sequence[Prompt], pad: int) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"]]:
    """Token ids and attention mask, padded on the left so that answers can go on."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)
