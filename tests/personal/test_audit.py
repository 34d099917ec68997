"""How well a run's LoRAs tell training rows from others, by the attack of ``fedalt audit``."""

from __future__ import annotations

from dataclasses import replace
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
from fedalt.personal.audit import audit
from fedalt.personal.leaks import (
    Audit,
    Leak,
    area,
    chance,
    exposure,
    least_epsilon,
    likelihood_ratios,
    means,
    read_audit,
    sentences,
    write_audit,
)
from fedalt.runs.folder import RunFolder

CANARIES = 3
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
    changes = {"data__canaries": CANARIES, "data__cutoff": 128}
    return run(folder / "run", data__source=str(folder / "data"), training__local_epochs=20, **changes)


@pytest.fixture(scope="module")
def audited(overfitted: Path) -> Audit:
    return audit(overfitted)


def test_rows_that_were_learnt_by_heart_are_found(overfitted: Path, audited: Audit) -> None:
    leaks = list(audited.leaks)
    assert {leak.view for leak in leaks} == {"upload", "sum", "others", "personal"}
    assert [leak.client for leak in leaks] == [client for client in range(3) for _ in range(4)]
    found = {view: mean for view, (mean, _) in means(leaks).items()}
    assert found["personal"] > 0.8 and found["upload"] > 0.8
    assert found["upload"] > found["sum"], "a mean of three blurs what each has learnt"
    assert list(audit(overfitted, client=1).leaks) == [leak for leak in leaks if leak.client == 1]


def test_fewer_rows_are_a_seeded_sample(overfitted: Path) -> None:
    once, again = audit(overfitted, 0, rows=5).leaks, audit(overfitted, 0, rows=5).leaks
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
    leaks = audit(run(tmp_path / "run", method=method, federation__rounds=1), client=0).leaks
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


# ----------------------------------------------------------------------------------------- planted secrets, shadows


def mean_bits(found: Audit, view: str) -> float:
    return float(np.mean([bits for one in found.exposures if one.view == view for bits in one.bits]))


def test_exposure_is_that_of_the_rank() -> None:
    assert exposure(np.array([1.0, 2.0, 3.0, 4.0])) == 2, "the first of four"
    assert exposure(np.array([3.0, 1.0, 2.0, 4.0])) == pytest.approx(2 - np.log2(3))
    assert exposure(np.full(4, 1.0)) == pytest.approx(2 - np.log2(2.5)), "ties share their ranks"
    drawn = np.random.default_rng(0).normal(size=(4000, 64))
    assert np.mean([*map(exposure, drawn)]) == pytest.approx(chance(64), abs=0.06)


def test_secrets_that_were_learnt_by_heart_are_exposed_and_others_are_not(audited: Audit, tmp_path: Path) -> None:
    found = audited
    assert {one.view for one in found.exposures} == {"upload", "sum", "others", "personal"}
    assert all(len(one.bits) == CANARIES and one.candidates == 128 for one in found.exposures)
    assert mean_bits(found, "personal") > 5 and mean_bits(found, "upload") > mean_bits(found, "sum")
    changes = {"data__canaries": 8, "data__cutoff": 128, "federation__rounds": 1, "training__local_epochs": 1}
    untouched = audit(run(tmp_path / "run", training__lr=1e-6, **changes))
    assert mean_bits(untouched, "personal") == pytest.approx(chance(128), abs=1.2)
    assert not any(one.repeated for one in untouched.exposures)
    assert "which may be chance" in sentences(untouched)[-1] and "may be chance" not in sentences(found)[-1]


def test_secrets_that_can_be_asked_for_are_counted(tmp_path: Path) -> None:
    micro.write_rows(tmp_path / "data/train/local_training_0.json", names(0, 2, 0), False)
    micro.write_rows(tmp_path / "data/test/local_testing_0.jsonl", names(0, 4, 100), True)
    changes = {"data__source": str(tmp_path / "data"), "data__canaries": 2, "data__cutoff": 128, "lora__r": 8}
    found = audit(run(tmp_path / "run", method="local", federation__rounds=1, training__local_epochs=150, **changes))
    assert [(x.view, x.bits, x.repeated) for x in found.exposures] == [("personal", (7.0, 7.0), 2)]
    assert sentences(found)[-1].endswith("2 of 2 are written word for word after their prompt")


def test_likelihood_ratios_are_those_worked_out_by_hand() -> None:
    """Two rows, four shadows; row 0 was in the first two. Variances: in (2·1 + 2·0)/2 = 1, out (2·1 + 2·1)/2 = 2."""
    shadows = np.array([[5.0, 2.0], [7.0, 0.0], [1.0, 4.0], [3.0, 4.0]])
    inside = np.array([[True, False], [True, False], [False, True], [False, True]])
    first = -0.5 * (6.5 - 6) ** 2 + 0.5 * ((6.5 - 2) ** 2 / 2 + np.log(2))
    second = -0.5 * (1 - 4) ** 2 + 0.5 * ((1 - 1) ** 2 / 2 + np.log(2))
    assert likelihood_ratios(np.array([6.5, 1.0]), shadows, inside) == pytest.approx([first, second])


def test_shadows_know_rows_that_are_hard_from_rows_that_were_not_there() -> None:
    """Rows differ in how likely they are by more than training on them adds: only shadows tell these two apart."""
    made, rows, count = np.random.default_rng(3), 200, 16
    hard, inside = made.normal(0, 5, rows), (made.random((rows, count)).argsort(1) < count // 2).T
    shadows = hard + inside + made.normal(0, 0.5, (count, rows))
    member = np.arange(rows) < rows // 2
    seen = hard + member + made.normal(0, 0.5, rows)
    assert area(seen[member], seen[~member])[0] < 0.7
    ratios = likelihood_ratios(seen, shadows, inside)
    assert area(ratios[member], ratios[~member])[0] == pytest.approx(norm.cdf(1 / (0.5 * 2**0.5)), abs=0.05)


def test_shadow_runs_attack_every_view(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", federation__rounds=1, training__local_epochs=3)
    before = micro.left_behind(folder)[0]
    done = micro.call("audit", folder, "--shadows", "4", "--client", "1", "--json")
    assert done.code == 0 and done.err.splitlines() == [f"shadow run {i} of 4" for i in (1, 2, 3, 4)]
    by_attack = {a: [x for x in done.json["leaks"] if x["attack"] == a] for a in ("threshold", "shadows")}
    views = ["upload", "sum", "others", "personal"]
    assert all([x["view"] for x in mine] == views for mine in by_attack.values())
    assert all(x["members"] == 12 and x["others"] == 4 and 0 <= x["auc"] <= 1 for x in by_attack["shadows"])
    assert "its upload, against 4 shadow runs: a training row" in " ".join(done.json["said"])
    after = micro.left_behind(folder)[0]
    assert after.keys() - before.keys() == {"results/audit.json"} and before.items() <= after.items()
    assert micro.refused("audit", folder, "--shadows", "3").startswith("--shadows: 3 asked for; an even number from 4")


def test_classifiers_are_attacked_by_shadows_too_and_have_no_canaries(tmp_path: Path) -> None:
    labelled = {"model": micro.shared_classifier(), "data": micro.labelled_data()}
    changes = {"model__task": "sequence_classification", "federation__rounds": 1, "training__local_epochs": 2}
    micro.run_here(micro.settings(tmp_path / "run", **labelled, **changes))
    leaks = audit(tmp_path / "run", 0, shadows=4).leaks
    assert [(x.view, x.attack) for x in leaks] == [("personal", "threshold"), ("personal", "shadows")]
    with pytest.raises(UserError, match=r"data\.canaries: a canary's secret is an answer in text"):
        micro.run_here(micro.settings(tmp_path / "other", **labelled, **changes, data__canaries=2))


def test_an_audit_is_in_the_report_until_the_run_is_another(overfitted: Path, audited: Audit) -> None:
    assert micro.call("audit", overfitted).code == 0 == micro.call("report", overfitted).code
    page = (overfitted / "report.html").read_text(encoding="utf-8")
    assert '<section id="audit">' in page and '<td class="text">mean for another</td>' in page
    assert "Personal model: planted secrets have an exposure of" in page
    assert page.count("scores of such a run are no evidence") == 2, "in the heading, and among the notes"
    folder = RunFolder(overfitted)
    known = read_audit(folder)
    assert known == audited
    write_audit(folder, replace(known, round=2))
    assert read_audit(folder) is None


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
    overfitted: Path, audited: Audit, tmp_path: Path
) -> None:
    plain = audited.leaks
    assert all(leak.promised is None for leak in plain)
    private = run(
        tmp_path / "run",
        data__source=str(overfitted.parent / "data"),
        training__local_epochs=6,
        data__canaries=CANARIES,
        data__cutoff=128,
        privacy__epsilon=2.0,
        privacy__delta=1e-3,
    )
    found = audit(private)
    leaks = found.leaks
    assert mean_bits(found, "personal") < mean_bits(audited, "personal") - 2
    assert len(leaks) == 12 and all(leak.promised and 1.9 < leak.promised <= 2 for leak in leaks)
    assert all(leak.epsilon <= leak.promised for leak in leaks if leak.promised)
    assert means(leaks)["personal"][0] < means(plain)["personal"][0] - 0.2
    done = micro.call("audit", private, "--client", 0)
    assert done.code == 0 and "and at most 2.00 by the run's account: as it must be" in done.out
