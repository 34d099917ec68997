"""Legends in HTML, which wrap on a phone as Plotly's own do not; a click hides a client or method."""

from __future__ import annotations

import json
from html import escape

import plotly.graph_objects as go

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
    """One key per name: traces of the same group share it. Nothing for a single one."""
    groups: dict[str, list[int]] = {}
    for place, trace in enumerate(figure.data):
        if trace.name:
            groups.setdefault(trace.legendgroup or trace.name, []).append(place)
    if len(groups) < 2:
        return ""
    keys = "".join(_key(figure.data[places[0]], places, anchor) for places in groups.values())
    return f'<div class="legend">{keys}</div>'


def _key(trace: go.Scatter | go.Bar, places: list[int], anchor: str) -> str:
    whole = escape(str(trace.meta or trace.name))
    return (
        f'<button type="button" class="key" data-figure="{anchor}" data-traces="{json.dumps(places)}">'
        f'<svg viewBox="0 0 26 12" aria-hidden="true">{_bar(trace) if trace.type == "bar" else _line(trace)}</svg>'
        f"<span>{whole}</span></button>"
    )


def _line(trace: go.Scatter) -> str:
    colour = trace.line.color or trace.marker.color
    parts = ""
    if "lines" in trace.mode:
        dash = _DASHES[trace.line.dash or "solid"]
        parts = f'<path d="M0 6h26" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"/>'
    return parts + (f'<path d="{_SHAPES[trace.marker.symbol]}" fill="{colour}"/>' if "markers" in trace.mode else "")


def _bar(trace: go.Bar) -> str:
    pattern = _PATTERNS[trace.marker.pattern.shape or ""]
    return f'<path d="{_BAR}" fill="{trace.marker.color}"/><path d="{pattern}" stroke="#fff" stroke-width="1.2"/>'
