"""The dashboard's addresses: who is let in, what they see of a folder of runs, and that they see nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from micro import call, finished, refused, settings, write_yaml

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from starlette.testclient import TestClient

from fedalt.cli.complete import fields as known_settings
from fedalt.config import load_config
from fedalt.dashboard import form
from fedalt.dashboard.app import application
from fedalt.dashboard.guard import STRICT
from fedalt.dashboard.processes import OWN
from fedalt.runs.watch import Log, Watch

HERE = "http://127.0.0.1:8501"
TOKEN = "right"
HOSTILE = "</script><img src=x onerror=alert(1)>"
GETS = ("/", "/app.js", "/style.css", "/plotly.js", "/api/listed", "/api/run?path=a", "/api/fields", "/report/a", "/x")
POSTS = ("start", "stop", "resume", "forget", "estimate", "chat")


def visitor(root: Path, token: str | None = TOKEN, **headers: str) -> TestClient:
    """Somebody who has opened the address with a token, and whose browser says where a question comes from."""
    client = TestClient(application(root, TOKEN), HERE, headers={"Origin": HERE, **headers}, follow_redirects=False)
    if token is not None:
        client.get(f"/?token={token}")
    return client


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, one of them with a client whose name is HTML, and a comparison."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(finished(), folder / "plain")
    shutil.copytree(finished("local"), folder / "inner" / "other")
    events = folder / "inner" / "other" / "events.jsonl"
    events.write_text(events.read_text().replace('"task0"', json.dumps(HOSTILE)))
    (folder / "inner" / "other" / "digests.json").unlink()
    quick = settings(folder / "both", federation__rounds=1, training__local_epochs=1)
    done = call("compare", write_yaml(folder.parent / "both.yaml", quick), "--methods", "local,fedit")
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def page(root: Path) -> Iterator[TestClient]:
    with visitor(root) as client:
        yield client


def asked(page: TestClient, what: str, **values: str) -> Any:
    answer = page.get(f"/api/{what}", params=values)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ------------------------------------------------------------------------------------------------------ who is let in


@pytest.mark.parametrize("token", [None, "", "wrong", "right "])
def test_nothing_without_the_token(root: Path, token: str | None) -> None:
    stranger = visitor(root, token)
    answers = [stranger.get(path) for path in GETS] + [stranger.post(f"/api/{name}", json={}) for name in POSTS]
    assert {answer.status_code for answer in answers} == {403}
    assert not stranger.cookies


def test_the_token_becomes_a_cookie_that_no_other_page_can_use_or_read(root: Path) -> None:
    answer = visitor(root, None).get(f"/?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert {"HttpOnly", "SameSite=strict"} <= set(answer.headers["set-cookie"].split("; "))


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8501", "127.0.0.1.evil.example:8501", "", "192.168.0.1"]
)
def test_another_name_for_this_machine_is_refused(root: Path, host: str) -> None:
    page = visitor(root)
    assert page.get("/api/listed", headers={"Host": host}).status_code == 403
    assert page.get(f"/?token={TOKEN}", headers={"Host": host}).status_code == 403
    assert (
        page.get("/api/listed", headers={"Host": "localhost:8501", "Cookie": f"fedalt-8501={TOKEN}"}).status_code == 200
    )


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://127.0.0.1:9999", "https://127.0.0.1:8501", "null", ""]
)
@pytest.mark.parametrize("name", POSTS)
def test_a_page_of_another_origin_cannot_ask_for_anything(root: Path, origin: str, name: str) -> None:
    body = {"name": "theirs", "path": "plain", "values": {}, "prompt": "x", "clients": [0]}
    answer = visitor(root).post(f"/api/{name}", json=body, headers={"Origin": origin})
    assert answer.status_code == 403
    assert not (root / "theirs").exists() and not (root / OWN).exists()


def test_what_changes_something_is_no_link(page: TestClient) -> None:
    assert {page.get(f"/api/{name}").status_code for name in POSTS} == {405}


def test_every_answer_forbids_what_comes_from_elsewhere(page: TestClient) -> None:
    for path in ("/", "/app.js", "/api/listed", "/nothing"):
        headers = page.get(path).headers
        assert headers["content-security-policy"] == STRICT
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert page.get("/report/plain").headers["content-security-policy"].startswith("sandbox allow-scripts")
    assert "http" not in STRICT and "unsafe-eval" not in STRICT
    assert "script-src 'self';" in STRICT


def test_the_page_loads_from_here_and_makes_no_html_of_text(page: TestClient) -> None:
    text = page.get("/").text + page.get("/app.js").text + page.get("/style.css").text
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert word not in text, word


@pytest.mark.parametrize("path", ["..", "../..", "/etc", "plain/../../secret", "link", "link/secret"])
def test_no_path_leads_out_of_the_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "runs").mkdir()
    shutil.copytree(finished(), tmp_path / "secret")
    (tmp_path / "runs" / "link").symlink_to(tmp_path, target_is_directory=True)
    page = visitor(tmp_path / "runs")
    answers = [page.get(f"/api/{name}", params={"path": path}) for name in ("run", "comparison")]
    answers += [page.get("/api/side_by_side", params={"paths": json.dumps([path])})]
    body = {"path": path, "prompt": "x", "clients": [0]}
    answers += [page.post(f"/api/{name}", json=body) for name in ("stop", "resume", "forget", "chat")]
    answers += [page.get(f"/report/{path.replace('..', '%2e%2e')}")]
    for answer in answers:
        assert answer.status_code == 422 and "no such folder among the runs" in answer.text, answer.text
    assert asked(page, "listed")["runs"] == []


# ------------------------------------------------------------------------------------------------------ what is shown


def test_runs_and_comparisons_of_a_folder(page: TestClient, root: Path) -> None:
    found = asked(page, "listed")
    runs = {run["path"]: run for run in found["runs"]}
    assert set(runs) == {"plain", "inner/other", "both/local-seed3", "both/fedit-seed3"}
    assert found["comparisons"] == ["both"]
    final = json.loads((root / "plain/results/final_scores.json").read_text())["last"]
    plain = runs["plain"]
    assert (plain["state"], plain["round"], plain["rounds"], plain["clients"]) == ("finished", 3, 3, 3)
    assert (plain["mean"], plain["worst"]) == (final["mean"], final["worst"])


def test_a_run_has_figures_tables_and_its_version(page: TestClient) -> None:
    run = asked(page, "run", path="plain")
    assert [one["id"] for one in run["figures"]] == ["score-curves", "loss", "row", "alpha"]
    assert (run["talks"], run["report"], run["clients"]) == (True, True, [0, 1, 2])
    assert [row[0] for row in run["tables"][0]["rows"]] == ["0", "1", "2"]
    assert "figures" not in asked(page, "run", path="plain", have=run["version"])
    assert [one["id"] for one in asked(page, "run", path="inner/other")["figures"]] == ["score-curves", "loss"]


def test_html_in_a_clients_name_stays_text(page: TestClient) -> None:
    run = asked(page, "run", path="inner/other")
    assert run["tables"][0]["rows"][0][1] == HOSTILE, "which the page shows as text"
    assert f"0 {HOSTILE}" in [key["name"] for key in run["figures"][0]["keys"]]
    assert "<img" not in json.dumps([one["plot"] for one in run["figures"]]), "Plotly reads some HTML"


def test_looking_at_a_run_runs_no_code_that_it_names(tmp_path: Path) -> None:
    shutil.copytree(finished(), tmp_path / "run")
    code, config = tmp_path / "mine.py", tmp_path / "run" / "config.yaml"
    code.write_text(f"open({str(tmp_path / 'taken')!r}, 'w')\n")
    config.write_text(f"{config.read_text()}plugins: [{code}]\n")
    events = tmp_path / "run" / "events.jsonl"
    events.write_text(events.read_text().replace("rouge1", "my_own"))
    page = visitor(tmp_path)
    run = asked(page, "run", path="run")
    assert ["plugins", f"[{code}]"] in run["tables"][2]["rows"]
    assert run["figures"][0]["plot"]["layout"]["yaxis"]["title"]["text"] == run["tables"][0]["head"][2] == "my_own"
    asked(page, "filled", kind="run", name="run")
    asked(page, "side_by_side", paths='["run", "run"]')
    assert asked(page, "listed")["runs"][0]["metric"] == "my_own"
    assert not (tmp_path / "taken").exists()


def test_runs_side_by_side(page: TestClient) -> None:
    found = asked(page, "side_by_side", paths=json.dumps(["plain", "both/fedit-seed3"]))
    assert [one["id"] for one in found["figures"]] == ["method-curves", "bars", "cost-plot"]
    scores, differing = found["tables"]
    assert [row[0] for row in scores["rows"]] == ["plain", "both/fedit-seed3"]
    assert ["method", "default", "fedit"] in differing["rows"]
    assert not any(row[0] == "seed" for row in differing["rows"])


def test_a_comparison(page: TestClient) -> None:
    found = asked(page, "comparison", path="both")
    assert found["finding"] and len(found["tables"]) == 3
    assert {"bars", "cost-plot"} <= {one["id"] for one in found["figures"]}


def test_damage_is_one_line(tmp_path: Path) -> None:
    shutil.copytree(finished(), tmp_path / "run")
    events = tmp_path / "run" / "events.jsonl"
    events.write_text(events.read_text().replace('{"event": "round"', '{"even', 1))
    answer = visitor(tmp_path).get("/api/run", params={"path": "run"})
    assert answer.status_code == 422 and re.search(r"events.jsonl:\d+: damaged", answer.json()["error"])
    assert "not understood" in visitor(tmp_path).post("/api/stop", content=b"no json").json()["error"]


def test_a_log_is_read_on_from_where_it_was(tmp_path: Path) -> None:
    whole = (finished() / "events.jsonl").read_bytes()
    file, lines = tmp_path / "events.jsonl", whole.splitlines(keepends=True)
    log = Log(file)
    assert log.read() == []
    file.write_bytes(b"".join(lines[:4]) + lines[4][:10])
    assert len(log.read()) == 4
    file.write_bytes(whole)  # the same file, which has grown
    before, version = log.events[0], log.version
    assert len(log.read()) == len(lines) and log.events[0] is before and log.version != version
    replaced = tmp_path / "new"
    replaced.write_bytes(b"".join(lines[:3]))
    replaced.replace(file)  # as a run does that is resumed
    assert len(log.read()) == 3
    assert sum(bool(event.get("alpha")) for event in Log(finished() / "events.jsonl").read()) == 3, "of the last round"


def test_a_long_log_is_summed_up_by_its_ends(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished(), run)
    events = (run / "events.jsonl").read_text().splitlines(keepends=True)
    note = json.dumps({"event": "note", "round": 0, "text": "x" * 1000}) + "\n"
    (run / "events.jsonl").write_text(events[0] + note * 20_000 + "".join(events[1:]))
    watch = Watch(tmp_path)
    (slow,) = watch.summaries()
    (plain,) = Watch(finished()).summaries()
    assert (slow.round, slow.mean, slow.loss, slow.state) == (plain.round, plain.mean, plain.loss, "finished")
    watch.summaries()
    started = time.process_time()
    watch.summaries()
    assert time.process_time() - started < 5, "nothing is read again"


# ------------------------------------------------------------------------------------------------------ new runs


def test_the_form_knows_every_setting() -> None:
    sections = form.fields()
    found = {field["key"]: field for section in sections for field in section["fields"]}
    assert set(found) == set(known_settings()) - {"out"}
    assert found["lora.r"] | {"least": 1, "most": 65_536, "type": "integer", "default": "8"} == found["lora.r"]
    assert found["training.lr"]["open"] == ["Minimum"]
    assert found["model.dtype"]["choices"] == ["float32", "bfloat16", "float16"]
    assert "fedalt" in found["method"]["names"] and found["fedprox.mu"]["type"] == "number"
    assert all(field["help"] for field in found.values())


@pytest.mark.parametrize("kind", ["recipe", "run"])
def test_a_filled_form_says_what_it_was_filled_from(root: Path, kind: str) -> None:
    runs = {"plain": root / "plain"}
    for name in form.recipes() if kind == "recipe" else runs:
        path = form.recipes()[name] if kind == "recipe" else root / name / "config.yaml"
        whole = load_config(path, recorded=kind == "run").model_dump(exclude={"out"})
        given = form.given_in(kind, name, runs)
        assert not any(key.startswith("fedalt.") for key in given), "all of these are defaults"
        whole.pop("fedalt", None)
        assert form.read(given).model_dump(exclude={"out"}) == whole


@pytest.mark.parametrize(
    ("asked_for", "told"),
    [
        ({"name": "../x"}, "no name of a folder"),
        ({"name": ".hidden"}, "no name of a folder"),
        ({"name": "plain"}, "holds a run already; add another name"),
        ({"name": "x", "values": {"lora.r": "0"}}, "lora.r 0: must be at least 1"),
        ({"name": "x", "values": {"lora.rr": "1"}}, 'unknown key "lora.rr"'),
    ],
)
def test_a_start_that_cannot_be_is_refused(page: TestClient, root: Path, asked_for: dict[str, Any], told: str) -> None:
    answer = page.post("/api/start", json={"values": {}, **asked_for})
    assert answer.status_code == 422 and told in answer.json()["error"], answer.text
    assert not (root / OWN).exists()


HOLD = "import sys, time; from pathlib import Path; from fedalt.files import only_one\n" + (
    "with only_one(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
)


@contextlib.contextmanager
def held(run: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has a run's lock, as one has that trains."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A run that has come to its second of five rounds."""
    run = tmp_path / "half"
    shutil.copytree(finished(), run)
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    over = next(i for i, line in enumerate(lines) if line.startswith('{"event": "evaluated", "round": 2'))
    failed = {"event": "client_failed", "round": 3, "client": 1, "reason": "[red]no[/] numbers"}
    (run / "events.jsonl").write_text("".join(lines[: over + 1]) + json.dumps(failed) + "\n" + '{"event": "cl')
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("  rounds: 3", "  rounds: 5"))
    return run


def test_a_run_that_another_process_holds_runs_and_is_stopped(half: Path) -> None:
    page = visitor(half.parent)
    with held(half) as process:
        (run,) = asked(page, "listed")["runs"]
        assert (run["state"], run["round"], run["rounds"]) == ("running", 2, 5)
        assert run["eta"] > 0 and run["error"] == "client 1, round 3: [red]no[/] numbers"
        assert "runs already" in page.post("/api/resume", json={"path": "half"}).json()["error"]
        assert page.post("/api/stop", json={"path": "half"}).status_code == 200
        assert process.wait(60) == -signal.SIGTERM
    (run,) = asked(page, "listed")["runs"]
    assert (run["state"], run["eta"]) == ("stopped", None)
    assert asked(page, "run", path="half")["tables"][0]["rows"][1][-1] == "round 3: [red]no[/] numbers"


def test_status_shows_the_runs_of_a_folder(half: Path) -> None:
    shutil.copytree(finished("local"), half.parent / "other")
    (half.parent / "empty").mkdir()
    told = call("status", half.parent).out
    assert "2 of 5" in told and "stopped" in told and "[red]no[/]" in told and "finished" in told
    runs = {run["path"]: run for run in call("status", half.parent, "--json").json["folders"]}
    assert set(runs) == {"half", "other"} and runs["other"]["state"] == "finished"
    assert "none" in call("status", half.parent / "empty").out
    assert "no such folder here" in refused("status", half.parent / "nowhere")
    assert "exclude each other" in refused("status", half.parent, "--watch", "--json")
    assert "give one of them" in refused("status", half.parent, "--state", half.parent)


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ("note: x\nerror: data.source: /x is no folder\n", "data.source: /x is no folder"),
        ("error: stopped by SIGTERM; finished rounds are safe\n", ""),
        (
            "Traceback (most recent call last):\n  File\nZeroDivisionError: division by zero\n",
            "ZeroDivisionError: division by zero",
        ),
        ("FedALT: scores\n", ""),
    ],
)
def test_how_a_start_ended_is_known_and_can_be_forgotten(tmp_path: Path, output: str, error: str) -> None:
    own = tmp_path / OWN / "inner" / "mine"
    own.mkdir(parents=True)
    (own / "process.json").write_text(json.dumps({"pid": os.getpid(), "created": 1.0}))  # another process's number
    (own / "output.txt").write_text(output)
    page = visitor(tmp_path)
    assert asked(page, "run", path="inner/mine")["started"] == {"alive": False, "error": error}
    assert [one["path"] for one in asked(page, "listed")["started"]] == ["inner/mine"] * bool(error)
    assert page.post("/api/forget", json={"path": "inner/mine"}).status_code == 200
    assert asked(page, "run", path="inner/mine")["started"] is None


def test_a_run_that_nobody_holds_cannot_be_stopped(page: TestClient) -> None:
    assert "no process holds this run" in page.post("/api/stop", json={"path": "plain"}).json()["error"]


def test_the_command_says_what_is_wrong() -> None:
    assert "no such folder of runs" in refused("dashboard", "nowhere")
