"""Metrics from a file outside the package: by row and over all rows, with settings, and where lower is better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from micro import METRICS, call, events, fedalt, refused, settings, shared_data, write_yaml

pytestmark = pytest.mark.usefixtures("forgotten")

FILE = """
from fedalt.registry import METRICS
from fedalt.config.section import Section


def length_gap(answer: str, reference: str) -> float:
    return abs(len(answer) - len(reference))

length_gap.higher_is_better = False


@METRICS.register("shared_letters", corpus=True, title="letters", digits=2)
class SharedLetters:
    class Settings(Section):
        least: int = 1

    def __call__(self, answers, references):
        assert len(answers) == len(references)
        letters = set("".join(answers)) & set("".join(references))
        return len(letters) if len(letters) >= self.settings.least else 0.0


@METRICS.register("right", task="class")
def right(answer, reference):
    return float(answer == reference)


def broken(answer, reference):
    return 1 / 0


def nan(answer, reference):
    return float("nan")


NUMBER = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def yaml(folder: Path, **changes: Any) -> Path:
    quick = {"federation__rounds": 2, "evaluation__every": 1, "training__local_epochs": 1}
    return write_yaml(folder / "x.yaml", settings(folder / "run", **quick | changes))


def test_a_function_of_a_row_by_reference(file: Path, tmp_path: Path) -> None:
    done = call("run", yaml(tmp_path), "--set", f"evaluation.metric={file}:length_gap", "--json")
    assert done.code == 0, done.err
    assert done.json["metric"] == "length_gap"
    clients = done.json["last"]["clients"]
    assert tuple(clients["0"]) == (*METRICS, "length_gap")
    values = [clients[c]["length_gap"] for c in clients]
    assert (done.json["last"]["worst"], done.json["last"]["mean"]) == (max(values), pytest.approx(sum(values) / 3))
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert f"- {file}" in config and "metric: length_gap" in config
    (start,) = (event for event in events(tmp_path / "run") if event["event"] == "run_started")
    assert list(start["code"]) == ["metric length_gap"]
    again = fedalt("evaluate", tmp_path / "run", "--json")  # in a process that has not seen the reference
    assert again.json["clients"]["0"]["length_gap"] == clients["0"]["length_gap"]
    assert call("report", tmp_path / "run").code == 0
    assert "length_gap" in (tmp_path / "run" / "report.html").read_text()
    file.write_text(FILE + "# another digest\n")
    assert "mine.py has changed since; put the old code back" in refused(
        "run", "--out", tmp_path / "run", "--resume", "--rounds", 3
    )


def test_lower_is_better_picks_the_best_round(file: Path, tmp_path: Path) -> None:
    config = yaml(tmp_path, data__source=str(shared_data(validation=4)), federation__rounds=3)
    done = call("run", config, "--set", f"evaluation.metric={file}:length_gap", "--json")
    assert done.code == 0, done.err
    means: dict[int, list[float]] = {}
    for event in events(tmp_path / "run"):
        if event["event"] == "scores" and event["point"] == "validation":
            means.setdefault(event["round"], []).append(event["length_gap"])
    assert len(means) == 3 and len({sum(values) for values in means.values()}) > 1
    assert done.json["best_validation"]["round"] == min(means, key=lambda number: (sum(means[number]), number))


def test_a_comparison_where_lower_is_better(file: Path, tmp_path: Path) -> None:
    """The lowest mean is marked, a gain is Local's score less the method's, and harmed is who has more than Local."""
    config = yaml(tmp_path, federation__rounds=1, training__local_epochs=2)
    metric = ("--set", f"evaluation.metric={file}:length_gap")
    done = call("compare", config, *metric, "--methods", "local,fedit,zero_shot", "--seeds", "0,1", "--jobs", 2)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "run" / "comparison.json").read_text())
    local, fedit = found["methods"]["local"], found["methods"]["fedit"]
    gains = {c: local["per_client"][c] - fedit["per_client"][c] for c in local["per_client"]}
    assert any(gains.values())
    assert fedit["gain_per_client"] == pytest.approx(gains)
    assert fedit["gain_over_local"] == pytest.approx(local["mean"] - fedit["mean"])
    assert fedit["harmed"] == sum(round(gain, 9) < 0 for gain in gains.values())
    assert fedit["per_client"][fedit["worst_client"]] == max(fedit["per_client"].values())
    text = (tmp_path / "run" / "comparison.md").read_text()
    best = min(local["mean"], fedit["mean"])
    assert f"**{best:.1f} ±" in text and "lower is better" in text and "lower is better" in done.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Down and to the left is better" in page


def test_a_class_over_all_rows_with_settings(file: Path, tmp_path: Path) -> None:
    chosen = ("--set", f"evaluation.metrics={file}:SharedLetters")
    done = call("run", yaml(tmp_path), *chosen, "--json")
    assert done.code == 0, done.err
    assert done.json["metric"] == "rouge1"
    letters = {c: scores["shared_letters"] for c, scores in done.json["last"]["clients"].items()}
    assert max(letters.values()) > 0
    section = {"shared_letters": {"least": 99}}
    config = write_yaml(tmp_path / "y.yaml", settings(tmp_path / "other") | section | {"plugins": [str(file)]})
    strict = call("run", config, "--rounds", 1, "--set", "evaluation.metrics=[shared_letters]", "--json")
    assert strict.code == 0, strict.err
    assert {scores["shared_letters"] for scores in strict.json["last"]["clients"].values()} == {0.0}
    frozen = call("run", "--out", tmp_path / "other", "--resume", "--set", "shared_letters.least=1", "--rounds", 2)
    assert frozen.code == 2 and "another run" in frozen.error


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("evaluation.metric={file}:lenght_gap", 'metric: {file} has no "lenght_gap" (did you mean "length_gap"?)'),
        ("evaluation.metric={file}:NUMBER", "metric: NUMBER in {file} is not a function or a class"),
        ("evaluation.metric={file}:right", ": right does not suit the task causal_lm; use rouge1"),
        ("evaluation.metric=rogue1", '(did you mean "rouge1"?)'),
        ("evaluation.metric=nowhere.py:x", "nowhere.py: no such file"),
        ("evaluation.metric=log_loss", "log_loss does not suit the task causal_lm"),
        ("evaluation.metrics=option_accuracy", "option_accuracy needs evaluation.options"),
        ("shared_letters.leest=2", 'unknown key "shared_letters.leest" (did you mean "least"?)'),
    ],
)
def test_typos(file: Path, tmp_path: Path, change: str, line: str) -> None:
    config = yaml(tmp_path, plugins=[str(file)])
    assert line.format(file=file) in refused("run", config, "--set", change.format(file=file))
    assert not (tmp_path / "run").exists()


def test_a_metric_that_fails_or_returns_no_number_says_whose_it_is(file: Path, tmp_path: Path) -> None:
    at = FILE.split("\n").index("    return 1 / 0") + 1
    line = refused("run", yaml(tmp_path), "--set", f"evaluation.metric={file}:broken")
    assert line == f'metric "broken" of file {file}:{at}: ZeroDivisionError: division by zero'
    line = refused("run", yaml(tmp_path), "--overwrite", "--set", f"evaluation.metric={file}:nan")
    assert line == 'metric "nan" returned nan; a score is a finite number'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('METRICS.register("rouge1")(max)', 'metric "rouge1" of session: fedalt has one of this name'),
        ('METRICS.register("rows")(max)', 'metric "rows" of session: the name means something else here'),
        ('METRICS.register("x", higher_is_beter=False)', '(did you mean "higher_is_better"?)'),
        ('METRICS.register("data")(Own)', 'something registered has settings in a section "data"'),
        ('METRICS.register("fedalt")(Own)', "which is that of the method of fedalt; choose another name"),
    ],
)
def test_collisions(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "taken.py"
    own = "class Own:\n    class Settings(Section):\n        x: int = 1\n"
    file.write_text(f"from fedalt.registry import METRICS\nfrom fedalt.config.section import Section\n{own}{text}\n")
    assert line in refused("run", yaml(tmp_path, plugins=[str(file)], pf2lora={}))
