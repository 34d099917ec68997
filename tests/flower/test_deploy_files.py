"""deploy/: image, compose file and units, as far as they can be looked at without Docker and systemd's manager."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from fedalt.cli.app import app
from fedalt.flower.certs import make_certs
from flower.test_certs import listening

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def given(words: Sequence[str]) -> dict[str, Any]:
    """What the command line makes of a command; options that it does not have are an error."""
    group: click.Group = typer.main.get_command(app)  # type: ignore[assignment]
    parent = click.Context(group, info_name="fedalt")
    return group.commands[words[0]].make_context(words[0], list(words[1:]), parent=parent).params


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return found


def mounted(service: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Source, place, mode."""
    for text in service["volumes"]:
        source, place, mode = [*text.split(":"), "rw"][:3]
        yield source, place, mode


def test_units_are_verified_hardened_and_start_commands_that_exist(tmp_path: Path) -> None:
    assert [unit.stem for unit in UNITS] == ["fedalt-server", "fedalt-site"]
    for unit in UNITS:
        text = unit.read_text(encoding="utf-8")
        lines = [line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#")]
        values = {name: value for name, _, value in lines}
        for name in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "RestrictNamespaces"):
            assert values[name] == "yes", name
        assert values["ProtectSystem"] == "strict" and values["Restart"] == "on-failure"
        assert values["User"] == "fedalt" and values["RestartPreventExitStatus"] == "2"
        _, *words = shlex.split(values["ExecStart"].replace("${FEDALT_CLIENT}", "0").replace("${FEDALT_SERVER}", "x:1"))
        asked = given(words)
        assert (
            Path(asked["state"]).parent
            == Path("/var/lib") / values["StateDirectory"]
            == Path(values["WorkingDirectory"])
        )
        if program := shutil.which("systemd-analyze"):
            there = tmp_path / unit.name
            there.write_text(text.replace("/opt/fedalt/bin/fedalt", sys.executable), encoding="utf-8")
            done = subprocess.run([program, "verify", there], capture_output=True, text=True, check=False)
            assert (done.returncode, [line for line in done.stderr.splitlines() if unit.name in line]) == (0, [])


def test_the_image_keeps_the_rules() -> None:
    path = DEPLOY / "Dockerfile"
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8").replace("\\\n", " "), flags=re.MULTILINE)
    steps = [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]
    allowed = "FROM ARG WORKDIR COPY RUN ENV VOLUME USER STOPSIGNAL ENTRYPOINT CMD"
    assert {word for word, _ in steps} <= {*allowed.split()}
    for word, rest in steps:
        assert word != "FROM" or (re.fullmatch(r"[a-z]+:[\w.-]+( AS build)?", rest) and ":latest" not in rest)
        assert word not in ("ENTRYPOINT", "CMD") or rest.startswith('["'), "signals reach the command"
        assert word != "RUN" or "pip install" not in rest or ("--no-cache-dir" in rest and "-c constraints.txt" in rest)
        if word == "COPY" and not rest.startswith("--from"):
            assert all((DEPLOY.parent / name).exists() for name in rest.split()[:-1]), rest
    last = [word for word, _ in steps]
    assert dict(steps)["USER"] == "10001:10001" and last.index("USER") > len(last) - 1 - last[::-1].index("RUN")
    if program := shutil.which("hadolint"):
        assert subprocess.run([program, path], check=False).returncode == 0


def test_services_run_commands_that_exist_with_what_certs_makes(compose: dict[str, Any], tmp_path: Path) -> None:
    make_certs(tmp_path / "tls", 3, ["server"])
    services = compose["services"]
    for service in services.values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["init"]
        assert service["security_opt"] == ["no-new-privileges:true"] and "user" not in service
        volumes = {place: (source, mode) for source, place, mode in mounted(service)}
        source, mode = volumes.pop("/var/lib/fedalt")
        assert source in compose["volumes"] and mode == "rw"
        assert {mode for _, mode in volumes.values()} == {"ro"}, "only the state can be written"
        assert set(service["networks"]) <= set(compose["networks"])
    server = given(services["server"]["command"])
    assert server["address"].startswith("127.0.0.1:") and server["tls"] == "/etc/fedalt/tls"
    assert services["server"]["ports"][0].endswith(":" + server["public"].rpartition(":")[2])
    for client in range(3):
        service = services[f"site{client}"]
        asked = given(service["command"])
        assert asked["client"] == client and asked["server"] == "server:" + server["public"].rpartition(":")[2]
        [secret] = service["secrets"]
        assert asked["key"] == f"/run/secrets/{secret}" and secret == f"client_{client}"
        assert asked["ca"].removeprefix("/") in service["configs"] and service["networks"] == ["sites"]
        assert {asked["data"], asked["model"]} < {place for _, place, _ in mounted(service)}
        assert service["healthcheck"]["test"][-1] == asked["state"] + "/online"
        assert service["depends_on"] == {"server": {"condition": "service_healthy"}}
    for one in [*compose["secrets"].values(), *compose["configs"].values()]:
        assert (tmp_path / one["file"]).is_file(), one
    assert all((tmp_path / one["file"]).stat().st_mode & 0o077 == 0 for one in compose["secrets"].values())
    build = services["server"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert set(build["args"]) == {"TORCH_INDEX"}


def test_the_servers_health_check_sees_whether_it_answers(compose: dict[str, Any], tmp_path: Path) -> None:
    make_certs(tmp_path / "tls", 1)
    _, _, flag, code = compose["services"]["server"]["healthcheck"]["test"]
    with listening(tmp_path / "tls") as port:
        here = code.replace("/etc/fedalt/tls", str(tmp_path / "tls")).replace("9443", str(port))
        assert subprocess.run([sys.executable, flag, here], check=False).returncode == 0
    assert subprocess.run([sys.executable, flag, here], check=False, stderr=subprocess.DEVNULL).returncode == 1
