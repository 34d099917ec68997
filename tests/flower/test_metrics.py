"""/metrics: what a state folder's logs say, in Prometheus' text format, for this machine only."""

from __future__ import annotations

import http.client
import re
import shutil
from pathlib import Path

import pytest

from micro import events, finished, of_kind, refused

pytest.importorskip("flwr", reason="needs pip install 'fedalt[flower]'")

from fedalt.flower.deploy.address import free_port
from fedalt.flower.deploy.metrics import exposition, measured, samples

LINE = re.compile(r'([a-z_]+)\{(\w+="(?:[^"\\\n]|\\.)*"(?:,\w+="(?:[^"\\\n]|\\.)*")*)\} (-?[0-9.e+-]+)')


def asked(port: int, path: str = "/metrics", host: str = "127.0.0.1") -> tuple[int, str]:
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    line.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = line.getresponse()
    return answer.status, answer.read().decode()


def test_a_state_folder_is_measured_on_loopback(tmp_path: Path) -> None:
    run, port = tmp_path / 'a "run"', free_port()
    shutil.copytree(finished(), run)
    with measured(tmp_path, port):
        status, text = asked(port)
        assert status == 200
        assert (asked(port, "/")[0], asked(port, host="evil.example")[0]) == (404, 403)
        found = [LINE.fullmatch(line) for line in text.splitlines() if not line.startswith("#")]
        values = {(one[1], one[2].partition(",")[2]): float(one[3]) for one in found if one}
        assert all(found) and 'run="a \\"run\\""' in text
        rounds = of_kind(run, "round")
        assert values["fedalt_round", ""] == values["fedalt_rounds", ""] == values["fedalt_clients", ""] == 3
        assert values["fedalt_finished", ""] == 1 and values["fedalt_failures_total", ""] == 0
        for way in ("up", "down"):
            told = values["fedalt_bytes_total", f'direction="{way}"']
            assert told == sum(one[f"bytes_{way}"] for one in rounds)
        assert values["fedalt_seconds_total", 'phase="training"'] == sum(one["seconds"] for one in rounds)
        assert values["fedalt_seconds_total", 'phase="scoring"'] > 0
        with (run / "events.jsonl").open("a") as log:
            log.write('{"event": "client_failed", "round": 4, "client": 0, "reason": "x"}\n')
        text = asked(port)[1]
        assert 'fedalt_failures_total{run="a \\"run\\""} 1.0' in text and "fedalt_finished" in text
        line = refused(
            "server", "--state", tmp_path / "state", "--address", f"127.0.0.1:{free_port()}", "--metrics", port
        )
        assert line.startswith(f"--metrics {port}: cannot be used")
    with pytest.raises(ConnectionError):
        asked(port)


def test_sites_of_a_private_run_tell_no_loss() -> None:
    log = [{**event, "loss": None} if event["event"] == "client" else event for event in events(finished())]
    found = {name: value for name, _, value in samples(log)}
    assert "fedalt_loss" not in found and found["fedalt_clients"] == 3


def test_a_sites_log_has_its_own_rounds() -> None:
    events = [
        {"event": "client", "round": 1, "client": 2, "seconds": 3.0, "loss": 2.0},
        {"event": "client_failed", "round": 2, "client": 2, "reason": "not finite"},
        {"event": "client", "round": 3, "client": 2, "seconds": 1.5, "loss": 1.0, "epsilon": 2.5},
        {"event": "run_finished", "round": 3},
        {"event": "reply", "round": 3, "client": 2, "bytes_up": 5, "bytes_down": 7},
    ]
    found = {(name, *labels.values()): value for name, labels, value in samples(events)}
    assert found["fedalt_round",] == 3 and found["fedalt_clients",] == 1 and found["fedalt_loss",] == 1.0
    assert (found["fedalt_bytes_total", "up"], found["fedalt_bytes_total", "down"]) == (5, 7), "of every answer"
    assert found["fedalt_epsilon", "2"] == 2.5 and found["fedalt_finished",] == 1
    assert found["fedalt_seconds_total", "training"] == 4.5 and found["fedalt_failures_total",] == 1
    assert "fedalt_bytes_total" in exposition(samples(events)) and "fedalt_loss" not in exposition(samples([]))
