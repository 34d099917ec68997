"""No space, no permission: one clear line, exit code 2, and every finished round still there to go on from.

File size limits make writes fail with the system's own error in the middle of a file; a file system of a few hundred
kilobytes is really full.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from micro import ENVIRONMENT, Done, call, finished, left_behind, of_kind, refused, settings, write_yaml

QUICK: dict[str, Any] = {
    "lora__r": 1,
    "training__local_epochs": 1,
    "evaluation__max_new_tokens": 2,
    "data__test_limit": 2,
    "federation__rounds": 8,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with contextlib.chdir(folder):
        assert call("run", write_yaml(folder / "x.yaml", settings(Path("run"), **QUICK))).code == 0
    return folder / "run"


def size_until(run: Path, event: str, round_: int) -> int:
    """Bytes of the log up to an event."""
    size = 0
    for line in (run / "events.jsonl").read_bytes().splitlines(keepends=True):
        size += len(line)
        if f'"event": "{event}", "round": {round_},'.encode() in line:
            return size
    raise AssertionError(f"no {event} in round {round_}")


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def says_disk_full(done: Done, where: str) -> None:
    assert done.code == 2, (done.code, done.out, done.err)
    line = done.error
    assert line.startswith(where), line
    assert "disk full (" in line
    assert line.endswith("finished rounds are safe, free some space and use --resume")


def test_a_log_that_cannot_grow_stops_the_command_with_one_line_and_the_run_resumes(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own: the log hits its limit in the middle of round 6's first line."""
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "x.yaml", settings(Path("run"), **QUICK))
    size = size_until(undisturbed, "evaluated", 5) + 20
    assert size > max(path.stat().st_size for path in (undisturbed / "checkpoints").rglob("*.safetensors"))
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    command = [str(Path(sys.executable).with_name("fedalt")), "run", "x.yaml"]
    run = subprocess.run(
        command,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    says_disk_full(Done(run.returncode, run.stdout, run.stderr), "run/events.jsonl: ")
    assert sorted(p.name for p in Path("run/checkpoints").iterdir()) == ["round_0004", "round_0005"]
    assert call("run", "x.yaml", "--resume").code == 0
    assert [event["round"] for event in of_kind(Path("run"), "run_resumed")] == [5]
    assert left_behind(Path("run")) == left_behind(undisturbed)


@pytest.mark.parametrize(
    ("limit", "where", "rounds"),
    [
        (100, "run/partition.json: ", 0),
        (1800, "run/", 0),
        (3500, "run/checkpoints/", 0),
        (400_000, "run/report.html: ", 8),
    ],
)
def test_any_file_may_be_the_one_that_does_not_fit(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, where: str, rounds: int
) -> None:
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "x.yaml", settings(Path("run"), **QUICK))
    with no_file_larger_than(limit):
        done = call("run", "x.yaml")
    says_disk_full(done, where)
    finished_rounds = list(Path("run/checkpoints").glob("round_*"))
    assert (max(int(p.name[-4:]) for p in finished_rounds) if finished_rounds else 0) == rounds
    assert not list(Path("run").rglob(".*.tmp")), "half a file takes no space away"
    assert call("run", "x.yaml", "--resume").code == 0
    assert left_behind(Path("run")) == left_behind(undisturbed)


def test_a_full_disk_while_exporting(tmp_path: Path) -> None:
    run = finished()
    for extra in ([], ["--static"]):
        with no_file_larger_than(1000):
            done = call("export", run, "--client", 0, "--to", tmp_path / "taken", *extra)
        assert done.code == 2, done.err
        assert "disk full" in done.error
        shutil.rmtree(tmp_path / "taken", ignore_errors=True)


# -------------------------------------------------------------------------------------------- a really full file system


SIZES = (24, 100, 180, 300)
"""KiB: full while writing the first scores, the first log, the third and the seventh checkpoint."""


def fill(plan: Path) -> None:
    """In a mount namespace of our own: run into small file systems, then give them room and resume."""
    root = plan.parent
    results: dict[str, list[Any]] = {}
    for size in SIZES:
        folder = root / f"small-{size}"
        folder.mkdir()
        mount(folder, f"size={size}k")
        with contextlib.chdir(folder):
            done = [call("run", root / "x.yaml"), call("run", root / "x.yaml", "--resume")]
            mount(folder, "remount,size=64m")
            done.append(call("run", root / "x.yaml", "--resume"))
        shutil.copytree(folder / "run", root / f"kept-{size}")
        results[str(size)] = [dataclasses.astuple(one) for one in done]
    (root / "fixed").mkdir()
    mount(root / "fixed", "ro,size=64k")
    results["ro"] = [dataclasses.astuple(call("run", root / "x.yaml", "--out", root / "fixed" / "run"))]
    plan.with_suffix(".results.json").write_text(json.dumps(results))


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Done]]]:
    """What the commands said, and copies of the runs; skips where mounting is not permitted."""
    root = tmp_path_factory.mktemp("full")
    write_yaml(root / "x.yaml", settings(Path("run"), **QUICK))
    alone = ["unshare", "--mount"]
    with contextlib.suppress(OSError):
        trial = [*alone, "mount", "-t", "tmpfs", "tmpfs", str(root)]
        if subprocess.run(trial, capture_output=True, check=False).returncode == 0:
            command = [*alone, sys.executable, __file__, str(root / "plan.json")]
            environment = os.environ | ENVIRONMENT
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            results = json.loads((root / "plan.results.json").read_text())
            return root, {name: [Done(*one) for one in said] for name, said in results.items()}
    pytest.skip("mounting is not permitted here")


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size} KiB")
def test_a_full_file_system(undisturbed: Path, full: Any, size: int) -> None:
    root, said = full
    first, second, third = said[str(size)]
    says_disk_full(first, "run")
    says_disk_full(second, "run")
    assert third.code == 0, third.err
    assert left_behind(root / f"kept-{size}") == left_behind(undisturbed)


def test_a_read_only_file_system(full: Any) -> None:
    root, said = full
    assert said["ro"][0].code == 2
    assert said["ro"][0].error.startswith(f"{root / 'fixed' / 'run'}: cannot write here (")


# ----------------------------------------------------------------------------------------------------- no such place


@pytest.mark.parametrize("below", ["run", "a/b/run"])
def test_a_path_below_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / below
    config = write_yaml(tmp_path / "x.yaml", settings(out, **QUICK))
    for flags in ([], ["--resume"], ["--overwrite"]):
        assert refused("run", config, *flags) == f"{tmp_path / 'file'}: is a file, not a folder"
    for extra in ([], ["--static"]):
        line = refused("export", finished(), "--client", 0, "--to", out, *extra)
        assert "cannot write here (" in line
    assert (tmp_path / "file").read_text() == "x"


if __name__ == "__main__":
    fill(Path(sys.argv[1]))
