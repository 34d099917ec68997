"""Every kind of damage to every kind of file of a finished run: each command refuses it, or does as without.

One command is tried on each damaged folder; ``FEDALT_TESTS_DAMAGE=6`` tries all.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from micro import call, data_folder, finished, left_behind, refused, tree

pytestmark = pytest.mark.slow
TRIED = int(os.environ.get("FEDALT_TESTS_DAMAGE", "1"))
FILES = {
    "config": "config.yaml",
    "partition": "partition.json",
    "events": "events.jsonl",
    "a state": "checkpoints/round_0003/clients/1.safetensors",
    "an upload": "checkpoints/round_0003/uploads/1.safetensors",
    "a manifest": "checkpoints/round_0003/manifest.json",
    "final scores": "results/final_scores.json",
    "scores": "results/scores_client1_round3.json",
    "earlier scores": "results/scores_client1_round2.json",
    "answers": "results/eval_client1_round3.jsonl",
    "about a model": "clients/1/fedalt_config.json",
    "a model": "clients/1/individual/adapter_model.safetensors",
    "PEFT's settings": "clients/1/individual/adapter_config.json",
    "a mixer": "clients/1/mixer.safetensors",
    "digests": "digests.json",
}


def of_digits(run: Path, name: str) -> None:
    """The hardest of flips: it is still the same kind of file."""
    data = (run / name).read_bytes()
    found = [*re.finditer(rb"(?<=\.)[0-9](?=[0-9])|(?<=: )[0-9]", data)] if not name.endswith("safetensors") else []
    place = found[len(found) // 2].start() if found else len(data) - 3
    flipped = (b"%d" % ((int(data[place : place + 1]) + 1) % 10)) if found else bytes([data[place] ^ 64])
    (run / name).write_bytes(data[:place] + flipped + data[place + 1 :])


def flip(run: Path, name: str) -> None:
    data = bytearray((run / name).read_bytes())
    data[len(data) // 2] ^= 1
    (run / name).write_bytes(data)


def truncate(run: Path, name: str) -> None:
    (run / name).write_bytes((run / name).read_bytes()[: (run / name).stat().st_size // 2])


def swap(run: Path, name: str) -> None:
    """With another client's, or another file beside it."""
    other = run / re.sub(r"(?<=client|ients/|loads/)1", "2", name)
    other = other if other != run / name else next(p for p in sorted((run / name).parent.iterdir()) if p.is_file())
    one, two = (run / name).read_bytes(), other.read_bytes()
    (run / name).write_bytes(two)
    other.write_bytes(one)


def swap_folders(run: Path, name: str) -> None:
    """With all that lies beside it."""
    folder = run / Path(name).parent
    if folder == run:
        (run / name).write_bytes((finished(seed=4) / name).read_bytes())
        return
    shutil.rmtree(folder)
    shutil.copytree(finished(seed=4) / Path(name).parent, folder)


DAMAGE: dict[str, Callable[[Path, str], None]] = {
    "another digit": of_digits,
    "a flipped bit": flip,
    "cut": truncate,
    "empty": lambda run, name: (run / name).write_bytes(b"") and None,
    "gone": lambda run, name: (run / name).unlink(),
    "swapped": swap,
    "of another run": lambda run, name: (run / name).write_bytes((finished(seed=4) / name).read_bytes()) and None,
    "folder of another run": swap_folders,
}


def newcomers(folder: Path) -> Path:
    return data_folder(folder / "newcomers", 1)


def resumed(run: Path, *more: Any) -> tuple[int, str, Any]:
    done = call("run", run / "config.yaml", "--out", run, "--resume", *more)
    return done.code, done.err, left_behind(run) if done.code == 0 else None


def onboarded(run: Path) -> tuple[int, str, Any]:
    done = call("onboard", run, "--data", newcomers(run.parent), "--epochs", 1, "--out", run.parent / "joined")
    return done.code, done.err, tree(run.parent / "joined") if done.code == 0 else None


def exported(run: Path) -> tuple[int, str, Any]:
    done = call("export", run, "--client", 1, "--out", run.parent / "out")
    return done.code, done.err, tree(run.parent / "out") if done.code == 0 else None


def evaluated(run: Path) -> tuple[int, str, Any]:
    done = call("evaluate", run, "--json")
    return done.code, done.err, done.out


def reported(run: Path) -> tuple[int, str, Any]:
    done = call("report", run)
    text = (run / "report.html").read_text() if done.code == 0 else ""
    return done.code, done.err, re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "", text)


COMMANDS: dict[str, Callable[[Path], tuple[int, str, Any]]] = {
    "resume": resumed,
    "one round more": lambda run: resumed(run, "--rounds", 4),
    "evaluate": evaluated,
    "export": exported,
    "onboard": onboarded,
    "report": reported,
}


def fresh(folder: Path) -> Path:
    """A copy of the finished run, always at the same place, which its files name."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished(), folder / "run", ignore=shutil.ignore_patterns("report.html"))
    return folder / "run"


@cache
def healthy(folder: Path) -> dict[str, Any]:
    found = {name: command(fresh(folder)) for name, command in COMMANDS.items()}
    assert {name: code for name, (code, *_) in found.items()} == dict.fromkeys(COMMANDS, 0), found
    return {name: left for name, (_, _, left) in found.items()}


WITHOUT_INSIGHT = ("answers", "folder of another run", "report")
"""The report is made of the log, which is the run's own; insight of another run is left out of it."""


@pytest.mark.parametrize("kind", FILES)
def test_damage_is_refused_or_mended(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, wrong = tmp_path_factory.getbasetemp() / "damaged", []
    expected = healthy(folder)
    for damage, spoil in DAMAGE.items():
        for name in random.Random(f"{kind} {damage}").sample([*COMMANDS], TRIED):
            run, command = fresh(folder), COMMANDS[name]
            spoil(run, FILES[kind])
            code, said, left = command(run)
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            fine = left == expected[name] if code == 0 else code == 2 and 1 <= len(errors) <= 11
            fine |= code == 0 and (kind, damage, name) == WITHOUT_INSIGHT
            if not fine or "Traceback" in said:
                wrong.append(f"{damage}, {name}: exit code {code} {said[-300:]}")
    assert not wrong, "\n".join(wrong)


def test_a_change_that_was_meant(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "# mine\n")
    line = refused("evaluate", run)
    assert line == (
        f"{run}/config.yaml: has changed since the run ended; put back what was there, or remove digests.json "
        "if you meant it"
    )
    (run / "digests.json").unlink()
    assert evaluated(run)[0] == 0
