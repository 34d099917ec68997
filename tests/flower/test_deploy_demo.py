"""``make deploy-demo`` as whoever types it sees it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_demo_kills_a_site_and_ends_with_the_table(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    done = subprocess.run(
        [sys.executable, ROOT / "examples/deploy_demo.py"],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    said = [line.partition("│ ")[2] for line in done.stdout.splitlines()]
    assert any(line.startswith("kill -9 of site 1, which is training round 2") for line in said)
    assert [int(found[1]) for line in said if (found := re.match(r"round (\d): loss", line))] == [1, 2, 3]
    assert any("scores after round 3" in line for line in said)
    assert any("finished:completed" in line for line in said), "fedalt status, after all"
    for command in ("flower-superlink", "flower-supernode", "flwr run", "flwr list", "flwr supernode list"):
        assert any(f"$ {command} " in line for line in said), command
