"""Clients in files of any names, in a column, or nowhere; what could be either is refused with both spellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedalt.config.data import DataConfig, PartitionConfig
from fedalt.data.federation import Federation
from fedalt.data.load import load_as_it_is, load_federation
from fedalt.errors import UserError
from micro import call, data_folder, shared_model


def write(path: Path, name: str, count: int = 20, **more: Any) -> None:
    rows = [{"prompt": f"{name} {i}", "completion": f"{i % 2}", **more} for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")


def load(source: Path, **settings: Any) -> Federation:
    return load_federation(DataConfig(source=str(source), **settings), 0)


def refusal(source: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sizes(federation: Federation) -> list[tuple[int, int]]:
    return [(len(data.train), len(data.test)) for data in federation.clients.values()]


def test_a_file_is_a_client_named_after_it(tmp_path: Path) -> None:
    for name in ("dee.json", "ann.json", "ben.csv", "cid.jsonl"):
        write(tmp_path / name, name)
    made = load(tmp_path)
    assert [data.train[0].task for data in made.clients.values()] == ["ann", "ben", "cid", "dee"]
    assert "a client per file; prompt and completion (prompt → completion); 4 clients: 0 ann, 1 ben, 2" in made.notes[0]
    assert "0.2 of the rows of 4 clients without test rows are held out" in made.notes[1]
    assert sizes(made) == [(16, 4)] * 4
    for data in made.clients.values():
        assert not {row.instruction for row in data.train} & {row.instruction for row in data.test}
    assert sizes(load_as_it_is(DataConfig(source=str(tmp_path)), 0)) == [(16, 4)] * 4
    dealt = load(tmp_path, clients=2, partition=PartitionConfig(by="iid"))
    assert sum(train + test for train, test in sizes(dealt)) == 80


@pytest.mark.parametrize(
    "names",
    [
        "{}_train.json {}_test.csv",
        "{}-training.json {}-dev.json",
        "train/{}.json test/{}.json",
        "{}/train.json {}/test.json",
    ],
)
def test_files_of_a_client_by_split(tmp_path: Path, names: str) -> None:
    for name in ("ann", "ben"):
        train, later = (tmp_path / pattern.format(name) for pattern in names.split())
        write(train, name)
        write(later, f"{name} later", 5)
    made = load(tmp_path)
    assert [data.train[0].task for data in made.clients.values()] == ["ann", "ben"]
    assert sizes(made) == ([(16, 4)] * 2 if "dev" in names else [(20, 5)] * 2)
    assert {len(data.validation) for data in made.clients.values()} == {5 if "dev" in names else 0}


def test_every_client_may_have_a_format_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "ann.json", "ann")
    (tmp_path / "ben.json").write_text(json.dumps([{"text": f"t{i}", "label": i % 2, "id": i} for i in range(20)]))
    made = load(tmp_path)
    assert "1 × prompt and completion (prompt → completion), 1 × text: text; label: label" in made.notes[0]
    assert made.notes[1] == f"{tmp_path}: not read: id"


def test_a_file_that_is_not_there_is_not_asked_of_the_hub(tmp_path: Path) -> None:
    write(tmp_path / "alpaca.json", "a")
    assert "there is no file" in refusal(tmp_path / "alpaka.json") and "alpaca.json" in refusal(
        tmp_path / "alpaka.json"
    )


def test_descriptions_and_unnamed_columns_are_no_rows(tmp_path: Path) -> None:
    for name in ("ann", "ben"):
        (tmp_path / f"{name}.csv").write_text(",prompt,completion\n" + "".join(f"{i},p{i},c{i}\n" for i in range(20)))
    (tmp_path / "dataset_info.json").write_text('{"ann": {"file_name": "ann.csv"}}')
    made = load(tmp_path)
    assert made.notes[1] == f"{tmp_path}: not read: (no name)"
    assert {row.category for row in made.clients[1].train} == {""}


def test_one_file_in_a_folder_is_dealt(tmp_path: Path) -> None:
    write(tmp_path / "all.json", "x", 60)
    assert len(load(tmp_path, clients=3).clients) == 3


def test_splits_beside_other_files_are_asked_for(tmp_path: Path) -> None:
    for name in ("train", "ann"):
        write(tmp_path / f"{name}.json", name, 40)
    line = refusal(tmp_path, clients=2)
    assert "ann.json, train.json" in line and "data.files=splits" in line and "data.files=pool" in line
    assert sum(a + b for a, b in sizes(load(tmp_path, clients=2, files="splits"))) == 40
    assert sum(a + b for a, b in sizes(load(tmp_path, clients=2, files="pool"))) == 80
    assert "data.files: clients asked for, but" in refusal(tmp_path, files="clients")


def test_a_column_of_clients(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"{i % 2}", "client": "xyz"[i % 3]} for i in range(60)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    made = load(path)
    assert "a client for each value of client: 3 clients: 0 x, 1 y, 2 z" in made.notes[0]
    assert [data.test[0].task for data in made.clients.values()] == ["x", "y", "z"]
    line = refusal(path, clients=2)
    assert "data.partition.by=column" in line and "data.partition.by=iid" in line
    assert len(load(path, clients=2, partition=PartitionConfig(by="iid")).clients) == 2
    asked = load(path, partition=PartitionConfig(by="column", column="client"))
    assert asked.clients == made.clients


def test_a_client_of_one_row_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "ann.json", "ann")
    write(tmp_path / "ben.json", "ben", 1)
    assert "1 row; it needs one more to be scored on" in refusal(tmp_path)


def test_names_of_labels_are_those_of_any_client(tmp_path: Path) -> None:
    for name in ("ann", "ben"):
        write(tmp_path / f"{name}.json", name)
    assert load(tmp_path, label_names={"0": "no"}).clients[1].train[0].output in ("no", "1")
    assert 'has the label "2"' in refusal(tmp_path, label_names={"2": "no"})


def test_what_was_understood_is_the_first_line(tmp_path: Path) -> None:
    write(tmp_path / "rows/ann.json", "ann")
    write(tmp_path / "rows/ben.json", "ben")
    for command in (("validate", "--model", shared_model()), ("partition",), ("data", "show")):
        data = [tmp_path / "rows"] if command[0] == "data" else ["--data", tmp_path / "rows"]
        done = call(*command, *data)
        assert done.code == 0, done.err
        assert done.out.startswith(f"{tmp_path / 'rows'}: a client per file; "), done.out


def test_the_seeds_layout_reads_every_format(tmp_path: Path) -> None:
    folder = data_folder(tmp_path, clients=2)
    write(folder / "train" / "local_training_1.json", "ben", secret=1)
    write(folder / "test" / "local_testing_1.jsonl", "ben later", 6)
    made = load(folder)
    assert made.clients[1].train[0].output == "0"
    assert made.notes == (
        f"{folder}: client files; 1 × instruction and output (instruction → output), "
        f"1 × prompt and completion (prompt → completion); 2 clients; 32 train rows, 10 test rows",
        f"{folder}: not read: secret",
    )
