"""Rows without clients: tables, Hugging Face data sets, image folders and digits, and how each can be wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from fedalt.config.data import DataConfig, PartitionConfig
from fedalt.data import load
from fedalt.data.federation import Pool, Row
from fedalt.data.formats.images import ArrayPicture, FilePicture
from fedalt.data.load import load_federation
from fedalt.errors import UserError

CSV = "sentence,label\nfine,1\nbad,0\n"
LABELS = ["negative", "positive"]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(source: Any, **settings: Any) -> Pool:
    pool = load.read(DataConfig(source=str(source), **settings))
    assert isinstance(pool, Pool)
    return pool


def refusal(source: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_federation(DataConfig(source=str(source), **{"clients": 1} | settings), 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def image(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 3), shade).save(path)
    return path


def photo(path: Path, cut: float = 0) -> Path:
    """A JPEG without its last bytes, or without its last part."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), "uint8")).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - int(cut if cut >= 1 else cut * len(whole))])
    return path


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        ("csv", CSV),
        ("csv", "\ufeff" + CSV),
        ("tsv", CSV.replace(",", "\t")),
        ("json", json.dumps([{"sentence": "fine", "label": 1}, {"sentence": "bad", "label": 0}])),
        ("jsonl", '{"sentence": "fine", "label": 1}\n\n{"sentence": "bad", "label": 0}\n'),
    ],
    ids=["csv", "csv with a mark", "tsv", "json", "jsonl"],
)
def test_one_file_in_every_format(tmp_path: Path, ending: str, text: str) -> None:
    pool = read(write(tmp_path / f"mood.{ending}", text))
    assert pool.train == (Row("fine", "1", "mood"), Row("bad", "0", "mood"))
    assert (pool.validation, pool.test) == ((), ())
    assert "a table; text: sentence; label: label; 2 train rows" in pool.notes[0]


@pytest.mark.parametrize("middle", ["validation", "dev", "valid"])
def test_a_folder_of_files(tmp_path: Path, middle: str) -> None:
    for name, line in (("train", "a,1"), (middle, "b,0"), ("test", "c,1")):
        write(tmp_path / f"{name}.csv", f"text,label\n{line}\n")
    pool = read(tmp_path, label_names={0: "no", 1: "yes"})
    assert [rows[0].instruction + rows[0].output for rows in (pool.train, pool.validation, pool.test)] == [
        "ayes",
        "bno",
        "cyes",
    ]


def test_a_tsv_without_a_header_and_with_quotes_in_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "train.tsv", "a \"quoted\t1\nit's\t0\n")
    assert [row.instruction for row in read(tmp_path, columns=("sentence", "label")).train] == ['a "quoted', "it's"]
    line = refusal(path)
    assert "data.label_column: say which column is the label; " in line
    assert 'the columns a "quoted, 1; ' in line
    assert "data.columns names them" in line


def test_a_csv_cell_may_hold_commas_and_newlines(tmp_path: Path) -> None:
    (row,) = read(write(tmp_path / "x.csv", 'text,label\n"a, ""b""\nc",1\n')).train
    assert row.instruction == 'a, "b"\nc'


def test_pairs_are_joined_and_task_and_category_are_taken(tmp_path: Path) -> None:
    text = "premise,hypothesis,label,task,category,source\np,h,yes,nli,pairs,web\n"
    path = write(tmp_path / "x.csv", text)
    assert read(path).train == (Row("p\nh", "yes", "nli", "pairs"),)
    chosen = read(path, text_columns=("hypothesis",), label_column="source")
    assert chosen.train == (Row("h", "web", "nli", "pairs"),)


def test_a_column_of_the_source_can_deal_the_rows(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": i % 2, "site": "ABC"[i % 3]} for i in range(60)]
    write(tmp_path / "train.json", json.dumps(rows))
    write(tmp_path / "test.json", json.dumps(rows[:12]))
    config = DataConfig(source=str(tmp_path), partition=PartitionConfig(by="column", column="site"))
    made = load_federation(config, 0)
    for client, data in made.clients.items():
        assert {int(row.instruction[1:]) % 3 for row in (*data.train, *data.test)} == {client}
        assert (len(data.train), len(data.test)) == (20, 4)


BAD_TABLES: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "no such column": (
        "x.csv",
        CSV,
        {"text_columns": ("sentense",)},
        ['"sentense" (did you mean "sentence"?)', "label"],
    ),
    "no such label": ("x.csv", CSV, {"label_column": "lable"}, ['data.label_column: no column "lable"', '"label"']),
    "no text": ("x.csv", "words,label\na,1\n", {}, ["data.text_columns: say which", "words, label"]),
    "no such site": (
        "x.csv",
        CSV,
        {"partition": PartitionConfig(by="column", column="site")},
        ['data.partition.column: no column "site"'],
    ),
    "too many cells": ("x.csv", f"{CSV}a,b,c\n", {}, ["x.csv:4: 3 cells, but 2 columns: sentence, label"]),
    "open quotes": ("x.csv", 'text,label\n"a,1\n', {}, ["x.csv:", "broken line"]),
    "a column twice": ("x.csv", "text,text\na,1\n", {}, ['x.csv:1: column "text" twice']),
    "empty text": ("x.csv", f"{CSV} ,1\n", {}, ['x.csv:4: "sentence" is empty']),
    "empty label": ("x.csv", f"{CSV}a,\n", {}, ['x.csv:4: "label" is empty']),
    "only a header": ("x.csv", "text,label\n", {}, ["x.csv: no rows"]),
    "an empty file": ("x.json", "", {}, ["x.json: no rows"]),
    "a list for a row": ("x.json", "[[1]]", {}, ["x.json: row 0: a row is a mapping", "found list"]),
    "a column that goes missing": (
        "x.jsonl",
        '{"text": "a", "label": 1}\n{"text": "b"}',
        {},
        ['x.jsonl:2: no "label"'],
    ),
    "a list for a text": ("x.json", '[{"text": ["a"], "label": 1}]', {}, ['"text" is list']),
    "names for a file that has some": ("x.json", "[]", {"columns": ("a",)}, ["data.columns: ", "x.json names its"]),
    "a name for no label": ("x.csv", CSV, {"label_names": {"2": "two"}}, ['has the label "2"', "labels: 0, 1"]),
    "another ending": ("x.txt", CSV, {}, ["x.txt is no folder, and no table (.csv, .tsv, .json, .jsonl"]),
    "no clients": ("x.csv", CSV, {"clients": None}, ["data.clients: say how many clients the 2 rows"]),
    "tasks of a table": ("x.csv", CSV, {"tasks": ("a",)}, ["data.tasks: ", "no clients with tasks"]),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_tables_that_are_wrong(tmp_path: Path, name: str) -> None:
    file, text, settings, pieces = BAD_TABLES[name]
    line = refusal(write(tmp_path / file, text), **settings)
    assert all(piece in line for piece in pieces), line


# ---------------------------------------------------------------------------------------------------- Hugging Face sets


def hub_rows(count: int, unlabelled: bool = False) -> datasets.Dataset:
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=LABELS)})
    labels = [-1 if unlabelled else i % 2 for i in range(count)]
    return datasets.Dataset.from_dict({"sentence": [f"s{i}" for i in range(count)], "label": labels}, features)


def test_class_numbers_become_names(tmp_path: Path) -> None:
    hub_rows(3).save_to_disk(tmp_path / "mood")
    pool = read(tmp_path / "mood")
    assert pool.train[:2] == (Row("s0", "negative", "mood"), Row("s1", "positive", "mood"))
    assert "a Hugging Face data set" in pool.notes[0]


def test_validation_rows_stand_in_for_unlabelled_test_rows(tmp_path: Path) -> None:
    splits = {"train": hub_rows(4), "validation": hub_rows(3), "test": hub_rows(2, unlabelled=True)}
    datasets.DatasetDict({**splits, "extra": hub_rows(1)}).save_to_disk(tmp_path / "glue")
    pool = read(tmp_path / "glue")
    assert list(map(len, (pool.train, pool.validation, pool.test))) == [4, 0, 3]
    assert any("the test rows have no labels and are not used" in note for note in pool.notes)
    assert any("validation rows take the place of test rows" in note for note in pool.notes)
    assert any("splits not used: extra" in note for note in pool.notes)


def test_test_rows_without_a_column_of_labels_are_unlabelled_rows(tmp_path: Path) -> None:
    splits = {"train": hub_rows(4), "test": hub_rows(2).remove_columns("label")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    assert (len(read(tmp_path / "set").train), read(tmp_path / "set").test) == (4, ())
    splits["train"] = splits["train"].rename_column("label", "mood")
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "other")
    assert "data.label_column: say which column is the label" in refusal(tmp_path / "other")
    assert read(tmp_path / "other", label_column="mood").train[1].output == "positive"


def test_a_folder_that_load_dataset_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, count in (("train", 4), ("test", 2)):
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        hub_rows(count).to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    pool = read(tmp_path / "set")
    assert [row.output for row in pool.test] == LABELS
    assert len(pool.train) == 4


@pytest.mark.parametrize(("name", "part"), [("ag_news", None), ("glue", "sst2"), ("some-body/mood.2", None)])
def test_a_data_set_of_the_hub_by_name(name: str, part: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any) -> datasets.DatasetDict:
        asked.append(args)
        return datasets.DatasetDict({"train": hub_rows(4), "test": hub_rows(2)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pool = read(name, config=part)
    assert asked == [(name, part)]
    assert pool.source == (f"{name}/{part}" if part else name)
    assert [row.output for row in pool.test] == LABELS


def test_rows_without_any_label_are_refused(tmp_path: Path) -> None:
    hub_rows(3, unlabelled=True).save_to_disk(tmp_path / "set")
    assert "the training rows have no labels" in refusal(tmp_path / "set")


def test_an_image_column_is_decoded_when_it_is_needed(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=["apple", "pear"]),
            "coarse_label": datasets.ClassLabel(names=["fruit"]),
        }
    )
    pictures = [np.full((2, 3, 3), shade, "uint8") for shade in (10, 200)]
    values = {"img": pictures, "fine_label": [0, 1], "coarse_label": [0, 0]}
    datasets.Dataset.from_dict(values, features).save_to_disk(tmp_path / "set")
    pool = read(tmp_path / "set")
    assert [(row.output, row.category) for row in pool.train] == [("apple", "fruit"), ("pear", "fruit")]
    first, second = (row.image for row in pool.train)
    assert first and second
    assert np.asarray(second.open()).tolist() == pictures[1].tolist()
    assert len({first.digest(), second.digest()}) == 2
    assert first.digest() == read(tmp_path / "set").train[0].image.digest()  # type: ignore[union-attr]


@pytest.mark.parametrize("cut", [0, 0.1, 20])
def test_a_broken_image_is_found_before_it_is_needed(tmp_path: Path, cut: float) -> None:
    whole, other = photo(tmp_path / "a.jpg").read_bytes(), photo(tmp_path / "b.jpg", cut).read_bytes()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    values = {"image": [{"bytes": whole, "path": None}, {"bytes": other, "path": None}], "label": [0, 1]}
    datasets.Dataset.from_dict(values, features).save_to_disk(tmp_path / "set")
    if cut:
        assert "set: train row 1: no image, or a broken one" in refusal(tmp_path / "set")
    else:
        assert [row.output for row in read(tmp_path / "set").train] == ["cat", "dog"]


def test_a_name_that_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    line = refusal("tinyworlt")
    assert 'data.source: tinyworlt is no folder (did you mean "tinyworld"?) and no file, nor a data set' in line


@pytest.mark.parametrize(
    ("module", "extra", "source"),
    [("datasets", "datasets", "ag_news"), ("sklearn.datasets", "vision", "digits"), ("PIL", "vision", "images")],
)
def test_a_library_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str, source: str
) -> None:
    image(tmp_path / "images" / "a" / "0.png", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install 'fedalt[{extra}]'" in refusal(source)


# --------------------------------------------------------------------------------------------------------------- images


def test_an_image_folder_without_splits(tmp_path: Path) -> None:
    for place, name in enumerate(("cat/b.png", "cat/a.png", "dog/c.PNG")):
        image(tmp_path / name, 10 * place)
    pool = read(tmp_path)
    assert [(row.instruction, row.output) for row in pool.train] == [
        ("cat/a.png", "cat"),
        ("cat/b.png", "cat"),
        ("dog/c.PNG", "dog"),
    ]
    picture = pool.train[0].image
    assert picture is not None
    assert picture.open().getpixel((0, 0)) == 10
    assert len({row.image.digest() for row in pool.train if row.image}) == 3


def test_an_image_folder_with_splits(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        image(tmp_path / split / "cat" / "a.png", 1)
    pool = read(tmp_path)
    assert [rows[0].instruction for rows in (pool.train, pool.validation, pool.test)] == [
        "train/cat/a.png",
        "valid/cat/a.png",
        "test/cat/a.png",
    ]


def spoiled(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name in ("cat/a.png", "dog/b.png"):
            image(folder / "pets" / name, 1)
        change(folder / "pets")
        return folder / "pets"

    return make


BAD_IMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "text": (lambda f: (f / "dog" / "b.png").write_text("woof"), ["dog/b.png: no image, or a broken one"]),
    "half a file": (
        lambda f: (f / "cat" / "a.png").write_bytes((f / "cat" / "a.png").read_bytes()[:-20]),
        ["cat/a.png: no image, or a broken one"],
    ),
    "most of a JPEG": (lambda f: photo(f / "cat" / "c.jpg", cut=0.1), ["cat/c.jpg: no image, or a broken one"]),
    "all but the end of a JPEG": (lambda f: photo(f / "cat" / "c.jpg", cut=20), ["cat/c.jpg: no image, or a broken"]),
    "a class without images": (lambda f: (f / "eel").mkdir(), ["eel: no images of this class"]),
    "two names for a split": (
        lambda f: [image(f / split / "cat" / "a.png", 1) for split in ("train", "dev", "valid")],
        ["validation images twice, in dev/ and valid/"],
    ),
    "tables, too": (lambda f: write(f / "train.csv", CSV), ["holds tables and images by class"]),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_image_folders_that_are_wrong(tmp_path: Path, name: str) -> None:
    change, pieces = BAD_IMAGES[name]
    line = refusal(spoiled(change)(tmp_path))
    assert all(piece in line for piece in pieces), line


def test_an_image_that_goes_away_is_the_users_error(tmp_path: Path) -> None:
    picture = FilePicture(image(tmp_path / "a.png", 3))
    picture.path.write_text("no image")
    with pytest.raises(UserError, match=r"a\.png: no image, or a broken one"):
        picture.open()
    picture.path.unlink()
    with pytest.raises(UserError, match=r"a\.png: cannot be read"):
        picture.digest()


def test_an_array_is_a_picture() -> None:
    picture = ArrayPicture(bytes(range(6)), (3, 2))
    assert np.asarray(picture.open()).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert picture.digest() != ArrayPicture(bytes(range(6)), (2, 3)).digest()


def test_a_folder_of_nothing_known(tmp_path: Path) -> None:
    write(tmp_path / "notes.md", "x")
    line = refusal(tmp_path)
    assert all(
        piece in line for piece in ("train/local_training_0.json", "train.csv", "images per class", "save_to_disk")
    )


def test_digits_come_with_scikit_learn() -> None:
    pool = read("digits", label_names={"7": "seven"})
    assert len(pool.train) == 1797
    assert [row.output for row in pool.train[5:9]] == ["5", "6", "seven", "8"]
    picture = pool.train[0].image
    assert picture is not None
    pixels = np.asarray(picture.open())
    assert pixels.shape == (8, 8)
    assert pixels[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0], "5, 13, 9 and 1 of 16"
    made = load_federation(DataConfig(source="digits", clients=4), 0)
    assert sum(len(d.train) + len(d.test) for d in made.clients.values()) == 1797
    for data in made.clients.values():
        assert len(data.test) == round(0.2 * (len(data.train) + len(data.test)))
