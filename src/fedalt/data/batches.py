"""Batches: the seeded order of each client's rows, and the padded tensors of one step of a cohort."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fedalt.data.encode import Example
from fedalt.model.rowmap import RowMap
from fedalt.seeding import derive_seed, rng

Prompt = tuple[int, ...]
"""Token ids that an answer follows."""


@dataclass(frozen=True)
class Plan:
    """One client's steps of one round: which of its rows, in which order.

    Attributes:
        client: Client id.
        steps: Rows of every step; the last step of an epoch may be smaller.
        key: Seed of the client's dropout in this round.
    """

    client: int
    steps: tuple[tuple[Example, ...], ...]
    key: int


def plan_round(
    examples: Sequence[Example], client: int, epochs: int, batch_size: int, seed: int, round_: int, repeat_order: bool
) -> Plan:
    """Shuffle a client's rows anew for every epoch, from (seed, round, client) alone.

    ``repeat_order`` restarts the same permutations every round, as the official code does because each round's
    trainer reseeds with 42.
    """
    steps = []
    for epoch in range(epochs):
        generator = rng(seed, "order", 0 if repeat_order else round_, client, epoch)
        order = torch.randperm(len(examples), generator=generator).tolist()
        steps += [tuple(examples[i] for i in order[at : at + batch_size]) for at in range(0, len(order), batch_size)]
    return Plan(client, tuple(steps), derive_seed(seed, "dropout", round_, client))


@dataclass(frozen=True)
class Batch:
    """The rows of one step of a cohort, right-padded, client by client.

    Attributes:
        input_ids: Token ids.
        attention_mask: True where a token stands.
        row, column: Position of every supervised prediction: logits at (row, column) predict ``target``.
        target: Token to predict.
        owner: Stack index of the client of every target.
        rows: Row map of the batch.
    """

    input_ids: Int[Tensor, "n t"]
    attention_mask: Bool[Tensor, "n t"]
    row: Int[Tensor, " s"]
    column: Int[Tensor, " s"]
    target: Int[Tensor, " s"]
    owner: Int[Tensor, " s"]
    rows: RowMap

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {name: getattr(self, name).to(device) for name in self.__dataclass_fields__ if name != "rows"}
        return Batch(**moved, rows=self.rows)


def collate(groups: Sequence[Sequence[Example]], pad: int, keys: Sequence[int] = ()) -> Batch:
    """Pad the rows of a cohort to one length; only answer tokens are supervised."""
    examples = [example for group in groups for example in group]
    width = max(map(len, examples))
    ids = torch.full((len(examples), width), pad)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    supervised: list[tuple[int, int, int, int]] = []
    owners = [k for k, group in enumerate(groups) for _ in group]
    for n, (example, owner) in enumerate(zip(examples, owners, strict=True)):
        ids[n, : len(example)] = torch.tensor(example.prompt + example.answer)
        mask[n, : len(example)] = True
        start = len(example.prompt) - 1
        supervised += [(n, start + i, token, owner) for i, token in enumerate(example.answer)]
    row, column, target, owner_ = torch.tensor(supervised).unbind(1)
    lengths = tuple(max(map(len, group), default=0) for group in groups)
    rows = RowMap(tuple(map(len, groups)), lengths, tuple(keys))
    return Batch(ids, mask, row, column, target, owner_, rows)


def cohort_steps(plans: Sequence[Plan], pad: int) -> Iterator[Batch]:
    """Step s of the cohort is step s of every client that has one; the others have no rows in it."""
    for step in range(max(len(plan.steps) for plan in plans)):
        groups = [plan.steps[step] if step < len(plan.steps) else () for plan in plans]
        yield collate(groups, pad, [derive_seed(plan.key, step) for plan in plans])


def pad_prompts(prompts: Sequence[Prompt], pad: int, left: bool) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"]]:
    """Token ids and attention mask: left-padded to go on generating, right-padded so that positions count from 0."""
    width = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        gap = width - len(prompt)
        before, after = (gap, 0) if left else (0, gap)
        ids.append([pad] * before + list(prompt) + [pad] * after)
        mask.append([0] * before + [1] * len(prompt) + [0] * after)
    return torch.tensor(ids), torch.tensor(mask)
