"""Metrics: what is measured of answers and of classes, ours and anybody's; means are taken where shown.

A metric compares answers with references. Most are functions of one row, and a client's score is the mean over its
rows; one with ``corpus=True`` is a function of all rows at once:

    @METRICS.register("length_gap", higher_is_better=False)
    def length_gap(answer: str, reference: str) -> float: ...

    @METRICS.register("distinct", corpus=True, digits=3)
    def distinct(answers: list[str], references: list[str]) -> float: ...

A class is made once, and called in the same way; its settings are ``self.settings``: those of its nested ``Settings``,
or the section ``evaluation``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite, log
from typing import TYPE_CHECKING, Any, Literal

from fedalt.errors import UserError
from fedalt.registry import METRICS, OURS

if TYPE_CHECKING:
    from fedalt.config import EvaluationConfig

_ROUGE = ("rouge1", "rouge2", "rougeL")
_LEAST = 1e-12


@dataclass(frozen=True)
class Metric:
    """What is known of a metric.

    Attributes:
        name: Its name.
        title: Heading in tables; the name when not given.
        task: ``text`` or ``class`` where it suits answers or classes alone.
        corpus: Whether it is a function of all of a client's rows, and not of one.
        reads: What is compared with the reference: the answer or the class that the model chose, the likeliest
            ``option``, or the ``probability`` that the model gave the right class. Rows without it are left out. A
            metric that reads ``loss`` gets the nats of reference answers, and how many tokens they have.
        higher_is_better: Whether more is better.
        points: Whether it runs from 0 to 100.
        unit: What it is counted in, for people; usually nothing.
        digits: Decimals that are shown.
    """

    name: str
    title: str
    task: Literal["text", "class"] | None = None
    corpus: bool = False
    reads: Literal["answer", "option", "probability", "loss"] = "answer"
    higher_is_better: bool = True
    points: bool = False
    unit: str = ""
    digits: int = 1

    def text(self, value: float | None, sign: bool = False) -> str:
        """A score, or a difference of two, as tables show it; a dash for none."""
        return "–" if value is None else f"{value:{'+' if sign else ''}.{self.digits}f}"

    def gain(self, score: float, other: float) -> float:
        """How much better a score is than another one; negative where it is worse."""
        return score - other if self.higher_is_better else other - score

    def better(self, score: float, other: float) -> bool:
        """Whether a score is better than another one."""
        return self.gain(score, other) > 0

    def best(self, scores: Iterable[float]) -> float:
        """The best of some scores."""
        return max(scores) if self.higher_is_better else min(scores)

    def worst(self, scores: Iterable[float]) -> float:
        """The worst of some scores."""
        return min(scores) if self.higher_is_better else max(scores)

    def tail(self, scores: Sequence[float], percent: float) -> float:
        """The percentile, counted from the worst score."""
        return percentile(scores, percent if self.higher_is_better else 100 - percent)


def metric_of(name: str) -> Metric:
    """What is known of a metric; its name alone where its code is not at hand."""
    value, known = METRICS.get(name) if name in METRICS else None, Metric(name, name)
    found = {key: getattr(value, key, default) for key, default in vars(known).items() if key != "name"}
    return Metric(name, **found)


@dataclass(frozen=True)
class Measure:
    """A metric, ready to be called."""

    metric: Metric
    call: Any

    def __call__(self, answers: Any, references: Any) -> float:
        """Its value for one row, or for all rows of a client."""
        with METRICS.blamed(self.metric.name):
            value = self.call(answers, references)
            found = float(value) if isinstance(value, int | float) or hasattr(value, "__float__") else None
        if found is None or not isfinite(found):
            raise UserError(f'metric "{self.metric.name}" returned {value!r}; a score is a finite number')
        return found


def measures(config: EvaluationConfig, classes: bool) -> list[Measure]:
    """What a run measures: all of ours for its task, and what is asked for."""
    ours = [entry.name for entry in METRICS.entries() if entry.origin == OURS]
    asked = [*((config.metric,) if config.metric else ()), *config.metrics]
    suiting = [name for name in ours if metric_of(name).task == ("class" if classes else "text")]
    return [measure_of(name, config) for name in dict.fromkeys((*suiting, *asked))]


def measure_of(name: str, config: EvaluationConfig) -> Measure:
    """A metric, ready to be called."""
    return Measure(metric_of(name), METRICS.make(name, config.section, config))


def score(lines: Sequence[Mapping[str, Any]], asked: Sequence[Measure]) -> dict[str, Any]:
    """Scores of all rows and by category, with counts.

    Args:
        lines: One mapping per row: ``answer``, ``reference``, ``category``, and for some ``option`` or ``probability``.
        asked: What is measured.
    """
    rows = row_scores(lines, asked)

    def block(places: Sequence[int]) -> dict[str, Any]:
        found: dict[str, Any] = {"rows": len(places)}
        for measure in asked:
            name, read = measure.metric.name, [i for i in places if measure.metric.reads in lines[i]]
            if read and measure.metric.corpus:
                found[name] = measure(*map(list, zip(*(_pair(measure, lines[i]) for i in read), strict=True)))
            elif read:
                found[name] = sum(rows[i][name] for i in read) / len(read)
        return found

    categories = sorted({line["category"] for line in lines})
    parts = {c: block([i for i, line in enumerate(lines) if line["category"] == c]) for c in categories}
    return {**block(range(len(lines))), "categories": parts}


def row_scores(lines: Iterable[Mapping[str, Any]], asked: Sequence[Measure]) -> list[dict[str, float]]:
    """What is measured of every row by itself."""
    single = [measure for measure in asked if not measure.metric.corpus]
    return [{m.metric.name: m(*_pair(m, line)) for m in single if m.metric.reads in line} for line in lines]


def _pair(measure: Measure, line: Mapping[str, Any]) -> tuple[Any, Any]:
    reads = measure.metric.reads
    return line[reads], line["tokens" if reads == "loss" else "reference"]


class _Rouge:
    name = ""
    task, points = "text", True
    settings: EvaluationConfig

    def __call__(self, answer: str, reference: str) -> float:
        """The score of one answer."""
        return float(_rouge(answer, reference, self.settings.stemmer)[self.name])


@METRICS.register("rouge1", title="ROUGE-1")
class Rouge1(_Rouge):
    """F1 of the words that answer and reference share.

    Google's rouge_score, whose own tokenizer keeps a to z and 0 to 9 only. For a reference most of whose letters are of
    other scripts, words are those of any script, and every character is one in Chinese, Japanese, Thai and other
    scripts that leave no space between words. ``rouge_tokenizer`` among the scores says which was used.
    ``evaluation.stemmer`` changes the scores of Google's tokenizer.
    """


@METRICS.register("rouge2", title="ROUGE-2")
class Rouge2(_Rouge):
    """F1 of the pairs of neighbouring words that answer and reference share. See ``rouge1``."""


@METRICS.register("rougeL", title="ROUGE-L")
class RougeL(_Rouge):
    """F1 of the longest common subsequence of words of answer and reference. See ``rouge1``."""


@METRICS.register("exact_match", title="exact match", task="text", points=True)
def exact_match(answer: str, reference: str) -> float:
    """Share of answers that equal their reference, spaces at both ends aside."""
    return 100.0 * (answer.strip() == reference.strip())


@METRICS.register("accuracy", task="class", points=True)
def accuracy(answer: str, reference: str) -> float:
    """Share of rows whose most probable class is the right one."""
    return 100.0 * (answer == reference)


@METRICS.register("macro_f1", title="macro-F1", task="class", corpus=True, points=True)
def macro_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean of the classes' F1 scores, over classes among references or choices.

    F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c)
    """
    pairs = list(zip(answers, references, strict=True))
    f1 = [
        2 * sum(a == r == label for a, r in pairs) / sum((a == label) + (r == label) for a, r in pairs)
        for label in sorted({*answers, *references})
    ]
    return 100 * sum(f1) / len(f1)


@METRICS.register(
    "log_loss",
    title="log-loss",
    task="class",
    reads="probability",
    higher_is_better=False,
    unit="nats",
    digits=3,
)
def log_loss(probability: float, reference: str) -> float:
    """Mean of -log p(right class). p counts as 1e-12 at least."""
    return -log(max(probability, _LEAST))


@METRICS.register("option_accuracy", title="option accuracy", task="text", reads="option", points=True)
def option_accuracy(option: str, reference: str) -> float:
    """Share of rows whose most likely option is the right one.

    For rows whose instruction lists OPTIONS; needs ``evaluation.options=sum`` or ``mean``, which says how an option's
    tokens are added up.
    """
    return float(exact_match(option, reference))


@METRICS.register(
    "answer_loss",
    title="answer loss",
    task="text",
    corpus=True,
    reads="loss",
    higher_is_better=False,
    unit="nats",
    digits=3,
)
def answer_loss(nats: Sequence[float], tokens: Sequence[int]) -> float:
    """Mean of -log p over the tokens of all reference answers, the end of sequence included, as in training.

    ``evaluation.loss=true`` measures it.
    """
    return sum(nats) / sum(tokens)


def metrics_in(scores: Mapping[str, Any]) -> dict[str, float]:
    """The metrics among other things, in the order of tables."""
    return {name: scores[name] for name in METRICS.names() if name in scores}


def group_mean(values: Iterable[float]) -> float | None:
    """Mean of some clients' scores; nothing for no client."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def over_clients(scores: Sequence[float], name: str) -> dict[str, float]:
    """Mean, worst and 10th percentile of the clients' scores by a metric; a tenth of clients are worse than that."""
    metric = metric_of(name)
    return {"mean": sum(scores) / len(scores), "worst": metric.worst(scores), "p10": metric.tail(scores, 10)}


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile with linear interpolation between neighbours, as NumPy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


GOOGLE, ANY_SCRIPT = "rouge_score", "any script"
"""Tokenizers of ROUGE."""
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@lru_cache(maxsize=1 << 12)
def is_latin(text: str) -> bool:
    """Whether Google's tokenizer suits a text: at least half of its letters are Latin, or it has none."""
    names = [unicodedata.name(letter, "") for letter in text if letter.isalpha()]
    return 2 * sum(name.startswith(("LATIN", "FULLWIDTH LATIN")) for name in names) >= len(names)


def rouge_tokenizer(references: Iterable[str]) -> str:
    """Which tokenizer ROUGE uses for some references."""
    kinds = [is_latin(reference) for reference in references]
    others = kinds.count(False)
    if others in (0, len(kinds)):
        return ANY_SCRIPT if others else GOOGLE
    return f"{GOOGLE}; {ANY_SCRIPT} for {others} of {len(kinds)} rows"


class AnyScript:
    """Words of letters, digits and marks of any script; characters where a script leaves no space between words."""

    def tokenize(self, text: str) -> list[str]:
        """The words."""
        parts = []
        for letter in text.lower():
            kept = unicodedata.category(letter)[0] in "LNM"
            alone = letter.isalpha() and unicodedata.name(letter, "").startswith(_UNSPACED)
            parts.append(f" {letter} " if alone else letter if kept else " ")
        return "".join(parts).split()


@lru_cache(maxsize=1)
def _rouge(answer: str, reference: str, stemmer: bool) -> dict[str, float]:
    """All three at once: they are asked for one after another."""
    found = _scorer(stemmer, is_latin(reference)).score(reference, answer)
    return {name: 100 * float(found[name].fmeasure) for name in _ROUGE}


@lru_cache
def _scorer(stemmer: bool, latin: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(_ROUGE), use_stemmer=stemmer, tokenizer=None if latin else AnyScript())
