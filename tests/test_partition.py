"""``fedalt partition``, and partition.json of a run."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from fedalt.cli import show
from micro import CLIENTS, TRAIN, call, refused, settings, shared_data, write_yaml
from report.test_html import page

DIGITS = ("partition", "--data", "digits", "--clients", 6, "--set", "data.partition.by=dirichlet")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_table_of_clients_and_labels_with_bars(tmp_path: Path) -> None:
    done = call(*DIGITS, "--set", "data.held_out=1")
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if "│" in line]
    assert len(lines) == 6
    assert "5 (held out)" in done.out
    assert "█" in lines[0]
    assert "3 of 10 labels are others" in done.out
    assert "rows dealt to 6 clients: dirichlet, alpha 0.5; by label" in done.out
    assert not list(tmp_path.iterdir()), "nothing is written without --out"
    numbers = [list(map(int, re.findall(r"\d+", line.replace("(held out)", "")))) for line in lines]
    assert all(n[1] == sum(n[3:]) for n in numbers), "labels and others add up to the training rows"


@pytest.mark.parametrize("width", [80, 120])
def test_narrow_tables_show_fewer_labels_and_whole_numbers(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "out", Console(width=width))
    done = call(*DIGITS, "--set", "data.held_out=1", "--set", "data.validation_rows=20")
    assert done.code == 0, done.err
    table = done.out[done.out.index("training rows by") :]
    lines = [line for line in table.splitlines() if "│" in line]
    assert len(lines) == 6 and "…" not in table
    assert max(map(len, table.splitlines())) <= width
    assert all(name in table for name in ("client", "train", "validation", "test", "others", "5 (held out)", "█"))
    numbers = [list(map(int, re.findall(r"\d+", line.replace("(held out)", "")))) for line in lines]
    assert all(n[1] == sum(n[4:]) for n in numbers), "labels and others add up to the training rows"


def test_json_and_files(tmp_path: Path) -> None:
    done = call(*DIGITS, "--json", "--out", "p")
    assert done.code == 0, done.err
    assert done.json["clients"] == list(range(6))
    written = json.loads((tmp_path / "p" / "partition.json").read_text())
    assert written["counts"] == done.json["counts"]
    assert written["settings"]["partition"]["by"] == "dirichlet"
    for client, splits in written["clients"].items():
        for split, digests in splits.items():
            assert sum(written["counts"][client][split].values()) == len(digests)
    assert list(written["counts"]["0"]["train"]) == sorted(written["counts"]["0"]["train"])
    page = (tmp_path / "p" / "partition.html").read_text()
    assert 'id="labels-by-client"' in page
    assert 'id="partition"' in page
    assert "by: dirichlet" in page
    assert "<script src" not in page and "<link" not in page, "one file"
    again = call("partition", "--data", "digits", "--set", "data.partition.file=p/partition.json", "--json")
    assert again.json["counts"] == written["counts"]


def test_the_pictures_numbers_are_the_counts(tmp_path: Path) -> None:
    assert call(*DIGITS, "--set", "data.held_out=1", "--out", "p").code == 0
    counts = json.loads((tmp_path / "p" / "partition.json").read_text())["counts"]
    figures = page(tmp_path / "p" / "partition.html").figures
    [cells] = figures["labels-by-client"]
    labels = [str(n) for n in range(10)]
    assert cells["z"] == [[mine["train"].get(label, 0) for label in labels] for mine in counts.values()]
    drawn = Counter[tuple[str, str]]()
    for bar in figures["partition"]:
        split = "test" if bar["xaxis"] == "x2" else "train"
        for client, rows in zip(bar["y"], bar["x"], strict=True):
            drawn[client.removesuffix(" held out"), split] += rows
            assert bar["name"] == "others" or rows == counts[client.split()[0]][split].get(bar["name"], 0)
    for client, mine in counts.items():
        for split in ("train", "test"):
            assert drawn[client, split] == sum(mine[split].values())


def test_clients_with_tasks_are_shown_as_they_are() -> None:
    done = call("partition", "--data", shared_data(), "--json")
    assert done.code == 0, done.err
    assert [sum(mine["train"].values()) for mine in done.json["counts"].values()] == [TRAIN] * CLIENTS


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    assert "data.clients: say how many" in refused("partition", "--data", "digits")
    assert "data.partition.by=dirichlt: must be iid, dirichlet" in refused(
        "partition", "--set", "data.partition.by=dirichlt"
    )
    assert "1797 training rows" in refused("partition", "--data", "digits", "--clients", 9999)
    (tmp_path / "full").write_text("a file")
    assert "full" in refused(*DIGITS, "--out", "full")
    done = call("partition", "--resume")
    assert done.code == 2
    assert "--resume: no such option" in done.err


def test_a_run_keeps_its_partition_and_leaves_clients_out(tmp_path: Path) -> None:
    changes = {"federation__rounds": 1, "training__local_epochs": 1, "method": "local", "data__held_out": 1}
    config = write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", **changes))
    assert call("run", config).code == 0
    written = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert (list(written["clients"]), list(written["held_out"])) == (["0", "1"], ["2"])
    assert (tmp_path / "run" / "clients" / "1").is_dir()
    assert not (tmp_path / "run" / "clients" / "2").exists()
    changes |= {"data__held_out": 0, "data__partition": {"file": "run/partition.json"}}
    assert call("run", write_yaml(tmp_path / "y.yaml", settings(tmp_path / "again", **changes))).code == 0
    assert not (tmp_path / "again" / "clients" / "2").exists()
    repeated = json.loads((tmp_path / "again" / "partition.json").read_text())
    for name in ("clients", "held_out", "counts"):
        assert repeated[name] == written[name]
