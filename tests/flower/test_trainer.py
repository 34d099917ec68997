"""The trainer is killed with ``kill -9`` while training, while writing and while replying; real processes.

Whoever asks gets the reply that an undisturbed site gives, to the byte, and the site's state is what it would have
been.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import pytest

import micro
from fedalt.config import parse_config
from fedalt.errors import UserError
from fedalt.flower import trainer
from fedalt.flower.own import SiteRows
from fedalt.flower.requests import Reply, Request
from fedalt.flower.site import Site
from fedalt.runs.setup import Bases
from flower.grid import Clock

CLIENT = 1
BECOME = "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
ROUND = "run-1/checkpoints/.round_0002.tmp"
KILLS = [
    ("training", "before"),
    (f"write {ROUND}/clients/1.safetensors", "half"),
    (f"write {ROUND}/reply.json", "before"),
    (f"write {ROUND}/manifest.json", "half"),
    (f"rename {ROUND}", "before"),
    (f"rename {ROUND}", "after"),
    ("reply", "before"),
    ("reply", "half"),
]


def requests(folder: Path) -> list[Request]:
    values = micro.settings(folder / "server", data__clients=3)
    settings = json.dumps(parse_config(values, "s").model_dump(mode="json"))
    return [Request("train", "run-1", settings, 3, round_) for round_ in (1, 2)]


def state(folder: Path) -> Path:
    folder.mkdir()
    own = {"min_rows": 1, "task": "task1", "categories": ["compare", "copy"]}
    said = {"client": CLIENT, "data": str(micro.shared_data()), "model": str(micro.shared_model()), "own": own}
    (folder / "site.json").write_text(json.dumps(said))
    return folder


def told(request: Request, reply: Reply) -> Request:
    return replace(request, share=1 / 3, counts=1, told=True, block=reply.block)


def rounds(ask: Callable[[Request], Reply], folder: Path) -> list[Reply]:
    first, second = requests(folder)
    one = ask(first)
    return [one, ask(told(second, one))]


@contextmanager
def running(*command: object) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | micro.ENVIRONMENT
    with subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, env=environment) as process:
        try:
            yield process
        finally:
            assert process.stdin
            process.stdin.close()


def as_text(replies: list[Reply]) -> list[tuple[str, bytes]]:
    return [(reply.header, reply.block) for reply in replies]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[str, bytes]], dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    rows = SiteRows(data=str(micro.shared_data()), model=str(micro.shared_model()), min_rows=1)
    site = Site(CLIENT, folder / "state", Bases(), rows)
    replies = rounds(site.answer, folder.parent / "any")
    return as_text(replies), micro.tree(folder / "state/run-1/checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize(("where", "how"), KILLS, ids=[f"{how} {where.split('/')[-1]}" for where, how in KILLS])
def test_a_killed_trainer_answers_as_if_nothing_had_happened(
    where: str, how: str, tmp_path: Path, undisturbed: tuple[list[tuple[str, bytes]], dict[str, bytes]]
) -> None:
    home = state(tmp_path / "state")
    with running(sys.executable, Path(__file__).with_name("doomed_trainer.py"), home, where, how):
        replies = rounds(lambda request: trainer.ask(home, request), tmp_path.parent / "any")
    assert int((home / "status1").read_text()) == signal.SIGKILL
    assert as_text(replies) == undisturbed[0]
    assert micro.tree(home / "run-1/checkpoints") == undisturbed[1]


def test_a_trainer_ends_with_whoever_started_it(tmp_path: Path) -> None:
    home = state(tmp_path / "state")
    with running(sys.executable, "-P", "-m", "fedalt.flower.trainer", home) as process:
        assert trainer.ask(home, Request("join", settings="[]")).error == "message"
        socket = Path(json.loads((home / "trainer.json").read_text())["socket"])
        assert socket.exists()
        assert socket.parent.stat().st_mode & 0o777 == 0o700
    assert process.wait(10) == 0
    assert not socket.parent.exists()


def test_a_trainer_that_dies_after_hours_of_training_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience begins when it is gone, not when it was asked."""
    clock = Clock()
    monkeypatch.setattr(trainer, "time", clock)
    home = state(tmp_path / "state")
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen()
        (home / trainer.TRAINER).write_text(json.dumps({"socket": f"{folder}/s"}))

        def serve() -> None:
            for dies in (True, False):
                line, _ = listener.accept()
                with line:
                    trainer._receive(line)
                    if dies:
                        clock.sleep(3600)
                    else:
                        trainer._send(line, Reply("save", "run", 1, CLIENT).header, b"")

        thread = Thread(target=serve, daemon=True)
        thread.start()
        assert trainer.ask(home, Request("save")).round == 1
        thread.join()


@pytest.mark.parametrize(
    ("room", "said"), [(0, "nothing can be written where temporary files go"), (20, "trainer.json: disk full")]
)
def test_a_disk_that_is_full_from_the_beginning_is_one_line(room: int, said: str, tmp_path: Path) -> None:
    home = state(tmp_path / "state")
    limited = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room})); {BECOME}"
    with subprocess.Popen(
        [sys.executable, "-c", limited, "-P", "-m", "fedalt.flower.trainer", home],
        env=os.environ | micro.ENVIRONMENT,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        [line] = process.stderr.read().splitlines()
        assert process.wait() == trainer.WRONG
    assert line.startswith("error: ") and said in line


def test_a_trainer_that_never_comes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "PATIENCE", 0.5)
    with pytest.raises(UserError, match="no trainer answers"):
        trainer.ask(tmp_path, Request("who"))
