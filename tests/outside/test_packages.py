"""What an installed package announces by entry points, of every kind, has its name without being named as a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fedalt.registry import ALL

CODE = """
import fedalt as fa

class Mine(fa.Method):
    pass

class Log:
    def start(self, run, about, folder): pass
    def log(self, values, step): pass
    def finish(self): pass

def anything(*given): return 0
"""
VALUES = {"method": "Mine", "tracker": "Log"}
LOOK = """
import json, sys
from fedalt.registry import ALL
print(json.dumps({r.kind: [r.entry(f"my_{r.kind}").origin, bool(r.entry(f"my_{r.kind}").digest)] for r in ALL}))
"""


def test_every_kind_is_found(tmp_path: Path) -> None:
    (tmp_path / "my_package.py").write_text(CODE)
    about = tmp_path / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    points = (f"[{r.group}]\nmy_{r.kind} = my_package:{VALUES.get(r.kind, 'anything')}\n" for r in ALL)
    (about / "entry_points.txt").write_text("\n".join(points))
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", LOOK], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    assert json.loads(done.stdout) == {r.kind: ["package my_package", True] for r in ALL}
