"""Processes that share work: who gets what, and what happens when one of them, or all, or their parent, ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fedalt.errors import UserError
from fedalt.runs.pool import Pool, Task
from micro import ENVIRONMENT
from pooled import dying, obliging, spawned, squares


def pool(*names: str) -> Pool:
    return Pool(obliging, names, [f"job {name}" for name in names], "--jobs")


def do(*what: Any) -> Task:
    return Task(f"doing {what[0]}", what)


# ------------------------------------------------------------------------------------------------------ who gets what


def test_results_are_in_the_order_of_tasks_and_whoever_is_free_gets_the_next(tmp_path: Path) -> None:
    """The first process is busy until all other tasks are done."""
    end, made = tmp_path / "end", list[int]()

    def tasks() -> Iterator[Task]:
        yield do("wait", str(end))
        for number in range(5):
            made.append(number)
            yield do("sleep", 0.0)

    def on_event(task: int, event: Any) -> None:
        seen.append((task, event["event"]))
        if task:
            assert made == list(range(task)), "a task is made when a process is free for it"
        if task == 5:
            end.touch()

    seen = list[tuple[int, str]]()
    with pool("a", "b") as both:
        assert both.map(tasks(), on_event) == ["a", *"bbbbb"]
        assert sorted(seen) == [(0, "waiting"), *((number, "asleep") for number in range(1, 6))]
        assert both.map([do("sleep", 0.2)] * 2) == ["a", "b"], "each has one of the first tasks, and state that stays"
        assert both.map([]) == []


def test_a_process_that_is_needed_no_longer_ends_while_others_work() -> None:
    def on_event(task: int, event: Any) -> None:
        until = time.monotonic() + 60
        while [child.pid for child in spawned(os.getpid())] != [event["pid"]]:
            assert time.monotonic() < until
            time.sleep(0.01)

    with pool("a", "b") as both:
        assert len(spawned(os.getpid())) == 2
        assert both.map([do("sleep", 0.0)], on_event, last=True) == ["a"]


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    with pool("a", "b") as both:
        assert both.map([do("threads")] * 2) == [2, 2]


def test_what_is_printed_there_is_no_result_of_a_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pool("a") as one:
        one.map([do("speak")])
    out, err = capfd.readouterr()
    assert out == ""
    assert {"from Python", "from C"} <= set(err.splitlines())


def test_a_process_may_have_a_pool_of_its_own() -> None:
    with pool("a") as one:
        assert one.map([do("nested", 3)]) == [[0, 1, 4]]


# ---------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("what", "error", "line", "traced"),
    [
        ("refuse", UserError, "^no such thing as b$", False),
        ("fail", RuntimeError, r"^job b \(doing fail\): EOFError: half a file$", True),
        ("die", UserError, r"^--jobs: job b \(doing die\) was killed \(signal 9\), perhaps for lack of memory", False),
    ],
)
def test_an_error_ends_all_at_once(
    what: str, error: type[Exception], line: str, traced: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with pool("a", "b") as both:
        with pytest.raises(error, match=line):
            both.map([do("sleep", 600), do(what)])
        assert not spawned(os.getpid())
    assert ("Traceback" in capfd.readouterr().err) == traced


def test_one_that_dies_is_missed_though_nobody_waits_for_it() -> None:
    with (
        pool("a", "b") as both,
        pytest.raises(UserError, match=r"^--jobs: job b \(waiting\) was killed \(signal 15\)"),
    ):
        pids = list[int]()
        both.map([do("sleep", 0.2)] * 2, lambda task, event: pids.append(event["pid"]))
        both.map([do("sleep", 600)], lambda task, event: os.kill((set(pids) - {event["pid"]}).pop(), signal.SIGTERM))


def test_one_that_cannot_start_is_named() -> None:
    with Pool(dying, [0], ["the one"], "--jobs") as one, pytest.raises(UserError, match=r"--jobs: the one \(doing"):
        one.map([do("square", 1)])
    assert not spawned(os.getpid())


# --------------------------------------------------------------------------------------------------- wherever it starts


def python(*command: str, cwd: Path, stdin: str = "") -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, *command],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | ENVIRONMENT,
        timeout=240,
        check=False,
    )
    return done.stdout, done.stderr


def test_a_script_needs_no_guard_and_no_file(tmp_path: Path) -> None:
    """Modules beside it are there for the processes, too; nothing in the working directory is taken for Python's."""
    script = tmp_path / "beside" / "script.py"
    script.parent.mkdir()
    script.write_text(
        "print('once')\nfrom pooled import obliging\nfrom fedalt.runs.pool import Pool, Task\n"
        "with Pool(obliging, 'a', ['a'], '--jobs') as pool:\n"
        "    print(pool.map([Task('', ('main',)), Task('', ('import', 'mine'))]))\n"
    )
    script.with_name("mine.py").write_text("WHERE = 'beside the script'\n")
    for name in ("pickle", "signal", "struct"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    assert python(str(script), cwd=tmp_path) == ("once\n[None, 'beside the script']\n", "")
    squares = "from pooled import squares\nprint(squares(3))\n"
    assert python("-", cwd=script.parent, stdin=squares) == ("[0, 1, 4]\n", "")


def test_what_the_processes_inherit_is_as_before_here() -> None:
    def state() -> Any:
        return sys.modules["__main__"], os.environ.get("PYTHONSAFEPATH"), signal.pthread_sigmask(signal.SIG_BLOCK, [])

    before = state()
    assert squares(2) == [0, 1]
    assert state() == before


SPINNING = """
from pooled import obliging
from fedalt.runs.pool import Pool, Task
with Pool(obliging, "ab", "ab", "--jobs") as pool:
    pool.map([Task("", ("spin",))] * 2, lambda task, event: print(event["event"], flush=True))
"""


@pytest.mark.parametrize("early", [pytest.param(True, id="early"), pytest.param(False, id="late")])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_none_outlives_its_parent(number: signal.Signals, early: bool) -> None:
    """Whatever they do: Python starts, or a product is under way. Ctrl-C is for the parent, and it alone says so."""
    process = subprocess.Popen(
        [sys.executable, "-c", SPINNING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
        start_new_session=True,
    )
    assert process.stdout
    if not early:
        assert [process.stdout.readline() for _ in range(2)] == ["spinning\n"] * 2
    until = time.monotonic() + 60
    while len(children := spawned(process.pid)) < 2:
        assert time.monotonic() < until
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.kill()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert (len(gone), alive) == (2, [])
    _, error = process.communicate(timeout=60)
    assert process.returncode == -number
    lines = [line for line in error.splitlines() if not line.startswith(" ")]
    if number == signal.SIGINT:
        assert lines == ["Traceback (most recent call last):", "KeyboardInterrupt"]
    else:
        assert early or not lines  # one that has just been made complains that nobody says what it is for
