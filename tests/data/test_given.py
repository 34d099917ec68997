"""Rows given in memory: what is understood, what is refused, and what their digest stands for."""

from __future__ import annotations

from typing import Any

import pytest

import fedalt as fa
from fedalt.errors import UserError
from micro import rows

ROWS = rows(0, 12)


def test_clients_by_name() -> None:
    data = fa.load_data({"ann": (ROWS, ROWS[:3]), "ben": (ROWS[:5], ROWS[5:6], ROWS[6:])})
    assert [len(mine.train) for mine in data.clients.values()] == [12, 5]
    assert [len(mine.validation) for mine in data.clients.values()] == [0, 1]
    assert {row.task for row in data.clients[0].train} == {"task0"}  # rows say so themselves
    bare = [{"text": f"t{i}", "label": i % 2} for i in range(4)]
    data = fa.load_data({"ann": {"train": bare, "test": bare}, 7: (tuple(bare), bare)}, label_names={0: "no"})
    assert [row.output for row in data.clients[0].test] == ["no", "1", "no", "1"]
    assert [data.clients[k].train[0].task for k in (0, 1)] == ["ann", "7"]
    assert fa.load_data({"train": (bare, bare)}).clients[0].train[0].task == "train"


def test_rows_that_nobody_has() -> None:
    data = fa.load_data(rows(0, 40), clients=2, partition=fa.Iid(), seed=0)
    assert len(data.clients) == 2 and data.federation.source.startswith("memory:")
    split = fa.load_data({"train": rows(0, 40), "test": rows(0, 8, 50)}, clients=2, partition="iid", seed=0)
    assert sum(len(mine.test) for mine in split.clients.values()) == 8


def test_hugging_face_data_sets() -> None:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})

    def made(count: int) -> Any:
        return datasets.Dataset.from_dict(
            {"text": [f"row {i}" for i in range(count)], "label": [i % 2 for i in range(count)]}, features=features
        )

    whole = fa.load_data(made(40), clients=2, partition=fa.Iid(), seed=0)
    parted = fa.load_data(datasets.DatasetDict(train=made(40), test=made(8)), clients=2, seed=0)
    named = fa.load_data(
        {"ann": (made(6), made(4)), "ben": datasets.DatasetDict(train=made(5), validation=made(2), test=made(1))}
    )
    assert {row.output for row in whole.clients[0].train} == {"bad", "good"}
    assert sum(len(mine.test) for mine in parted.clients.values()) == 8
    assert [len(mine.train) for mine in named.clients.values()] == [6, 5]
    assert len(named.clients[1].validation) == 2 and named.clients[1].train[0].task == "ben"


def test_the_digest_is_of_rows_their_order_and_their_clients() -> None:
    pair = (ROWS, ROWS[:3])
    names = [
        fa.load_data(given).federation.source
        for given in (
            {"a": pair, "b": pair},
            {"a": (ROWS[::-1], ROWS[:3]), "b": pair},
            {"a": (ROWS[1:], ROWS[:3]), "b": pair},
            {"a": pair},
        )
    ]
    assert len(set(names)) == 4
    assert fa.load_data({"a": pair, "b": pair}).federation.source == names[0]


@pytest.mark.parametrize(
    ("given", "settings", "line"),
    [
        (3, {}, "found a int; give a path or name, {name: (train rows, test rows)}"),
        ({}, {}, "no clients"),
        ({"ann": ROWS}, {}, 'client "ann": give (train rows, test rows), found a list'),
        ({"ann": (ROWS, [])}, {}, 'client "ann" has no test rows'),
        ({"ann": ([], ROWS)}, {}, 'client "ann": no train rows'),
        ({"ann": ([*ROWS, {"instruction": "x"}], ROWS)}, {}, 'client "ann", train row 12: no "output"'),
        ({"ann": ([*ROWS, "x"], ROWS)}, {}, "row 12: a row is a mapping of columns to values, found str"),
        (
            {"ann": ([{"instruction": " ", "output": "x"}], ROWS)},
            {},
            'train row 0: "instruction" is empty',
        ),
        ({"ann": ([{"sentense": "a", "label": 1}], ROWS)}, {}, "say which columns are the text"),
        ({"ann": (ROWS, ROWS)}, {"label_names": {"x": "y"}}, 'no row of memory has the label "x"'),
        (ROWS, {}, "say how many clients the 12 rows of memory"),
        (ROWS, {"columns": ["a"]}, "names its columns itself"),
        (ROWS, {"train_limt": 3}, 'load_data: unknown key "data.train_limt" (did you mean "train_limit"?)'),
        ("tinywrld", {}, 'did you mean "tinyworld"'),
    ],
)
def test_what_is_refused(given: Any, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        fa.load_data(given, **settings)
    assert line in str(error.value) and "\n" not in str(error.value)
