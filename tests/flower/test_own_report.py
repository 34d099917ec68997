"""A site's own report of a run: from its files alone, and of nobody else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import micro
from fedalt.files import write_json
from fedalt.flower.trainer import SITE
from fedalt.runs.setup import Bases
from flower.grid import Clock
from flower.rounds import LATE, once, run
from report.browser import DESKTOP, PHONE, browser, find_browser


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


def reported(state: Path, client: int, *more: object) -> tuple[Path, str]:
    """A site's one run, and its report without tags and scripts."""
    own = {"data": str(micro.shared_data()), "model": str(micro.shared_model()), "own": {"min_rows": 1}}
    write_json(state / SITE, {"client": client, **own})
    [folder] = state.glob("run-*")
    done = micro.call("report", folder, *more)
    assert done.code == 0, done.err
    page = (folder / "report.html").read_text()
    return folder, re.sub(r"<[^>]*>", "\n", re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.DOTALL))


def test_a_site_reports_what_it_gained_sent_and_missed(tmp_path: Path, bases: Bases, clock: Clock) -> None:
    late, lost = once(1, 1, "late"), once(1, 2, "lost")

    def arrange(grid: Any) -> None:
        grid.fault = lambda client, request: late(client, request) or lost(client, request)

    run(tmp_path, bases, arrange, **LATE)
    folder, text = reported(tmp_path / "sites/1", 1, "--alone")
    assert re.search(r"ROUGE-1 [\d.]+ with the others, [\d.]+ alone: (the same|better by|worse by)", text)
    assert "alone, 2 rounds" in text and "round 3, with the others" in text and "On 4 test rows" in text
    assert "round 1: trained and answered, and the server did not count it" in text
    assert "round 2: not asked: not drawn, or this site was away" in text and "round 3: not" not in text
    replies = micro.of_kind(folder, "reply")
    assert f"{sum(one['bytes_up'] for one in replies) / 1e6:.3f}" in text.split()
    assert "model.layers.0.self_attn.q_proj.individual.A  4×32  F32" in text
    assert str(tmp_path / "run") not in text, "the server's folder"
    for other in (0, 2):
        assert not any(row["instruction"] in text for row in micro.rows(other, 12))
    status = micro.call("status", tmp_path / "sites/1", "--json").json["folders"]
    assert [(one["state"], one["round"], one["clients"]) for one in status] == [("finished", 3, 1)]
    if find_browser():
        with browser(tmp_path / "profile") as tab:
            for size in (PHONE, DESKTOP):
                visit = tab.open(folder / "report.html", size, "light")
                assert visit.errors == [] and len([url for url in visit.requests if url.startswith("http")]) == 0
                assert tab.evaluate("document.documentElement.scrollWidth") == size[0]


def test_a_private_run_shows_what_it_has_spent_and_how_to_know_the_gain(tmp_path: Path, bases: Bases) -> None:
    run(tmp_path, bases, federation__rounds=1, privacy__epsilon=8.0, privacy__report="none")
    folder, text = reported(tmp_path / "sites/0", 0)
    [spent] = [event["epsilon"] for event in micro.of_kind(folder, "client")]
    assert "epsilon so far" in text and f"{spent:.2f}" in text.split() and "Not scored here." in text
    assert "its upload (below), epsilon, its steps" in text
    line = micro.refused("report", tmp_path / "sites/0")
    assert line.endswith(f"a site's state; name a run in it: {folder.name}")
    assert "--alone is for a run at a site" in micro.refused("report", tmp_path / "run", "--alone")
