"""Comparisons as tables of plain cells, in CSV and in Markdown; what is shown, in one place for files and terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedalt.config.data import planted_note
from fedalt.errors import listed
from fedalt.evaluation.metrics import Metric, metric_of
from fedalt.files import write_json, write_text

INTERVAL = "± after an average is half of the 95 % interval over {} (Student's t)"
EQUAL = "equal are rounds and local epochs, not trained parameters or bytes: see --match-budget"
STEPS = "steps differ: {}"
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


def score_grid(comparison: Mapping[str, Any], most: int = MOST, *, judged: bool = True) -> Grid:
    """Methods × tasks, and the average over clients, as in the paper's Table 1; ``judged``: what follows, too."""
    groups = columns(comparison)
    groups = groups if len(groups) <= most else {}
    metric, judged = metric_of(comparison["metric"]), judged and len(comparison["methods"]) > 1

    def row(block: Mapping[str, Any]) -> list[Cell]:
        means = [sum(block["per_client"][c] for c in mine) / len(mine) for mine in groups.values()]
        scores = (Score(round(m, metric.digits), metric.text(m)) for m in means)
        apart, _, verdict = difference(block, metric)
        return [block["title"], *scores, average(block, metric), *([apart, verdict] if judged else [])]

    rows, below = _parted(comparison, row)
    title = f"{metric.title} on each client's own test rows, {seeds(comparison)}"
    notes = conditions(comparison)
    if not groups:
        notes.append("scores of every client: comparison.csv")
    head = ["method", *groups, "average"]
    if judged:
        head += [f"vs {_reference(comparison)}", "verdict"]
        notes.append(verdict_note(comparison))
    return Grid(title, head, rows, below, notes, metric.higher_is_better)


def conditions(comparison: Mapping[str, Any]) -> list[str]:
    """Which scores are better if low ones are, what ± is, and what is equal for all methods."""
    notes = [planted_note(comparison["canaries"])] if comparison.get("canaries") else []
    notes += [] if metric_of(comparison["metric"]).higher_is_better else [LOWER]
    draws = comparison.get("draws") or ()
    repeated = "draws of rows" if len(draws) > 1 else "seeds"
    notes += [INTERVAL.format(repeated)] if len(comparison["seeds"]) > 1 or len(draws) > 1 else []
    steps = {block["title"]: round(block.get("steps", 0)) for block in comparison["methods"].values()}
    if comparison["budget"]:
        notes.append(f"ranks are chosen for equal {comparison['budget']}")
    elif len(comparison["methods"]) > 1:
        notes.append(STOPPED if comparison.get("early_stop") else EQUAL)
    if tuned := comparison.get("tuned"):
        notes.append(f"tuned on validation rows, {tuned['trials']} trials per method: {_settings(tuned['methods'])}")
    if len(set(filter(None, steps.values()))) > 1:
        usual = max(steps.values(), key=list(steps.values()).count)
        other = ", ".join(f"{title} {count:,}" for title, count in steps.items() if count not in {usual, 0})
        notes.append(STEPS.format(f"{other}, others {usual:,} per client"))
    return notes


def _settings(tuned: Mapping[str, Any]) -> str:
    """What every method was tuned to, with a mark on what lies at the edge of its range."""

    def one(found: Mapping[str, Any]) -> str:
        own = found["settings"].items()
        texts = (f"{key.rpartition('.')[2]} {value}{' (edge)' if key in found['edge'] else ''}" for key, value in own)
        return ", ".join(texts) or "as configured"

    return "; ".join(f"{name} {one(found)}" for name, found in tuned.items())


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
    """Methods against the reference and against Local."""
    reference, metric = _reference(comparison), metric_of(comparison["metric"])
    count = len(comparison["tasks"])

    def row(block: Mapping[str, Any]) -> list[Cell]:
        apart, p, verdict = difference(block, metric)
        return [
            block["title"],
            apart,
            _range((block["against"] or {}).get("beyond"), metric),
            p,
            verdict,
            metric.text(block["gain_over_local"], sign=True),
            harmed(block, count),
            metric.text(block["worst"]),
            metric.text(block["p10"]),
        ]

    head = ["method", f"vs {reference}", "beyond these", "p", "verdict", "gain over Local", "clients harmed"]
    rows, below = _parted(comparison, row)
    notes = [verdict_note(comparison), BEYOND, HARMED, *spread_notes(comparison)]
    return Grid(f"Against {reference} and Local", [*head, "worst client", "10th percentile"], rows, below, notes)


def _reference(comparison: Mapping[str, Any]) -> str:
    return str(comparison["methods"][comparison["reference"]]["title"])


BEYOND = "beyond these: 95 % interval for other clients, draws of rows and seeds (hierarchical bootstrap)"
WHO = "client: gain over Local ± half of its 95 % interval over the client's own test rows"
HARMED = "harmed: mean over seeds worse than Local's"


def verdict_note(comparison: Mapping[str, Any]) -> str:
    """What a difference and a verdict are."""
    tests = [block["against"] for block in comparison["methods"].values() if block["against"]]
    clients = max((test["clients"] for test in tests), default=0)
    text = (
        f"vs {_reference(comparison)}: mean over {clients} clients (the unit) ± half of its 95 % interval; verdict: "
        "paired t tests, Holm, p < .05"
    )
    if comparison["margin"]:
        text += f"; equivalent: surely less than {_margin(comparison)} apart; not worse: by {_margin(comparison)}"
    return text


def _margin(comparison: Mapping[str, Any]) -> str:
    metric, margin = metric_of(comparison["metric"]), comparison["margin"]
    unit = metric.unit or ("point" if margin == 1 else "points")
    return f"{margin:g} {unit}"


def spread_notes(comparison: Mapping[str, Any]) -> list[str]:
    """How much the differences to the reference vary by clients, draws and seeds; one line in all."""
    metric, lines = metric_of(comparison["metric"]), []
    for block in comparison["methods"].values():
        if found := (block["against"] or {}).get("sources"):
            lines.append(f"{block['title']} {', '.join(f'{name} {metric.text(sd)}' for name, sd in found.items())}")
    return [f"standard deviation of the difference by source: {'; '.join(lines)}"] if lines else []


def finding(comparison: Mapping[str, Any]) -> str:
    """What came out, in one sentence; nothing for a single method."""
    methods, metric = comparison["methods"], metric_of(comparison["metric"])
    said: dict[str, list[str]] = {}
    for name, block in methods.items():
        test = block["against"]
        if not test:
            continue
        other, apart = "training alone" if name == LOCAL else block["title"], metric.text(abs(test["difference"]))
        match test["verdict"]:
            case "equivalent":
                said.setdefault("equivalent to {} within " + _margin(comparison), []).append(other)
            case "worse":
                said.setdefault("{}", []).append(f"{apart} better than {other}")
            case "better":
                said.setdefault("{} ", []).append(f"{apart} worse than {other}")
            case "not worse":
                said.setdefault("not " + _margin(comparison) + " better than {}", []).append(other)
            case _:
                said.setdefault("undecided against {}", []).append(other)
    if not said:
        return ""
    units = max(block["against"]["clients"] for block in methods.values() if block["against"])
    parts = [text.format(_and(others)).strip() for text, others in said.items()]
    draws = len(comparison.get("draws") or ())
    over = (
        f"{units} clients, {f'{draws} draws of rows, ' if draws > 1 else ''}{_count(len(comparison['seeds']), 'seed')}"
    )
    return f"{_reference(comparison)}: {', '.join(parts)} ({metric.title}, {over})."


def who(comparison: Mapping[str, Any]) -> list[str]:
    """For whom a method is better than training alone, and for whom worse, a line per method; none without Local."""
    metric, said = metric_of(comparison["metric"]), []
    for block in comparison["methods"].values():
        halves, gains = block.get("gain_ci95"), block["gain_per_client"]
        if not halves or block["harmed"] is None:
            continue
        signs = {
            c: 0 if half is None or abs(gains[c]) <= half else 1 if gains[c] > 0 else -1 for c, half in halves.items()
        }
        parts = []
        for sign, word in ((1, "better"), (-1, "worse")):
            mine = sorted((c for c in gains if signs[c] == sign), key=lambda c: -abs(gains[c]))
            each = [f"{c}: {metric.text(gains[c], sign=True)} ± {metric.text(halves[c])}" for c in mine]
            parts.append(
                f"{word} for {len(mine)} of {_count(len(gains), 'client')} ({listed(each, 4)})" if each else ""
            )
        parts.append(f"undecided for {unsure}" if (unsure := sum(not sign for sign in signs.values())) else "")
        said.append(f"{block['title']} against training alone: {', '.join(filter(None, parts))}")
    return [*said, WHO] if said else []


def _and(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def budget_grid(comparison: Mapping[str, Any]) -> Grid:
    """Scores beside what they cost."""
    gpu = any(block["peak_memory_gpu"] is not None for block in comparison["methods"].values())
    private = any("epsilon" in block for block in comparison["methods"].values())
    metric = metric_of(comparison["metric"])

    def row(block: Mapping[str, Any]) -> list[Cell]:
        if "runs" not in block:
            return [block["title"], metric.text(block["mean"]), *[NOTHING] * (len(head) - 2)]
        memory = [block["peak_memory"], *([block["peak_memory_gpu"]] if gpu else [])]
        return [
            block["title"],
            average(block, metric).text,
            f"{block['steps']:,.0f}",
            f"{block['tokens'] / 1e3:,.0f}",
            f"{block['parameters'] / 1e3:,.0f}",
            f"{block['bytes_up'] / 1e6:.1f}",
            f"{block['bytes_down'] / 1e6:.1f}",
            f"{block['seconds']:.0f}",
            f"{block['scoring_seconds']:.0f}",
            *(NOTHING if peak is None else f"{peak / 1e9:.2f}" for peak in memory),
            *([f"{block['epsilon']:.2f}" if "epsilon" in block else NOTHING] if private else []),
        ]

    head = ["method", "average", "steps", "tokens, k", "trained, k", "MB up", "MB down", "training, s", "scoring, s"]
    head += ["memory, GB", *(["GPU, GB"] if gpu else []), *(["epsilon"] if private else [])]
    rows, below = _parted(comparison, row)
    notes = [
        "steps and tokens: of a client in the whole run; trained: parameters of a client; MB: all clients, all rounds"
    ]
    if private:
        notes.append("epsilon: most that any client has spent in a run, on every one of its training rows")
    return Grid("Budgets", head, rows, below, notes)


def average(block: Mapping[str, Any], metric: Metric) -> Score:
    """Mean over clients and seeds, with its interval where there is one."""
    spread = "" if block["ci95"] is None else f" ± {metric.text(block['ci95'])}"
    return Score(round(block["mean"], metric.digits), f"{metric.text(block['mean'])}{spread}")


def difference(block: Mapping[str, Any], metric: Metric) -> tuple[str, str, str]:
    """Difference to the reference with its interval, adjusted p, verdict."""
    test = block["against"]
    if test is None:
        return (NOTHING, NOTHING, "reference" if "runs" in block else NOTHING)
    spread = "" if test["ci95"] is None else f" ± {metric.text(test['ci95'])}"
    p = test["p_adjusted"]
    return (
        f"{metric.text(test['difference'], sign=True)}{spread}",
        NOTHING if p is None else "<.001" if p < 0.001 else f"{p:.3f}".replace("0.", "."),
        test["verdict"],
    )


def _range(bounds: Sequence[float] | None, metric: Metric) -> str:
    return NOTHING if bounds is None else f"{metric.text(bounds[0], sign=True)} to {metric.text(bounds[1], sign=True)}"


def harmed(block: Mapping[str, Any], clients: int) -> str:
    """How many clients would rather have trained alone."""
    return NOTHING if block["harmed"] is None else f"{block['harmed']} of {clients}"


def seeds(comparison: Mapping[str, Any]) -> str:
    """How many seeds, or which one, and how many draws."""
    known, draws = comparison["seeds"], len(comparison.get("draws") or ())
    text = f"mean of {len(known)} seeds" if len(known) > 1 else f"seed {known[0]}"
    return f"{text}, {draws} draws of rows" if draws > 1 else text


def _parted(comparison: Mapping[str, Any], row: Any) -> tuple[list[list[Cell]], list[list[Cell]]]:
    methods, under = comparison["methods"], comparison["below"]
    rows = [row(block) for name, block in methods.items() if name not in under]
    below = [row(methods[name]) for name in under]
    constant = [row(comparison["majority"])] if comparison.get("majority") else []
    return (rows, below + constant) if rows else (below, constant)


def write_comparison(out: Path, comparison: Mapping[str, Any]) -> None:
    """Write ``comparison.json``, ``comparison.csv`` (a line per method, seed and client) and ``comparison.md``."""
    write_json(out / "comparison.json", comparison)
    write_csv(out / "comparison.csv", client_lines(comparison))
    grids = (score_grid(comparison), verdict_grid(comparison), gain_grid(comparison), budget_grid(comparison))
    text = "\n".join([*(markdown(grid) for grid in grids if grid), *(f"{line}  " for line in who(comparison))])
    head = "\n\n".join(filter(None, (f"# Comparison on {comparison['source']}", finding(comparison))))
    write_text(out / "comparison.md", f"{head}\n\n{text}")


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
                    "seed": seed.split("/")[0],
                    **({"draw": seed.split("/")[1]} if "/" in seed else {}),
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
