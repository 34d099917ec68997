"""A run is settings: a site executes nothing that it was sent, and says in a line what else was in it."""

from __future__ import annotations

import getpass
import importlib
import io
import os
import stat
import subprocess
import tomllib
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

import micro
from fedalt.config import parse_config
from fedalt.errors import UserError
from fedalt.flower.deploy.address import Connection, parse_address
from fedalt.flower.deploy.bundle import PROJECT, app_with, check_bundle
from fedalt.flower.deploy.control import NAME, control
from fedalt.flower.deploy.node import LINE, LOOP, replace_in
from fedalt.flower.deploy.submission import write_app
from fedalt.flower.deploy.tasks import CLIENT_APP
from flower.deployment import Deployment

OURS = tomli_w.dumps(app_with({"settings": "{}", "resume": False, "overwrite": True, "by": "ada@lab"}))
LIST = (".info/CONTENT", "")
MARK = "HOSTILE_BUNDLE_RAN"


def bundle(*files: tuple[str, str], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", how) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, text in files:
            archive.writestr(name, text)
    return made.getvalue()


def link(name: str, target: str) -> bytes:
    made, info = io.BytesIO(), zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(PROJECT, OURS)
        archive.writestr(info, target)
        archive.writestr(*LIST)
    return made.getvalue()


def project(old: str, new: str) -> bytes:
    assert old in OURS
    return bundle((PROJECT, OURS.replace(old, new)), LIST)


WRONG = {
    "code": (bundle((PROJECT, OURS), ("evil.py", "import os"), LIST), "has evil.py; "),
    "a way out": (bundle((PROJECT, OURS), ("../../.bashrc", ""), LIST), "has ../../.bashrc; "),
    "a link": (link("rows", "/etc/passwd"), "has rows; "),
    "letters for a terminal": (bundle((PROJECT, OURS), ("\x1b[2Jx.py", ""), LIST), r"has \?\[2Jx.py; "),
    "many files": (bundle(*[(f"{i:04}.py", "") for i in range(3000)]), r"0000.py, .*0004.py, … \(3000 in all\)"),
    "two projects": (bundle((PROJECT, OURS), (PROJECT, OURS), LIST), f"no single {PROJECT}"),
    "nothing": (bundle(), f"no single {PROJECT}"),
    "another client": (project("fedalt.flower.client_app:app", "evil:app"), 'components.clientapp = "evil:app"'),
    "another server": (project("fedalt.flower.server_app:app", "os:system"), 'components.serverapp = "os:system"'),
    "packages": (project("dependencies = []", 'dependencies = ["evil"]'), "project.dependencies = list"),
    "more tools": (project("[project]", "[tool.uv]\nx = 1\n[project]"), "tool.uv.x = int"),
    "more settings": (project("resume = false", "resume = false\nplugin = 'x.py'"), 'config.plugin = "x.py"'),
    "settings of another kind": (project('settings = "{}"', "settings = 1"), "config.settings = int"),
    "no settings": (project('settings = "{}"\n', ""), "config.settings = NoneType"),
    "less": (project('license = "Apache-2.0"\n', ""), "no project.license"),
    "no zip": (b"PK\x03\x04 and so on", "cannot be read .BadZipFile"),
    "no TOML": (bundle((PROJECT, "=" * 50), LIST), "cannot be read .TOMLDecodeError"),
    "a bomb": (bundle((PROJECT, "\n" * (1 << 25)), LIST), "of more than 1,048,576 bytes"),
    "a bomb of another kind": (bundle((PROJECT, "\n" * (1 << 20)), LIST, how=zipfile.ZIP_BZIP2), "another way"),
    "much": (b"x" * (1 << 21), "has 2,097,152 bytes"),
    "deep keys": (bundle((PROJECT, "a." * 100_000 + "a = 1"), LIST), "a line of more than 200 bytes"),
    "deep lists": (bundle((PROJECT, "a = [\n" + "[\n" * 100_000), LIST), "cannot be read .RecursionError"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_bundle_that_is_more_than_settings(kind: str) -> None:
    content, line = WRONG[kind]
    with pytest.raises(UserError, match=line) as refused:
        check_bundle(content)
    said = str(refused.value)
    assert said.startswith("refused: the app of this run has ") and len(said) < 600 and said.isprintable()


def test_what_fedalt_submits_is_taken(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    values = micro.settings(tmp_path / "run", data__clients=3, data__source='a "quoted"\n\\ name')
    write_app(tmp_path, parse_config(values, "s"), "ask")
    check_bundle(build_fab_from_disk(tmp_path))
    check_bundle(bundle((PROJECT, OURS), LIST))
    by = tomllib.loads((tmp_path / PROJECT).read_text())["tool"]["flwr"]["app"]["config"]["by"]
    assert by.split("@")[0] == getpass.getuser()


def test_flower_takes_apps_by_the_names_that_are_replaced() -> None:
    """If Flower changes how it checks, installs or loads an app, a site must not run it: this says so."""
    loop, task, line = map(importlib.import_module, (LOOP, CLIENT_APP, LINE))
    assert "_pull_and_store_message" in loop.start_client_internal.__code__.co_names
    used = {"_verify_fab", "FAB_VERIFICATION_ERROR", "get_fused_config_from_fab"}
    assert used <= set(loop._pull_and_store_message.__code__.co_names)
    assert {"install_from_fab", "get_load_client_app_fn"} <= set(task.run_clientapp.__code__.co_names)
    assert "HeartbeatSender" in line.http_request_response.__wrapped__.__code__.co_names
    with pytest.raises(AttributeError, match="install_a_fab"):
        replace_in(task, install_a_fab=None)


# ----------------------------------------------------------------------------------------------------- a real SuperLink


CODE = f'''
from pathlib import Path

for place in {{places}}:
    Path(place, "{MARK}").touch()
'''
SERVER = """
import logging
import time

from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 3:
        time.sleep(0.2)
    asked = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
    for reply in grid.send_and_receive(asked, timeout=120):
        logging.getLogger("flwr").info("answer: %s", reply.error.reason if reply.has_error() else "ran")
"""
CLIENT = """
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def handle(message, context):
    raise SystemExit
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Three sites, one of whose state folders was there, for all to read; files are, unless somebody says otherwise."""
    folder = tmp_path_factory.mktemp("federation")
    (folder / "state1").mkdir(mode=0o755)
    before = os.umask(0o022)
    try:
        with Deployment(folder) as deployment:
            for client in range(3):
                deployment.wait_for(f"site{client}", "SuperNode ID:")
            yield deployment
    finally:
        os.umask(before)


def submit(federation: Deployment, app: Path, until: str) -> str:
    """``flwr run`` as anybody could type it: its log until a line, or its end."""
    with control(Connection(parse_address(federation.address, "-"))) as superlink:
        command = superlink.command("run", str(app), NAME, "--stream")
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, env=superlink.environment, **options) as process:  # type: ignore[call-overload]
            said = ""
            for line in process.stdout:
                said += line
                if until and until in line:
                    superlink.stop(superlink.runs()[0]["run-id"])
                    break
            process.terminate()
    return said


def hostile(folder: Path, sites: list[Path], server: bool) -> Path:
    """An app with code that leaves a mark at every site as soon as it is imported, whoever the ServerApp is of."""
    (folder / "evil").mkdir(parents=True)
    (folder / "evil/__init__.py").touch()
    (folder / "evil/client.py").write_text(CODE.format(places=list(map(str, sites))) + CLIENT)
    write_app(folder, parse_config(micro.settings(folder.parent / "never", data__clients=3), "s"), "ask")
    text = (folder / PROJECT).read_text().replace("fedalt.flower.client_app:app", "evil.client:app")
    if server:
        (folder / "evil/server.py").write_text(SERVER)
        text = text.replace("fedalt.flower.server_app:app", "evil.server:app")
    (folder / PROJECT).write_text(text)
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("server", [True, False])
def test_sites_run_nothing_of_a_hostile_app_and_say_so(federation: Deployment, tmp_path: Path, server: bool) -> None:
    states = [federation.state(client) for client in range(3)]
    before = [files(state) for state in states]
    logs = [federation.log(f"site{client}").count("refused: ") for client in range(3)]
    app = hostile(tmp_path / "app", states, server)
    said = submit(federation, app, "" if server else "a site: refused")
    reason = "refused: the app of this run has evil/__init__.py, evil/client.py"
    assert said.count(reason) == (3 if server else 1), said
    for client, state in enumerate(states):
        assert files(state) == before[client]
        log = federation.log(f"site{client}")
        assert log.count("refused: ") > logs[client] and reason in log and "Traceback" not in log
    assert not list(federation.folder.rglob(MARK))


@pytest.mark.slow
def test_an_honest_run_afterwards_and_nobody_else_reads_what_it_leaves(federation: Deployment, tmp_path: Path) -> None:
    run = federation.folder / "runs" / "honest"
    run.mkdir(parents=True)
    run.chmod(0o755)
    federation.finish(micro.settings(run, data__clients=3, federation__rounds=2))
    assert len(federation.models("honest")) > 0
    assert "could be read by others (mode 755); now it is private" in (federation.folder / "site1.log").read_text()
    for folder in [federation.folder / "server", run, *map(federation.state, range(3))]:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
        found = [path for path in folder.rglob("*") if not path.is_symlink()]
        loose = {str(path): oct(path.stat().st_mode) for path in found if path.stat().st_mode & 0o077}
        assert found and not loose, loose
