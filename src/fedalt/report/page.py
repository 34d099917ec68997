"""The page around tables and figures: one file that needs no network and fits a phone."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from fedalt.comparisons.tables import Grid, Score
from fedalt.report.theme import Drawing

SCRIPT = """
document.addEventListener("click", event => {
  const key = event.target.closest(".key");
  if (!key) return;
  const hidden = key.classList.toggle("off");
  Plotly.restyle(key.dataset.figure, { visible: !hidden }, JSON.parse(key.dataset.traces));
});
"""
_SHAPES = {
    "circle": "M9 6a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "square": "M9.5 2.5h7v7h-7z",
    "diamond": "M13 1l5 5-5 5-5-5z",
    "triangle-up": "M13 1.5l4.5 8h-9z",
    "cross": "M11.5 1.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "star": "M13 .5l1.6 3.4 3.7.4-2.8 2.5.8 3.7-3.3-1.9-3.3 1.9.8-3.7-2.8-2.5 3.7-.4z",
    "triangle-down": "M13 10.5l4.5-8h-9z",
    "hexagon": "M13 1l4.3 2.5v5L13 11l-4.3-2.5v-5z",
}
_DASHES = {"solid": "", "dash": "6 3", "dot": "2 2"}
_BAR = "M7 1h12v10h-12z"
_PATTERNS = {"": "", "/": "M9 11l8-10M7 7l5-6M14 11l5-6", ".": "M9 3h1M13 6h1M16 9h1M16 3h1M9 9h1"}


def legend(figure: go.Figure, anchor: str) -> str:
    """One key per name. Nothing for a single one."""
    keys = "".join(
        f'<button type="button" class="key" data-figure="{anchor}" data-traces="{json.dumps(key["traces"])}">'
        f'<svg viewBox="0 0 26 12" aria-hidden="true">{"".join(map(_path, key["marks"]))}</svg>'
        f"<span>{escape(key['name'])}</span></button>"
        for key in keys_of(figure)
    )
    return keys and f'<div class="legend">{keys}</div>'


def keys_of(figure: go.Figure) -> list[dict[str, Any]]:
    """Name, traces and marks of every key; traces of the same group share one. None for a single name."""
    groups: dict[str, list[int]] = {}
    for place, trace in enumerate(figure.data):
        if trace.name:
            groups.setdefault(trace.legendgroup or trace.name, []).append(place)
    firsts = {places[0]: places for places in groups.values()} if len(groups) > 1 else {}
    return [
        {"name": str(figure.data[i].meta or figure.data[i].name), "traces": places, "marks": _marks(figure.data[i])}
        for i, places in firsts.items()
    ]


def _marks(trace: go.Scatter | go.Bar) -> list[dict[str, str]]:
    """Attributes of the paths that stand for a trace."""
    if trace.type == "bar":
        hatch = {"d": _PATTERNS[trace.marker.pattern.shape or ""], "stroke": "#fff", "stroke-width": "1.2"}
        return [{"d": _BAR, "fill": trace.marker.color}, hatch]
    colour = trace.line.color or trace.marker.color
    line = {"stroke": colour, "stroke-width": "2.5", "stroke-dasharray": _DASHES[trace.line.dash or "solid"]}
    point = {"d": _SHAPES[trace.marker.symbol.removesuffix("-open")], "fill": colour}
    return [{"d": "M0 6h26", **line}] * ("lines" in trace.mode) + [point] * ("markers" in trace.mode)


def _path(attributes: Mapping[str, str]) -> str:
    return "<path " + " ".join(f'{name}="{value}"' for name, value in attributes.items()) + "/>"


STYLE = """
:root { color-scheme: light dark; --fg: #1c1e21; --bg: #fff; --line: #d8dade; --soft: #5c636c; --card: #f6f7f9;
  --own: 0,119,187; --others: 238,119,51; --dim: none; }
@media (prefers-color-scheme: dark) { :root { --fg: #e4e6ea; --bg: #16181c; --line: #33373e; --soft: #9aa0a8;
  --card: #1e2126; --own: 51,153,221; --dim: brightness(.7); } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { color: var(--fg); background: var(--bg); font: 16px/1.5 system-ui, sans-serif; max-width: 70rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 0; }
h2 { font-size: 1.2rem; margin: 0 0 .4rem; padding-top: 1rem; }
h2 a { text-decoration: none; } a { color: inherit; }
section { border-top: 1px solid var(--line); margin-top: 1.6rem; }
p.about { color: var(--soft); margin: .2rem 0; font-size: .9rem; }
p.finding { font-size: 1.1rem; font-weight: 600; margin: .4rem 0; }
dt { font-weight: 600; font-size: .92rem; } dd { margin: 0 0 .5rem 1rem; font-size: .92rem; }
nav { display: flex; flex-wrap: wrap; gap: .4rem; margin: 1rem 0; }
nav a { padding: .15rem .7rem; border: 1px solid var(--line); border-radius: 1rem; text-decoration: none;
  font-size: .9rem; }
figure { margin: 0 0 1.2rem; }
figcaption { font-weight: 600; font-size: .95rem; }
figcaption span { display: block; font-weight: 400; color: var(--soft); font-size: .85rem; }
.scroll { overflow: auto; margin-bottom: 1.2rem; } .tall { max-height: 34rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; overflow-wrap: normal; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; background: var(--bg); }
th.text, td.text { text-align: left; max-width: 20rem; overflow: hidden; text-overflow: ellipsis; }
tr > :first-child { position: sticky; left: 0; background: var(--bg); z-index: 1; }
@media (max-width: 480px) { th.text, td.text { max-width: 6.5rem; white-space: normal; }
  th, td { padding: .3rem .4rem; } }
.hm, .cbfills { filter: var(--dim); }
tr.total, td.best { font-weight: 600; }
pre { background: var(--card); padding: .8rem; overflow-x: auto; font-size: .85rem; overflow-wrap: normal; }
details { margin: .4rem 0; } summary { cursor: pointer; }
.tokens { background: var(--card); padding: .6rem .8rem; border-radius: .4rem; white-space: pre-wrap;
  font: .85rem/1.7 ui-monospace, monospace; margin: .5rem 0; }
.tokens span { border-radius: .15rem; padding: .1rem 0; }
.own { background: rgba(var(--own), var(--a)); } .others { background: rgba(var(--others), var(--a)); }
.legend { display: flex; flex-wrap: wrap; gap: 0 .9rem; margin-top: .4rem; }
.key { all: unset; cursor: pointer; display: inline-flex; align-items: center; gap: .35rem; font-size: .8rem;
  max-width: 100%; }
.key svg { width: 26px; height: 12px; flex: none; }
.key.off { opacity: .35; text-decoration: line-through; }
.key:focus-visible { outline: 2px solid; }
.xtick text, .ytick text, .x2tick text, .y2tick text, .x3tick text, .y3tick text, .cbaxis text,
.cbtitle text, .g-xtitle text, .g-ytitle text, .g-x2title text, .g-x3title text, .annotation-text
  { fill: var(--fg) !important; }
.gridlayer path { stroke: var(--line) !important; }
"""
"""Figures have no background, and their text and grid take the page's colours, so dark and light need no script."""
_MOST_ROWS = 30
"""Rows of a table that is shown whole."""


@dataclass(frozen=True)
class Section:
    """A part of the page with an anchor."""

    id: str
    title: str
    parts: Sequence[str | Drawing] = field(default_factory=tuple)


def page(title: str, about: Sequence[str], sections: Sequence[Section], finding: str = "") -> str:
    """The whole file: heading, what came out, lines about it, a list of the sections that are not empty, and these."""
    filled = [section for section in sections if any(section.parts)]
    lines = f'<p class="finding">{escape(finding)}</p>' if finding else ""
    lines += "".join(f'<p class="about">{escape(line)}</p>' for line in about if line)
    links = "".join(f'<a href="#{section.id}">{escape(section.title)}</a>' for section in filled)
    body = "\n".join(map(_section, filled))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body><h1>{escape(title)}</h1>{lines}\n<nav>{links}</nav>\n{body}\n<script>{SCRIPT}</script></body></html>\n"
    )


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    bold: int | None = None,
    words: Sequence[int] = (0, 1),
    best: Collection[tuple[int, int]] = (),
) -> str:
    """A table that scrolls by itself where it is wider than the screen.

    ``bold`` is the row that sums up; ``words`` are columns of text, which stand on the left; ``best`` are rows and
    columns of cells that stand out.
    """

    def cells(values: Sequence[str], tag: str, place: int | None = None) -> str:
        kinds = [
            ' class="text"' if i in words else ' class="best"' if (place, i) in best else "" for i in range(len(values))
        ]
        return "".join(f"<{tag}{kind}>{escape(value)}</{tag}>" for kind, value in zip(kinds, values, strict=True))

    def line(place: int, row: Sequence[str]) -> str:
        return f"<tr{' class=total' if place == bold else ''}>{cells(row, 'td', place)}</tr>"

    body = "".join(line(place, row) for place, row in enumerate(rows))
    tall = " tall" if len(rows) > _MOST_ROWS else ""
    return f'<div class="scroll{tall}"><table><tr>{cells(head, "th")}</tr>{body}</table></div>'


def grid_table(grid: Grid) -> str:
    """A grid with the best of every column in bold, and its notes."""
    rows = [[cell.text if isinstance(cell, Score) else cell for cell in row] for row in (*grid.rows, *grid.below)]
    if grid.below:
        rows.insert(len(grid.rows), ["for reference", *[""] * (len(grid.head) - 1)])
    best = {
        (i, j)
        for i, row in enumerate(grid.rows)
        for j, (cell, top) in enumerate(zip(row, grid.best, strict=True))
        if isinstance(cell, Score) and cell.value == top
    }
    return paragraph(grid.title) + table(grid.head, rows, words=(0,), best=best) + "".join(map(paragraph, grid.notes))


def paragraph(text: str) -> str:
    """A line of explanation."""
    return f'<p class="about">{escape(text)}</p>'


def glossary(words: Mapping[str, str]) -> str:
    """Words and what they mean."""
    return f"<dl>{''.join(f'<dt>{escape(word)}</dt><dd>{escape(text)}</dd>' for word, text in words.items())}</dl>"


def code(text: str) -> str:
    """A command or a file as it is."""
    return f"<pre>{escape(text)}</pre>"


def linked(folders: Sequence[str]) -> str:
    """A list of the reports in other folders, named by these."""
    items = "".join(f'<li><a href="{escape(name)}/report.html">{escape(name)}</a></li>' for name in folders)
    return f"<ul>{items}</ul>"


def _section(section: Section) -> str:
    parts = "\n".join(part if isinstance(part, str) else _drawing(part) for part in section.parts if part)
    head = f'<h2><a href="#{section.id}">{escape(section.title)}</a></h2>'
    return f'<section id="{section.id}">{head}\n{parts}</section>'


def _drawing(drawing: Drawing) -> str:
    download = {"format": "svg", "filename": drawing.id}  # the one button, on hovering and on touch
    bar = {"displaylogo": False, "modeBarButtons": [["toImage"]], "toImageButtonOptions": download}
    config = {"responsive": True, **bar}
    plot = drawing.plot.to_html(
        full_html=False,
        include_plotlyjs=False,
        config=config,
        div_id=drawing.id,
        default_height=drawing.plot.layout.height,
    )
    note = f"<span>{escape(drawing.note)}</span>" if drawing.note else ""
    keys = legend(drawing.plot, drawing.id)
    plot = (
        f'<div class="scroll"><div style="min-width: {drawing.least}px">{plot}</div></div>' if drawing.least else plot
    )
    return f"<figure><figcaption>{escape(drawing.title)}{note}</figcaption>{keys}{plot}</figure>"
