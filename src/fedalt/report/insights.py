"""Figures and shaded rows from ``results/insight.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from plotly.subplots import make_subplots

from fedalt.config import load_config
from fedalt.data.load import Rows
from fedalt.evaluation.metrics import metric_of
from fedalt.personal.insight import BINS, write_insight
from fedalt.report.page import paragraph
from fedalt.report.theme import PATTERNS, SEQUENTIAL, Drawing, again, cells, colour, decimals, labels, shown, styled
from fedalt.runs.folder import RunFolder, final_scores, kept_scores
from fedalt.runs.setup import Bases, Resident

Insight = Mapping[str, Any]
Counts = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Client → split → category → rows."""
_CATEGORIES = 16
"""Kinds of rows that get a colour and pattern of their own."""


def look(folder: RunFolder, count: int, resident: Resident | None = None, rows: Rows | None = None) -> None:
    """Write a finished run's insight for the clients that its report shows; see ``write_insight``."""
    name, found = final_scores(folder)["metric"], kept_scores(folder)["clients"]
    clients = [int(c) for c in shown({c: v[name] for c, v in found.items()}, metric_of(name).higher_is_better)]
    config = load_config(folder.config, recorded=True)
    write_insight(folder, config, clients, count, resident=resident, rows=rows)


def look_at_each(
    folders: Sequence[RunFolder], count: int, bases: Bases | None = None, rows: Rows | None = None
) -> None:
    """``look`` at several runs, with one base and one set of rows in memory where they can share them."""
    bases, rows = bases or Bases(), rows or Rows()
    for folder in folders if count else ():
        look(folder, count, bases.of(load_config(folder.config, recorded=True)), rows)


def matrix(insight: Insight, tasks: Mapping[str, str]) -> Drawing:
    """Score of every client's model on every client's rows."""
    names, metric = _names(insight, tasks), metric_of(insight["metric"])
    digits = metric.digits - 1 if metric.points else metric.digits
    figure = cells(
        insight["matrix"],
        [name.split(" ")[0] for name in names],
        names,
        **({"zmin": 0, "zmax": 100} if metric.points else {}),
        colorscale=SEQUENTIAL,
        text=[[f"{value:.{digits}f}" for value in row] for row in insight["matrix"]],
        hovertemplate=f"model of %{{y}}<br>rows of client %{{x}}<br>%{{z:.{metric.digits}f}}<extra></extra>",
    )
    figure.update_xaxes(title="rows of client", type="category")
    note = f"{metric.title} on up to {insight['rows']} test rows of each client; own rows on the diagonal."
    return Drawing("matrix", "Every model on every client's rows", note, figure)


def similarity(insight: Insight, tasks: Mapping[str, str]) -> Drawing | str:
    """Cosine similarity of LoRAs; a line where all are one and the same."""
    slot, values = insight["similarity"]["slot"], insight["similarity"]["values"]
    if len(values) < 2:
        return ""
    if min(map(min, values)) > 1 - 1e-9:
        return paragraph(f"All clients hold the same {slot} LoRA.")
    names = _names(insight, tasks)
    others = [value for i, row in enumerate(values) for j, value in enumerate(row) if i != j]
    figure = cells(
        [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(values)],
        [name.split(" ")[0] for name in names],
        names,
        zmin=min(0.0, *others),
        zmax=max(others) if max(others) > 0 else 1.0,
        colorscale=SEQUENTIAL,
        text=[["" if i == j else decimals(value) for j, value in enumerate(row)] for i, row in enumerate(values)],
        hovertemplate="%{y} and %{x}<br>%{z:.3f}<extra></extra>",
    )
    figure.update_xaxes(title="client", type="category")
    note = f"Cosine similarity of the products BA of the {slot} LoRAs over all layers; 1 for a client with itself."
    return Drawing("similarity", "Similarity of the clients' LoRAs", note, figure)


def histogram(insight: Insight, tasks: Mapping[str, str]) -> Drawing:
    """Mixer weights on test rows, as shares of tokens and layers: of all clients together, and of each."""
    names, clients = labels(tasks), insight["alpha"]["clients"]
    counts = {names[client]: seen["histogram"] for client, seen in clients.items()}
    rows = {"all shown": [sum(column) for column in zip(*counts.values(), strict=True)], **counts}
    figure = cells(
        [[100 * count / sum(row) for count in row] for row in rows.values()],
        [f"{(i + 0.5) / BINS:.3f}" for i in range(BINS)],
        list(rows),
        zmin=0,
        colorscale=SEQUENTIAL,
        hovertemplate="%{y}<br>α about %{x}: %{z:.1f} %<extra></extra>",
    )
    figure.update_xaxes(
        title="α", type="category", tickvals=[-0.5, BINS / 2 - 0.5, BINS - 0.5], ticktext=["0", ".5", "1"]
    )
    slot = insight["alpha"]["slot"]
    note = (
        f"% of tokens and layers, on up to {insight['rows']} own test rows of every client and its answers; "
        f"1 is the {slot} LoRA alone."
    )
    return Drawing("histogram", "How mixer weights are spread", note, figure)


def shaded_rows(insight: Insight, tasks: Mapping[str, str]) -> str:
    """Some test rows of every client, each token shaded by the mixer's weight; answers are set off."""
    slot, clients = insight["alpha"]["slot"], insight["alpha"]["clients"]
    tokens = [a for seen in clients.values() for row in seen["rows"] for _, a in row["tokens"]]
    widest = max((abs(a - 0.5) for a in tokens), default=0) or 0.5
    blocks = []
    for place, (client, seen) in enumerate(clients.items()):
        rows = "".join(_shaded(row, widest) for row in seen["rows"])
        summary = escape(f"{client} {tasks[client]}")
        blocks.append(f"<details{'' if place else ' open'}><summary>{summary}</summary>{rows}</details>")
    note = (
        f"Mean weight over layers while reading a test row and answering it (after ▸). Blue: the {slot} LoRA weighs "
        f"more than a half; orange: less; strongest colour: {0.5 + widest:.2f} or {0.5 - widest:.2f}."
    )
    return f"<figure><figcaption>Tokens shaded by α<span>{escape(note)}</span></figcaption>{''.join(blocks)}</figure>"


def partition_bars(insight: Insight, tasks: Mapping[str, str]) -> Drawing:
    """Rows per client by category, a panel per split."""
    clients, names, counts = insight["clients"], labels(tasks), _few_kinds(insight["partition"])
    splits = list(dict.fromkeys(split for mine in counts.values() for split in mine))
    kinds = list(dict.fromkeys(kind for mine in counts.values() for split in mine.values() for kind in split))
    figure = make_subplots(1, len(splits), shared_yaxes=True, column_titles=splits, horizontal_spacing=0.06)
    for place, kind in enumerate(kinds):
        for column, split in enumerate(splits, 1):
            figure.add_bar(
                y=[names[client] for client in clients],
                x=[counts[client].get(split, {}).get(kind, 0) for client in clients],
                name=kind or "rows",
                orientation="h",
                marker={"color": colour(place), "pattern": {"shape": again(place, PATTERNS)}, "line": {"width": 0}},
                legendgroup=kind,
                row=1,
                col=column,
                hovertemplate="%{y}: %{x} rows",
            )
    styled(figure, height=90 + 26 * len(clients))
    figure.update_layout(barmode="stack", bargap=0.25, margin_t=24)
    for column, split in enumerate(splits, 1):
        most = max(sum(mine.get(split, {}).values()) for mine in counts.values())
        figure.update_xaxes(nticks=3, tickfont_size=10, range=[0, 1.15 * most], row=1, col=column)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_annotations(font_size=12)
    return Drawing("partition", "Rows of every client", "By category (or task) and split.", figure)


def _few_kinds(counts: Counts) -> Counts:
    """The same with all kinds of rows but the most frequent ones put together."""
    totals: Counter[str] = Counter()
    for mine in counts.values():
        for kinds in mine.values():
            totals.update(kinds)
    kept = {kind for kind, _ in totals.most_common(_CATEGORIES - (len(totals) > _CATEGORIES))}

    def merged(kinds: Mapping[str, int]) -> dict[str, int]:
        rest = sum(count for kind, count in kinds.items() if kind not in kept)
        return {kind: count for kind, count in kinds.items() if kind in kept} | ({"others": rest} if rest else {})

    return {client: {split: merged(kinds) for split, kinds in mine.items()} for client, mine in counts.items()}


def _names(insight: Insight, tasks: Mapping[str, str]) -> list[str]:
    return [labels(tasks)[client] for client in insight["clients"]]


def _shaded(row: Mapping[str, Any], widest: float) -> str:
    spans = []
    for place, (text, a) in enumerate(row["tokens"]):
        strength = min(abs(a - 0.5) / widest, 1) * 0.75
        mark = "▸ " if place == row["prompt"] else ""
        side = "own" if a >= 0.5 else "others"
        spans.append(f'{mark}<span class="{side}" style="--a:{strength:.2f}" title="{a:.2f}">{escape(text)}</span>')
    return f'<div class="tokens">{"".join(spans)}</div>'
