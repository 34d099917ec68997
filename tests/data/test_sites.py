"""Natural sites: AfriSenti and MedQuAD from miniature copies of their repositories, in the seed layout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedalt.config.data import DataConfig
from fedalt.data.load import load_federation
from fedalt.datasets.sites import shortened
from micro import call

SPLITS = ("train", "validation", "test")
LABELS = ("positive", "neutral", "negative")


@pytest.fixture
def afrisenti(tmp_path: Path) -> Path:
    """Two languages, one with another kind of names; a post is in all splits, and one has an unknown label."""
    for code, begins in (("amh", ""), ("hau", "hau_")):
        folder = tmp_path / "afrisenti" / "data" / code
        folder.mkdir(parents=True)
        for name, count in (("train", 30), ("dev", 6), ("test", 12)):
            lines = [f'{code}_{i}\t{code} {name} "post {i}\t{LABELS[i % 3]}' for i in range(count)]
            lines += [f"x\t{code} of two splits\tpositive", f"y\t{code} {name} odd\tmixed"]
            (folder / f"{begins}{name}.tsv").write_text(
                "\n".join(["ID\ttweet\tlabel", *lines]) + "\n", encoding="utf-8"
            )
    return tmp_path / "afrisenti"


def document(number: int, questions: int) -> str:
    pairs = "".join(
        f'<QAPair pid="{q}"><Question qid="{number}-{q}" qtype="causes">What causes {number}  {q} ?</Question>'
        f"<Answer>Number {number} is caused by {q}. {'It is long. ' * 30}</Answer></QAPair>"
        for q in range(questions)
    )
    return (
        f'<?xml version="1.0"?><Document id="{number}" source="X"><Focus>f</Focus><QAPairs>{pairs}</QAPairs></Document>'
    )


@pytest.fixture
def medquad(tmp_path: Path) -> Path:
    """Two institutes and a source without answers."""
    for name in ("1_CancerGov_QA", "8_NHLBI_QA_XML", "10_MPlus_ADAM_QA"):
        folder = tmp_path / "medquad" / name
        folder.mkdir(parents=True)
        for i in range(12):
            (folder / f"{i:07}.xml").write_text(document(i, 1 + i % 3), encoding="utf-8")
    return tmp_path / "medquad"


def prepared(name: str, folder: Path, out: Path, *flags: Any) -> Any:
    done = call("prepare", name, "--from", folder, "--out", out, "--json", *flags)
    assert done.code == 0, done.err
    return done


def test_a_language_is_a_client(afrisenti: Path, tmp_path: Path) -> None:
    done = prepared("afrisenti", afrisenti, tmp_path / "out", "--train", 20)
    assert [one["task"] for one in done.json["tasks"]] == ["afrisenti_amh", "afrisenti_hau"]
    made = load_federation(DataConfig(source=str(tmp_path / "out")), 0)
    for client, code in ((0, "amh"), (1, "hau")):
        splits = {split: getattr(made.clients[client], split) for split in SPLITS}
        assert {split: len(rows) for split, rows in splits.items()} == {"train": 20, "validation": 6, "test": 13}
        posts = [row.instruction for rows in splits.values() for row in rows]
        assert len(set(posts)) == len(posts), "no post is in two splits"
        row = next(row for row in splits["test"] if "post 3" in row.instruction)
        assert row.instruction.startswith(f'{code} test "post 3\n\nWhat is the sentiment of this post?\nOPTIONS:\n')
        assert (row.output, row.category) == ("positive", "sentiment")
    assert "validation: 6 rows of 50" in done.err


def test_an_institute_is_a_client_and_a_document_in_one_split(medquad: Path, tmp_path: Path) -> None:
    done = prepared("medquad", medquad, tmp_path / "out", "--test", 4, "--validation", 2)
    assert [one["task"] for one in done.json["tasks"]] == ["medquad_cancergov", "medquad_nhlbi"]
    made = load_federation(DataConfig(source=str(tmp_path / "out")), 0)
    for data in made.clients.values():
        documents = {split: {row.instruction.split()[2] for row in getattr(data, split)} for split in SPLITS}
        assert len(data.test) == 4 and len(data.validation) == 2 and len(data.train) > 10
        assert max(Counter(d for some in documents.values() for d in some).values()) == 1
        assert {row.category for row in data.train} == {"causes"}
        assert all(row.instruction == " ".join(row.instruction.split()) for row in data.train)
        assert all(50 < len(row.output.split()) <= 60 and row.output.endswith("long.") for row in data.train)


def test_equal_seeds_draw_equal_rows(medquad: Path, tmp_path: Path) -> None:
    texts = []
    for place, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepared("medquad", medquad, tmp_path / place, "--test", 4, "--validation", 2, "--seed", seed)
        texts.append((tmp_path / place / "test" / "local_testing_0.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("One. Two!  Three?", "One. Two! Three?"),
        ("a " * 40 + "end. " + "b " * 40 + "end.", ("a " * 40 + "end.")),
        ("a " * 95 + "end.", ""),
        (" \n ", ""),
    ],
)
def test_answers_are_cut_at_the_end_of_a_sentence(text: str, short: str) -> None:
    assert shortened(text) == short


def test_a_site_with_too_few_rows_is_skipped_and_told(medquad: Path, tmp_path: Path) -> None:
    for path in sorted((medquad / "1_CancerGov_QA").iterdir())[2:]:
        path.unlink()
    done = prepared("medquad", medquad, tmp_path / "out", "--test", 4, "--validation", 2)
    assert [(one["task"], one["client"]) for one in done.json["tasks"]] == [
        ("medquad_cancergov", None),
        ("medquad_nhlbi", 0),
    ]
    assert "skipped medquad_cancergov: train: 0 rows of 200" in done.err


@pytest.mark.parametrize("name", ["afrisenti", "medquad"])
def test_what_is_refused(name: str, medquad: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for source, out, line in (
        (tmp_path / "empty", "out", f"nothing of {name}"),
        (tmp_path / "not there", "out", "no folder, and no name of a data set on the hub"),
        (medquad, "full", "is there already"),
    ):
        done = call("prepare", name, "--from", source, "--out", tmp_path / out)
        assert done.code == 2 and line in done.err, done.err
    assert not (tmp_path / "out").exists()


def test_files_that_are_broken_are_named(medquad: Path, afrisenti: Path, tmp_path: Path) -> None:
    (medquad / "1_CancerGov_QA" / "0000003.xml").write_text("<Document>")
    (afrisenti / "data" / "amh" / "dev.tsv").write_text("a\tb\n")
    for name, folder, line in (
        ("medquad", medquad, "0000003.xml: no XML"),
        ("afrisenti", afrisenti, "dev.tsv: no columns tweet and label; it has a, b"),
    ):
        done = call("prepare", name, "--from", folder, "--out", tmp_path / "out")
        assert done.code == 2 and line in done.err, done.err
