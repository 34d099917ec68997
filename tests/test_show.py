"""The progress bar: one per run, whichever job of a comparison an event comes from."""

from __future__ import annotations

import pytest

from fedalt.cli import show


def test_every_run_of_every_job_has_its_own_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with show.live(9) as sink:
        for job, method in enumerate(("local", "fedalt")):
            sink({"event": "member", "method": method, "seed": 1, "job": job})
            sink({"event": "run_started", "method": method, "round": 0, "rounds": 2, "metric": "rouge1", "job": job})
            sink({"event": "note", "text": "said once", "job": job})
        sink({"event": "point", "name": "lora.r=[4]"})
        sink({"event": "run_finished", "mean": 40.0, "worst": 30.0, "job": 1})
        sink({"event": "run_finished", "mean": 50.0, "worst": 20.0, "job": 0})
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert any("local seed 1" in line and "mean 50.0, worst 20.0" in line for line in lines)
    assert any("fedalt seed 1" in line and "mean 40.0, worst 30.0" in line for line in lines)
    assert said.count("said once") == 1
    assert "lora.r=[4]" in said
