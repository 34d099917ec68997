"""Client files in the seed's layout, and every way in which they can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedalt.config.data import DataConfig
from fedalt.data.federation import FIELDS, Row
from fedalt.data.formats.folder import read_folder
from fedalt.data.load import load_federation
from fedalt.errors import UserError
from micro import TEST, TRAIN, data_folder, refused, rows, settings, write_rows, write_yaml


def expected(client: int, count: int, start: int = 0) -> tuple[Row, ...]:
    return tuple(Row(**row) for row in rows(client, count, start))


# --------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("flat", [False, True], ids=["train-folder", "beside-test"])
@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_both_layouts_hold_a_list_or_lines(tmp_path: Path, flat: bool, lines: bool) -> None:
    federation = read_folder(data_folder(tmp_path, flat=flat, lines=lines))
    assert federation.ids == (0, 1, 2)
    for client, data in federation.clients.items():
        assert data.train == expected(client, TRAIN)
        assert data.test == expected(client, TEST, 100)
        assert data.validation == ()


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_the_ending_does_not_decide_the_format(tmp_path: Path, ending: str, lines: bool) -> None:
    write_rows(tmp_path / "train" / f"local_training_0.{ending}", rows(0, 3), lines)
    write_rows(tmp_path / "test" / f"local_testing_0.{ending}", rows(0, 2), lines)
    (data,) = read_folder(tmp_path).clients.values()
    assert (data.train, data.test) == (expected(0, 3), expected(0, 2))


def test_clients_come_in_numerical_order(tmp_path: Path) -> None:
    assert read_folder(data_folder(tmp_path, clients=11, train=1, test=1)).ids == tuple(range(11))


def test_validation_folder(tmp_path: Path) -> None:
    federation = read_folder(data_folder(tmp_path, validation=3))
    assert all(data.validation == expected(client, 3, 200) for client, data in federation.clients.items())


def test_blank_lines_are_not_rows(tmp_path: Path) -> None:
    folder = data_folder(tmp_path, clients=1)
    path = folder / "test" / "local_testing_0.jsonl"
    path.write_text("\n" + path.read_text().replace("\n", "\n\n"))
    assert read_folder(folder).clients[0].test == expected(0, TEST, 100)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"], ids=["U+2028", "U+2029", "U+0085"])
def test_only_a_newline_ends_a_line(tmp_path: Path, character: str) -> None:
    """JSON allows these raw inside a string; Python's ``splitlines`` would break the row there."""
    row = {"instruction": f"one{character}two", "output": "x"}
    write_rows(tmp_path / "train" / "local_training_0.json", rows(0, 2), lines=False)
    path = tmp_path / "test" / "local_testing_0.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_folder(tmp_path).clients[0].test[0].instruction == f"one{character}two"


def test_other_fields_get_a_note_and_optional_ones_default_to_nothing(tmp_path: Path) -> None:
    folder = data_folder(tmp_path, clients=1)
    write_rows(folder / "train" / "local_training_0.json", [{"instruction": "a", "output": "b", "id": 7}], lines=False)
    federation = read_folder(folder)
    assert federation.clients[0].train == (Row("a", "b", "", ""),)
    assert federation.notes[1:] == (f"{folder}: not read: id",)


def test_row_text_is_kept_as_it_is(tmp_path: Path) -> None:
    folder, text = data_folder(tmp_path, clients=1), '  “Zürich” → 東京 \\ "x"\n\ttab '
    write_rows(folder / "train" / "local_training_0.json", [{"instruction": text, "output": text}], lines=False)
    assert read_folder(folder).clients[0].train == (Row(text, text),)


# -------------------------------------------------------------------------------------------------- hold-out and limits


def test_hold_out_is_seeded_disjoint_and_reproducible(tmp_path: Path) -> None:
    config = DataConfig(source=str(data_folder(tmp_path)), validation_rows=4)
    first, again, other = (load_federation(config, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    for client, data in first.clients.items():
        assert len(data.train) == TRAIN - 4
        assert len(data.validation) == 4
        assert not set(data.train) & set(data.validation)
        assert set(data.train) | set(data.validation) == set(expected(client, TRAIN))
        assert data.test == expected(client, TEST, 100)
    places = [[expected(c, TRAIN).index(row) for row in d.validation] for c, d in first.clients.items()]
    assert len({tuple(p) for p in places}) > 1, "every client draws its own"


def test_given_validation_rows_are_not_replaced(tmp_path: Path) -> None:
    config = DataConfig(source=str(data_folder(tmp_path, validation=3)), validation_rows=4)
    for client, data in load_federation(config, 1).clients.items():
        assert (data.train, data.validation) == (expected(client, TRAIN), expected(client, 3, 200))


def test_hold_out_of_everything_is_refused(tmp_path: Path) -> None:
    config = DataConfig(source=str(data_folder(tmp_path)), validation_rows=TRAIN)
    with pytest.raises(UserError, match=rf"data\.validation_rows: {TRAIN} .*client 0 has {TRAIN} training rows"):
        load_federation(config, 1)


def test_limits_and_clients(tmp_path: Path) -> None:
    source = str(data_folder(tmp_path))
    limits = {"train_limit": 5, "test_limit": 3, "limit_by": "first"}
    federation = load_federation(DataConfig(source=source, clients=2, **limits), 1)  # type: ignore[arg-type]
    assert federation.ids == (0, 1)
    for client, data in federation.clients.items():
        assert (data.train, data.test) == (expected(client, 5), expected(client, 3, 100))
    beyond = load_federation(DataConfig(source=source, train_limit=99, test_limit=99), 1)
    assert [len(d.train) for d in beyond.clients.values()] == [TRAIN] * 3


def test_a_limit_does_not_touch_what_is_held_out(tmp_path: Path) -> None:
    source = str(data_folder(tmp_path))
    whole = load_federation(DataConfig(source=source, validation_rows=4), 1)
    limited = load_federation(DataConfig(source=source, validation_rows=4, train_limit=3, limit_by="first"), 1)
    for client, data in limited.clients.items():
        assert data.validation == whole.clients[client].validation
        assert data.train == whole.clients[client].train[:3]


# ------------------------------------------------------------------------------------------------------------- refusals

Change = Callable[[Path], object]


def replaced(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def row_without(client: int, name: str, **more: str) -> Change:
    def change(folder: Path) -> None:
        values = rows(client, 3)
        values[1] = {k: v for k, v in values[1].items() if k != name} | more
        write_rows(folder / "test" / f"local_testing_{client}.jsonl", values, lines=True)

    return change


def row_with(name: str, value: object) -> Change:
    def change(folder: Path) -> None:
        write_rows(
            folder / "train" / "local_training_1.json", [*rows(1, 2), {**rows(1, 1)[0], name: value}], lines=False
        )

    return change


def copied(old: str, new: str) -> Change:
    return lambda folder: shutil.copy(folder / old, folder / new)


def removed(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


GOOD = json.dumps(rows(0, 1)[0])
TRAIN_1, TEST_2 = "train/local_training_1.json", "test/local_testing_2.jsonl"
BAD: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("is no folder", "tinyworld")),
    "empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), ("no training rows", "train/local_training_0.json")),
    "empty train folder": (lambda f: (shutil.rmtree(f / "train"), (f / "train").mkdir()), ("no training rows",)),
    "a file for a folder": (lambda f: (shutil.rmtree(f), f.write_text("x")), ("is no folder",)),
    "client without training rows": (replaced(TRAIN_1, "[]"), (TRAIN_1, "no rows")),
    "client with an empty file": (replaced(TRAIN_1, " \n"), (TRAIN_1, "no rows")),
    "client without test rows": (replaced(TEST_2, "\n"), (TEST_2, "no rows")),
    "broken list": (replaced(TRAIN_1, f"[\n{GOOD},\n{{]"), (f"{TRAIN_1}:3", "broken JSON")),
    "list cut short": (replaced(TRAIN_1, f"[\n{GOOD},\n"), (f"{TRAIN_1}:3", "broken JSON")),
    "broken line": (replaced(TEST_2, f'{GOOD}\n\n{{"instruction": \n'), (f"{TEST_2}:3", "broken JSON")),
    "not a mapping in a list": (replaced(TRAIN_1, f'[{GOOD}, "x"]'), (f"{TRAIN_1}: row 1", "found str")),
    "not a mapping in a line": (replaced(TEST_2, f"{GOOD}\n[1]\n"), (f"{TEST_2}:2", "found list")),
    "row without output": (row_without(2, "output"), (f"{TEST_2}:2", 'no "output"', "instruction, task, category")),
    "row with a typing error": (row_without(2, "output", outputs="x"), (f"{TEST_2}:2", 'did you mean "outputs"?')),
    "row without instruction": (row_without(2, "instruction"), (f"{TEST_2}:2", 'no "instruction"')),
    "empty output": (row_with("output", "  "), (f"{TRAIN_1}: row 2", '"output" is empty')),
    "empty instruction": (row_with("instruction", ""), (f"{TRAIN_1}: row 2", '"instruction" is empty')),
    "duplicate index": (copied(TRAIN_1, f"{TRAIN_1}l"), ("client 1 twice", TRAIN_1, f"{TRAIN_1}l")),
    "duplicate index, zero-padded": (copied(TRAIN_1, "train/local_training_01.json"), ("client 1 twice",)),
    "missing index": (removed(TRAIN_1), ("client 1 is missing", "client 2")),
    "missing test file": (removed(TEST_2), ("client 2", TEST_2, "missing")),
    "no test folder": (lambda f: shutil.rmtree(f / "test"), ("client 0", "test/local_testing_0.jsonl", "missing")),
    "no client number": (copied(TRAIN_1, "train/local_training_x.json"), ("local_training_x.json", "<number>")),
    "not UTF-8": (lambda f: (f / TRAIN_1).write_bytes(b'[{"instruction": "\xff'), (TRAIN_1, "not UTF-8", "byte 18")),
    "half a validation": (
        lambda f: write_rows(f / "validation/local_validation_0.jsonl", rows(0, 1), lines=True),
        ("client 1", "validation/local_validation_1.jsonl", "missing"),
    ),
    "more clients than there are": (lambda f: write_rows(f / "../clients", [], lines=True), ("7 clients", "has 3")),
}
BAD |= {
    f"{name} is {type(value).__name__}": (row_with(name, value), (f"{TRAIN_1}: row 2", f'"{name}" is'))
    for name, value in zip(FIELDS, (["x"], None, ["a"], {"b": 1}), strict=True)
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_stop_the_command_with_one_clear_line(tmp_path: Path, name: str) -> None:
    change, pieces = BAD[name]
    folder = data_folder(tmp_path / "rows")
    change(folder)
    asked = {"data__clients": 7} if name == "more clients than there are" else {}
    config = write_yaml(tmp_path / "run.yaml", settings(tmp_path / "run", data=folder, **asked))
    line = refused("run", config)
    for piece in pieces:
        assert piece in line
    assert not (tmp_path / "run").exists()
    assert refused("validate", config) == line


def test_a_lone_surrogate_is_a_users_error(tmp_path: Path) -> None:
    r"""``"\ud800"`` is legal JSON and no text: it cannot be tokenised, nor written as UTF-8."""
    folder = data_folder(tmp_path / "rows")
    (folder / TRAIN_1).write_text(r'[{"instruction": "a \ud800", "output": "b"}]')
    line = refused("run", write_yaml(tmp_path / "run.yaml", settings(tmp_path / "run", data=folder)))
    assert f"{TRAIN_1}: row 0" in line
