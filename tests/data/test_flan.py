"""``fedalt prepare flan`` on miniatures of the eight data sets: rows, balance, and what happens to what is missing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedalt.data.federation import Federation, Row
from fedalt.data.formats.folder import read_folder
from fedalt.datasets.flan.build import WORDINGS, build, instruction
from fedalt.datasets.flan.tasks import TASKS
from fedalt.evaluation.choices import options_of
from micro import call, refused, tree

datasets = pytest.importorskip("datasets")

SIZES = {"train": 12, "test": 8, "validation": 0}
RECORDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "ag_news_subset": lambda i: {"text": f"news {i} of {{today}}", "label": (i * i) % 4 if i % 5 else i % 4},
    "snli": lambda i: {"premise": f"p{i}", "hypothesis": f"h{i}", "label": i % 4 - 1},
    "openbookqa": lambda i: {
        "question_stem": f"q{i}",
        "choices": {"text": [f"{letter}{i} " for letter in "abcd"], "label": list("ABCD")},
        "answerKey": "ABCD"[(7 * i) % 4],
    },
    "glue_mrpc": lambda i: {"sentence1": f"s{i}", "sentence2": f"t{i}", "label": int(i % 3 > 0), "idx": i},
    "story_cloze": lambda i: {
        "story_id": str(i),
        **{f"input_sentence_{k}": f"s{i}.{k}" for k in range(1, 5)},
        **{f"sentence_quiz{k}": f"e{i}.{k}" for k in (1, 2)},
        "answer_right_ending": i % 2 + 1,
    },
    "common_gen": lambda i: {"concepts": [f"c{i // 2}", "dog"], "target": f"the dog {i}" if i % 7 else ""},
    "sentiment140": lambda i: {"text": f"tweet {i}", "sentiment": (0, 4, 4, 2)[i % 4]},
    "definite_pronoun_resolution": lambda i: {
        "sentence": f"Ann met Bob when she left {i}.",
        "pronoun": " she",
        "candidates": ["Ann ", "Bob"],
        "label": i % 2,
    },
}
"""What record i of each data set looks like on the hub."""
LABELS = {"snli": 3, "ag_news_subset": 4, "openbookqa": 4, "common_gen": 0}
OWN = ("story_cloze", "openbookqa", "definite_pronoun_resolution")
"""Tasks whose options are the record's own."""


def split(name: str, start: int, count: int) -> Any:
    return datasets.Dataset.from_list([RECORDS[name](i) for i in range(start, start + count)])


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All eight, with the hub's splits; the test split of common_gen is empty of targets there, so it has none."""
    folder = tmp_path_factory.mktemp("copies")
    for name, task in TASKS.items():
        parts = {task.train[0]: split(name, 0, 90), task.test[0]: split(name, 500, 70)}
        datasets.DatasetDict(parts).save_to_disk(folder / name)
    return folder


@pytest.fixture(scope="module")
def federation(copies: Path, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    out = tmp_path_factory.mktemp("out") / "rows"
    build(list(TASKS), out, SIZES, 42, local=copies)
    return read_folder(out)


def place(row: Row) -> str:
    """Where the right option stands, or the answer itself."""
    options = row.instruction.split("OPTIONS:\n")[-1].split("\n")
    return str(options.index(f"- {row.output}")) if row.task in OWN else row.output


def test_client_i_has_the_i_th_task_with_as_many_rows_as_asked_for(federation: Federation) -> None:
    assert [data.train[0].task for data in federation.clients.values()] == list(TASKS)
    for data in federation.clients.values():
        assert (len(data.train), len(data.test), len(data.validation)) == (12, 8, 0)
        assert len({(row.task, row.category) for row in (*data.train, *data.test)}) == 1
    assert len({data.train[0].category for data in federation.clients.values()}) == len(TASKS)


def test_labels_are_balanced_and_no_record_comes_twice(federation: Federation) -> None:
    for data in federation.clients.values():
        task = data.train[0].task
        for rows in (data.train, data.test):
            if LABELS.get(task, 2):
                counts = Counter(map(place, rows))
                assert len(counts) == LABELS.get(task, 2)
                assert max(counts.values()) - min(counts.values()) <= 1, (task, counts)
        numbers = [json.dumps(row.instruction.split("OPTIONS")[0]) for row in (*data.train, *data.test)]
        assert len(set(numbers)) == len(numbers)


def test_rows_are_records_in_words(federation: Federation) -> None:
    """Every row is one of the wordings of a record that the data set has, with the answer that the record gives."""
    for data in federation.clients.values():
        task = TASKS[data.train[0].task]
        for start, rows in ((0, data.train), (500, data.test)):
            samples = [s for i in range(start, start + 90) if (s := task.read(RECORDS[task.name](i)))]
            known = {instruction(w, s.fields, s.options): s.answer for w in WORDINGS[task.name] for s in samples}
            answers = {(instruction(w, s.fields, s.options), s.answer) for w in WORDINGS[task.name] for s in samples}
            for row in rows:
                assert row.instruction in known
                assert (row.instruction, row.output) in answers
        if task.name != "common_gen":
            assert all(row.output in options_of(row.instruction) for row in (*data.train, *data.test))
        openings = {row.instruction[:3] for row in data.train}
        assert len(openings) > 1, "one wording for all"


def test_concept_sets_of_test_rows_are_unknown_in_training(copies: Path, tmp_path: Path) -> None:
    """Two targets of the same concepts count as the same question, also when both splits come from one pool."""
    split("common_gen", 0, 60).save_to_disk(tmp_path / "one" / "common_gen")
    build(["common_gen"], tmp_path / "out", SIZES | {"validation": 5}, 1, local=tmp_path / "one")
    data = read_folder(tmp_path / "out").clients[0]
    asked = [
        next(w for w in row.instruction.replace(",", " ").split() if w[0] == "c" and w[1:].isdigit())
        for row in (*data.train, *data.validation, *data.test)
    ]
    assert len(asked) == len(set(asked)) == 25


def test_the_seed_decides_everything(copies: Path, tmp_path: Path) -> None:
    names = ["snli", "common_gen"]
    for out, seed, validation in (("a", 1, 0), ("b", 1, 0), ("c", 2, 0), ("d", 1, 4)):
        build(names, tmp_path / out, SIZES | {"validation": validation}, seed, local=copies)
    a, b, c, d = (tree(tmp_path / out) for out in "abcd")
    assert a == b
    assert all(c[name] != value for name, value in a.items())
    assert {name: d[name] for name in a} == a, "validation rows must not change others"
    assert len(d) == len(a) + 2


def test_what_is_missing_or_different_is_said_and_the_others_go_on(copies: Path, tmp_path: Path) -> None:
    split("snli", 0, 40).rename_column("premise", "premises").save_to_disk(tmp_path / "some" / "snli")
    odd = [RECORDS["openbookqa"](i) | {"answerKey": "E"} for i in range(30)]
    datasets.Dataset.from_list(odd).save_to_disk(tmp_path / "some" / "openbookqa")
    (tmp_path / "some" / "glue_mrpc").mkdir()
    for name in ("sentiment140", "common_gen"):
        (tmp_path / "some" / name).symlink_to(copies / name)
    names = "ag_news_subset,snli,openbookqa,glue_mrpc,sentiment140,common_gen"
    sizes = ("--train", 12, "--test", 300)
    done = call("prepare", "flan", "--from", tmp_path / "some", "--tasks", names, "--out", tmp_path / "out", *sizes)
    assert done.code == 0
    lines = done.err.splitlines()
    skipped = [line for line in lines if line.startswith("skipped ")]
    assert [line.split(":")[0] for line in skipped] == [f"skipped {n}" for n in names.split(",")[:4]]
    assert f"{tmp_path}/some/ag_news_subset is no folder" in skipped[0]
    assert 'no column "premise" (did you mean "premises"?); it has: premises, hypothesis, label' in skipped[1]
    assert "a record is not as expected" in skipped[2]
    assert f"{tmp_path}/some/glue_mrpc cannot be opened" in skipped[3]
    assert [line for line in lines if line.startswith("note: ")] == [line for line in lines if line not in skipped]
    assert any("sentiment140: test: 53 rows of 300" in line for line in lines)
    assert "labels are not balanced (negative: 18, positive: 35)" in done.err
    clients = read_folder(tmp_path / "out").clients
    assert [data.train[0].task for data in clients.values()] == ["sentiment140", "common_gen"]
    assert done.out.count("skipped") == 4 and "sentiment140" in done.out


def test_files_and_the_original_columns_of_story_cloze_are_understood(tmp_path: Path) -> None:
    old = {v: k for k, v in TASKS["story_cloze"].aliases.items()}
    folder = tmp_path / "files" / "story_cloze"
    folder.mkdir(parents=True)
    rows = [{old.get(k, k): v for k, v in RECORDS["story_cloze"](i).items()} for i in range(40)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call("prepare", "flan", "--from", tmp_path / "files", "--tasks", "story_cloze", "--train", 12, "--test", 8,
                "--out", tmp_path / "out", "--json")  # fmt: skip
    assert done.json["tasks"][0]["rows"] == {"test": 8, "train": 12}
    data = read_folder(tmp_path / "out").clients[0]
    assert not {row.instruction for row in data.train} & {row.instruction for row in data.test}


def test_wrong_commands_are_refused_in_one_line(copies: Path, tmp_path: Path) -> None:
    base = ("prepare", "flan", "--from", copies, "--out")
    assert 'snly" is unknown (did you mean "snli"?)' in refused(*base, tmp_path / "x", "--tasks", "snly")
    assert "--tasks: snli twice" in refused(*base, tmp_path / "x", "--tasks", "snli,snli")
    assert "--tasks: no task" in refused(*base, tmp_path / "x", "--tasks", ",")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    assert "is there already" in refused(*base, tmp_path / "full", "--tasks", "snli")
    done = call("prepare", "flan", "--from", tmp_path / "full", "--out", tmp_path / "x", "--tasks", "snli,glue_mrpc")
    assert done.code == 2 and "none of 2 tasks could be prepared" in done.error
    assert not (tmp_path / "x").exists()


def test_the_hub_is_asked_for_every_data_set_where_there_are_no_copies(
    copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, tuple[str | None, str | None]] = {}

    def load_dataset(hub: str, config: str | None, revision: str | None) -> Any:
        asked[hub] = (config, revision)
        (name,) = [task.name for task in TASKS.values() if task.hub == hub]
        if name == "snli":
            raise ConnectionError("no network\nat all")
        return datasets.load_from_disk(copies / name)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    done = build(list(TASKS), tmp_path / "out", SIZES, 42)
    assert asked == {task.hub: (task.config, task.revision) for task in TASKS.values()}
    assert [one.client for one in done] == [0, None, 1, 2, 3, 4, 5, 6]
    assert done[1].problem == (
        "stanfordnlp/snli cannot be opened (no network); a local copy in DIR/snli can be given with --from DIR"
    )
    assert [data.train[0].task for data in read_folder(tmp_path / "out").clients.values()] == [
        name for name in TASKS if name != "snli"
    ]


def test_without_datasets_the_extra_is_named(copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = call("prepare", "flan", "--from", copies, "--out", tmp_path / "x", "--tasks", "snli")
    assert done.code == 2 and "pip install 'fedalt[datasets]'" in done.error
