"""The dashboard as a person uses it, in a real browser: start a run, watch it end, stop and resume it, chat."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from micro import ENVIRONMENT, shared_data, shared_model
from report.browser import DESKTOP, PHONE, Tab, browser, find_browser
from report.test_browser import NEEDED, TOO_WIDE

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        NEEDED not in os.environ and (find_browser() is None or find_spec("websocket") is None),
        reason="needs Chromium (apt-get install chromium) and websocket-client (pip install websocket-client)",
    ),
]
HOSTILE = "<img src=x onerror=document.title='taken'>"
SETTINGS = {
    "model.name": str(shared_model()), "data.source": "rows", "data.cutoff": "64", "lora.r": "4",
    "training.local_epochs": "5", "training.batch_size": "4", "training.lr": "0.02", "federation.rounds": "30",
    "evaluation.every": "1", "evaluation.max_new_tokens": "5",
}  # fmt: skip


@contextlib.contextmanager
def dashboard(root: Path, cwd: Path) -> Iterator[str]:
    """The command, and the address that it prints; killed without a word at the end."""
    command = [sys.executable, "-m", "fedalt", "dashboard", str(root), "--port", "0"]
    environment = os.environ | ENVIRONMENT
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=cwd, env=environment)
    try:
        assert process.stdout
        yield next(line.strip() for line in process.stdout if "http" in line)
    finally:
        process.kill()
        process.wait()


def wait(tab: Tab, condition: str, seconds: float = 300) -> None:
    """Until something is so on the page."""
    deadline = time.monotonic() + seconds
    while not tab.evaluate(f"Boolean({condition})"):
        assert time.monotonic() < deadline, (condition, tab.evaluate("document.body.innerText"))
        time.sleep(0.2)


def press(tab: Tab, text: str) -> None:
    """Press a button as soon as it is there."""
    button = f"[...document.querySelectorAll('button.do')].find(one => one.textContent === {json.dumps(text)})"
    wait(tab, f"{button} && !{button}.disabled")
    tab.evaluate(f"{button}.click()")


def write(tab: Tab, where: str, text: str) -> None:
    """Write into a field."""
    field = f"document.getElementById({json.dumps(where)})"
    tab.evaluate(f"{field}.value = {json.dumps(text)}; {field}.dispatchEvent(new Event('input'))")


def state(name: str) -> str:
    return f"document.querySelector('.state')?.textContent === {json.dumps(name)}"


def test_a_run_is_started_watched_and_talked_to(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    data = tmp_path / "rows"
    data.mkdir()
    for file in shared_data().rglob("*.json*"):  # a client whose name is HTML
        copy = data / file.relative_to(shared_data())
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(file.read_text().replace('"task0"', json.dumps(HOSTILE)))
    with browser(tmp_path / "profile") as tab:
        with dashboard(root, tmp_path) as address:
            here = address.partition("?")[0]
            tab.open(address, DESKTOP, "light")
            assert tab.evaluate("location.href") == here, "the token has left the address bar"
            assert tab.evaluate("document.cookie") == "", "and no script can read it"
            press_link(tab, "New run")
            wait(tab, "document.getElementById('set-lora.r')")
            for key, value in SETTINGS.items():
                write(tab, f"set-{key}", value)
            write(tab, "run-name", "mine")
            press(tab, "Check and estimate")
            wait(tab, "document.querySelectorAll('#estimate .facts b').length === 6")
            write(tab, "set-lora.r", "0")
            press(tab, "Start")
            wait(tab, "!document.getElementById('problem').hidden")
            write(tab, "set-lora.r", "4")
            press(tab, "Start")
            wait(tab, state("running"))
            wait(tab, "document.querySelectorAll('.js-plotly-plot .trace').length > 5")
            tab.screenshot(tmp_path / "live.png")
            press(tab, "Stop")
            wait(tab, state("stopped"))
            press(tab, "Resume")
            wait(tab, state("running"))
            visit = tab.visit()
            assert not visit.errors
            assert all(one.startswith((here, "data:", "blob:")) for one in visit.requests), visit.requests
        with dashboard(root, tmp_path) as address:  # the first one was killed; its run was not
            here = address.partition("?")[0]
            tab.open(address, PHONE, "dark")
            wait(tab, "document.querySelector('.card a.name')")
            tab.evaluate("document.querySelector('.card a.name').click()")
            wait(tab, state("finished"))
            wait(tab, "document.querySelectorAll('.js-plotly-plot .trace').length > 5")
            assert HOSTILE in tab.evaluate("document.querySelector('table').innerText")
            assert tab.evaluate(TOO_WIDE) == []
            press(tab, "Chat")
            wait(tab, "document.querySelector('textarea')")
            tab.evaluate("document.querySelector('textarea').value = 'Is 3 more than 1?'")
            press(tab, "Ask")
            wait(tab, "document.querySelectorAll('.answer').length === 3 && !document.querySelector('.pending')")
            assert tab.evaluate("document.querySelectorAll('.tokens').length") == 2, "shaded by the mixer's weight"
            assert all(tab.evaluate("[...document.querySelectorAll('.answer p:first-of-type')].map(p => p.innerText)"))
            assert tab.evaluate(TOO_WIDE) == []
            tab.screenshot(tmp_path / "chat.png")
            assert tab.evaluate("document.title") == "fedalt"
            visit = tab.visit()
            assert not visit.errors
            assert all(one.startswith((here, "data:", "blob:")) for one in visit.requests), visit.requests
    assert (root / "mine" / "results" / "final_scores.json").is_file()


def press_link(tab: Tab, text: str) -> None:
    tab.evaluate(f"[...document.querySelectorAll('a')].find(one => one.textContent === {json.dumps(text)}).click()")
