"""Partitioners from a file outside the package, and settings of ``data.partition`` that change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedalt.config import parse_config
from fedalt.data.load import load_federation
from micro import call, refused, settings, shared_data, write_yaml

pytestmark = pytest.mark.usefixtures("forgotten")

FILE = """
import numpy as np
from fedalt.registry import PARTITIONERS
from fedalt.config.section import Section


def halves(rows, clients, rng):
    return np.array_split(rng.permutation(len(rows)), clients)


@PARTITIONERS.register("first_share")
class FirstShare:
    class Settings(Section):
        share: float = 0.5

    def __call__(self, rows, clients, rng):
        cut = int(self.settings.share * len(rows))
        return [range(cut), *np.array_split(np.arange(cut, len(rows)), clients - 1)]


@PARTITIONERS.register("by_alpha", uses=("alpha",))
class ByAlpha:
    def __call__(self, rows, clients, rng):
        cut = round(self.settings.alpha * len(rows))
        return [list(range(cut)), list(range(cut, len(rows)))]


def forgetful(rows, clients, rng):
    return [[0], [0, 2]]


def few(rows, clients, rng):
    return [list(range(len(rows)))]


def broken(rows, clients, rng):
    return rows.colours
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def dealt(by: str, clients: int, *more: Any) -> tuple[str, ...]:
    options = ("--set", f"data.partition.by={by}", "--set", "data.partition.min_rows=1", "--clients", clients)
    return ("partition", "--data", str(shared_data()), *map(str, options), *map(str, more))


def sizes(done: Any) -> list[int]:
    return [sum(counts["train"].values()) for counts in done.json["counts"].values()]


def test_a_function_deals_the_same_rows_for_the_same_seed(file: Path) -> None:
    first, *others = (
        call(*dealt(f"{file}:halves", 2, "--seed", seed, "--json", "--out", file.parent / str(place)))
        for place, seed in enumerate((1, 1, 2))
    )
    assert [done.code for done in (first, *others)] == [0, 0, 0], first.err
    assert sizes(first) == [18, 18]
    assert "rows dealt to 2 clients: halves; by task" in first.json["notes"][0]
    written = [json.loads((file.parent / str(i) / "partition.json").read_text()) for i in range(3)]
    assert written[0]["clients"] == written[1]["clients"] != written[2]["clients"]
    assert written[0]["settings"]["partition"]["by"] == "halves"


def test_a_class_has_its_settings(file: Path) -> None:
    assert sizes(call(*dealt(f"{file}:FirstShare", 3, "--json"))) == [18, 9, 9]
    given = ("--set", f"plugins=[{file}]", "--set", "first_share.share=0.75", "--json")
    assert sizes(call(*dealt("first_share", 3, *given))) == [27, 5, 4]
    line = refused(*dealt("first_share", 3, *given, "--set", "first_share.shere=1"))
    assert 'unknown key "first_share.shere" (did you mean "share"?)' in line


def test_a_class_without_settings_has_those_of_the_section(file: Path) -> None:
    done = call(*dealt(f"{file}:ByAlpha", 2, "--set", "data.partition.alpha=0.25", "--json"))
    assert sizes(done) == [9, 27]
    assert not any("without effect" in note for note in done.json["notes"])


def test_a_run_and_its_continuation_in_jobs(file: Path, tmp_path: Path) -> None:
    values = settings(tmp_path / "run", data__clients=2, data__partition={"by": f"{file}:halves", "min_rows": 1})
    config = write_yaml(tmp_path / "x.yaml", values)
    done = call("compare", config, "--methods", "local,fedit", "--seeds", 0, "--rounds", 1, "--jobs", 2)
    assert done.code == 0, done.err
    run = tmp_path / "run" / "fedit-seed0"
    assert "by: halves" in (run / "config.yaml").read_text()
    assert call("run", "--out", run, "--resume", "--rounds", 2).code == 0
    file.write_text(FILE + "# changed\n")
    assert "mine.py has changed since; put the old code back" in refused("run", "--out", run, "--resume", "--rounds", 3)


@pytest.mark.parametrize(
    ("by", "line"),
    [
        ("{file}:halfes", 'partitioner: {file} has no "halfes" (did you mean "halves"?); it has'),
        ("dirichlett", '(did you mean "dirichlet"?)'),
        ("{file}:forgetful", 'partitioner "forgetful" dealt row 0 2 times; each of rows 0 to 35 goes to one client'),
        ("{file}:few", 'partitioner "few" made parts for 1 clients; there are 2'),
        ("{file}:broken", "partitioner \"broken\" of file {file}:37: AttributeError: 'TrainingRows' object has no"),
    ],
)
def test_what_a_partitioner_may_not_do(file: Path, by: str, line: str) -> None:
    assert line.format(file=file) in refused(*dealt(by.format(file=file), 2))


# ---------------------------------------------------------------------------------------- settings that change nothing


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"by": "iid", "alpha": 0.3}, "data.partition.alpha; iid does not use them"),
        ({"by": "dirichlet", "alpha": 0.3}, None),
        ({"by": "sc_dir", "dir_level": "superclass", "superclasses_per_client": 1, "alpha": 9.0}, None),
        (
            {"by": "quantity", "alpha": 9.0, "classes_per_client": 3, "dir_level": "superclass"},
            "data.partition.classes_per_client, data.partition.dir_level; quantity does not use them",
        ),
        ({"alpha": 0.3, "seed": 1}, "data.partition.alpha, data.partition.seed; the clients of"),
        ({"column": "category", "test": "shared"}, "data.partition.column, data.partition.test; the clients of"),
        ({}, None),
    ],
)
def test_settings_that_change_nothing_get_a_note(options: dict[str, Any], note: str | None) -> None:
    partition = {"min_rows": 2, **options} if "by" in options else options
    config = parse_config({"data": {"source": str(shared_data()), "partition": partition}}, "x")
    found = [text for text in load_federation(config.data, 0).notes if "without effect" in text]
    assert len(found) == (note is not None)
    assert note is None or f"without effect: {note}" in found[0]


def test_with_a_partition_file_all_else_changes_nothing(tmp_path: Path) -> None:
    done = call(*dealt("iid", 2, "--out", tmp_path))
    assert done.code == 0, done.err
    file = tmp_path / "partition.json"
    again = call(*dealt("iid", 2, "--set", f"data.partition.file={file}", "--json"))
    assert any(
        "without effect: data.partition.by, data.partition.min_rows; clients and" in n for n in again.json["notes"]
    )
