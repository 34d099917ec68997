"""Comparisons: what is tested against what, jobs, resumption, sweeps and the files they leave."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from fedalt import registry
from fedalt.cli.compare import compare_table
from fedalt.comparisons import compare as comparing
from fedalt.comparisons import jobs
from fedalt.comparisons import jobs as members
from fedalt.comparisons.compare import collect, compare, plan
from fedalt.comparisons.statistics import half_width, paired
from fedalt.comparisons.sweep import Point, parse_axis, points, sweep
from fedalt.comparisons.tables import (
    EQUAL,
    WHO,
    Grid,
    Score,
    budget_grid,
    columns,
    conditions,
    finding,
    gain_grid,
    markdown,
    score_grid,
    verdict_grid,
    who,
)
from fedalt.comparisons.tune import at_edge, spans, trials
from fedalt.config import RunConfig, load_config, parse_config, with_settings
from fedalt.config.section import Span
from fedalt.data.load import load_federation
from fedalt.errors import UserError
from fedalt.evaluation.metrics import measures, score
from fedalt.methods.registry import Variant, title_of
from fedalt.runs import setup
from fedalt.runs.events import read_events
from fedalt.runs.setup import load_resident
from fedalt.start import run_one
from micro import CLIENTS, data_folder, labelled_table, left_behind, settings, shared_classifier
from pooled import dying, leaving
from support import METHODS

QUICK = {"federation__rounds": 1, "training__local_epochs": 1}
METHOD_NAMES = ("local", "fedit", "fedalt")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(**changes: Any) -> RunConfig:
    return parse_config(settings(Path("unused"), **(QUICK | changes)), "settings")


def quiet(event: Any) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Three methods, two seeds, two rounds."""
    out = tmp_path_factory.mktemp("comparison")
    values = config(federation__rounds=2, training__local_epochs=3)
    return out, compare(values, METHOD_NAMES, (0, 1), out, if_exists="ask", sink=quiet)


# --------------------------------------------------------------------------------------------------------- what is said


def test_gains_and_harm_are_by_client(done: Any) -> None:
    methods = done[1]["methods"]
    local = methods["local"]["per_client"]
    for name, block in methods.items():
        assert block["title"] == title_of(name)
        assert block["ci95"] == pytest.approx(
            half_width([sum(v.values()) / CLIENTS for v in block["per_seed"].values()])
        )
        gains = {client: score - local[client] for client, score in block["per_client"].items()}
        assert block["gain_per_client"] == pytest.approx(gains)
        assert block["harmed_clients"] == [client for client, gain in gains.items() if gain < 0]
        assert block["harmed"] == len(block["harmed_clients"])
        assert block["per_client"][block["worst_client"]] == min(block["per_client"].values())
        assert block["scoring_seconds"] > 0
        assert block["peak_memory"] > 1e6
    assert methods["local"]["harmed"] == 0


def test_who_gained_is_told_by_rows(done: Any) -> None:
    out, comparison = done
    asked = measures(config().evaluation, False)
    rows: dict[str, dict[str, list[float]]] = {}
    for name in ("local", "fedit"):
        for client in comparison["tasks"]:
            files = [out / f"{name}-seed{seed}" / "results" / f"eval_client{client}_round2.jsonl" for seed in (0, 1)]
            lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
            values = [[score([one], asked)[comparison["metric"]] for one in mine] for mine in lines]
            rows.setdefault(name, {})[client] = [sum(pair) / 2 for pair in zip(*values, strict=True)]
    block = comparison["methods"]["fedit"]
    for client, mine in rows["fedit"].items():
        apart = [a - b for a, b in zip(mine, rows["local"][client], strict=True)]
        assert block["gain_per_client"][client] == pytest.approx(sum(apart) / len(apart))
        assert block["gain_ci95"][client] == pytest.approx(half_width(apart))
    assert "gain_ci95" not in comparison["methods"]["local"]
    *lines, note = who(comparison)
    assert [line.split(" against ")[0] for line in lines] == ["FedIT", "FedALT"]
    assert note == WHO
    assert lines[0] in (out / "comparison.md").read_text(encoding="utf-8")


def test_better_and_worse_are_beyond_the_interval() -> None:
    block = {
        "title": "Ours",
        "harmed": 2,
        "gain_per_client": {"0": 3.0, "1": -4.0, "2": 1.0, "3": 5.0, "4": -1.0},
        "gain_ci95": {"0": 1.0, "1": 2.0, "2": 1.5, "3": 0.5, "4": None},
    }
    known = {"metric": "rouge1", "methods": {"a": block, "centralized": block | {"harmed": None}}}
    assert who(known) == [
        "Ours against training alone: better for 2 of 5 clients (3: +5.0 ± 0.5, 0: +3.0 ± 1.0), "
        "worse for 1 of 5 clients (1: -4.0 ± 2.0), undecided for 2",
        WHO,
    ]
    assert who({"metric": "rouge1", "methods": {"a": block | {"gain_ci95": None}}}) == []


def test_every_method_is_tested_against_fedalt(done: Any) -> None:
    comparison = done[1]
    assert comparison["reference"] == "fedalt"
    assert comparison["methods"]["fedalt"]["against"] is None
    reference = comparison["methods"]["fedalt"]["per_seed"]
    for name in ("local", "fedit"):
        mine = comparison["methods"][name]
        apart = [mean(mine["per_seed"][s][c] - reference[s][c] for s in reference) for c in mine["per_client"]]
        test, expected = mine["against"], paired(apart, 1.0)
        assert (test["difference"], test["p"], test["p_equivalent"], test["clients"]) == (
            pytest.approx(expected.difference),
            pytest.approx(expected.p),
            pytest.approx(expected.p_equivalent),
            CLIENTS,
        )
        assert test["p"] <= test["p_adjusted"] <= min(1, 2 * test["p"])
        assert test["beyond"][0] <= test["difference"] <= test["beyond"][1]
        assert test["sources"].keys() == {"clients", "seeds"}
    assert comparison["margin"] == 1.0


def test_majority_is_a_line_and_no_run(done: Any) -> None:
    """The most frequent training answer of each client, by the run's own metric."""
    out, comparison = done
    block, run = comparison["majority"], load_config(out / "local-seed0" / "config.yaml")
    found = {}
    for client, data in load_federation(run.data, 0).clients.items():
        answer = Counter(row.output for row in data.train).most_common(1)[0][0]
        lines = [{"answer": answer, "reference": row.output, "category": ""} for row in data.test]
        found[str(client)] = score(lines, measures(run.evaluation, False))["rouge1"]
    assert block["per_client"] == pytest.approx(found)
    assert "runs" not in block and "majority" not in comparison["methods"]
    for grid in (score_grid(comparison), verdict_grid(comparison), gain_grid(comparison), budget_grid(comparison)):
        assert grid is not None and grid.below[-1][0] == "majority"
    assert "majority" in printed(compare_table(comparison))


def test_a_loss_has_no_majority(tmp_path: Path) -> None:
    made = compare(
        config(evaluation__metric="answer_loss"), ["local", "fedit"], (0,), tmp_path, if_exists="ask", sink=quiet
    )
    assert (made["majority"], made["margin"]) == (None, None)
    assert "equivalent" not in (tmp_path / "comparison.md").read_text()


def test_budgets_stand_beside_scores(done: Any) -> None:
    out, comparison = done
    for name, block in comparison["methods"].items():
        events = list(read_events(out / f"{name}-seed0" / "events.jsonl"))
        mine = [event for event in events if event["event"] == "client"]
        assert block["steps"] == sum(event["steps"] for event in mine) / CLIENTS
        assert block["tokens"] == sum(event["tokens"] for event in mine) / CLIENTS
        assert block["parameters"] == events[0]["trainable_parameters"] > 0
    assert not any(note.startswith("steps differ") for note in conditions(comparison))
    longer = json.loads(json.dumps(comparison))
    longer["methods"]["fedit"]["steps"] = 175
    assert any(note.startswith("steps differ: FedIT 175, others") for note in conditions(longer))


@pytest.mark.parametrize(
    ("verdicts", "line"),
    [
        (
            {"local": "equivalent", "fedit": "worse"},
            "FedALT: equivalent to training alone within 1 point, 6.2 better than FedIT (ROUGE-1, 8 clients, 2 seeds).",
        ),
        (
            {"local": "better", "fedit": "not worse"},
            "FedALT: 6.2 worse than training alone, not 1 point better than FedIT (ROUGE-1, 8 clients, 2 seeds).",
        ),
        (
            {"local": "undecided", "fedit": "undecided"},
            "FedALT: undecided against training alone and FedIT (ROUGE-1, 8 clients, 2 seeds).",
        ),
    ],
)
def test_the_finding_is_one_sentence(done: Any, verdicts: dict[str, str], line: str) -> None:
    told = json.loads(json.dumps(done[1]))
    for name, word in verdicts.items():
        told["methods"][name]["against"] |= {"verdict": word, "difference": -6.2, "clients": 8}
    assert finding(told) == line
    assert finding(done[1]) in (done[0] / "comparison.md").read_text()


def test_draws_are_crossed_with_seeds(tmp_path: Path) -> None:
    """Clients of a table are dealt anew by each draw; those of a folder draw other rows of their own."""
    source = {"data": labelled_table(header=True), "model": shared_classifier()}
    changes = {"model__task": "sequence_classification", "data__clients": CLIENTS}
    values = parse_config(settings(Path("unused"), **source, **QUICK, **changes), "settings")
    made = compare(values, ["local", "fedit"], (0, 1), tmp_path / "dealt", if_exists="ask", sink=quiet, partitions=2)
    assert (made["dealt"], made["draws"], made["seeds"]) == (True, [0, 1], [0, 1])
    labels = ["0/0", "1/0", "0/1", "1/1"]
    assert list(made["methods"]["local"]["per_seed"]) == list(made["majority"]["per_seed"]) == labels
    other = next(block["against"] for block in made["methods"].values() if block["against"])
    assert other["clients"] == 2 * CLIENTS and other["sources"].keys() == {"clients", "draws", "seeds"}
    rows = {
        (draw, seed): (tmp_path / "dealt" / f"local-seed{seed}-draw{draw}" / "partition.json").read_text()
        for draw in (0, 1)
        for seed in (0, 1)
    }
    clients = {place: json.loads(text)["clients"] for place, text in rows.items()}
    assert clients[0, 0] == clients[0, 1] != clients[1, 0] == clients[1, 1]
    with (tmp_path / "dealt" / "comparison.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["seed"], line["draw"]) for line in lines[:: 2 * CLIENTS]] == [("0", "0"), ("0", "1")] * 2
    assert "2 draws of rows" in (tmp_path / "dealt" / "comparison.md").read_text()


def test_draws_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--partitions: every draw has the same rows of .*data.train_limit"):
        compare(config(), ["local"], (0,), tmp_path / "out", if_exists="ask", sink=quiet, partitions=2)
    made = compare(
        config(data__train_limit=4),
        ["local", "fedit"],
        (0,),
        tmp_path / "few",
        if_exists="ask",
        sink=quiet,
        partitions=2,
    )
    assert not made["dealt"] and made["methods"]["local"]["against"] is None
    assert made["methods"]["fedit"]["against"]["clients"] == CLIENTS


@pytest.mark.parametrize("margin", [0.0, -1.0, float("nan")])
def test_a_margin_is_above_zero(tmp_path: Path, margin: float) -> None:
    with pytest.raises(UserError, match="--margin"):
        compare(config(), ["local"], (0,), tmp_path / "out", if_exists="ask", sink=quiet, margin=margin)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- tuning


def test_tuning_looks_at_validation_rows_and_keeps_the_best(tmp_path: Path) -> None:
    values = config(data__validation_rows=3)
    made = compare(values, ["local", "fedprox"], (0,), tmp_path, if_exists="ask", sink=quiet, tune=3)
    told = json.loads((tmp_path / "tune" / "tune.json").read_text())
    assert made["tuned"] == told and told["trials"] == 3
    for name, keys in (("local", {"training.lr"}), ("fedprox", {"training.lr", "fedprox.mu"})):
        found = told["methods"][name]
        assert len(found["validation"]) == 3
        chosen = load_config(tmp_path / f"{name}-seed0" / "config.yaml")
        best = found["validation"].index(max(found["validation"]))
        trial = load_config(tmp_path / "tune" / f"{name},trial{best}-seed{values.seed}" / "config.yaml")
        assert chosen.training == trial.training and chosen.sections == trial.sections
        assert found["settings"].keys() == (keys if best else set())
    rates = [
        load_config(tmp_path / "tune" / f"{name},trial1-seed{values.seed}" / "config.yaml").training.lr
        for name in ("local", "fedprox")
    ]
    assert rates[0] == rates[1] != values.training.lr
    assert "tuned on validation rows, 3 trials per method: local " in (tmp_path / "comparison.md").read_text()


def test_what_tuning_looks_at() -> None:
    values = config()
    found = spans(values, Variant("fedalt", ""))
    lr = values.training.lr
    assert found == {"training.lr": Span(lr / 10, lr * 10), "fedalt.full_start": Span(values=(False, True))}
    assert "fedalt.full_start" not in spans(values, Variant("fedalt_full_start", "")), "it makes the variant"
    assert "ditto.weight" not in spans(values, Variant("ditto", "", {"ditto.weight": 0.3})), "it was given"
    drawn = [one.settings["training.lr"] for one in trials(found, Variant("fedalt", ""), 0, 50)[1:]]
    assert lr / 10 <= min(drawn) < lr / 5 and lr * 5 < max(drawn) <= lr * 10
    assert at_edge(found, {"training.lr": lr * 9}) == at_edge(found, {"training.lr": lr / 9}) == ["training.lr"]
    assert at_edge(found, {"training.lr": lr, "fedalt.full_start": True}) == []


def test_tuning_needs_validation_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--tune: a client has no validation rows; set data.validation_rows"):
        compare(config(), ["local"], (0,), tmp_path / "out", if_exists="ask", sink=quiet, tune=2)


def test_without_fedalt_the_first_is_the_reference_and_without_local_there_is_no_gain(done: Any) -> None:
    members = [m for m in plan(config(), METHOD_NAMES, (0, 1), done[0], "resume") if m.name == "fedit"]
    alone = collect(members, config())
    assert alone["reference"] == "fedit"
    block = alone["methods"]["fedit"]
    assert (block["gain_over_local"], block["harmed"], block["against"]) == (None, None, None)
    assert "–" in markdown(verdict_grid(alone))
    assert gain_grid(alone) is None


def test_a_row_for_reference_is_not_what_others_are_tested_against(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "REFERENCE_ROWS", ("local",))
    members = [m for m in plan(config(), METHOD_NAMES, (0, 1), done[0], "resume") if m.name != "fedalt"]
    assert collect(members, config())["reference"] == "fedit"


def test_one_seed_has_no_interval(done: Any) -> None:
    members = [m for m in plan(config(), METHOD_NAMES, (0, 1), done[0], "resume") if m.config.seed == 0]
    one = collect(members, config())
    assert one["methods"]["fedalt"]["ci95"] is None
    assert one["methods"]["local"]["against"]["clients"] == CLIENTS
    assert "±" not in markdown(score_grid(one, judged=False))


def test_reference_rows_come_last_and_harm_nobody(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "REFERENCE_ROWS", ("fedit",))
    members = plan(config(), METHOD_NAMES, (0, 1), done[0], "resume")
    comparison = collect(members, config())
    assert comparison["below"] == ["fedit"]
    assert comparison["methods"]["fedit"]["harmed"] is None
    grid = score_grid(comparison)
    assert [row[0] for row in grid.rows] == ["Local", "FedALT"]
    assert [row[0] for row in grid.below] == ["FedIT", "majority"]
    text = markdown(grid)
    assert text.index("| FedALT") < text.index("*for reference*") < text.index("| FedIT")
    shown = printed(compare_table(comparison))
    assert shown.index("FedALT") < shown.index("FedIT")


def test_a_method_without_rounds_costs_nothing() -> None:
    assert comparing._cost([[{"event": "run_started"}]]) == {
        "steps": 0,
        "tokens": 0,
        "parameters": 0,
        "bytes_up": 0,
        "bytes_down": 0,
        "seconds": 0,
        "scoring_seconds": 0,
        "peak_memory": 0,
        "peak_memory_gpu": None,
    }


# ---------------------------------------------------------------------------------------------------------------- files


def test_csv_has_a_line_per_method_seed_and_client(done: Any) -> None:
    out, comparison = done
    with (out / "comparison.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 2 * CLIENTS
    for line in lines:
        seeds = comparison["methods"][line["method"]]["per_seed"]
        assert float(line["score"]) == seeds[line["seed"]][line["client"]]
        local = comparison["methods"]["local"]["per_seed"][line["seed"]][line["client"]]
        assert float(line["gain_over_local"]) == pytest.approx(float(line["score"]) - local)
        assert line["task"] == f"task{line['client']}"


def test_markdown_is_methods_by_tasks_and_then_the_tests(done: Any) -> None:
    out, comparison = done
    text = (out / "comparison.md").read_text()
    first, second, third, fourth = text.split("## ")[1:]
    assert "| method | task0 | task1 | task2 | average | vs FedALT | verdict |" in first
    block = comparison["methods"]["fedalt"]
    average = f"{block['mean']:.1f} ± {block['ci95']:.1f}"
    (row,) = [line for line in first.splitlines() if line.startswith("| FedALT |")]
    assert row.replace("*", "").endswith(f"| {average} | – | reference |")
    assert EQUAL in first, "FFA-LoRA, say, trains half as much"
    gains = [*block["gain_per_client"].values(), block["gain_over_local"]]
    (row,) = [line for line in third.splitlines() if line.startswith("| FedALT |")]
    assert row.replace("**", "") == " | ".join(["| FedALT", *(f"{gain:+.1f}" for gain in gains)]) + " |"
    assert "| Local |" not in third
    assert "vs FedALT" in second
    assert "steps | tokens, k | trained, k | MB up" in fourth
    assert "| reference |" in second
    assert len({line.count("|") for line in second.splitlines() if line.startswith("|")}) == 1
    assert json.loads((out / "comparison.json").read_text()) == comparison


def test_the_best_of_a_column_is_bold_and_text_stays_in_its_cell() -> None:
    grid = Grid(
        "t", ["m", "a|b"], [["x", Score(2.0, "2.0 ± 1")], ["y", Score(1.0, "1.0")]], [["z", Score(9, "9.0")]], ["n"]
    )
    assert grid.best == [None, 2.0]
    assert markdown(grid).splitlines()[2:] == [
        "| m | a\\|b |",
        "| --- | ---: |",
        "| x | **2.0 ± 1** |",
        "| y | 1.0 |",
        "| *for reference* |  |",
        "| z | 9.0 |",
        "",
        "n",
    ]


def test_clients_of_a_task_share_a_column() -> None:
    tasks = {str(i): ("a", "b")[i % 2] for i in range(6)}
    assert columns({"tasks": tasks}) == {"a (3 clients)": ["0", "2", "4"], "b (3 clients)": ["1", "3", "5"]}
    assert columns({"tasks": {"0": "a", "1": ""}}) == {"a": ["0"], "1": ["1"]}
    assert columns({"tasks": {"0": "a", "1": "a"}}) == {"0": ["0"], "1": ["1"]}
    assert columns({"tasks": {str(i): f"t{i}" for i in range(21)}}) == {}


def printed(table: Any, width: int = 100) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(table)
    return console.export_text()


def many(comparison: dict[str, Any], count: int, clients: int) -> dict[str, Any]:
    """The same with copies of methods and clients: as wide as the paper's tables."""
    block = next(b for b in comparison["methods"].values() if b["against"])
    ids = [str(i) for i in range(clients)]
    block |= {"per_client": {c: 50.0 + i for i, c in enumerate(ids)}, "title": "FedALT, no mixer"}
    methods = {f"m{i}": dict(block) for i in range(count)} | {"fedalt": dict(block, against=None, title="FedALT")}
    tasks = {c: f"tiny_{name}" for c, name in zip(ids, LONG, strict=False)}
    constant = comparison["majority"] | {"per_client": block["per_client"]}
    return {**comparison, "tasks": tasks, "methods": methods, "majority": constant}


LONG = ("commonsense", "coreference", "inference", "paraphrase", "reading", "sentiment", "verbalise", "topic")


def test_ten_methods_on_eight_tasks_fit_100_columns(done: Any) -> None:
    text = printed(compare_table(many(json.loads(json.dumps(done[1])), 9, 8)))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    rows = [line for line in text.splitlines() if line.startswith(" FedALT")]
    assert len(rows) == 30, "a line per method in each table: nothing is folded"
    for word in ("commo.", "topic", "average", "verdict", "harmed", "Local"):
        assert word in text


def test_a_few_methods_stand_beside_each_other(done: Any) -> None:
    text = printed(compare_table(done[1]))
    assert "┃ client " in text
    assert EQUAL in text
    for word in ("mean of 2 seeds", "clients harmed", "gain over Local", "vs FedALT", "verdict", "reference", "±"):
        assert word in text


# ----------------------------------------------------------------------------------------------------- jobs, resumption


def test_an_error_in_a_job_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no-such-model") as caught:
        compare(
            config(model__name="./no-such-model"),
            ["local"],
            (0,),
            tmp_path / "out",
            if_exists="ask",
            sink=quiet,
            jobs=2,
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("work", "error", "line"),
    [
        (dying, UserError, r"--jobs: job 0 \(local seed 0\) was killed \(signal 9\).*--resume"),
        (leaving, RuntimeError, r"job 0 \(local seed 0\) ended with status 3"),
    ],
)
def test_a_job_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Any, error: type[Exception], line: str
) -> None:
    monkeypatch.setattr(members, "_job", work)
    with pytest.raises(error, match=line):
        compare(config(), ["local"], (0,), tmp_path / "out", if_exists="ask", sink=quiet, jobs=2)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_comparison_that_was_killed_goes_on(done: Any, tmp_path: Path, jobs: int) -> None:
    """One run has finished, one stands in its first round, one has not started; the end is that of one job."""
    values = config(federation__rounds=2, training__local_epochs=3)
    killed, seen = tmp_path / "killed", list[dict[str, Any]]()

    def kill(event: Any) -> None:
        seen.append(event)
        if event["event"] == "evaluated" and sum(one["event"] == "member" for one in seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(values, METHOD_NAMES, (0,), killed, if_exists="ask", sink=kill)
    assert not (killed / "comparison.json").exists()
    assert not (killed / "fedalt-seed0").exists()
    with pytest.raises(UserError, match="holds a run already"):
        compare(values, METHOD_NAMES, (0,), killed, if_exists="ask", sink=quiet)
    seen.clear()
    made = compare(values, METHOD_NAMES, (0,), killed, if_exists="resume", sink=seen.append, jobs=jobs)
    for name in METHOD_NAMES:
        mine, whole = left_behind(killed / f"{name}-seed0"), left_behind(done[0] / f"{name}-seed0")
        mine[0].pop("config.yaml"), whole[0].pop("config.yaml")  # they name their folders
        assert mine == whole
        assert made["methods"][name]["per_seed"]["0"] == done[1]["methods"][name]["per_seed"]["0"]
    assert {event.get("job") for event in seen} == ({None} if jobs == 1 else {0, 1})
    assert sorted(event["method"] for event in seen if event["event"] == "member") == sorted(METHOD_NAMES)


CODE = '''
import fedalt as fa


@fa.method("pulled_{name}")
class Pulled(fa.Method):
    """FedIT, pulled to where the round began."""

    class Settings(fa.Settings):
        weight: float = 0.5

    def penalty(self, trained, start):
        return self.settings.weight * fa.squared_distance(trained, start)
'''


@pytest.fixture
def registered() -> Iterator[None]:
    """What a test gives a name is gone afterwards."""
    before = dict(registry.METHODS._entries)
    yield
    registry.METHODS._entries = before


@pytest.mark.parametrize(("devices", "jobs"), [(None, 2), ("cpu,cpu", 1)], ids=["jobs", "devices"])
def test_a_method_in_a_file_is_known_to_other_processes(
    tmp_path: Path, registered: None, devices: str | None, jobs: int
) -> None:
    """With settings of its own, and with the numbers of one process."""
    (tmp_path / "mine.py").write_text(CODE.format(name=f"by_{jobs}"))
    mine = with_settings(config(federation__cohort=2), {"method": "mine.py:Pulled", f"pulled_by_{jobs}.weight": 2.0})
    others = with_settings(mine, {"federation.devices": devices})
    seeds = range(jobs)
    compare(mine, ["mine.py:Pulled"], seeds, tmp_path / "one", if_exists="ask", sink=quiet)
    compare(others, ["mine.py:Pulled"], seeds, tmp_path / "spread", if_exists="ask", sink=quiet, jobs=jobs)
    for seed in seeds:
        one, spread = (left_behind(tmp_path / out / f"pulled_by_{jobs}-seed{seed}")[0] for out in ("one", "spread"))
        assert {file for file in one | spread if one.get(file) != spread.get(file)} == {"config.yaml"}


def test_a_method_of_this_session_is_refused_where_others_cannot_see_it(tmp_path: Path, registered: None) -> None:
    exec(CODE.format(name="here"), {"__name__": "__main__"})
    assert registry.METHODS.entry("pulled_here").origin == registry.SESSION
    line = "the method pulled_here was defined in this session, .* give FILE.py:Name"
    with pytest.raises(UserError, match=f"^jobs: {line}"):
        compare(config(), ["local", "pulled_here"], (0,), tmp_path / "out", if_exists="ask", sink=quiet, jobs=2)
    spread = config(method="pulled_here", federation__devices="cpu,cpu")
    with pytest.raises(UserError, match=f"^federation.devices: {line}"):
        run_one(spread, "ask", nullcontext(quiet))
    assert not list(tmp_path.iterdir()), "nothing has begun"


# ----------------------------------------------------------------------------------------------------- names and budget


def test_members_are_checked_before_the_first_starts(tmp_path: Path) -> None:
    for methods, seeds, line in (
        ((), (0,), "--methods: name at least one of"),
        (("local", "fedallt"), (0,), 'did you mean "fedalt"'),
        (("local",), (0, -1), "--seeds -1"),
    ):
        with pytest.raises(UserError, match=line):
            compare(config(), methods, seeds, tmp_path / "out", if_exists="ask", sink=quiet)
    for changes, line in (
        ({"federation__weighting": "uniform"}, "federation.weighting: uniform has no effect on hetlora"),
        ({"lora__init": "per_client"}, "lora.init: per_client .* ffa_lora"),
        ({"lora__ranks": [1, 4, 2]}, "lora.ranks: ffa_lora has no rule"),
    ):
        with pytest.raises(UserError, match=line):
            compare(
                config(**changes), ("local", "hetlora", "ffa_lora"), (0,), tmp_path / "out", if_exists="ask", sink=quiet
            )
    assert not (tmp_path / "out").exists()


def test_a_member_has_the_name_it_was_asked_for(tmp_path: Path) -> None:
    members = plan(config(), ["fedit", "fedit", "local"], [1, 1], tmp_path, "ask")
    assert [(m.name, m.config.seed, m.folder.path.name) for m in members] == [
        ("fedit", 1, "fedit-seed1"),
        ("local", 1, "local-seed1"),
    ]
    assert all(member.from_json(json.loads(json.dumps(member.to_json()))) == member for member in members)


def test_a_budget_is_matched_for_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def matched(config: RunConfig, name: str, layer_sizes: Any, clients: int, by: str) -> RunConfig:
        asked.append((name, clients, by, len(layer_sizes) > 0))
        return config.model_copy(update={"lora": config.lora.model_copy(update={"r": 2})})

    monkeypatch.setattr(jobs, "matched", matched)
    made = compare(config(), ["local", "fedalt"], (0,), tmp_path, if_exists="ask", sink=quiet, budget="bytes")
    assert asked == [("local", CLIENTS, "bytes", True), ("fedalt", CLIENTS, "bytes", True)]
    assert made["budget"] == "bytes"
    assert "r: 2\n" in (tmp_path / "local-seed0" / "config.yaml").read_text()
    text = (tmp_path / "comparison.md").read_text()
    assert "equal bytes" in text and EQUAL not in text


def test_methods_of_a_seed_have_the_same_rows_on_one_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are dealt by the seed; the base is loaded once for all."""
    loaded = []

    def load(config: RunConfig) -> Any:
        loaded.append(config.model.name)
        return load_resident(config)

    monkeypatch.setattr(setup, "load_resident", load)
    source = {"data": labelled_table(header=True), "model": shared_classifier()}
    changes = {"model__task": "sequence_classification", "data__clients": CLIENTS, "data__train_limit": 6}
    values = parse_config(settings(Path("unused"), **source, **QUICK, **changes), "settings")
    compare(values, METHOD_NAMES, (0, 1), tmp_path, if_exists="ask", sink=quiet)
    assert len(loaded) == 1
    dealt = [[(tmp_path / f"{n}-seed{seed}" / "partition.json").read_text() for n in METHOD_NAMES] for seed in (0, 1)]
    assert [len(set(mine)) for mine in dealt] == [1, 1]
    assert dealt[0][0] != dealt[1][0]


# --------------------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("lora.r=4,6,8", ("lora.r", [4, 6, 8])),
        (" lora.init = shared,per_client", ("lora.init", ["shared", "per_client"])),
        ("lora.targets=[q_proj],[q_proj, v_proj]", ("lora.targets", [["q_proj"], ["q_proj", "v_proj"]])),
        ("training.lr=1.0e-3", ("training.lr", [0.001])),
        ("federation.clients=8,16", ("data.clients", [8, 16])),
    ],
)
def test_axes_are_yaml(text: str, axis: Any) -> None:
    assert parse_axis(text) == axis


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("lora.r", "write key.path=value,value"),
        ("=4", "write key.path=value,value"),
        ("lora.r=", "at least one value"),
        ("lora.r=[4", "not valid YAML"),
        ("seed=1,2", "use --seeds"),
        ("method=local", "use --methods"),
    ],
)
def test_axes_that_are_none(text: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        parse_axis(text)


@pytest.mark.parametrize(
    ("axes", "line"),
    [
        ([("lora.rr", [4])], r'^--sweep lora.rr=4: unknown key "lora.rr" \(did you mean "r"\?\)$'),
        ([("lora.r", [4, 0])], r"^--sweep lora.r=0: lora.r = 0: "),
        ([("lora.r", [4, 4])], "lora.r=4 is there twice"),
        ([("lora.r", [4]), ("lora.r", [6])], "--sweep lora.r: given twice"),
        ([("data.clients", [3, 4])], "data.clients: 4 clients asked for.*multiple of 3"),
        ([("data.tasks_per_client", [1, 4])], "data.tasks_per_client: 4 asked for"),
    ],
)
def test_points_are_checked_before_the_first_starts(tmp_path: Path, axes: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        sweep(config(), axes, ["local"], (0,), tmp_path / "out", if_exists="ask", sink=quiet)
    assert not (tmp_path / "out").exists()


def test_points_are_every_combination() -> None:
    made = points(config(), [("lora.r", [2, 4]), ("training.local_epochs", [1, 2])])
    assert [point.name for point in made] == [
        f"lora.r={r},training.local_epochs={epochs}" for r in (2, 4) for epochs in (1, 2)
    ]
    assert [(p.config.lora.r, p.config.training.local_epochs) for p in made] == [(2, 1), (2, 2), (4, 1), (4, 2)]
    assert {p.config.lora.alpha for p in made} == {16}, "stays as configured"


def test_a_value_is_a_safe_folder_name() -> None:
    assert Point({"model.name": "../a b/c"}, config()).name == "model.name=.._a_b_c"


def test_a_sweep(tmp_path: Path) -> None:
    seen: list[str] = []

    def watch(event: Any) -> None:
        seen.append(event["name"] if event["event"] == "point" else "")

    made = sweep(config(), [("lora.r", [2, 4])], ["local", "fedalt"], (0, 1), tmp_path, if_exists="ask", sink=watch)
    assert [name for name in seen if name] == ["lora.r=2", "lora.r=4"]
    assert json.loads((tmp_path / "sweep.json").read_text()) == made
    for point, r in zip(made["points"], (2, 4), strict=True):
        folder = tmp_path / f"lora.r={r}"
        comparison = json.loads((folder / "comparison.json").read_text())
        assert f"r: {r}\n" in (folder / "local-seed0" / "config.yaml").read_text()
        for name in ("local", "fedalt"):
            assert point["methods"][name]["mean"] == comparison["methods"][name]["mean"]
    with (tmp_path / "sweep.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["lora.r"], line["method"]) for line in lines] == [
        (r, name) for r in ("2", "4") for name in ("local", "fedalt")
    ]
    text = (tmp_path / "sweep.md").read_text()
    assert "| method \\\\ lora.r | 2 | 4 |" in text
    block = made["points"][1]["methods"]["fedalt"]
    assert f"{block['mean']:.1f} ± {block['ci95']:.1f}" in text


def test_clients_of_a_sweep_split_the_same_rows(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "rows", clients=2, train=8, test=4)
    values = config(data__source=str(folder))
    made = sweep(values, [("data.clients", [2, 4])], ["local"], (0,), tmp_path / "out", if_exists="ask", sink=quiet)
    assert [point["clients"] for point in made["points"]] == [2, 4]
    rows = [partition_rows(tmp_path / "out" / f"data.clients={n}" / "local-seed0") for n in (2, 4)]
    assert rows[0] == rows[1]


def partition_rows(run: Path) -> dict[str, list[str]]:
    clients = json.loads((run / "partition.json").read_text())["clients"].values()
    return {split: sorted(d for client in clients for d in client[split]) for split in ("train", "test")}


def test_every_shipped_method_has_a_title() -> None:
    assert all(title_of(name) for name in METHODS)
