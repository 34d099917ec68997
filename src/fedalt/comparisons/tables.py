"""Comparisons as tables of plain cells, in CSV and in Markdown; what is shown, in one place for files and terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedalt.evaluation.metrics import Metric, metric_of
from fedalt.files import write_json, write_text

INTERVAL = "± is half of the 95 % interval over seeds (Student's t)"
EQUAL = "equal are rounds and local epochs, not trained parameters or bytes: see --match-budget"
STOPPED = "every run has stopped by itself, and its best round on validation rows is compared; rounds are not equal"
LOWER = "lower is better; a gain over Local is Local's score less the method's"
NOTHING = "–"
LOCAL = "local"
"""The method that gains are measured against."""
MOST = 20
"""Columns of tasks that a table can have."""


@dataclass(frozen=True)
class Score:
    """A cell that competes with the others of its column."""

    value: float
    text: str


Cell = str | Score


@dataclass(frozen=True)
class Grid:
    """A table of cells.

    Attributes:
        title: Its heading.
        head: Names of columns.
        rows: The methods.
        below: Rows under a line, which do not compete.
        notes: Lines under the table.
        highest: Whether the highest scores are the best.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    below: Sequence[Sequence[Cell]] = ()
    notes: Sequence[str] = ()
    highest: bool = True

    @property
    def best(self) -> list[float | None]:
        """The best score of every column; None where no two compete."""
        return [column[0] if len(column) > 1 else None for column in self._columns]

    @property
    def second(self) -> list[float | None]:
        """The best score of every column but the best; None where there is none."""
        return [next((value for value in column if value != column[0]), None) for column in self._columns]

    @property
    def _columns(self) -> list[list[float]]:
        """Scores of every column, the best first."""
        columns = zip(*self.rows, strict=True)
        found = [[cell.value for cell in column if isinstance(cell, Score)] for column in columns]
        return [sorted(column, reverse=self.highest) for column in found]


def columns(comparison: Mapping[str, Any]) -> dict[str, list[str]]:
    """Title → clients of a column: one per client, or one per task where several clients share tasks.

    Empty where there are too many for a table.
    """
    tasks = comparison["tasks"]
    groups: dict[str, list[str]] = {}
    for client, task in tasks.items():
        groups.setdefault(task or client, []).append(client)
    if len(groups) == 1 < len(tasks):
        groups = {client: [client] for client in tasks}
    titled = {name if len(mine) == 1 else f"{name} ({len(mine)} clients)": mine for name, mine in groups.items()}
    return titled if len(titled) <= MOST else {}


def score_grid(comparison: Mapping[str, Any], most: int = MOST) -> Grid:
    """Methods × tasks, and the average over clients, as in the paper's Table 1."""
    groups = columns(comparison)
    groups = groups if len(groups) <= most else {}
    metric = metric_of(comparison["metric"])

    def row(block: Mapping[str, Any]) -> list[Cell]:
        means = [sum(block["per_client"][c] for c in mine) / len(mine) for mine in groups.values()]
        scores = (Score(round(m, metric.digits), metric.text(m)) for m in means)
        return [block["title"], *scores, average(block, metric)]

    rows, below = _parted(comparison, row)
    title = f"{metric.title} on each client's own test rows, {seeds(comparison)}"
    notes = conditions(comparison)
    if not groups:
        notes.append("scores of every client: comparison.csv")
    return Grid(title, ["method", *groups, "average"], rows, below, notes, metric.higher_is_better)


def conditions(comparison: Mapping[str, Any]) -> list[str]:
    """Which scores are better if low ones are, what ± is, and what is equal for all methods."""
    notes = [] if metric_of(comparison["metric"]).higher_is_better else [LOWER]
    notes += [INTERVAL] if len(comparison["seeds"]) > 1 else []
    if comparison["budget"]:
        notes.append(f"ranks are chosen for equal {comparison['budget']}")
    elif len(comparison["methods"]) > 1:
        notes.append(STOPPED if comparison.get("early_stop") else EQUAL)
    return notes


def gain_grid(comparison: Mapping[str, Any]) -> Grid | None:
    """Methods × tasks once more, as gains over Local; None where there is no Local or too many tasks."""
    groups, methods = columns(comparison), comparison["methods"]
    others = {name: block for name, block in methods.items() if name != LOCAL}
    if LOCAL not in methods or not others or not groups:
        return None
    metric = metric_of(comparison["metric"])

    def row(block: Mapping[str, Any]) -> list[Cell]:
        gains = block["gain_per_client"]
        means = [sum(gains[c] for c in mine) / len(mine) for mine in groups.values()]
        scores = [*means, block["gain_over_local"]]
        return [block["title"], *(Score(round(m, metric.digits), metric.text(m, sign=True)) for m in scores)]

    rows, below = _parted({**comparison, "methods": others}, row)
    return Grid("Gain over Local, client by client", ["method", *groups, "average"], rows, below)


def verdict_grid(comparison: Mapping[str, Any]) -> Grid:
    """Methods against the reference and against Local, and what they cost."""
    reference = comparison["methods"][comparison["reference"]]["title"]
    gpu = any(block["peak_memory_gpu"] is not None for block in comparison["methods"].values())
    count, metric = len(comparison["tasks"]), metric_of(comparison["metric"])

    def row(block: Mapping[str, Any]) -> list[Cell]:
        test, memory = block["against"], [block["peak_memory"], *([block["peak_memory_gpu"]] if gpu else [])]
        return [
            block["title"],
            *difference(test, metric),
            metric.text(block["gain_over_local"], sign=True),
            harmed(block, count),
            metric.text(block["worst"]),
            metric.text(block["p10"]),
            f"{block['bytes_up'] / 1e6:.1f}",
            f"{block['bytes_down'] / 1e6:.1f}",
            f"{block['seconds']:.0f}",
            f"{block['scoring_seconds']:.0f}",
            *(NOTHING if peak is None else f"{peak / 1e9:.2f}" for peak in memory),
        ]

    head = [
        "method",
        f"vs {reference}",
        "p",
        "verdict",
        "gain over Local",
        "clients harmed",
        "worst client",
        "10th pct",
    ]
    head += ["MB up", "MB down", "training, s", "scoring, s", "memory, GB", *(["GPU, GB"] if gpu else [])]
    rows, below = _parted(comparison, row)
    pairs = max((b["against"]["pairs"] for b in comparison["methods"].values() if b["against"]), default=0)
    notes = [
        f"vs {reference}: mean difference of {pairs} (client, seed) pairs and half of its 95 % interval; "
        "p: signed ranks, Holm",
        "better or worse: p < .05 and the interval excludes zero; harmed: mean over seeds worse than Local's",
    ]
    return Grid(f"Against {reference} and Local", head, rows, below, notes)


def average(block: Mapping[str, Any], metric: Metric) -> Score:
    """Mean over clients and seeds, with its interval where there is one."""
    spread = "" if block["ci95"] is None else f" ± {metric.text(block['ci95'])}"
    return Score(round(block["mean"], metric.digits), f"{metric.text(block['mean'])}{spread}")


def difference(test: Mapping[str, Any] | None, metric: Metric) -> tuple[str, str, str]:
    """Difference to the reference with its interval, adjusted p, verdict."""
    if test is None:
        return (NOTHING, NOTHING, "reference")
    spread = "" if test["ci95"] is None else f" ± {metric.text(test['ci95'])}"
    p = test["p_adjusted"]
    return (
        f"{metric.text(test['difference'], sign=True)}{spread}",
        NOTHING if p is None else "<.001" if p < 0.001 else f"{p:.3f}".replace("0.", "."),
        test["verdict"],
    )


def harmed(block: Mapping[str, Any], clients: int) -> str:
    """How many clients would rather have trained alone."""
    return NOTHING if block["harmed"] is None else f"{block['harmed']} of {clients}"


def seeds(comparison: Mapping[str, Any]) -> str:
    """How many seeds, or which one."""
    known = comparison["seeds"]
    return f"mean of {len(known)} seeds" if len(known) > 1 else f"seed {known[0]}"


def _parted(comparison: Mapping[str, Any], row: Any) -> tuple[list[list[Cell]], list[list[Cell]]]:
    methods, under = comparison["methods"], comparison["below"]
    rows = [row(block) for name, block in methods.items() if name not in under]
    below = [row(methods[name]) for name in under]
    return (rows, below) if rows else (below, [])


def write_comparison(out: Path, comparison: Mapping[str, Any]) -> None:
    """Write ``comparison.json``, ``comparison.csv`` (a line per method, seed and client) and ``comparison.md``."""
    write_json(out / "comparison.json", comparison)
    write_csv(out / "comparison.csv", client_lines(comparison))
    grids = (score_grid(comparison), verdict_grid(comparison), gain_grid(comparison))
    text = "\n".join(markdown(grid) for grid in grids if grid)
    write_text(out / "comparison.md", f"# Comparison on {comparison['source']}\n\n{text}")


def client_lines(comparison: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """A line per method, seed and client."""
    methods, metric = comparison["methods"], metric_of(comparison["metric"])
    local = methods.get(LOCAL)
    for name, block in methods.items():
        for seed, scores in block["per_seed"].items():
            for client, score in scores.items():
                yield {
                    "method": name,
                    "title": block["title"],
                    "seed": seed,
                    "client": client,
                    "task": comparison["tasks"][client],
                    "metric": metric.name,
                    "score": score,
                    "gain_over_local": metric.gain(score, local["per_seed"][seed][client]) if local else None,
                }


def write_csv(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write mappings with equal keys as CSV with a header; None is an empty field."""
    values = list(lines)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(values[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(values)
    write_text(path, file.getvalue())


def markdown(grid: Grid) -> str:
    """A heading, a table with the best of every column in bold, and the notes."""
    best = grid.best

    def shown(cell: Cell, top: float | None) -> str:
        if isinstance(cell, str):
            return _escaped(cell)
        return f"**{cell.text}**" if cell.value == top else cell.text

    lines = [" | ".join(map(_escaped, grid.head)), " | ".join(["---", *["---:"] * (len(grid.head) - 1)])]
    lines += [" | ".join(shown(cell, top) for cell, top in zip(row, best, strict=True)) for row in grid.rows]
    if grid.below:
        lines.append(" | ".join(["*for reference*", *[""] * (len(grid.head) - 1)]))
    lines += [" | ".join(shown(cell, None) for cell in row) for row in grid.below]
    table = "".join(f"| {line} |\n" for line in lines)
    notes = "".join(f"\n{note}  " for note in grid.notes).rstrip(" ")
    return f"## {grid.title}\n\n{table}{notes}\n"


def _escaped(text: str) -> str:
    """Text from rows stays in its cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def latex(grid: Grid) -> str:
    """A ``tabular`` with booktabs: the best of every column in bold, the second underlined; notes as comments."""
    best, second = grid.best, grid.second

    def shown(cell: Cell, top: float | None, next_: float | None) -> str:
        text = _for_latex(cell if isinstance(cell, str) else cell.text)
        if isinstance(cell, str) or cell.value not in (top, next_):
            return text
        return f"\\{'textbf' if cell.value == top else 'underline'}{{{text}}}"

    def line(cells: Iterable[str]) -> str:
        return f"{' & '.join(cells)} \\\\"

    nobody = [None] * len(grid.head)
    lines = [f"% {note}" for note in (grid.title, *grid.notes, r"needs \usepackage{booktabs}")]
    lines += [f"\\begin{{tabular}}{{l{'r' * (len(grid.head) - 1)}}}", r"\toprule", line(map(_for_latex, grid.head))]
    lines += [r"\midrule", *(line(map(shown, row, best, second)) for row in grid.rows)]
    if grid.below:
        lines += [r"\midrule", *(line(map(shown, row, nobody, nobody)) for row in grid.below)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


_LATEX = {**{c: f"\\{c}" for c in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"\\": r"\textbackslash{}", "±": r"$\pm$", "–": "--", "\n": " "}


def _for_latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
