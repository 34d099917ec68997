"""Rows among other clients: every row stays, once, on its side of the split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalt.config.data import DataConfig
from fedalt.data.clients import mix_tasks, split_rows
from fedalt.data.federation import SPLITS, ClientData, Federation, Row
from fedalt.data.load import load_federation
from fedalt.errors import UserError
from micro import data_folder, shared_data
from support import quick


def federation(*sizes: tuple[int, int, int]) -> Federation:
    """Client k's i-th row of a split asks ``k split i``."""
    return Federation(
        {
            k: ClientData(
                **{
                    split: tuple(Row(f"{k} {split} {i}", "x", f"task{k}") for i in range(n))
                    for split, n in zip(SPLITS, mine, strict=True)
                }
            )
            for k, mine in enumerate(sizes)
        },
        "here",
    )


def asked(rows: tuple[Row, ...]) -> list[str]:
    return [row.instruction for row in rows]


def everything(made: Federation, split: str) -> Counter[str]:
    return Counter(row.instruction for data in made.clients.values() for row in getattr(data, split))


sizes = st.tuples(*(st.integers(3, 12),) * 3)
federations = st.lists(sizes, min_size=1, max_size=5).map(lambda made: federation(*made))


# ---------------------------------------------------------------------------------------------------------------- split


def test_rows_are_dealt_by_turns() -> None:
    made = split_rows(federation((5, 0, 3), (4, 0, 2)), 4)
    assert {c: asked(data.train) for c, data in made.clients.items()} == {
        0: ["0 train 0", "0 train 2", "0 train 4"],
        1: ["1 train 0", "1 train 2"],
        2: ["0 train 1", "0 train 3"],
        3: ["1 train 1", "1 train 3"],
    }
    assert asked(made.clients[2].test) == ["0 test 1"]
    assert all(data.validation == () for data in made.clients.values())


@quick
@given(federations, st.integers(1, 3))
def test_splitting_loses_and_moves_nothing_between_splits(before: Federation, parts: int) -> None:
    count = len(before.clients)
    after = split_rows(before, count * parts)
    assert after.ids == tuple(range(count * parts))
    for split in SPLITS:
        assert everything(after, split) == everything(before, split)
        for client, data in after.clients.items():
            mine = getattr(before.clients[client % count], split)
            assert set(getattr(data, split)) <= set(mine)
            assert len(getattr(data, split)) in (len(mine) // parts, -(-len(mine) // parts))


def test_no_multiple_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.clients: 7 clients asked for, here has 3; .* multiple of 3.* 6 or 9$"):
        split_rows(federation(*[(9, 0, 9)] * 3), 7)


@pytest.mark.parametrize(("mine", "split"), [((2, 0, 9), "train"), ((9, 0, 2), "test"), ((9, 2, 9), "validation")])
def test_too_few_rows_to_split_are_refused(mine: tuple[int, int, int], split: str) -> None:
    with pytest.raises(UserError, match=rf"client 1 of here has only 2 {split} rows to split into 3"):
        split_rows(federation((9, 9, 9), mine), 6)


def test_a_folder_is_split_when_more_clients_are_asked_for() -> None:
    whole = load_federation(DataConfig(source=str(shared_data())), 0)
    half = load_federation(DataConfig(source=str(shared_data()), clients=6), 0)
    for client in whole.ids:
        assert half.clients[client].train == whole.clients[client].train[::2]
        assert half.clients[client + 3].train == whole.clients[client].train[1::2]
    with pytest.raises(UserError, match="multiple of 3"):
        load_federation(DataConfig(source=str(shared_data()), clients=4), 0)


def test_tinyworld_makes_new_rows_or_splits_its_own() -> None:
    eight = load_federation(DataConfig(), 0)
    split = load_federation(DataConfig(clients=16, split_rows=True), 0)
    assert [len(data.train) for data in split.clients.values()] == [150] * 16
    assert everything(split, "train") == everything(eight, "train")
    made = load_federation(DataConfig(clients=16, train_limit=20, test_limit=5), 0)
    assert max(everything(made, "train").values()) == 1 < len(made.clients[8].train), "client 8 has rows of its own"
    with pytest.raises(UserError, match="multiple of 8"):
        load_federation(DataConfig(clients=12, split_rows=True), 0)
    assert load_federation(DataConfig(clients=5, split_rows=True), 0).ids == (0, 1, 2, 3, 4)


# ------------------------------------------------------------------------------------------------------------------ mix


def test_shares_go_to_the_next_clients() -> None:
    made = mix_tasks(federation(*[(4, 2, 2)] * 3), 2)
    assert asked(made.clients[0].train) == ["0 train 0", "0 train 2", "2 train 1", "2 train 3"]
    assert asked(made.clients[1].train) == ["1 train 0", "1 train 2", "0 train 1", "0 train 3"]
    assert asked(made.clients[2].test) == ["2 test 0", "1 test 1"]
    assert asked(made.clients[2].validation) == ["2 validation 0", "1 validation 1"]


@quick
@given(st.integers(1, 5).flatmap(lambda k: st.tuples(st.lists(sizes, min_size=k, max_size=k), st.integers(1, k))))
def test_mixing_uses_every_row_once(made: tuple[list[tuple[int, int, int]], int]) -> None:
    lists, tasks = made
    before = federation(*lists)
    try:
        after = mix_tasks(before, tasks)
    except UserError:
        assert min(min(train, test) for train, _, test in lists) < tasks
        return
    for split in SPLITS:
        assert everything(after, split) == everything(before, split)
        for k, data in after.clients.items():
            sources = [int(row.instruction.split()[0]) for row in getattr(data, split)]
            assert set(sources) <= {(k - j) % len(lists) for j in range(tasks)}
            if len({tuple(one) for one in lists}) == 1:
                assert len(sources) == len(getattr(before.clients[k], split))


def test_mixing_all_gives_everybody_rows_of_everybody() -> None:
    made = mix_tasks(federation(*[(12, 4, 4)] * 4), 4)
    for data in made.clients.values():
        for split, each in (("train", 3), ("validation", 1), ("test", 1)):
            assert Counter(row.task for row in getattr(data, split)) == {f"task{k}": each for k in range(4)}


def test_one_task_per_client_changes_nothing() -> None:
    before = federation((3, 0, 3), (4, 0, 4))
    assert mix_tasks(before, 1) == before


def test_more_tasks_than_clients_are_refused() -> None:
    with pytest.raises(UserError, match=r"^data.tasks_per_client: 3 asked for, but there are only 2 clients$"):
        mix_tasks(federation((3, 0, 3), (3, 0, 3)), 3)


def test_a_client_left_without_rows_is_refused() -> None:
    """A client with one test row keeps it; here client 1 has none of its own, and gets nothing from client 0."""
    none = ClientData(tuple(Row(f"1 train {i}", "x") for i in range(4)))
    with pytest.raises(UserError, match=r"^data.tasks_per_client: 2 shares leave client 1 without test rows$"):
        mix_tasks(Federation({0: federation((4, 0, 1)).clients[0], 1: none}, "here"), 2)


def test_limits_come_first_and_validation_rows_are_mixed_too(tmp_path: Path) -> None:
    folder = data_folder(tmp_path, clients=2)
    made = load_federation(
        DataConfig(source=str(folder), train_limit=4, test_limit=2, validation_rows=2, tasks_per_client=2), 0
    )
    for data in made.clients.values():
        for split, count in (("train", 4), ("validation", 2), ("test", 2)):
            rows = getattr(data, split)
            assert Counter(row.task for row in rows) == {"task0": count // 2, "task1": count // 2}
    assert "equal shares of 2 clients' rows" in made.notes[-1]


def test_rows_are_shuffled_before_limits_and_only_if_asked(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", clients=2, train=40)
    first: dict[str, Any] = {"source": str(folder), "train_limit": 20, "limit_by": "first"}
    plain = load_federation(DataConfig(**first), 0)
    shuffled = load_federation(DataConfig(**first, shuffle=True), 0)
    whole = load_federation(DataConfig(source=str(folder)), 0)
    for client in (0, 1):
        rows, mine = whole.clients[client].train, shuffled.clients[client].train
        assert plain.clients[client].train == rows[:20]
        assert len(mine) == 20 and set(mine) < set(rows) and set(mine) != set(rows[:20])
    assert shuffled == load_federation(DataConfig(**first, shuffle=True), 0)
    assert shuffled.clients != load_federation(DataConfig(**first, shuffle=True), 1).clients
