"""How figures look: one colour per client or method throughout a page, safe for the colour-blind, on dark and light.

And which clients are shown where there are too many for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLOURS = ("#0077bb", "#ee7733", "#009988", "#cc3311", "#33bbee", "#ee3377", "#a08000", "#999999")
"""Paul Tol's vibrant scheme (and a dark yellow), of a lightness that shows on white and on black."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "hexagon")
DASHES = ("solid", "dash", "dot")
PATTERNS = ("", "/", ".")
DIVERGING = "RdBu"
"""Red below, blue above."""
SEQUENTIAL = "Cividis"
ROOM = 5
"""Points of score that axes and colours span at least, so that hundredths do not look like worlds."""
_LABEL = 22
_CELLS = 12


@dataclass(frozen=True)
class Drawing:
    """A figure and what stands above it.

    Attributes:
        id: Anchor on the page.
        title: One line.
        note: How to read it.
        plot: The figure, which has no title of its own: Plotly does not wrap lines.
        least: Pixels that it needs; on a narrower screen it scrolls.
    """

    id: str
    title: str
    note: str
    plot: go.Figure
    least: int = 0


def colour(place: int) -> str:
    """Colour of a client or method by its place; after eight they come again, with another dash or pattern."""
    return COLOURS[place % len(COLOURS)]


def again(place: int, kinds: tuple[str, ...]) -> str:
    """How the clients that share a colour differ."""
    return kinds[place // len(COLOURS) % len(kinds)]


def labels(tasks: Mapping[str, str]) -> dict[str, str]:
    """Client → what stands at axes and in legends, short enough for a phone; the whole name shows on hovering."""
    return {client: short(f"{client} {task}".strip()) for client, task in tasks.items()}


def short(text: str) -> str:
    """The text, cut where it would leave no room for the figure."""
    return text if len(text) <= _LABEL else f"{text[: _LABEL - 1]}…"


def decimals(value: float) -> str:
    """Two decimals without the leading zero, so that it fits into a cell on a phone."""
    return f"{value:.2f}".replace("0.", ".", 1)


def styled(figure: go.Figure, x: str = "", y: str = "", height: int = 320) -> go.Figure:
    """Common layout; colours of text and grid come from the page's style sheet, which knows dark from light."""
    figure.update_layout(
        template="none",
        xaxis_title=x,
        yaxis_title=y,
        height=height,
        margin={"l": 8, "r": 8, "t": 12, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
        showlegend=False,
        hoverlabel={"namelength": 30},
    )
    figure.update_xaxes(automargin=True, zeroline=False)
    figure.update_yaxes(automargin=True, zeroline=False)
    return figure


def interval(halves: Sequence[float | None]) -> dict[str, Any] | None:
    """Bars of confidence up and down from the points of a trace; None where none is known."""
    return None if all(half is None for half in halves) else {"array": list(halves), "thickness": 1, "width": 4}


def score_range(values: Sequence[float], points: bool) -> list[float] | None:
    """Range of an axis of scores, with room above and below; Plotly's own where scores do not run from 0 to 100."""
    if not points:
        return None
    return [max(min(values) - ROOM, 0), min(max(values) + ROOM, 103)]


def cells(values: list[list[Any]], across: list[str], down: list[str], **options: Any) -> go.Figure:
    """A heat map that reads from the top, with its values in the cells while they fit on a phone, else with a scale."""
    import plotly.graph_objects as go  # here, as the command line has colours from this file, too

    told = len(across) <= _CELLS and "text" in options
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=across,
            y=down,
            xgap=1,
            ygap=1,
            texttemplate="%{text}" if told else None,
            showscale=not told,
            colorbar={"thickness": 10, "xpad": 4, "outlinewidth": 0},
            **options,
        )
    )
    styled(figure, height=max(200, 90 + 30 * len(down)))
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False, autorange="reversed")
    return figure


MOST = 20
"""Clients that fit."""
_FIRST, _ENDS = 8, 6


def groups(scores: Mapping[str, float], highest: bool = True) -> dict[str, list[str]]:
    """Title → clients: all under no title while they fit, else the first ones, the worst and the best."""
    if len(scores) <= MOST:
        return {"": list(scores)}
    ranked = sorted(scores, key=lambda client: scores[client] if highest else -scores[client])
    return {
        f"first {_FIRST}": list(scores)[:_FIRST],
        f"worst {_ENDS}": ranked[:_ENDS],
        f"best {_ENDS}": ranked[: -_ENDS - 1 : -1],
    }


def shown(scores: Mapping[str, float], highest: bool = True) -> list[str]:
    """The clients of all groups, each once, in the order of clients."""
    chosen = {client for group in groups(scores, highest).values() for client in group}
    return [client for client in scores if client in chosen]


def caption(scores: Mapping[str, float]) -> str:
    """What a reader must know when not all are shown; otherwise nothing."""
    titles = groups(scores)
    return "" if "" in titles else f"{', '.join(titles)} of {len(scores)} clients; means are over all"
