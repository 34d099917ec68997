"""``python -m tools.picture BENCH.json PICTURE.svg`` draws what ``fedalt bench --out BENCH.json`` measured.

Two panels over the number of clients K: seconds and memory, each side's median with a bar from its smallest to its
largest run. Lines are light on dark and dark on light, as the reader's browser is set.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _TOP = 300, 210, 60, 50
"""Size of a panel, and what is left of and above it."""
_STEP = 400
_TICKS = 4
_STYLE = """text { fill: #1c1e21; } .line { fill: none; stroke-width: 2; } .axis { stroke: #8a94a3; }
    .grid { stroke: #8a94a3; stroke-opacity: .25; } .bg { fill: #ffffff; }
    .a { stroke: #0077bb; fill: #0077bb; } .b { stroke: #ee7733; fill: #ee7733; }
    @media (prefers-color-scheme: dark) { text { fill: #e4e6eb; } .bg { fill: #16181c; } }"""

Point = tuple[int, float, float, float]
"""K, median, smallest, largest."""


def picture(result: Mapping[str, Any]) -> str:
    """The SVG of one result of ``fedalt bench``."""
    lines = sorted(result["lines"], key=lambda line: line["clients"])
    spec = lines[0]["a"]["spec"]
    title = f"{result['what']}, {spec['model']}, batch {spec['batch_size']}, {spec['dtype']}"
    panels = [
        (f"seconds for {result['unit']}", lambda side: side["seconds"], 1.0),
        ("peak memory, GB", lambda side: side["memory"]["process"], 1e9),
    ]
    names = {side: lines[0][side]["spec"]["side"] for side in "ab"}
    legend = "".join(
        f'<g transform="translate({_LEFT + 150 * i} 36)"><path class="line {side}" d="M0 0H22"/>'
        f'<circle class="{side}" cx="11" r="3.5"/><text x="28" y="4">{escape(name)}</text></g>'
        for i, (side, name) in enumerate(names.items())
    )
    drawn = "".join(
        f'<g transform="translate({_LEFT + _STEP * i} {_TOP})">{_panel(label, lines, value, scale)}</g>'
        for i, (label, value, scale) in enumerate(panels)
    )
    size = f"{_LEFT + _STEP + _WIDTH + 30} {_TOP + _HEIGHT + 50}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="system-ui, sans-serif" '
        f'font-size="12">\n  <style>{_STYLE}</style>\n  <rect class="bg" width="100%" height="100%"/>\n'
        f'  <text x="{_LEFT}" y="20" font-size="14" font-weight="600">{escape(title)}</text>{legend}\n'
        f"  {drawn}\n</svg>\n"
    )


def ticks(largest: float) -> list[float]:
    """About four round numbers from 0 to one that is not below the largest value."""
    raw = largest / _TICKS
    unit = 10 ** math.floor(math.log10(raw))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * (1 - 1e-9))
    return [step * i for i in range(math.ceil(largest / step * (1 - 1e-9)) + 1)]


def _panel(
    label: str,
    lines: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], Mapping[str, float]],
    scale: float,
) -> str:
    sides: dict[str, list[Point]] = {}
    for side in "ab":
        spreads = [(line["clients"], value(line[side])) for line in lines]
        sides[side] = [(k, s["median"] / scale, s["min"] / scale, s["max"] / scale) for k, s in spreads]
    counts = [line["clients"] for line in lines]
    marks = ticks(max(largest for points in sides.values() for *_, largest in points))
    first, span = math.log2(counts[0]), math.log2(counts[-1] / counts[0]) or 1.0

    def x(count: int) -> str:
        return f"{12 + (_WIDTH - 24) * (math.log2(count) - first) / span:.1f}"

    def y(number: float) -> str:
        return f"{_HEIGHT * (1 - number / marks[-1]):.1f}"

    parts = [f'<text x="0" y="{_HEIGHT + 40}">clients K</text><text x="100" y="{_HEIGHT + 40}">{escape(label)}</text>']
    for mark in marks:
        parts.append(f'<path class="grid" d="M0 {y(mark)}H{_WIDTH}"/>')
        parts.append(f'<text x="-8" y="{float(y(mark)) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    parts.append(f'<path class="axis" d="M0 {_HEIGHT}H{_WIDTH}"/>')
    parts += [f'<text x="{x(k)}" y="{_HEIGHT + 18}" text-anchor="middle">{k}</text>' for k in counts]
    for side, points in sides.items():
        for one, other in pairwise(points):
            parts.append(f'<path class="line {side}" d="M{x(one[0])} {y(one[1])}L{x(other[0])} {y(other[1])}"/>')
        for count, median, least, most in points:
            parts.append(f'<path class="line {side}" d="M{x(count)} {y(least)}V{y(most)}"/>')
            parts.append(f'<circle class="{side}" cx="{x(count)}" cy="{y(median)}" r="3.5"/>')
    return "".join(parts)


def main(arguments: Sequence[str]) -> int:
    """Exit code 2 and one line when a file is missing."""
    if len(arguments) != 2 or not Path(arguments[0]).is_file():
        sys.stderr.write("error: give two files: python -m tools.picture BENCH.json PICTURE.svg\n")
        return 2
    result = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    Path(arguments[1]).write_text(picture(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
