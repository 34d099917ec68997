"""The table of tasks: where each is found, what its records hold, and how one becomes a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SIZES = {"train": 300, "validation": 0, "test": 200}
"""Rows per task and split; FedDPA's federation, from which the paper's is derived, has as many."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """A record that can be put into words.

    Attributes:
        fields: What the wordings of its task name.
        answer: The reference answer.
        options: What may be answered; empty for free text.
        label: What rows are balanced by: the class, or the place of the right option; None for free text.
    """

    fields: Mapping[str, str]
    answer: str
    options: tuple[str, ...] = ()
    label: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies what is asked, however it is worded."""
        return (*self.fields.values(), *self.options)


@dataclass(frozen=True)
class Task:
    """One task of the federation.

    Attributes:
        name: Its name in the paper.
        category: Kind of task.
        hub: Data set on the Hugging Face hub.
        train: Splits that training and validation rows are drawn from.
        test: Splits that test rows are drawn from.
        columns: What records must hold.
        labels: How many labels there are to balance by; 1 for none.
        read: Makes a sample of a record; None of one that has no label or no text.
        config: Configuration of the data set.
        revision: Branch of the hub's repository; its own Parquet files where the data set is a script, which
            ``datasets`` no longer runs.
        aliases: Column names in other editions of the data set → ours.
    """

    name: str
    category: str
    hub: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    columns: tuple[str, ...]
    labels: int
    read: Callable[[Record], Sample | None]
    config: str | None = None
    revision: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)


_PARQUET = "refs/convert/parquet"
_NEWS = ("World", "Sports", "Business", "Science/Technology")
_ENTAILMENT = ("yes", "it is not possible to tell", "no")
_SAME = ("no", "yes")
_SENTENCES = tuple(f"input_sentence_{i}" for i in range(1, 5))
_ENDINGS = ("sentence_quiz1", "sentence_quiz2")


def _classified(names: Sequence[str], label: int, **fields: str) -> Sample | None:
    """A sample of a class, by its number; unlabelled records have another number."""
    return Sample(fields, names[label], tuple(names), names[label]) if label in range(len(names)) else None


def _chosen(options: Sequence[str], right: int, **fields: str) -> Sample | None:
    """A sample whose options are its own, by the place of the right one."""
    stripped = tuple(option.strip() for option in options)
    return Sample(fields, stripped[right], stripped, str(right)) if right in range(len(stripped)) else None


def _news(record: Record) -> Sample | None:
    return _classified(_NEWS, record["label"], text=record["text"])


def _entailment(record: Record) -> Sample | None:
    return _classified(_ENTAILMENT, record["label"], premise=record["premise"], hypothesis=record["hypothesis"])


def _science(record: Record) -> Sample | None:
    choices = record["choices"]
    return _chosen(choices["text"], choices["label"].index(record["answerKey"]), question=record["question_stem"])


def _paraphrase(record: Record) -> Sample | None:
    return _classified(_SAME, record["label"], one=record["sentence1"], other=record["sentence2"])


def _story(record: Record) -> Sample | None:
    story = " ".join(record[name].strip() for name in _SENTENCES)
    return _chosen([record[name] for name in _ENDINGS], int(record["answer_right_ending"]) - 1, story=story)


def _concepts(record: Record) -> Sample | None:
    target = record["target"].strip()
    return Sample({"concepts": ", ".join(record["concepts"])}, target) if target else None


def _mood(record: Record) -> Sample | None:
    """Records say 0 for negative, 2 for neutral (a few test rows only) and 4 for positive."""
    label = {0: 0, 4: 1}.get(record["sentiment"], -1)
    return _classified(("negative", "positive"), label, text=record["text"])


def _pronoun(record: Record) -> Sample | None:
    return _chosen(
        record["candidates"], int(record["label"]), sentence=record["sentence"], pronoun=record["pronoun"].strip()
    )


_TABLE = (
    Task(
        "ag_news_subset",
        "text classification",
        "fancyzhx/ag_news",
        train=("train",),
        test=("test",),
        columns=("text", "label"),
        labels=len(_NEWS),
        read=_news,
    ),
    Task(
        "snli",
        "natural language inference",
        "stanfordnlp/snli",
        train=("train",),
        test=("test",),
        columns=("premise", "hypothesis", "label"),
        labels=len(_ENTAILMENT),
        read=_entailment,
    ),
    Task(
        "openbookqa",
        "reading comprehension",
        "allenai/openbookqa",
        config="main",
        train=("train",),
        test=("test", "validation"),
        columns=("question_stem", "choices", "answerKey"),
        labels=4,
        read=_science,
    ),
    Task(
        "glue_mrpc",
        "paraphrase",
        "nyu-mll/glue",
        config="mrpc",
        train=("train",),
        test=("test", "validation"),
        columns=("sentence1", "sentence2", "label"),
        labels=len(_SAME),
        read=_paraphrase,
    ),
    Task(
        "story_cloze",
        "commonsense",
        "juletxara/xstory_cloze",  # English too; the original is given on request only, as files for --from
        config="en",
        revision=_PARQUET,
        train=("train", "validation"),
        test=("test", "eval"),
        columns=(*_SENTENCES, *_ENDINGS, "answer_right_ending"),
        labels=len(_ENDINGS),
        read=_story,
        aliases={
            **{f"InputSentence{i}": name for i, name in enumerate(_SENTENCES, 1)},
            **{f"RandomFifthSentenceQuiz{i}": name for i, name in enumerate(_ENDINGS, 1)},
            "AnswerRightEnding": "answer_right_ending",
        },
    ),
    Task(
        "common_gen",
        "struct to text",
        "allenai/common_gen",
        train=("train",),
        test=("validation",),  # the test split has no targets
        columns=("concepts", "target"),
        labels=1,
        read=_concepts,
    ),
    Task(
        "sentiment140",
        "sentiment analysis",
        "stanfordnlp/sentiment140",
        revision=_PARQUET,
        train=("train",),
        test=("test",),
        columns=("text", "sentiment"),
        labels=2,
        read=_mood,
    ),
    Task(
        "definite_pronoun_resolution",
        "coreference",
        "community-datasets/definite_pronoun_resolution",
        train=("train",),
        test=("test",),
        columns=("sentence", "pronoun", "candidates", "label"),
        labels=2,
        read=_pronoun,
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _TABLE}
"""Name → task, in the paper's order of clients."""
