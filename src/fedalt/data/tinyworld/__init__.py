"""A small closed world with eight instruction tasks, one per client: a federation made from a seed, without a download.

What the clients can *share*: the skill of answering, and what the invented words mean (the base model has seen their
spelling only; each client's training rows use about half of them, its test rows use all).
What they *fight* over: the letter that stands for an answer, set by the dial ``clash``.
"""

from __future__ import annotations

import random

from fedalt.data.rows import ClientData, Federation, Row
from fedalt.data.tinyworld.convention import letter, shift
from fedalt.data.tinyworld.draw import Draft, Draw
from fedalt.data.tinyworld.tasks import TASKS, Task
from fedalt.data.tinyworld.world import Words, all_words, known_words
from fedalt.errors import UserError

__all__ = ["generate"]

_MOST = 5_000
"""Most rows of one split; every task has that many."""
_PATIENCE = 300
"""How many draws in a row may repeat a known instruction before the world counts as used up."""


def generate(seed: int = 0, clash: float = 0.5, train: int = 300, validation: int = 50, test: int = 200) -> Federation:
    """Eight clients with one task each; the same arguments give the same rows on every machine.

    The dial: a client either follows the common convention (slot 0 is ``A``, slot 1 is ``B``, ...) or its own
    (slot i is letter i + id of ``ABCDEFGH``, wrapping round). ``round(7 * clash)`` of the clients 1 to 7 follow their
    own, always the same ones first (`convention.LEAVING`); client 0's own *is* the common one. So at 0 all clients
    agree on every letter, at 1 no two clients agree on any, at 0.5 four follow the common one and four their own.
    The dial changes only that letter in the outputs: instructions, their order, splits, facts and right options
    stay as they are.

    Args:
        seed: What the invented words mean, who holds them, and which rows are drawn.
        clash: Share of the clients 1 to 7 that follow their own convention, in [0, 1].
        train: Training rows per client.
        validation: Validation rows per client, drawn like test rows.
        test: Test rows per client; about half of their invented words are not in the client's training rows.

    Returns:
        Clients 0 to 7. No instruction occurs twice, in any split of any client.

    Raises:
        UserError: ``clash`` outside [0, 1], a size outside [0, 5000], or more rows than the world holds.
    """
    if not 0 <= clash <= 1:
        raise UserError(f"clash = {clash}: must be a number from 0 (one convention) to 1 (every client its own)")
    seen: set[str] = set()
    sizes = {"train": train, "validation": validation, "test": test}
    clients = {client: _client(client, seed, clash, sizes, seen) for client in range(len(TASKS))}
    source = f"tinyworld (seed {seed}, clash {clash:g})"
    return Federation(clients, source, ("synthetic rows of a closed world; letters follow each client's convention",))


def _client(client: int, seed: int, clash: float, sizes: dict[str, int], seen: set[str]) -> ClientData:
    words = {"train": known_words(seed, client), "validation": all_words(seed), "test": all_words(seed)}
    by = shift(client, clash)
    splits = {}
    for split, size in sizes.items():
        drafts = _drafts(TASKS[client], words[split], random.Random(f"{seed}/{client}/{split}"), size, seen)
        splits[split] = tuple(_row(draft, TASKS[client], by) for draft in drafts)
    return ClientData(**splits)


def _drafts(task: Task, words: Words, rng: random.Random, size: int, seen: set[str]) -> list[Draft]:
    if not 0 <= size <= _MOST:
        raise UserError(f"{size} rows asked for: a split's size must be from 0 to {_MOST}")
    draw, drafts, repeats = Draw(words, rng), list[Draft](), 0
    while len(drafts) < size:
        draft = task.draft(draw)
        repeats = repeats + 1 if draft.instruction in seen else 0
        if repeats > _PATIENCE:
            raise UserError(f"{size} rows asked for: the world has only about {len(drafts)} more for {task.name}")
        if not repeats:
            drafts.append(draft)
            seen.add(draft.instruction)
    return drafts


def _row(draft: Draft, task: Task, by: int) -> Row:
    output = draft.answer.replace("{key}", letter(draft.slot, by))
    return Row(draft.instruction, output, task.name, task.category)
