"""Limits take a sample that knows every answer; a run that was made with the first rows goes on with them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedalt.config.data import DataConfig
from fedalt.data.clients import sampled
from fedalt.data.federation import ClientData, Federation, Row, nearly_constant
from fedalt.data.load import load_federation
from micro import adapters, call, data_folder, refused, settings, write_rows, write_yaml


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 3))
def test_a_sample_keeps_shares_and_forgets_no_answer(answers: list[str], limit: int, seed: int) -> None:
    places = sampled(answers, limit, seed, "train", 0)
    assert len(places) == min(limit, len(answers)) and places == sorted(set(places))
    assert places == sampled(answers, limit, seed, "train", 0)
    whole, mine = Counter(answers), Counter(answers[i] for i in places)
    if len(whole) <= limit // 2:
        assert mine.keys() == whole.keys()
        assert all(abs(mine[a] - whole[a] * len(places) / len(answers)) <= len(whole) for a in whole)


def test_sorted_files_show_every_answer(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{i}", "output": "no" if i < 150 else "yes"} for i in range(200)]
    for client in (0, 1):
        write_rows(tmp_path / f"train/local_training_{client}.json", rows, lines=False)
        write_rows(tmp_path / f"test/local_testing_{client}.jsonl", rows, lines=True)

    def load(seed: int, **more: Any) -> dict[int, ClientData]:
        return load_federation(DataConfig(source=str(tmp_path), train_limit=40, test_limit=8, **more), seed).clients

    made = load(0)
    assert Counter(row.output for row in made[0].train) == {"no": 30, "yes": 10}
    assert Counter(row.output for row in made[0].test) == {"no": 6, "yes": 2}
    assert made[0].train != made[1].train and made != load(1) and made == load(0)
    assert {row.output for row in load(0, limit_by="first")[0].train} == {"no"}


def test_answers_that_hardly_differ_get_a_note(tmp_path: Path) -> None:
    def client(yes: int, no: int) -> ClientData:
        return ClientData(tuple(Row(f"q{i}", "yes" if i < yes else "no") for i in range(yes + no)))

    made = Federation({0: client(10, 10), 1: client(96, 4), 2: client(20, 0)}, "here")
    assert nearly_constant(made) == (
        'nearly all training answers are one: client 1 ("yes" 96 of 100), client 2 ("yes" 20 of 20)',
    )
    assert nearly_constant(Federation({0: client(10, 10)}, "here")) == ()
    folder = data_folder(tmp_path / "rows", clients=2)
    write_rows(
        folder / "train/local_training_1.json", [{"instruction": f"q{i}", "output": "x"} for i in range(9)], False
    )
    config = write_yaml(tmp_path / "run.yaml", settings(tmp_path / "run", data=folder))
    assert 'note: nearly all training answers are one: client 1 ("x" 9 of 9)' in call("validate", config).out


def without(path: Path, *keys: str) -> None:
    """A YAML file as it was before there were such settings."""
    values = yaml.safe_load(path.read_text())
    for key in keys:
        del values["data"][key]
    path.write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("by", ["folder", "yaml"])
def test_a_run_of_the_first_rows_goes_on_with_them(tmp_path: Path, by: str) -> None:
    later = ("limit_by", "boundary", "files")
    limits: dict[str, Any] = {"data__train_limit": 6, "data__test_limit": 2, "federation__rounds": 2}
    values = settings(tmp_path / "run", data__source=str(data_folder(tmp_path / "rows")), **limits)
    first = write_yaml(tmp_path / "first.yaml", {**values, "data": {**values["data"], "limit_by": "first"}})
    assert call("run", first).code == 0
    whole, known = adapters(tmp_path / "run"), json.loads((tmp_path / "run/partition.json").read_text())["clients"]
    plain = write_yaml(tmp_path / "plain.yaml", values)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    line = refused("run", plain, "--resume", "--set", "data.limit_by=sample")
    assert "checkpoint of another run" in line
    without(tmp_path / "run/config.yaml", *later)
    shutil.rmtree(tmp_path / "run/checkpoints/round_0002")
    done = call("run", *([plain] if by == "yaml" else ["--out", tmp_path / "run"]), "--resume")
    assert done.code == 0, done.err
    assert all((value == whole[name]).all() for name, value in adapters(tmp_path / "run").items())
    assert json.loads((tmp_path / "run/partition.json").read_text())["clients"] == known
    assert "equal to the run's own scores" in call("evaluate", tmp_path / "run").out
