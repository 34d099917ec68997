"""A small closed world with eight instruction tasks: a federation made from a seed, without a download.

Eight clients have one task each. Of more, client i has the task, words and convention of client i % 8, and own rows.

What the clients can *share*: the skill of answering, and what the invented words mean (the base model has seen their
spelling only; each client's training rows use about half of them, its test rows use all).
What they *fight* over: the letter that stands for an answer, set by the dial ``clash``.

Every answer is a *slot*: the position of the right option as the text lists them, or a fixed verdict (yes, no, ...).
A client with shift s writes slot i as letter (i + s) mod 8 of ``ABCDEFGH``: under two different shifts no slot has
the same letter, so what is right for one client is wrong for the other.
"""

from __future__ import annotations

import random

from fedalt.data.federation import ClientData, Federation, Row
from fedalt.datasets.tinyworld.tasks import TASKS, Task
from fedalt.datasets.tinyworld.world import CLIENTS, Draft, Draw, Words, all_words, known_words
from fedalt.errors import UserError

LETTERS = "ABCDEFGH"
LEAVING = (5, 2, 7, 1, 4, 6, 3)
"""The order in which clients leave the common convention as the dial goes up; client 0's own is the common one."""


def shift(client: int, clash: float) -> int:
    """The client's shift: its own id among the first ``round(7 * clash)`` clients of `LEAVING`, else 0 (common)."""
    leavers = LEAVING[: int((CLIENTS - 1) * clash + 0.5)]
    return client if client in leavers else 0


def letter(slot: int, by: int) -> str:
    """The letter for a slot under a shift."""
    return LETTERS[(slot + by) % len(LETTERS)]


SIZES = {"train": 300, "validation": 50, "test": 200}
"""Rows per client, where nothing else is asked for."""
_MOST = 5_000
"""Most rows of one split; every task has that many."""
_PATIENCE = 300
"""How many draws in a row may repeat a known instruction before the world counts as used up."""


def generate(
    seed: int = 0,
    clash: float = 0.5,
    train: int = SIZES["train"],
    validation: int = SIZES["validation"],
    test: int = SIZES["test"],
    *,
    clients: int = CLIENTS,
) -> Federation:
    """Clients with one task each; the same arguments give the same rows on every machine.

    The dial: a client either follows the common convention (slot 0 is ``A``, slot 1 is ``B``, ...) or its own
    (slot i is letter i + id of ``ABCDEFGH``, wrapping round). ``round(7 * clash)`` of the clients 1 to 7 follow their
    own, always the same ones first (`convention.LEAVING`); client 0's own *is* the common one. So at 0 all clients
    agree on every letter, at 1 no two clients agree on any, at 0.5 four follow the common one and four their own.
    The dial changes only that letter in the outputs: instructions, their order, splits, facts and right options
    stay as they are. Client 8 follows what client 0 follows, client 9 client 1, and so on.

    Args:
        seed: What the invented words mean, who holds them, and which rows are drawn.
        clash: Share of the clients 1 to 7 that follow their own convention, in [0, 1].
        train: Training rows per client.
        validation: Validation rows per client, drawn like test rows.
        test: Test rows per client; about half of their invented words are not in the client's training rows.
        clients: How many clients; more than eight share the eight tasks.

    Returns:
        Clients 0, 1, …. No instruction occurs twice, in any split of any client.
    """
    if not 0 <= clash <= 1:
        raise UserError(f"clash = {clash}: must be a number from 0 (one convention) to 1 (every client its own)")
    seen: set[str] = set()
    sizes = {"train": train, "validation": validation, "test": test}
    rows = {client: _client(client, seed, clash, sizes, seen) for client in range(clients)}
    source = f"tinyworld (seed {seed}, clash {clash:g})"
    note = f"{source}: {clients} clients; synthetic rows of a closed world; letters follow each client's convention"
    return Federation(rows, source, (note,))


def _client(client: int, seed: int, clash: float, sizes: dict[str, int], seen: set[str]) -> ClientData:
    kind = client % CLIENTS
    words = {"train": known_words(seed, kind), "validation": all_words(seed), "test": all_words(seed)}
    task, by = TASKS[kind], shift(kind, clash)
    splits = {}
    for split, size in sizes.items():
        drafts = _drafts(task, words[split], random.Random(f"{seed}/{client}/{split}"), size, seen)
        if len(drafts) < size:
            raise UserError(
                f"tinyworld: {size} {split} rows asked for, but for client {client} only {len(drafts)} of {task.name} "
                "are left that no client has; ask for fewer data.clients, or a lower data.train_limit and test_limit"
            )
        splits[split] = tuple(_row(draft, task, by) for draft in drafts)
    return ClientData(**splits)


def _drafts(task: Task, words: Words, rng: random.Random, size: int, seen: set[str]) -> list[Draft]:
    if not 0 <= size <= _MOST:
        raise UserError(f"{size} rows asked for: a split's size must be from 0 to {_MOST}")
    draw, drafts, repeats = Draw(words, rng), list[Draft](), 0
    while len(drafts) < size and repeats <= _PATIENCE:
        draft = task.draft(draw)
        repeats = repeats + 1 if draft.instruction in seen else 0
        if not repeats:
            drafts.append(draft)
            seen.add(draft.instruction)
    return drafts


def _row(draft: Draft, task: Task, by: int) -> Row:
    output = draft.answer.replace("{key}", letter(draft.slot, by))
    return Row(draft.instruction, output, task.name, task.category)
