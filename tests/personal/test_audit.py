"""How well a run's LoRAs tell training rows from others, by the attack of ``fedalt audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, norm

import micro
from fedalt.errors import UserError
from fedalt.personal.audit import Leak, area, audit, least_epsilon, means

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=12)


@given(SCORES, SCORES)
def test_the_area_is_that_of_mann_and_whitney(one: list[float], other: list[float]) -> None:
    inside, outside = np.array(one), np.array(other)
    auc, spread = area(inside, outside)
    assert auc == pytest.approx(mannwhitneyu(inside, outside).statistic / inside.size / outside.size)
    assert 0 <= spread <= 0.71


def test_the_intervals_hold_as_often_as_they_say() -> None:
    made, hits = np.random.default_rng(0), 0
    for _ in range(400):
        auc, spread = area(made.normal(0.5, 1, 60), made.normal(0, 1, 60))
        hits += abs(auc - 0.638163) < 1.96 * spread  # Phi(0.5 / sqrt 2)
    assert 0.92 < hits / 400 < 0.98


def run(out: Path, **changes: Any) -> Path:
    """Three clients, whose training and test rows are of one kind."""
    settings = {"evaluation__every": 3, "evaluation__max_new_tokens": 2, "training__lr": 0.02, **changes}
    micro.run_here(micro.settings(out, **settings))
    return out


def names(client: int, count: int, first: int) -> list[dict[str, str]]:
    """Questions whose answers follow from nothing, so that only those can be known that were trained on."""
    made = np.random.default_rng([client, first])
    words = ["".join(made.choice(list("abcdefgh"), 6)) for _ in range(count)]
    return [{"instruction": f"name {first + i}?", "output": word} for i, word in enumerate(words)]


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    for client in range(3):
        micro.write_rows(folder / f"data/train/local_training_{client}.json", names(client, 16, 0), False)
        micro.write_rows(folder / f"data/test/local_testing_{client}.jsonl", names(client, 30, 100), True)
    return run(folder / "run", data__source=str(folder / "data"), training__local_epochs=20)


def test_rows_that_were_learnt_by_heart_are_found(overfitted: Path) -> None:
    leaks = audit(overfitted)
    assert {leak.view for leak in leaks} == {"upload", "sum", "others", "personal"}
    assert [leak.client for leak in leaks] == [client for client in range(3) for _ in range(4)]
    found = {view: mean for view, (mean, _) in means(leaks).items()}
    assert found["personal"] > 0.8 and found["upload"] > 0.8
    assert found["upload"] > found["sum"], "a mean of three blurs what each has learnt"
    assert audit(overfitted, client=1) == [leak for leak in leaks if leak.client == 1]


def test_fewer_rows_are_a_seeded_sample(overfitted: Path) -> None:
    once, again = audit(overfitted, 0, rows=5), audit(overfitted, 0, rows=5)
    assert once == again and {(leak.members, leak.others) for leak in once} == {(5, min(5, once[0].others))}


@pytest.mark.parametrize(
    ("method", "views"),
    [
        ("local", {"personal"}),
        ("fedsa_lora", {"personal"}),
        ("fedit", {"upload", "sum", "others", "personal"}),
        ("ffa_lora", {"upload", "sum", "others", "personal"}),
        ("flora", {"upload", "personal"}),
    ],
)
def test_what_can_be_seen_of_each_method(method: str, views: set[str], tmp_path: Path) -> None:
    leaks = audit(run(tmp_path / "run", method=method, federation__rounds=1), client=0)
    assert {leak.view for leak in leaks} == views
    assert all(0 <= leak.low <= leak.auc <= leak.high <= 1 and 0 <= leak.found <= 1 for leak in leaks)


def test_the_command_says_it_in_words(overfitted: Path) -> None:
    done = micro.call("audit", overfitted)
    assert done.code == 0, done.err
    assert "personal model: a training row has the higher score in" in done.out + done.err
    asked = micro.call("audit", overfitted, "--client", 2, "--json")
    assert [leak["view"] for leak in asked.json["leaks"]] == ["upload", "sum", "others", "personal"]
    assert micro.call("audit", overfitted, "--client", 9).error.endswith("no client 9 here; known: [0, 1, 2]")


def test_rows_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    for part in ("train/local_training_0.json", "test/local_testing_0.json"):
        micro.write_rows(tmp_path / "data" / part, names(0, 8, 0), False)
    with pytest.raises(UserError, match="test rows that are not among them"):
        audit(run(tmp_path / "run", data__source=str(tmp_path / "data"), federation__rounds=1))


def test_means_are_over_clients() -> None:
    leaks = [Leak(c, "upload", 5, 5, auc, 0, 1, 0) for c, auc in enumerate((0.5, 0.6, 0.7))]
    mean, half = means(leaks)["upload"]
    assert mean == pytest.approx(0.6) and half == pytest.approx(4.302653 * 0.1 / 3**0.5)


# --------------------------------------------------------------------------------------- against what was promised


def test_the_least_epsilon_holds_as_often_as_it_says() -> None:
    """Scores of a Gaussian mechanism: what is δ-likely at most bounds every attack on it, and an attack comes near."""
    made, mu, delta = np.random.default_rng(1), 2.0, 1e-3
    exact = 8.0  # ε of a sensitivity of 2 standard deviations at this δ: Φ(1 − ε/2) − e^ε Φ(−1 − ε/2) < δ
    assert norm.cdf(mu / 2 - exact / mu) - np.exp(exact) * norm.cdf(-mu / 2 - exact / mu) < delta
    found = [least_epsilon(made.normal(mu, 1, 2000), made.normal(0, 1, 2000), delta) for _ in range(40)]
    assert np.mean(found) > 1.0 and max(found) < exact
    pure = [least_epsilon(*randomised(made, 1.0)) for _ in range(300)]
    assert np.mean([one > 1.0 for one in pure]) <= 0.05 and max(pure) > 0.3


def randomised(made: np.random.Generator, epsilon: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Randomised response, which is exactly (ε, 0) private."""
    truth = 1 / (1 + np.exp(-epsilon))
    return (made.random(200) < truth).astype(float), (made.random(200) > truth).astype(float)


def test_nothing_follows_from_few_rows_or_from_chance() -> None:
    made = np.random.default_rng(2)
    assert least_epsilon(np.array([1.0]), np.array([0.0])) == 0
    assert least_epsilon(made.normal(size=500), made.normal(size=500)) == 0


def test_an_attack_finds_less_than_a_private_run_has_promised_and_more_without_noise(
    overfitted: Path, tmp_path: Path
) -> None:
    plain = audit(overfitted)
    assert all(leak.promised is None for leak in plain)
    private = run(
        tmp_path / "run",
        data__source=str(overfitted.parent / "data"),
        training__local_epochs=6,
        privacy__epsilon=2.0,
        privacy__delta=1e-3,
    )
    leaks = audit(private)
    assert len(leaks) == 12 and all(leak.promised and 1.9 < leak.promised <= 2 for leak in leaks)
    assert all(leak.epsilon <= leak.promised for leak in leaks if leak.promised)
    assert means(leaks)["personal"][0] < means(plain)["personal"][0] - 0.2
    done = micro.call("audit", private, "--client", 0)
    assert done.code == 0 and "by this attack, at most 2.00 by the run's account" in " ".join(
        f"{done.out} {done.err}".split()
    )
