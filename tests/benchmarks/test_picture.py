"""The picture of seconds and memory over K."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tools import picture

NAMESPACE = "{http://www.w3.org/2000/svg}"


def side(name: str, seconds: float, memory: float) -> dict[str, Any]:
    spec = {"side": name, "model": "a < b", "batch_size": 8, "dtype": "float32"}
    spread = {"median": seconds, "min": seconds / 2, "max": 2 * seconds}
    return {"spec": spec, "seconds": spread, "memory": {"process": dict.fromkeys(("median", "min", "max"), memory)}}


def result(*clients: int) -> dict[str, Any]:
    lines = [{"clients": k, "a": side("fedalt", k, 1e9), "b": side("paper", 4 * k, 2e9 * k)} for k in clients]
    return {"what": "round", "unit": "a round", "lines": lines}


def circles(svg: str, panel: int) -> list[tuple[str, float, float]]:
    groups = ElementTree.fromstring(svg).findall(f"{NAMESPACE}g")[2:]  # after the two of the legend
    found = groups[panel].findall(f"{NAMESPACE}circle")
    return [(c.attrib["class"], float(c.attrib["cx"]), float(c.attrib["cy"])) for c in found]


def test_points_are_where_the_numbers_are():
    svg = picture.picture(result(4, 1, 2))
    points = circles(svg, 0)
    assert [name for name, *_ in points] == ["a"] * 3 + ["b"] * 3
    xs = [x for _, x, _ in points[:3]]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2), "K on a logarithmic axis"
    heights = [210 - y for _, _, y in points]
    assert heights == pytest.approx([heights[0] * k for k in (1, 2, 4, 4, 8, 16)], rel=0.02)
    assert [210 - y for _, _, y in circles(svg, 1)] == pytest.approx([26.25] * 3 + [52.5, 105, 210], abs=0.1)
    assert "a &lt; b" in svg and ">paper<" in svg


def test_one_number_of_clients_is_drawn_too():
    assert len(circles(picture.picture(result(8)), 0)) == 2


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(4, [0, 1, 2, 3, 4]), (7.9, [0, 2, 4, 6, 8]), (0.093, [0, 0.025, 0.05, 0.075, 0.1]), (32, [0, 10, 20, 30, 40])],
)
def test_ticks_are_round(largest: float, expected: list[float]):
    assert picture.ticks(largest) == pytest.approx(expected)


def test_the_command_writes_the_file_or_says_what_it_wants(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "b.json").write_text(json.dumps(result(1, 2)), encoding="utf-8")
    assert picture.main([str(tmp_path / "b.json"), str(tmp_path / "p.svg")]) == 0
    ElementTree.parse(tmp_path / "p.svg")
    assert picture.main([str(tmp_path / "missing.json"), "p.svg"]) == 2
    assert "give two files" in capsys.readouterr().err
