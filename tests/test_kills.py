"""``kill -9`` of every command that writes, at random moments and file operations; called again, it ends as if alone.

This file, run as a script, imports the command once and forks for every call. ``FEDALT_TESTS_KILLS=100`` says how many
kills are tried; without it there are none, for they take minutes.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from micro import ENVIRONMENT, data_folder, settings, shared_data, shared_model, timeless, tree, write_yaml
from runs.test_resume import EARLY, QUICK, call_main
from trap import AT, die_at

KILLS = int(os.environ.get("FEDALT_TESTS_KILLS", "0"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not KILLS, reason="FEDALT_TESTS_KILLS says how many")]
RUN = ["run", "x.yaml", "--resume"]
COMPARE = ["compare", "x.yaml", "--methods", "local,fedalt", "--seeds", "0", "--out", "all", "--resume"]
JOIN = ["onboard", "run", "--data", "newcomers"]
COMMANDS: dict[str, list[str]] = {
    "run": RUN,
    "run --devices": [*RUN, "--devices", "cpu,cpu"],
    "compare": COMPARE,
    "compare --jobs": [*COMPARE, "--jobs", "2"],
    "onboard": [*JOIN, "--epochs", "1"],
    "onboard again": [*JOIN, "--epochs", "1", "--overwrite"],
    "export": ["export", "run", "--client", "1", "--out", "out"],
    "export --merge": ["export", "run", "--client", "1", "--out", "out", "--merge"],
    "export --static": ["export", "run", "--client", "1", "--out", "out", "--static"],
    "evaluate": ["evaluate", "run", "--json"],
    "report": ["report", "run"],
}
"""How a command is called, also after a kill."""
FRESH = ("run", "compare")
"""Those that begin with settings; the others with a finished run."""
WORKERS = ("run --devices", "compare --jobs")
COST = ("seconds", "scoring_seconds", "peak_memory")
DONE = re.compile(r"error: \S+(: holds a run already| exists| holds something| is not empty|: not empty)")
"""Said by a command whose first call had ended but for its last words."""


# --------------------------------------------------------------------------------------------- the process that kills


def forked(words: Sequence[str], folder: Path, kill: dict[str, Any]) -> tuple[int, int, float]:
    """Run a command in a child of this process: its exit code, how many operations there were, its seconds."""
    started, seen = time.monotonic(), Path(f"{folder}.seen")
    child = os.fork()
    if not child:
        os.chdir(folder)
        with Path(f"{folder}.txt").open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        if "worker" in kill:
            os.environ[AT] = f"{kill['worker']} {folder}"
        operations = die_at(kill.get("at", 0), folder)
        code = call_main(words)
        seen.write_text(json.dumps(operations))
        os._exit(code)
    timer = Timer(kill.get("after", 600.0), os.kill, (child, signal.SIGKILL))
    timer.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    timer.cancel()
    return code, len(json.loads(seen.read_text())) if seen.exists() else 0, time.monotonic() - started


def drive(root: Path, kills: int) -> None:
    """Every command alone, then with kills, as many as there are to be, of kinds by turns."""
    for module in EARLY:
        importlib.import_module(module)
    draw, found = random.Random(17), []
    alone = {name: forked(words, made(root, name, "alone"), {}) for name, words in COMMANDS.items()}
    for number in range(kills):
        name = [*COMMANDS][number % len(COMMANDS)]
        _, operations, seconds = alone[name]
        kinds = ["at", "at", "after", *(["worker"] if name in WORKERS else [])]
        kind = kinds[number // len(COMMANDS) % len(kinds)]
        most = {"at": operations, "worker": 25}
        kill = {kind: draw.uniform(0, seconds) if kind == "after" else draw.randint(1, max(1, most[kind]))}
        folder = made(root, name, str(number))
        codes = [forked(COMMANDS[name], folder, kill)[0], forked(COMMANDS[name], folder, {})[0]]
        found.append({"name": name, "kill": kill, "folder": str(folder), "codes": codes})
    (root / "found.json").write_text(json.dumps({"alone": alone, "kills": found}))


def made(root: Path, name: str, number: str) -> Path:
    """A folder in which a command can be called."""
    folder = root / name.replace(" ", "_") / number
    shutil.copytree(root / ("settings" if name.startswith(FRESH) else "finished"), folder)
    if name == "onboard again":
        shutil.copytree(root / "joined", folder / "run/newcomers")
    return folder


# ------------------------------------------------------------------------------------------------------------ the test


def left(folder: Path) -> dict[str, Any]:
    """All files, without times and what is drawn."""
    files: dict[str, Any] = {}
    for name, data in tree(folder).items():
        if name.endswith("events.jsonl"):
            files[name] = timeless((folder / name).parent)
        elif name.endswith("comparison.json"):
            methods = json.loads(data)["methods"]
            files[name] = {m: {k: v for k, v in said.items() if k not in COST} for m, said in methods.items()}
        elif not name.endswith((".html", "insight.json", "digests.json", ".md", ".tex", ".csv")):
            files[name] = re.sub(rb"^# commit: .*\n", b"", data, flags=re.M)
    return files


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("kills")
    values = settings(Path("run"), shared_model(), shared_data(), **{**QUICK, "federation__rounds": 2})
    for name in ("settings", "finished"):
        write_yaml(root / name / "x.yaml", values)
    data_folder(root / "finished/newcomers", 1)
    environment = os.environ | ENVIRONMENT
    (root / "sitecustomize.py").write_text("import trap\ntrap.die_if_asked()\n")
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{environment['PYTHONPATH']}"
    prepare = "run x.yaml", "onboard run --data newcomers --epochs 0"
    for words in prepare:
        code = f"import sys; sys.argv = {['fedalt', *words.split()]!r}; from fedalt.cli import main; main()"
        subprocess.run([sys.executable, "-c", code], cwd=root / "finished", env=environment, check=True)
    (root / "finished/run/newcomers").rename(root / "joined")
    words = [sys.executable, __file__, str(root), str(KILLS)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root, json.loads((root / "found.json").read_text())


def test_killed_and_called_again_is_as_if_alone(found: tuple[Path, dict[str, Any]]) -> None:
    _, seen = found
    assert {name: code for name, (code, *_) in seen["alone"].items()} == dict.fromkeys(COMMANDS, 0)
    wrong, killed = [], 0
    for case in seen["kills"]:
        folder, said = Path(case["folder"]), Path(f"{case['folder']}.txt").read_text()
        killed += case["codes"][0] == -signal.SIGKILL or "was killed" in said
        over = case["codes"][1] == 2 and DONE.search(said)
        expected, mine = left(folder.parent / "alone"), left(folder)
        other = [n for n in {*expected, *mine} if expected.get(n) != mine.get(n)]
        if (case["codes"][1] and not over) or other or "Traceback" in said:
            wrong.append((case["name"], case["kill"], case["codes"], other[:5], said[-500:]))
    assert not wrong, "\n".join(map(str, wrong))
    assert killed > 0.7 * len(seen["kills"])


if __name__ == "__main__":
    drive(Path(sys.argv[1]), int(sys.argv[2]))
