"""Draws every task's rows, balanced and disjoint, and writes them as a federation that ``read_folder`` reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path

import torch

from fedalt.data.flan.source import Splits, check_installed, open_splits
from fedalt.data.flan.tasks import TASKS, Sample, Task
from fedalt.data.flan.wording import WORDINGS, instruction
from fedalt.data.rows import FIELDS, Row
from fedalt.errors import UserError, did_you_mean
from fedalt.files import new_folder, write_json, write_json_lines
from fedalt.seeding import rng

_ORDER = ("test", "train", "validation")
"""Splits in the order they are drawn in, so that validation rows change no others."""
_READ = 1000
"""Records that are read at a time."""


@dataclass(frozen=True)
class Prepared:
    """What became of one task.

    Attributes:
        task: Its name.
        category: Kind of task.
        client: The client it went to; none when it was skipped.
        rows: Rows by split.
        notes: What is less than was asked for.
        problem: Why it was skipped.
    """

    task: str
    category: str
    client: int | None
    rows: Mapping[str, int]
    notes: tuple[str, ...] = ()
    problem: str = ""


def build(
    names: Sequence[str],
    out: Path,
    sizes: Mapping[str, int],
    seed: int,
    local: Path | None = None,
    tell: Callable[[Prepared], None] = lambda done: None,
) -> list[Prepared]:
    """Write the rows of some tasks, client i having the i-th of those that can be had.

    Args:
        names: Tasks.
        out: New folder.
        sizes: Rows per task for ``train``, ``test`` and ``validation``.
        seed: Decides which rows, their order and their wording.
        local: Folder with copies of the data sets; the hub when not given.
        tell: Called after every task.

    Raises:
        UserError: An unknown task or one given twice, a folder that holds something, ``datasets`` is not installed, or
            no task could be prepared.
    """
    check_installed()
    tasks = _known(names)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is there already; choose another --out")
    done: list[Prepared] = []
    drawn: list[dict[str, list[Row]]] = []
    for task in tasks:
        try:
            rows, notes = draw(task, open_splits(task, local), sizes, seed)
        except UserError as error:
            done.append(Prepared(task.name, task.category, None, {}, problem=str(error)))
        else:
            counts = {split: len(mine) for split, mine in rows.items()}
            done.append(Prepared(task.name, task.category, len(drawn), counts, notes))
            drawn.append(rows)
        tell(done[-1])
    if not drawn:
        raise UserError(f"{out}: not written, none of {len(tasks)} tasks could be prepared")
    _write(out, drawn)
    return done


def draw(
    task: Task, splits: Splits, sizes: Mapping[str, int], seed: int
) -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """Rows of one task by split, and notes on what is less than was asked for.

    Nothing is asked twice, in one split or in two. Labels are equally frequent as far as there are records.

    Raises:
        UserError: A record is not as it should be, or no row is left for training or testing.
    """
    seen: set[tuple[str, ...]] = set()
    found: dict[str, list[Row]] = {}
    notes: list[str] = []
    for split in (name for name in _ORDER if sizes[name]):
        pool = task.test if split == "test" else task.train
        names = [name for name in pool if name in splits] or sorted(splits)
        samples = _balanced(_samples(task, splits, names, seed), task.labels, sizes[split], seen)
        if not samples:
            raise UserError(f"no record left for {split} rows in {', '.join(names)}")
        notes += _shortage(split, samples, task.labels, sizes[split])
        found[split] = _rows(task, samples, seed, split)
    return found, tuple(notes)


def _known(names: Sequence[str]) -> list[Task]:
    for name in names:
        if name not in TASKS:
            raise UserError(f'--tasks: "{name}" is unknown{did_you_mean(name, TASKS)}; known: {", ".join(TASKS)}')
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice or not names:
        raise UserError(f"--tasks: {twice or 'no task'}{' twice' if twice else ''}; known: {', '.join(TASKS)}")
    return [TASKS[name] for name in names]


def _samples(task: Task, splits: Splits, names: Sequence[str], seed: int) -> Iterator[Sample]:
    """Samples of some splits, each in its own seeded order, read no further than they are wanted."""
    for name in names:
        order = torch.randperm(len(splits[name]), generator=rng(seed, "flan", task.name, name)).tolist()
        for start in range(0, len(order), _READ):
            for record in splits[name].select(order[start : start + _READ]):
                sample = _read(task, record, name)
                if sample and all(text.strip() for text in (sample.answer, *sample.key)):
                    yield sample


def _read(task: Task, record: Mapping[str, object], split: str) -> Sample | None:
    try:
        return task.read(record)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"split {split}: a record is not as expected ({type(error).__name__}: {error})") from None


def _balanced(samples: Iterator[Sample], labels: int, count: int, seen: set[tuple[str, ...]]) -> list[Sample]:
    """The first samples that were not seen before, a label after the other in turns; marks them as seen."""
    kept: dict[str, dict[tuple[str, ...], Sample]] = {}
    share = -(-count // labels)
    for sample in samples:
        mine = kept.setdefault(sample.label, {})
        if sample.key not in seen and len(mine) < count:
            mine.setdefault(sample.key, sample)
        if len(kept) == labels and all(len(some) >= share for some in kept.values()):
            break
    turns = chain.from_iterable(zip_longest(*(kept[label].values() for label in sorted(kept))))
    chosen = [sample for sample in turns if sample is not None][:count]
    seen.update(sample.key for sample in chosen)
    return chosen


def _shortage(split: str, samples: Sequence[Sample], labels: int, count: int) -> list[str]:
    counts = Counter(sample.label for sample in samples)
    notes = [f"{split}: {len(samples)} rows of {count}, there are no more"] if len(samples) < count else []
    if labels > 1 and (len(counts) < labels or max(counts.values()) - min(counts.values()) > 1):
        notes.append(f"{split}: labels are not balanced ({', '.join(f'{k}: {n}' for k, n in sorted(counts.items()))})")
    return notes


def _rows(task: Task, samples: Sequence[Sample], seed: int, split: str) -> list[Row]:
    """The samples in a seeded order, each in a wording drawn for it."""
    generator, wordings = rng(seed, "flan", task.name, "rows", split), WORDINGS[task.name]
    order = torch.randperm(len(samples), generator=generator).tolist()
    drawn = torch.randint(len(wordings), (len(samples),), generator=generator).tolist()
    blank = Row("", "", task.name, task.category)
    return [
        replace(
            blank,
            instruction=instruction(wordings[place], samples[i].fields, samples[i].options),
            output=samples[i].answer,
        )
        for i, place in zip(order, drawn, strict=True)
    ]


def _write(out: Path, drawn: Sequence[Mapping[str, Sequence[Row]]]) -> None:
    with new_folder(out) as folder:
        for client, rows in enumerate(drawn):
            lines = {split: [{f: getattr(row, f) for f in FIELDS} for row in mine] for split, mine in rows.items()}
            write_json(folder / "train" / f"local_training_{client}.json", lines["train"])
            write_json_lines(folder / "test" / f"local_testing_{client}.jsonl", lines["test"])
            if "validation" in lines:
                write_json_lines(folder / "validation" / f"local_validation_{client}.jsonl", lines["validation"])
