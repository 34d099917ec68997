"""The figures of a report as files for a paper: drawn by matplotlib from the same drawings, without a browser."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from plotly.colors import unlabel_rgb

from fedalt.errors import UserError, needs
from fedalt.files import disk_errors, read_json
from fedalt.report.html import comparison_sections, run_sections
from fedalt.report.theme import SYMBOLS, Drawing
from fedalt.runs.folder import open_run

FORMATS = ("pdf", "svg", "png")
_MARKERS = dict(zip(SYMBOLS, "osD^P*vh", strict=True))
_LINES = {"solid": "-", "dash": "--", "dot": ":"}
_STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "f",
}
_WIDTH, _TICKS = 6.75, 12
"""Inches of a text's width in two columns; labels that fit below a heat map."""


def write_figures(path: Path, formats: Sequence[str], to: Path | None = None) -> list[Path]:
    """Every figure of a run's report, or of a comparison's, in every format.

    Raises:
        UserError: There is no report there, or matplotlib is not installed.
    """
    with needs("figures", "figures as files"):
        import matplotlib as mpl
    known = path / "comparison.json"
    sections = comparison_sections(path, read_json(known)) if known.is_file() else run_sections(open_run(path)[0])[2]
    drawings = [part for section in sections for part in section.parts if isinstance(part, Drawing) and part.plot.data]
    if not drawings:
        raise UserError(f"{path}: nothing has been measured yet, so there are no figures")
    folder, written = to or path / "figures", []
    with disk_errors(folder), mpl.rc_context(_STYLE):
        folder.mkdir(parents=True, exist_ok=True)
        for drawing in drawings:
            figure = _drawn(drawing)
            for kind in formats:
                written.append(folder / f"{drawing.id}.{kind}")
                undated = {} if kind == "png" else {"CreationDate" if kind == "pdf" else "Date": None}
                figure.savefig(written[-1], dpi=200, metadata=undated, bbox_inches="tight")
    return written


def _drawn(drawing: Drawing) -> Any:
    from matplotlib.figure import Figure

    plot = drawing.plot
    panels = list(dict.fromkeys(trace.xaxis or "x" for trace in plot.data))
    figure = Figure(figsize=(_WIDTH, max(2.2, plot.layout.height / 110)), layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, len(panels), sharey=len(panels) > 1, squeeze=False)[0], strict=True))
    for name, axis in axes.items():
        traces = [trace for trace in plot.data if (trace.xaxis or "x") == name]
        {"scatter": _curves, "bar": _bars, "heatmap": _cells}[traces[0].type](axis, traces, plot)
        number = name.removeprefix("x")
        x, y = plot.layout[f"xaxis{number}"], plot.layout[f"yaxis{number}"]
        axis.set_xlabel(x.title.text or "")
        axis.set_ylabel(y.title.text or "")
        for limits, set_to in ((x.range, axis.set_xlim), (y.range, axis.set_ylim)):
            if limits:
                set_to(*limits)
    for title, axis in zip(plot.layout.annotations, axes.values(), strict=False):
        axis.set_title(title.text)
    groups = {trace.legendgroup or trace.name: trace.name for trace in reversed(plot.data)}
    named = {
        label: handle
        for axis in axes.values()
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        if label in groups.values()
    }
    if len(named) > 1:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _curves(axis: Any, traces: Sequence[Any], plot: Any) -> None:
    for trace in traces:
        hollow = trace.marker.symbol.endswith("-open")
        axis.errorbar(
            trace.x,
            trace.y,
            None if trace.error_y.array is None else [half or 0 for half in trace.error_y.array],
            label=trace.name,
            color=trace.line.color or trace.marker.color,
            linestyle=_LINES[trace.line.dash or "solid"] if "lines" in trace.mode else "none",
            marker=_MARKERS[trace.marker.symbol.removesuffix("-open")],
            markersize=trace.marker.size / 2,
            markerfacecolor="none" if hollow else None,
            linewidth=1,
            capsize=2,
        )
    axis.grid(alpha=0.3, linewidth=0.5)
    axis.xaxis.get_major_locator().set_params(integer=plot.layout.xaxis.tickformat == "d", min_n_ticks=1)


def _bars(axis: Any, traces: Sequence[Any], plot: Any) -> None:
    stacked, width = plot.layout.barmode == "stack", 1 - (plot.layout.bargap or 0.2)
    left = [0.0] * len(traces[0].y)
    for place, trace in enumerate(traces):
        height = width if stacked else width / len(traces)
        shift = 0.0 if stacked else (place - (len(traces) - 1) / 2) * height
        axis.barh(
            [row + shift for row in range(len(left))],
            trace.x,
            height,
            left,
            xerr=trace.error_x.array,
            label=trace.name,
            color=trace.marker.color,
            hatch={"/": "//", ".": ".."}.get(trace.marker.pattern.shape),
            edgecolor="white",
            linewidth=0,
        )
        left = [start + value for start, value in zip(left, trace.x, strict=True)] if stacked else left
    axis.set_yticks(range(len(left)), traces[0].y)
    axis.set_ylim(len(left) - 0.5, -0.5)
    axis.grid(alpha=0.3, linewidth=0.5, axis="x")


def _cells(axis: Any, traces: Sequence[Any], plot: Any) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    (trace,) = traces
    values = [[float("nan") if value is None else float(value) for value in row] for row in trace.z]
    known = [value for row in values for value in row if value == value]  # noqa: PLR0124 - NaN is not itself
    low, high = (min(known) if trace.zmin is None else trace.zmin), (max(known) if trace.zmax is None else trace.zmax)
    if trace.zmid is not None:
        half = max(abs(low - trace.zmid), abs(high - trace.zmid), 1e-9)
        low, high = trace.zmid - half, trace.zmid + half
    colours = [(at, [v / 255 for v in unlabel_rgb(c)] if c.startswith("rgb") else c) for at, c in trace.colorscale]
    cells = axis.imshow(values, LinearSegmentedColormap.from_list("", colours), aspect="auto", vmin=low, vmax=high)
    ticks = plot.layout.xaxis.tickvals
    step = max(1, ceil(len(trace.x) / _TICKS))
    axis.set_xticks(
        *((ticks, plot.layout.xaxis.ticktext) if ticks else (range(0, len(trace.x), step), trace.x[::step]))
    )
    axis.set_yticks(range(len(trace.y)), trace.y)
    if not trace.texttemplate:
        axis.figure.colorbar(cells)
        return
    for i, row in enumerate(trace.text):
        for j, text in enumerate(row):
            dark = sum(cells.to_rgba(values[i][j])[:3]) < 1.5
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
