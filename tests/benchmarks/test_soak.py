"""The soak: what counts as growth, what is drawn, and a small one from beginning to end."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from micro import ENVIRONMENT
from tools.soak import KINDS, fault, grown, picture, table

ROOT = Path(__file__).parents[2]
FLAT = [100e6 + (i % 3) * 1e6 for i in range(40)]
LINES = {
    ("memory", "door"): FLAT,
    ("memory", "server"): [value + 2e6 * i for i, value in enumerate(FLAT)],
    ("handles", "door"): [18.0] * 40,
    ("handles", "server"): [18.0 + i for i in range(40)],
    ("disk", "server"): [5e5 + 1e3 * i for i in range(40)],
}


def test_what_grows_is_said() -> None:
    rows = [row for row in table(LINES) if "**grows**" in row]
    assert [row.split(" | ")[:2] for row in rows] == [["| memory (RSS), MB", "server"], ["| open handles", "server"]]
    first, last, slope, _ = grown(LINES["disk", "server"], "disk")
    assert (first, last) == (504_500, 534_500) and slope == pytest.approx(1000)


def test_a_picture_has_a_panel_for_each_measure_and_a_line_for_each_part() -> None:
    drawn = ET.fromstring(picture(LINES, "3 sites"))
    lines = [path for path in drawn.iter("{http://www.w3.org/2000/svg}path") if "L" in path.attrib["d"]]
    assert len(lines) == len(LINES)


def test_faults_are_the_same_whoever_asks_and_the_first_site_has_none() -> None:
    found = [fault(0.3, client, number) for client in range(4) for number in range(100)]
    assert found == [fault(0.3, client, number) for client in range(4) for number in range(100)]
    assert set(found[:100]) == {None} and set(found[100:]) == {None, *KINDS}
    assert 0.2 < sum(map(bool, found[100:])) / 300 < 0.4


@pytest.mark.slow
def test_a_small_soak_ends_as_it_should(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tools.soak", "--sites", "3", "--rounds", "6", "--failing", "0.3"]
    words += ["--out", str(tmp_path / "soak.svg"), "--folder", str(tmp_path / "all")]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert "\nended as it should\n" in done.stdout, done.stdout + done.stderr
    assert {"SuperLink", "door", "ServerApp", "a site"} <= {
        row.split(" | ")[1] for row in done.stdout.splitlines() if " | " in row
    }
    assert "left out" in (tmp_path / "all/submit.log").read_text()
    assert (tmp_path / "soak.svg").is_file()
