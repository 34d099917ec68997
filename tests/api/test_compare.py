"""Comparisons from Python: tables for people and papers, and rows that are read once."""

from __future__ import annotations

import csv
import gc
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fedalt as fa
from fedalt.comparisons.compare import compare as compare_below
from fedalt.comparisons.sweep import sweep
from fedalt.comparisons.tables import Grid, Score, latex
from fedalt.config import parse_config
from fedalt.config.data import DataConfig
from fedalt.data.load import Rows, load_both
from fedalt.errors import UserError
from micro import call, labelled_table, settings, shared_data, shared_model, tree, write_yaml

QUICK: dict[str, Any] = {"rounds": 1, "epochs": 1, "batch_size": 4, "lr": 0.02, "rank": 4, "quiet": True}
REST: dict[str, Any] = {"evaluation.max_new_tokens": 3, "federation.cohort": 2}
METHODS = ("local", "fedit", "fedalt")


@pytest.fixture(scope="module")
def table() -> Any:
    data = fa.load_data(shared_data(), cutoff=64)
    return fa.compare(data, shared_model(), METHODS, [0, 1], settings=REST, **QUICK)


def test_the_numbers_are_those_of_the_command_line(table: Any, tmp_path: Path) -> None:
    values = settings(tmp_path / "cli", federation__rounds=1, federation__cohort=2, training__local_epochs=1)
    values["evaluation"] = {"max_new_tokens": 3}
    values["lora"] = {"r": 4}
    done = call("compare", write_yaml(tmp_path / "x.yaml", values), "--methods", ",".join(METHODS), "--seeds", "0,1")
    assert done.code == 0, done.err
    for name in METHODS:
        for seed in (0, 1):
            inside = Path(f"{name}-seed{seed}") / "clients"
            assert tree(tmp_path / "cli" / inside) == tree(table.folder / inside)
    assert (tmp_path / "cli/comparison.csv").read_text() == (table.folder / "comparison.csv").read_text()


def test_what_a_comparison_shows(table: Any, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = table.to_pandas()
    written = list(csv.DictReader((table.folder / "comparison.csv").open()))
    assert frame.columns.tolist() == list(written[0]) and len(frame) == len(written) == 3 * 2 * 3
    assert frame.groupby("method").score.mean().to_dict() == pytest.approx(
        {name: method["mean"] for name, method in table.table.items()}
    )
    assert isinstance(frame, pandas.DataFrame) and list(table.runs) == [(m, s) for m in METHODS for s in (0, 1)]
    run = table.runs["fedit", 1]
    assert run.config.seed == 1 and run.history.method == "fedit" and run.client(0).answer("Say 1 2.")
    assert repr(table) == table.to_markdown() == table._repr_markdown_()
    assert table.to_markdown() in (table.folder / "comparison.md").read_text(encoding="utf-8")
    text = table.to_latex(tmp_path / "table.tex")
    assert (tmp_path / "table.tex").read_text(encoding="utf-8") == text
    assert text.count(r"\\") == 5 and r"$\pm$" in text and r"\textbf{" in text
    assert "verdict" in text and "majority" in text and table.finding.startswith("FedALT: ")
    assert table.report(tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!")


def test_a_run_keeps_the_folder_of_its_comparison() -> None:
    table = fa.compare(fa.load_data(shared_data(), cutoff=64), shared_model(), "local", settings=REST, **QUICK)
    run = table.runs["local", 42]
    del table
    gc.collect()
    assert run.scores.round == 1
    folder = run.folder.parent
    del run
    gc.collect()
    assert not folder.exists()


def test_a_sweep_has_the_numbers_of_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    axes = {"lr": [0.01, 0.02], "lora.alpha": [8]}
    data = fa.load_data(shared_data(), cutoff=64)
    swept = fa.compare(data, shared_model(), METHODS[:2], [0], settings=REST, sweep=axes, **QUICK)
    values = settings(tmp_path / "cli", federation__rounds=1, federation__cohort=2, training__local_epochs=1)
    values |= {"evaluation": {"max_new_tokens": 3}, "lora": {"r": 4}}
    flags = ("--sweep", "training.lr=0.01,0.02", "--sweep", "lora.alpha=8")
    done = call("compare", write_yaml(tmp_path / "x.yaml", values), "--methods", "local,fedit", "--seeds", "0", *flags)
    assert done.code == 0, done.err
    assert list(swept.points) == ["training.lr=0.01,lora.alpha=8", "training.lr=0.02,lora.alpha=8"]
    for name, point in swept.points.items():
        assert (tmp_path / "cli" / name / "comparison.csv").read_text() == (point.folder / "comparison.csv").read_text()
        assert point.runs["fedit", 0].config.training.lr == float(name[12:16])
    assert swept.to_markdown() in (tmp_path / "cli/sweep.md").read_text(encoding="utf-8")
    frame = swept.to_pandas()
    assert len(frame) == 4 and {"training.lr", "method", "mean", "bytes_up"} <= set(frame.columns)
    assert swept.report(tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!")


def test_without_pandas(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"data frames need pip install 'fedalt\[pandas\]'"):
        table.to_pandas()


def test_latex_marks_the_best_and_the_second() -> None:
    rows = [
        ["A & B_1", Score(50.0, "50.0 ± 1.0"), Score(3.0, "3.0")],
        ["100 %", Score(50.0, "50.0"), Score(2.0, "2.0")],
        ["C", Score(40.0, "40.0"), Score(1.0, "1.0")],
        ["D", Score(30.0, "30.0"), "–"],
    ]
    grid = Grid("title", ["method", "x^2", "y~"], rows, [["below", Score(99.0, "99.0"), "–"]], ["a note"])
    assert (
        latex(grid)
        == r"""% title
% a note
% needs \usepackage{booktabs}
\begin{tabular}{lrr}
\toprule
method & x\textasciicircum{}2 & y\textasciitilde{} \\
\midrule
A \& B\_1 & \textbf{50.0 $\pm$ 1.0} & \textbf{3.0} \\
100 \% & \textbf{50.0} & \underline{2.0} \\
C & \underline{40.0} & 1.0 \\
D & 30.0 & -- \\
\midrule
below & 99.0 & -- \\
\bottomrule
\end{tabular}
"""
    )


def test_what_is_refused() -> None:
    data = fa.load_data(shared_data(), cutoff=64)
    for given, line in (
        ({"seed": 1}, "give seeds="),
        ({"methods": ["fedalr"]}, "did you mean"),
        ({"methods": []}, "at least one"),
        ({"seeds": [-1]}, "a seed is 0 or more"),
        ({"sweep": {"method": ["local"]}}, "method is not a setting to sweep; give methods"),
        ({"sweep": {"lora.r": 4}}, r"lora.r: give a list of values"),
        ({"sweep": {"lora.rr": [4]}}, "did you mean"),
        ({"sweep": {"lora.r": [4]}, "tune": 2}, "exclude each other"),
    ):
        with pytest.raises(UserError, match=line):
            fa.compare(data, shared_model(), **{"methods": ["local"], **QUICK, **given})


# ------------------------------------------------------------------------------------------------------- read once


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often every file is opened through its path."""
    shared_data(), labelled_table(header=True)  # which are made, and so opened, when they are first asked for
    counts: Counter[str] = Counter()
    path_open = Path.open

    def counting(self: Path, *args: Any, **kwargs: Any) -> Any:
        counts[str(self)] += 1
        return path_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counting)
    return counts


def _rows_read(opened: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in opened.items() if name.startswith(str(shared_data())) and ".json" in name}


@pytest.mark.parametrize("way", ["python", "command line", "sweep"])
def test_rows_are_read_and_encoded_once_for_all_methods_and_seeds(
    tmp_path: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    from fedalt.data.encode import AnswerEncoder

    encoded: Counter[str] = Counter()
    plain = AnswerEncoder.example
    monkeypatch.setattr(
        AnswerEncoder, "example", lambda self, row: (encoded.update([row.instruction]), plain(self, row))[1]
    )
    values = settings(tmp_path / "out", federation__rounds=1, training__local_epochs=1, evaluation__max_new_tokens=3)
    values["report"] = {"insight": 0}
    if way == "python":
        fa.compare(fa.load_data(shared_data(), cutoff=64), shared_model(), METHODS, [0, 1], settings=REST, **QUICK)
    elif way == "command line":
        path = write_yaml(tmp_path / "x.yaml", values)
        assert call("compare", path, "--methods", ",".join(METHODS), "--seeds", "0,1").code == 0
    else:
        config = parse_config(values, "x")
        sweep(
            config, [("lora.r", [2, 4])], METHODS[:2], [0], tmp_path / "out", if_exists="ask", sink=lambda event: None
        )
    read = _rows_read(opened)
    assert len(read) == 6 and set(read.values()) == {1}, read
    assert len(encoded) == 3 * 16 and set(encoded.values()) == {1}


def test_two_jobs_give_the_same(table: Any, tmp_path: Path) -> None:
    made = fa.compare(
        fa.load_data(shared_data(), cutoff=64), shared_model(), METHODS, [0, 1], jobs=2, settings=REST, **QUICK
    )
    assert made.to_markdown() == table.to_markdown()


def test_rows_that_are_dealt_by_every_seed(tmp_path: Path, opened: Counter[str]) -> None:
    table = labelled_table(header=True)
    values = settings(tmp_path / "out", data=table, federation__rounds=1, training__local_epochs=1)
    values["evaluation"] = {"max_new_tokens": 1}
    values["data"] |= {"clients": 2, "train_limit": 4, "test_limit": 2, "held_out": 1}
    made = compare_below(
        parse_config(values, "x"), ["local"], [0, 1], tmp_path / "out", if_exists="ask", sink=lambda event: None
    )
    assert made["seeds"] == [0, 1]
    assert {count for name, count in opened.items() if name.startswith(str(table))} == {1}


DEALS: tuple[dict[str, Any], ...] = (
    {},
    {"clients": 2},
    {"held_out": 1},
    {"shuffle": True},
    {"train_limit": 3},
    {"validation_rows": 2, "template": "alpaca"},
    {"partition": {"by": "iid"}, "clients": 2},
    {"partition": {"by": "column", "column": "category"}},
    {"tasks": ("task1", "task0")},
    {"tasks_per_client": 3},
)


def test_shared_rows_are_the_rows_of_each() -> None:
    """Whatever was asked for before, the answer is that of rows which nobody shares."""
    for source in (str(shared_data()), "tinyworld"):
        rows = Rows()
        for _ in range(2):
            for seed in (0, 1):
                for deal in DEALS:
                    if source == "tinyworld" and "tasks" in deal:
                        continue
                    config = DataConfig(**{"source": source, "cutoff": 64, **deal})
                    assert rows.both(config, seed) == load_both(config, seed), deal
