"""Partitioners: every row goes to one client, equal seeds give equal deals, test rows mirror training rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalt.config import parse_config
from fedalt.config.data import DataConfig, PartitionConfig
from fedalt.data.clients import to_clients
from fedalt.data.federation import SPLITS, ClientData, Federation, Pool, Row, pooled
from fedalt.data.load import load_federation, load_held_out
from fedalt.data.partition import alpha_of, cover, held_out, largest_remainder, split_like_train
from fedalt.data.record import in_order, label_counts, record, reproduce, row_digest
from fedalt.errors import UserError
from micro import shared_data
from support import quick

SETTINGS: dict[str, dict[str, Any]] = {
    "iid": {},
    "dirichlet": {"alpha": 1.0},
    "pathological": {"classes_per_client": 2},
    "column": {"column": "task"},
    "quantity": {"alpha": 2.0},
    "gl_dir": {"alpha": 1.0},
    "sc_dir": {},
    "sc_dir superclass": {"dir_level": "superclass", "superclasses_per_client": 2},
}


def pool(train: int, test: int = 0, validation: int = 0, labels: int = 4) -> Pool:
    """Rows of four labels in two categories and three tasks; row i of a split asks ``split i``."""
    rows = {
        s: tuple(Row(f"{s} {i}", f"l{i % labels}", f"t{i % 3}", f"c{i % labels % 2}") for i in range(n))
        for s, n in zip(SPLITS, (train, validation, test), strict=True)
    }
    return Pool(**rows, source="here")


def config(by: str, clients: int, **more: Any) -> DataConfig:
    options = {"by": by.split(" ", maxsplit=1)[0], "min_rows": 3, **SETTINGS[by], **more.pop("partition", {})}
    return DataConfig(clients=None if by == "column" else clients, partition=PartitionConfig(**options), **more)


def asked(federation: Federation, split: str) -> Counter[str]:
    return Counter(row.instruction for data in federation.clients.values() for row in getattr(data, split))


def refusal(rows: Pool, made: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        to_clients(rows, made, 0, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------- all partitioners


@pytest.mark.parametrize("by", SETTINGS)
@quick
@given(seed=st.integers(0, 10**6), clients=st.integers(2, 5), train=st.integers(80, 120))
def test_every_row_goes_to_one_client_and_everybody_has_enough(by: str, seed: int, clients: int, train: int) -> None:
    rows = pool(train, 40, 24)
    made = to_clients(rows, config(by, clients), seed, None)
    assert made.ids == tuple(range(3 if by == "column" else clients))
    for split in SPLITS:
        assert asked(made, split) == Counter(row.instruction for row in rows.split(split))
    assert all(len(data.train) >= 3 and data.validation and data.test for data in made.clients.values())


@pytest.mark.parametrize("by", SETTINGS)
def test_the_seed_alone_decides(by: str) -> None:
    first, again, other = (to_clients(pool(100, 40), config(by, 4), seed, None) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_seed_of_its_own_keeps_the_deal_for_every_run() -> None:
    free = DataConfig(source=str(shared_data()), partition=PartitionConfig(by="iid", min_rows=2))
    fixed = free.model_copy(update={"partition": free.partition.model_copy(update={"seed": 1})})
    assert load_federation(fixed, 8) == load_federation(fixed, 9) == load_federation(free, 1)
    assert load_federation(free, 8) != load_federation(free, 9)


@quick
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.9), train=st.integers(40, 90))
def test_without_test_rows_every_client_holds_some_out(seed: int, share: float, train: int) -> None:
    rows = pool(train)
    made = to_clients(rows, config("iid", 4, test_share=share, partition={"min_rows": 1}), seed, None)
    assert asked(made, "train") + asked(made, "test") == Counter(row.instruction for row in rows.train)
    for data in made.clients.values():
        total = len(data.train) + len(data.test)
        assert len(data.test) == min(max(1, round(share * total)), total - 1)


@quick
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    st.integers(0, 60),
    st.permutations(range(5)),
)
def test_largest_remainder_is_within_one_of_the_share(weights: list[int], total: int, order: list[int]) -> None:
    counts = largest_remainder(total, weights, [i for i in order if i < len(weights)])
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - Fraction(total * weight, sum(weights))) < 1
        assert weight or not count


# ---------------------------------------------------------------------------------------------------------- exact cases


def test_test_rows_follow_the_shares_of_training_rows() -> None:
    rows = pool(80, 40)
    train = [[i for i in range(80) if i % 4 in (0, 1)], [i for i in range(80) if i % 4 == 2]]
    train[1] += (third := [i for i in range(80) if i % 4 == 3])[:10]
    train[0] += third[10:]
    parts = split_like_train(rows, "test", "label", train, 0)
    counts = [Counter(rows.test[i].output for i in part) for part in parts]
    assert counts == [{"l0": 10, "l1": 10, "l3": 5}, {"l2": 10, "l3": 5}]


def test_a_client_with_a_tiny_share_gets_a_test_row_all_the_same() -> None:
    rows = pool(80, 4, labels=2)
    parts = split_like_train(rows, "test", "label", [list(range(78)), [78], [79]], 0)
    assert list(map(len, parts)) == [2, 1, 1]
    assert [rows.test[parts[k][0]].output for k in (1, 2)] == ["l0", "l1"]


def test_rows_held_out_of_a_client_are_stratified_and_leave_every_label_a_training_row() -> None:
    labels = ["a"] * 20 + ["b"] * 10 + ["c"]
    train, test = held_out(labels, 0.3, 0, 0)
    assert sorted(train + test) == list(range(31))
    assert Counter(labels[i] for i in test) == {"a": 6, "b": 3}
    assert held_out(["x", "y"], 0.5, 0, 0)[0] != [], "one of two rows stays"


@quick
@given(st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(0, 99))
def test_values_are_handed_out_before_any_comes_again(values: int, counts: list[int], seed: int) -> None:
    names = [f"v{i}" for i in range(values)]
    counts = [min(count, values) for count in counts]
    held = cover(names, counts, seed)
    assert [len(set(mine)) for mine in held] == counts
    assert len({v for mine in held for v in mine}) == min(values, sum(counts))


@pytest.mark.parametrize("clients", [2, 3, 6])
def test_pathological_clients_have_exactly_so_many_labels(clients: int) -> None:
    made = to_clients(pool(120, 40), config("pathological", clients), 5, None)
    held = [{row.output for row in data.train} for data in made.clients.values()]
    assert all(len(mine) == 2 for mine in held)
    assert set.union(*held) == {"l0", "l1", "l2", "l3"}
    for data, mine in zip(made.clients.values(), held, strict=True):
        assert {row.output for row in data.test} <= mine


def test_a_client_for_every_value_of_a_column() -> None:
    made = to_clients(pool(90, 30), config("column", 3), 5, None)
    for client, data in made.clients.items():
        assert {row.task for row in (*data.train, *data.test)} == {f"t{client}"}
        assert (len(data.train), len(data.test)) == (30, 10)


def test_superclasses_are_concentrated() -> None:
    one = config("sc_dir", 4, partition={"superclasses_per_client": 1})
    made = to_clients(pool(200, 40), one, 5, None)
    assert all(len({row.category for row in data.train}) == 1 for data in made.clients.values())
    assert {row.category for data in made.clients.values() for row in data.train} == {"c0", "c1"}


def by_twelve(train: int) -> Pool:
    """Rows of twelve labels, two in each of six categories."""
    return Pool(tuple(Row(f"{i}", f"l{i % 12}", "", f"c{i % 12 // 2}") for i in range(train)), (), (), "here")


def trained(rows: Pool, by: str, clients: int, seed: int = 0, **options: Any) -> list[tuple[Row, ...]]:
    """Every client's training rows, none of them held out."""
    tested = replace(rows, test=rows.train)
    settings = DataConfig(clients=clients, partition=PartitionConfig(by=by, min_rows=1, test="shared", **options))
    return [data.train for data in to_clients(tested, settings, seed, None).clients.values()]


def test_superclasses_are_one_or_two_each_where_there_are_many() -> None:
    counts = set[int]()
    for seed in range(3):
        held = [{row.category for row in mine} for mine in trained(by_twelve(600), "sc_dir", 8, seed)]
        assert set.union(*held) == {f"c{i}" for i in range(6)}
        counts |= set(map(len, held))
    assert counts == {1, 2}


def test_superclasses_are_shared_whole_or_label_by_label() -> None:
    """Where a category is shared by one draw, a client has equal shares of its two labels."""

    def apart(level: str) -> float:
        gaps = []
        for mine in trained(by_twelve(6000), "sc_dir", 6, dir_level=level, superclasses_per_client=2, alpha=1.0):
            counts = Counter(row.output for row in mine)
            gaps += [abs(counts[f"l{2 * i}"] - counts[f"l{2 * i + 1}"]) / 500 for i in range(6)]
        return max(gaps)

    assert apart("superclass") < 0.1
    assert apart("class_in_superclass") > 0.3


@pytest.mark.parametrize(("by", "usual"), {"dirichlet": 0.5, "quantity": 0.5, "gl_dir": 0.3, "sc_dir": 3.0}.items())
def test_alpha_has_the_papers_value_where_none_is_given(by: str, usual: float) -> None:
    rows = by_twelve(600)
    assert trained(rows, by, 6) == trained(rows, by, 6, alpha=usual) != trained(rows, by, 6, alpha=10 * usual)
    assert alpha_of(PartitionConfig(by=by)) == usual


def test_sizes_vary_and_labels_do_not() -> None:
    rows, even = pool(4000), 1000
    uneven = trained(rows, "quantity", 4, alpha=0.5)
    sizes = sorted(map(len, uneven))
    assert sum(sizes) == 4000 and sizes[-1] > 2 * sizes[0]
    assert all(abs(len(mine) - even) < 50 for mine in trained(rows, "quantity", 4, alpha=1e5))
    for mine in uneven:
        shares = [count / len(mine) for count in Counter(row.output for row in mine).values()]
        assert len(mine) < 100 or all(abs(share - 1 / 4) < 0.1 for share in shares)


def test_a_small_alpha_is_less_even_than_a_large_one() -> None:
    def largest_share(alpha: float) -> float:
        made = to_clients(pool(400, 40), config("dirichlet", 4, partition={"alpha": alpha, "min_rows": 1}), 5, None)
        return max(Counter(row.output for row in data.train)["l0"] for data in made.clients.values()) / 100

    assert largest_share(0.1) > 0.6
    assert largest_share(1000) < 0.35


def test_gl_dir_is_dirichlet_with_the_papers_alpha() -> None:
    gl = DataConfig(clients=3, partition=PartitionConfig(by="gl_dir", min_rows=1))
    dirichlet = DataConfig(clients=3, partition=PartitionConfig(by="dirichlet", alpha=0.3, min_rows=1))
    assert to_clients(pool(99, 30), gl, 1, None).clients == to_clients(pool(99, 30), dirichlet, 1, None).clients


def test_shared_test_rows_are_everybodys() -> None:
    rows = pool(60, 12, 8)
    made = to_clients(rows, config("iid", 3, partition={"test": "shared"}), 0, None)
    assert all((data.test, data.validation) == (rows.test, rows.validation) for data in made.clients.values())


# --------------------------------------------------------------------------------------------------- clients dealt anew


def test_a_folders_clients_are_dealt_anew() -> None:
    before = load_federation(DataConfig(source=str(shared_data())), 0)
    options = PartitionConfig(by="column", column="category", min_rows=1)
    made = load_federation(DataConfig(source=str(shared_data()), partition=options), 0)
    assert [{row.category for row in data.train} for data in made.clients.values()] == [{"compare"}, {"copy"}]
    for split in SPLITS:
        assert asked(made, split) == asked(before, split)


def test_only_clients_with_some_tasks() -> None:
    made = load_federation(DataConfig(source=str(shared_data()), tasks=("task2", "task0")), 0)
    assert [data.train[0].task for data in made.clients.values()] == ["task0", "task2"]
    assert made.ids == (0, 1)
    with pytest.raises(UserError, match=r'data.tasks: .* has "taks1" \(did you mean "task1"\?\); tasks: task0, task1'):
        load_federation(DataConfig(source=str(shared_data()), tasks=("taks1",)), 0)


def test_the_last_clients_take_no_part() -> None:
    whole = DataConfig(source=str(shared_data()))
    some = whole.model_copy(update={"held_out": 1})
    everybody, taken, rest = load_federation(whole, 0), load_federation(some, 0), load_held_out(some, 0)
    assert (taken.ids, rest.ids) == ((0, 1), (2,))
    assert {**taken.clients, **rest.clients} == everybody.clients
    assert load_held_out(whole, 0).clients == {}
    with pytest.raises(UserError, match=r"data.held_out: 3 clients asked for, but there are only 3"):
        load_federation(whole.model_copy(update={"held_out": 3}), 0)


# ------------------------------------------------------------------------------------------------------- partition.json


@pytest.mark.parametrize("test", ["like_train", "shared"])
def test_a_file_gives_the_same_clients_again(tmp_path: Path, test: str) -> None:
    options = PartitionConfig(by="dirichlet", alpha=1, column="task", min_rows=2, test=test)  # type: ignore[arg-type]
    made = DataConfig(source=str(shared_data()), clients=4, held_out=1, validation_rows=1, partition=options)
    taken, rest = load_federation(made, 7), load_held_out(made, 7)
    path = tmp_path / "partition.json"
    path.write_text(json.dumps(record(made, 7, taken, rest)))
    again = DataConfig(source=str(shared_data()), partition=PartitionConfig(file=str(path)))
    for repeated in (again, again.model_copy(update={"held_out": 1})):
        assert load_federation(repeated, 99).clients == taken.clients
        assert load_held_out(repeated, 99).clients == rest.clients
    with pytest.raises(UserError, match=r"data.held_out: 2 clients asked for, but .*partition.json holds 1 out"):
        load_federation(again.model_copy(update={"held_out": 2}), 99)
    fewer = again.model_copy(update={"tasks": None, "source": str(shared_data(clients=2))})
    with pytest.raises(UserError, match=r"data.partition.file: \d+ rows of .*partition.json are not in .*data-2-0"):
        load_federation(fewer, 0)


def test_rows_of_equal_text_are_all_used(tmp_path: Path) -> None:
    twins = tuple(Row("same", "x", category=name) for name in "ab")
    path = tmp_path / "partition.json"
    digest = row_digest(twins[0])
    wanted = {"train": [digest, digest], "validation": [], "test": []}
    path.write_text(json.dumps({"clients": {"0": wanted}}))
    assert reproduce(path, Pool(twins, (), (), "here")).clients[0].train == twins
    with pytest.raises(UserError, match="1 rows of"):
        reproduce(path, Pool(twins[:1], (), (), "here"))


def test_labels_that_are_numbers_come_by_size() -> None:
    assert in_order({"10", "b", "2", "a"}) == ["2", "10", "a", "b"]


@pytest.mark.parametrize("text", ["[]", "{}", '{"clients": {"x": {}}}', '{"clients": {}}', "{"])
def test_a_file_that_is_no_partition(tmp_path: Path, text: str) -> None:
    path = tmp_path / "partition.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"partition\.json"):
        load_federation(DataConfig(source=str(shared_data()), partition=PartitionConfig(file=str(path))), 0)


def test_counts_and_digests() -> None:
    made = Federation({4: ClientData(tuple(Row(f"q{i}", "ab"[i % 2]) for i in range(5)), (), (Row("q", "a"),))}, "here")
    assert label_counts(made) == (
        "label",
        {"4": {"train": {"a": 3, "b": 2}, "validation": {}, "test": {"a": 1}}},
    )
    free = Federation({0: ClientData(tuple(Row(f"q{i}", f"answer {i}", "t") for i in range(9)))}, "here")
    assert label_counts(free)[0] == "task"

    class Seen:
        def __init__(self, name: str) -> None:
            self.name = name

        def open(self) -> Any: ...

        def digest(self) -> str:
            return self.name

    one, same, other = (row_digest(Row("x", "a", image=Seen(name))) for name in ("p", "p", "q"))
    assert one == same != other
    assert one != row_digest(Row("x", "a"))


def test_pooling_keeps_the_order_of_clients() -> None:
    federation = load_federation(DataConfig(source=str(shared_data())), 0)
    assert pooled(federation).train == sum((data.train for data in federation.clients.values()), ())


# ------------------------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[Pool, DataConfig, list[str]]] = {
    "no number": (pool(9), DataConfig(), ["data.clients: say how many", "9 rows of here"]),
    "more clients than rows": (pool(9), config("iid", 10), ["data.clients: 10 clients", "9 training rows"]),
    "too few rows": (pool(30), config("iid", 10), ["iid leaves one of 10", "fewer than 4", "smaller min_rows"]),
    "too uneven": (
        pool(60, 9),
        config("dirichlet", 9, partition={"alpha": 0.01}),
        ["dirichlet leaves one of 9", "larger data.partition.alpha"],
    ),
    "too uneven sizes": (
        pool(60, 9),
        config("quantity", 9, partition={"alpha": 0.01}),
        ["quantity leaves one of 9", "larger data.partition.alpha"],
    ),
    "a label with no client": (
        pool(60, 9),
        config("pathological", 3, partition={"classes_per_client": 1}),
        ["classes_per_client: 3 clients hold at most 3 of the 4 values", "no client"],
    ),
    "more labels than there are": (
        pool(60, 9),
        config("pathological", 3, partition={"classes_per_client": 9}),
        ["classes_per_client: 9, but here has 4"],
    ),
    "no superclasses": (
        Pool(tuple(Row(f"{i}", "a") for i in range(9)), (), (), "here"),
        config("sc_dir", 2),
        ["sc_dir needs the category"],
    ),
    "column and no column": (
        pool(60),
        DataConfig(partition=PartitionConfig(by="column")),
        ["data.partition.column: say which"],
    ),
    "unknown column": (
        pool(60),
        DataConfig(partition=PartitionConfig(by="column", column="taks")),
        ['here has no "taks"', 'did you mean "task"?'],
    ),
    "another number than values": (
        pool(60),
        DataConfig(clients=5, partition=PartitionConfig(by="column", column="task")),
        ["data.clients: 5", "task has 3 values"],
    ),
    "a label in test rows only": (
        Pool(pool(60).train, (), (Row("x", "other"), Row("y", "other")), "here"),
        config("iid", 2),
        ['here: label "other" is in 2 test rows and in no training row'],
    ),
    "too few test rows": (pool(60, 2), config("iid", 4), ["4 clients", "2 test rows are too few"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_dealt(name: str) -> None:
    rows, made, pieces = REFUSED[name]
    line = refusal(rows, made)
    assert all(piece in line for piece in pieces), line


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        ({"by": "dirichlt"}, ["data.partition.by", '(did you mean "dirichlet"?)']),
        ({"by": "dirichlet", "alpha": 0}, ["data.partition.alpha = 0", "greater than 0"]),
        ({"alpha": -1.0}, ["greater than 0"]),
        ({"bye": "iid"}, ['unknown key "data.partition.bye" (did you mean "by"?)']),
        ({"min_rows": 0}, ["data.partition.min_rows"]),
    ],
)
def test_settings_that_are_not_allowed(options: dict[str, Any], pieces: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_config({"data": {"partition": options}}, "x.yaml")
    assert all(piece in str(caught.value) for piece in pieces), str(caught.value)
