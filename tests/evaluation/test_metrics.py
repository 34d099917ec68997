"""Scores against values worked out by hand."""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalt.config import EvaluationConfig
from fedalt.evaluation.metrics import (
    group_mean,
    is_latin,
    measures,
    metric_of,
    over_clients,
    percentile,
    rouge_tokenizer,
    score,
)
from micro import METRICS
from support import quick


def score_answer(answer: str, reference: str, stemmer: bool) -> dict[str, float]:
    """One row's scores."""
    found = score([row(answer, reference)], measures(EvaluationConfig(stemmer=stemmer), classes=False))
    return {name: value for name, value in found.items() if name not in ("rows", "categories")}


def row(answer: str, reference: str, category: str = "", **more: float) -> dict[str, Any]:
    return {"answer": answer, "reference": reference, "category": category, **more}


def test_rouge_by_hand() -> None:
    """2 of 3 words and 1 of 2 bigrams of the answer are in the reference of 4 words; the common subsequence is 2."""
    scores = score_answer("the cat sat", "the cat ran fast", stemmer=False)
    assert scores["rouge1"] == pytest.approx(100 * 4 / 7)  # P 2/3, R 2/4
    assert scores["rouge2"] == pytest.approx(100 * 2 / 5)  # P 1/2, R 1/3
    assert scores["rougeL"] == pytest.approx(100 * 4 / 7)
    assert scores["exact_match"] == 0
    assert tuple(scores) == METRICS


def test_word_order_matters_to_rouge_2_and_l_only() -> None:
    scores = score_answer("b a", "a b", stemmer=False)
    assert (scores["rouge1"], scores["rouge2"], scores["rougeL"]) == (100, 0, pytest.approx(50))


def test_repeated_words_count_as_often_as_in_the_reference() -> None:
    assert score_answer("yes yes yes", "yes", stemmer=False)["rouge1"] == pytest.approx(50)  # P 1/3, R 1


def test_the_stemmer_changes_the_score() -> None:
    assert score_answer("running cats", "run cat", stemmer=True)["rouge1"] == 100
    assert score_answer("running cats", "run cat", stemmer=False)["rouge1"] == 0


def test_exact_match_strips_and_keeps_case() -> None:
    assert score_answer(" World\n", "World", stemmer=True)["exact_match"] == 100
    scores = score_answer("world", "World", stemmer=True)
    assert (scores["exact_match"], scores["rouge1"]) == (0, 100)


@pytest.mark.parametrize("answer", ["", "!?", "unrelated"])
def test_no_common_word_scores_zero(answer: str) -> None:
    assert set(score_answer(answer, "the cat", stemmer=True).values()) == {0}


@pytest.mark.parametrize(
    ("answer", "reference", "rouge1"),
    [
        ("世界", "世界", 100),
        ("世人", "世界", 50),
        ("привет мир", "Привет, мир!", 100),
        ("नमस्ते", "नमस्ते दुनिया", pytest.approx(200 / 3)),
        ("สวัสดี", "สวัสดี", 100),
        ("안녕 세상", "안녕", pytest.approx(200 / 3)),
        ("هو", "لا", 0),
        ("hello", "世界", 0),
    ],
)
def test_references_in_other_scripts_have_words_of_their_own(answer: str, reference: str, rouge1: Any) -> None:
    assert score_answer(answer, reference, stemmer=True)["rouge1"] == rouge1


@pytest.mark.parametrize("reference", ["été à Zürich", "42", "", "the word 世界"])
def test_what_google_reads_stays_googles(reference: str) -> None:
    assert is_latin(reference)


def test_the_tokenizer_that_was_used_has_a_name() -> None:
    assert rouge_tokenizer(["a", "b"]) == "rouge_score"
    assert rouge_tokenizer(["世", "界"]) == "any script"
    assert rouge_tokenizer(["a", "世", "界"]) == "rouge_score; any script for 2 of 3 rows"


def test_summary_is_a_mean_over_rows_not_over_categories() -> None:
    rows = [row("a", "a", "news"), row("b", "a", "news"), row("b", "a", "fiction")]
    summary = score(rows, measures(EvaluationConfig(), classes=False))
    assert (summary["rows"], summary["rouge1"]) == (3, pytest.approx(100 / 3))
    assert list(summary["categories"]) == ["fiction", "news"]
    assert summary["categories"]["news"] == {"rows": 2, **dict.fromkeys(METRICS, 50.0), "rouge2": 0.0}
    assert summary["categories"]["fiction"] == {"rows": 1, **dict.fromkeys(METRICS, 0.0)}


def test_means_of_nothing() -> None:
    assert score([], measures(EvaluationConfig(), classes=False)) == {"rows": 0, "categories": {}}
    assert score([], measures(EvaluationConfig(), classes=True)) == {"rows": 0, "categories": {}}
    assert group_mean([]) is None
    assert group_mean(iter([1.0, 2.0])) == 1.5


def test_options_count_where_there_are_some() -> None:
    rows = [row("x", "yes", option=" yes"), row("x", "yes", option="no"), row("x", "yes", "none")]  # type: ignore[arg-type]
    summary = score(rows, measures(EvaluationConfig(), classes=False))
    assert summary["option_accuracy"] == 50
    assert "option_accuracy" not in summary["categories"]["none"]


def test_classes_by_hand() -> None:
    """a: TP 1, FN 1, F1 2/3. b: TP 1, FP 1, F1 2/3. c is a reference only, d is chosen only: F1 0, and both count."""
    chosen = [("a", "a", 0.5), ("d", "a", 0.25), ("b", "b", 1.0), ("b", "c", 0.0)]
    rows = [row(answer, reference, probability=p) for answer, reference, p in chosen]
    scores = score(rows, measures(EvaluationConfig(), classes=True))
    assert list(scores) == ["rows", "accuracy", "macro_f1", "log_loss", "categories"]
    assert scores["accuracy"] == 50
    assert scores["macro_f1"] == pytest.approx(100 * (2 / 3 + 2 / 3 + 0 + 0) / 4)
    assert scores["log_loss"] == pytest.approx((log(2) + log(4) + 0 + 12 * log(10)) / 4), "p = 0 counts as 1e-12"


@quick
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.sampled_from([0, 10, 37.5, 50, 100]))
def test_percentiles_are_those_of_numpy(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-6)


def test_mean_worst_and_tenth_percentile() -> None:
    found = over_clients([90.0, 10.0, 50.0], "rouge1")
    assert (found["mean"], found["worst"]) == (50, 10)
    assert found["p10"] == pytest.approx(18)  # a fifth of the way from 10 to 50


def test_where_lower_is_better_the_worst_is_the_highest() -> None:
    found = over_clients([0.9, 0.1, 0.5], "log_loss")
    assert (found["mean"], found["worst"]) == (pytest.approx(0.5), 0.9)
    assert found["p10"] == pytest.approx(0.82)  # a fifth of the way from .9 to .5
    loss, rouge = metric_of("log_loss"), metric_of("rouge1")
    assert loss.better(0.1, 0.2) and not loss.better(0.2, 0.2) and rouge.better(0.2, 0.1)
    assert (loss.best([2, 1, 3]), rouge.best([2, 1, 3])) == (1, 3)
    assert loss.gain(0.1, 0.3) == pytest.approx(0.2) and rouge.gain(0.1, 0.3) == pytest.approx(-0.2)
    assert (loss.text(0.1234), rouge.text(-12.34, sign=True), rouge.text(None)) == ("0.123", "-12.3", "–")
