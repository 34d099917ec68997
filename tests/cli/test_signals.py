"""Ctrl-C and SIGTERM: one line that says what is safe, the usual exit code, and the run goes on."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from micro import ENVIRONMENT, call, finished, refused, settings, write_yaml

STOPS = [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")]
PIPES: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)


def heeds(pid: int) -> bool:
    """Whether a process has a handler of its own for SIGTERM, so whether it has come to ``main``."""
    line = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    return bool(line and int(line[1], 16) >> (signal.SIGTERM - 1) & 1)


def stopped(words: Sequence[Any], number: signal.Signals, begun: Callable[[], bool]) -> str:
    """What a command says on stderr that gets a signal once it has begun."""
    command = [sys.executable, "-m", "fedalt", *map(str, words)]
    environment = {**ENVIRONMENT, "COLUMNS": "200"}
    with subprocess.Popen(command, **PIPES, text=True, env=environment) as process:
        while process.poll() is None and not (heeds(process.pid) and begun()):
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, said
    return said


@pytest.mark.parametrize(("number", "name"), STOPS)
def test_a_run_that_is_stopped_says_what_is_safe_and_goes_on_by_its_folder(
    number: signal.Signals, name: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = write_yaml(tmp_path / "x.yaml", settings(run, federation__rounds=300))
    said = stopped(["run", config], number, lambda: any(run.glob("checkpoints/round_*")))
    assert f"error: stopped by {name}; finished rounds are safe, --resume goes on from there" in said
    assert "Traceback" not in said
    assert refused("run", run).endswith(f"--resume goes on with it; its settings are {run}/config.yaml")
    done = max(int(path.name[6:]) for path in run.glob("checkpoints/round_*"))
    went_on = call("run", run, "--resume", "--rounds", done + 1)
    assert went_on.code == 0, went_on.err
    assert re.search(rf"run +{run}", went_on.out), went_on.out


def test_any_other_command_that_is_stopped() -> None:
    said = stopped(["evaluate", finished()], signal.SIGTERM, lambda: True)
    assert said.strip().splitlines()[-1] == "error: stopped by SIGTERM; nothing is left half written", said
