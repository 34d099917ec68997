"""Draws every task's rows, balanced and disjoint, and writes them as a federation that ``read_folder`` reads.

The style is FLAN's: a question around the record's fields, then an ``OPTIONS:`` list where there are options.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch

from fedalt.data.federation import FIELDS, Row
from fedalt.datasets.flan.tasks import TASKS, Sample, Task
from fedalt.errors import UserError, did_you_mean, first_line
from fedalt.files import new_folder, write_json, write_json_lines
from fedalt.seeding import rng

_SAVED = ("dataset_dict.json", "dataset_info.json")
"""What ``save_to_disk`` leaves in a folder."""

Splits = Mapping[str, Any]
"""Name of a split → ``datasets.Dataset``."""


def check_installed() -> None:
    """Refuse to begin without the library that reads data sets."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError("prepare flan needs datasets; install it with: pip install 'fedalt[datasets]'")


def open_splits(task: Task, local: Path | None) -> Splits:
    """All splits of a task that have the columns it needs under the names it knows."""
    place = task.hub if local is None else local / task.name
    if isinstance(place, Path) and not place.is_dir():
        raise UserError(f"{place} is no folder; --from looks for a copy of every data set under its task's name")
    try:
        opened = _saved(place) if isinstance(place, Path) else _from_hub(task)
    except Exception as error:  # whatever the hub, the network or a file gives rise to
        help_ = "" if local else f"; a local copy in DIR/{task.name} can be given with --from DIR"
        raise UserError(f"{place} cannot be opened ({first_line(error)}){help_}") from None
    splits = dict(opened) if isinstance(opened, dict) else {task.train[0]: opened}
    return {name: _named(task, split, f"{place}, split {name}") for name, split in splits.items()}


def _from_hub(task: Task) -> Any:
    from datasets import load_dataset

    return load_dataset(task.hub, task.config, revision=task.revision)


def _saved(path: Path) -> Any:
    from datasets import load_dataset, load_from_disk

    return load_from_disk(path) if any((path / name).is_file() for name in _SAVED) else load_dataset(str(path))


def _named(task: Task, split: Any, where: str) -> Any:
    split = split.rename_columns({old: new for old, new in task.aliases.items() if old in split.column_names})
    missing = next((name for name in task.columns if name not in split.column_names), None)
    if missing is not None:
        have = ", ".join(split.column_names) or "none"
        raise UserError(f'{where}: no column "{missing}"{did_you_mean(missing, split.column_names)}; it has: {have}')
    return split


WORDINGS: dict[str, tuple[str, ...]] = {
    "ag_news_subset": (
        "{text}\n\nWhich section of a newspaper does this belong to?",
        "Read this news item.\n\n{text}\n\nWhat is it about?",
        "Sort the following article by subject.\n\n{text}",
        'An editor must file "{text}" under one heading. Which one fits best?',
        "News: {text}\nTopic?",
    ),
    "snli": (
        'Suppose it is true that "{premise}" Does it follow that "{hypothesis}"?',
        "{premise}\n\nGiven only this, is the next statement true?\n{hypothesis}",
        "Known: {premise}\nClaim: {hypothesis}\nDoes what is known settle the claim?",
        'Someone sees the scene "{premise}" and says "{hypothesis}" Are they right?',
        "First sentence: {premise}\nSecond sentence: {hypothesis}\n\nMay the second be inferred from the first?",
    ),
    "openbookqa": (
        "{question}",
        "Use what you know of elementary science to finish or answer this: {question}",
        "Pick the best continuation or answer.\n\n{question}",
        "Science quiz: {question}\nWhich choice is right?",
    ),
    "glue_mrpc": (
        "{one}\n{other}\n\nDo these two sentences say the same thing?",
        "Compare the sentences.\nA: {one}\nB: {other}\nIs B a paraphrase of A?",
        'Does "{one}" have the same meaning as "{other}"?',
        "Two reporters wrote:\n- first: {one}\n- second: {other}\nDid they report the same facts?",
    ),
    "story_cloze": (
        "{story}\n\nHow does the story end?",
        "Here are four sentences of a story: {story}\nWhich fifth sentence makes sense?",
        "Choose the more plausible ending.\n\n{story}",
        "{story}\nWhat happened then?",
    ),
    "common_gen": (
        "Write one sentence of everyday life that has all of these words in it: {concepts}",
        "Words: {concepts}\nMake a sentence with them.",
        "Describe a common scene in which the following occur together: {concepts}.",
        "{concepts}\n\nTurn this list into a natural sentence.",
    ),
    "sentiment140": (
        "{text}\n\nIs the mood of this tweet good or bad?",
        "Somebody posted: {text}\nHow did they feel?",
        'What sentiment does the message "{text}" express?',
        "Label the feeling behind this short message.\n\n{text}",
    ),
    "definite_pronoun_resolution": (
        '{sentence}\n\nWhom or what does "{pronoun}" stand for?',
        'In the sentence below, "{pronoun}" refers to somebody or something named before. To which?\n{sentence}',
        'Resolve the pronoun "{pronoun}": {sentence}',
        'Sentence: {sentence}\nQuestion: "{pronoun}" means',
    ),
}


def instruction(wording: str, fields: Mapping[str, str], options: Sequence[str]) -> str:
    """The question, and the options below it."""
    question = wording.format_map(fields)
    return "\n".join([question, "", "OPTIONS:", *(f"- {option}" for option in options)]) if options else question


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
    *,
    local: Path | None = None,
    tell: Callable[[Prepared], None] = lambda done: None,
) -> list[Prepared]:
    """Write the rows of some tasks, client i having the i-th of those that can be had."""
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
    write(out, drawn)
    return done


def draw(
    task: Task, splits: Splits, sizes: Mapping[str, int], seed: int
) -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """Rows of one task by split, and notes on what is less than was asked for.

    Nothing is asked twice, in one split or in two. Labels are equally frequent as far as there are records.
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


def write(out: Path, drawn: Sequence[Mapping[str, Sequence[Row]]]) -> None:
    """Every client's rows by split, as ``read_folder`` reads them."""
    with new_folder(out) as folder:
        for client, rows in enumerate(drawn):
            lines = {split: [{f: getattr(row, f) for f in FIELDS} for row in mine] for split, mine in rows.items()}
            write_json(folder / "train" / f"local_training_{client}.json", lines["train"])
            write_json_lines(folder / "test" / f"local_testing_{client}.jsonl", lines["test"])
            if "validation" in lines:
                write_json_lines(folder / "validation" / f"local_validation_{client}.jsonl", lines["validation"])
