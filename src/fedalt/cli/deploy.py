"""``fedalt certs``, ``server``, ``site``, ``status`` and ``submit``: a federation across machines, on Flower."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedalt.cli import complete, show
from fedalt.cli.flags import only_with, settings
from fedalt.cli.recipes import config_path
from fedalt.cli.show import Json, complain, option, print_json, say, switch
from fedalt.config import RunConfig, load_config, parse_override, with_settings
from fedalt.errors import UserError, choose, needs
from fedalt.flower.waits import LONGEST
from fedalt.registry import held_plugins, hold_plugins
from fedalt.runs.folder import IfExists

if TYPE_CHECKING:
    from fedalt.flower.deploy.address import Connection

NEEDS = "certs, drain, server, site, submit and status"
SERVER = "127.0.0.1:9092"
_PAUSE = 2.0
_BUNDLED = ("tinyworld", "digits")
ServerAt = Annotated[str, option("HOST:PORT", "where fedalt server listens", "--server")]
Ca = Annotated[Path | None, option("FILE", "ca.crt of fedalt certs; no encryption when not given", "--ca")]
Metrics = Annotated[
    int | None, option("PORT", "answer http://127.0.0.1:PORT/metrics, for Prometheus", "--metrics", min=1, max=65535)
]
LogJson = Annotated[bool, switch("a JSON object (time, line) a line, for machines", "--log-json")]


def certs(
    sites: Annotated[int | None, option("N", "make a new folder, with a key for each of so many sites", min=1)] = None,
    out: Annotated[Path | None, option("DIR", "the folder; must be given")] = None,
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="the same as --out DIR", hidden=True)] = None,
    host: Annotated[
        list[str] | None, option("NAME", "name or IP address of the server, besides localhost; repeatable")
    ] = None,
    days: Annotated[
        int, option("N", "how long the server's certificate is valid; the CA's ten times", min=1, max=36500)
    ] = 365,
    *,
    show_all: Annotated[bool, switch("show certificates with their ends, and whose keys there are", "--list")] = False,
    add: Annotated[int | None, option("CLIENT", "make the key of one more site", "--add", min=0)] = None,
    rotate: Annotated[int | None, option("CLIENT", "make another key for a site", "--rotate", min=0)] = None,
    revoke: Annotated[int | None, option("CLIENT", "take a site's key away", "--revoke", min=0)] = None,
    renew: Annotated[bool, switch("sign the server's certificate anew, with ca.key of the folder", "--renew")] = False,
    as_json: Json = False,
) -> None:
    """Make a CA, a server certificate and site keys, and look after them."""
    with needs("flower", NEEDS):
        from fedalt.flower import certs

    if (folder is None) == (out is None):
        raise UserError("--out: name one new folder, for example fedalt certs --out tls --sites 3")
    folder = out or folder
    assert folder
    asked = {"--sites": sites, "--add": add, "--rotate": rotate, "--revoke": revoke}
    given = [flag for flag, value in asked.items() if value is not None]
    given += [flag for flag, value in (("--list", show_all), ("--renew", renew)) if value]
    if len(given) != 1:
        raise UserError("give one of --sites N (a new folder), --list, --add, --rotate, --revoke and --renew")
    if as_json and not show_all:
        raise UserError("--json goes with --list")
    if show_all:
        _show_certs(folder, as_json)
    elif add is not None:
        certs.add_key(folder, add)
        say(f"{folder}/keys/client_{add}      for that site; the server needs client_{add}.pub in its folder")
    elif rotate is not None:
        certs.rotate_key(folder, rotate)
        say(f"{folder}/keys/client_{rotate}      a new key; the server needs the new client_{rotate}.pub in its folder")
    elif revoke is not None:
        certs.revoke_key(folder, revoke)
        say(f"{folder}/keys/client_{revoke}.pub  is gone; take it out of the server's folder, too, if that is another")
    elif renew:
        until = certs.renew(folder, host or (), days)
        say(f"{folder}/server.pem  until {until:%Y-%m-%d}; sites need nothing new, the server has to be started again")
    elif sites:
        _say_made(folder, sites, certs.make_certs(folder, sites, host or (), days), days)


def _show_certs(folder: Path, as_json: bool) -> None:
    from fedalt.flower import certs

    until, now = certs.valid_until(folder), datetime.now(UTC)
    found = [{"file": n, "until": f"{end:%Y-%m-%d}", "days_left": (end - now).days} for n, end in until.items()]
    clients = sorted(certs.client_keys(folder))
    if as_json:
        print_json({"certificates": found, "server": certs.server_names(folder), "clients": clients})
        return
    for one in found:
        names = f", for {', '.join(certs.server_names(folder))}" if one["file"] == certs.CERTIFICATE else ""
        say(f"{one['file']}  until {one['until']}, {one['days_left']} days left{names}")
    for client in clients:
        say(f"keys/client_{client}.pub  does not end")
    for name, end in until.items():
        for line in certs.ending(name, end):
            say(f"note: {line}")


def _say_made(folder: Path, sites: int, names: Sequence[str], days: int) -> None:
    say(f"{folder}/ca.crt            for the sites and for those who submit: whom to trust")
    say(f"{folder}/ca.key            signs other certificates, as --renew does; keep it away from the server")
    say(f"{folder}/server.pem, .key  for the server: {', '.join(names)}; {days} days")
    say(f"{folder}/keys/client_N     a private key for each of {sites} sites; all others need client_N.pub only")


Plugins = Annotated[
    list[str] | None,
    option("FILE.py", "code of your own that runs may use here, by name; repeatable; never sent", "--plugin"),
]


def server(
    *,
    config_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG]", help="settings to check; runs come from fedalt submit", autocompletion=complete.configs
        ),
    ] = None,
    address: Annotated[str, option("HOST:PORT", "where runs are submitted; on loopback only, with --tls")] = SERVER,
    public: Annotated[
        str | None,
        option(
            "HOST:PORT", "let sites in here, and nobody else; 0.0.0.0 for every interface; at --address when not given"
        ),
    ] = None,
    tls: Annotated[
        Path | None, option("DIR", "certificates and site keys (fedalt certs); plain text when not given")
    ] = None,
    state: Annotated[Path, option("DIR", "the SuperLink's database; run folders are made here, too")] = Path(
        "flower-server"
    ),
    plugins: Plugins = None,
    metrics: Metrics = None,
    log_json: LogJson = False,
) -> None:
    """Serve a federation: start Flower's SuperLink, let the sites in, show its log until Ctrl-C."""
    with needs("flower", NEEDS):
        from fedalt.flower.certs import ending, valid_until
        from fedalt.flower.deploy.address import parse_address
        from fedalt.flower.deploy.metrics import measured
        from fedalt.flower.deploy.superlink import Server, serve

    if config_file is not None:
        from fedalt.flower.server_app import checked

        checked(load_config(config_path(config_file)))
    gate = parse_address(public, "--public") if public else None
    asked = Server(parse_address(address, "--address"), tls, state, gate)
    asked.check()
    tell = _logged(log_json)
    tell(f"$ {shlex.join(asked.command())}")

    def ready() -> None:
        trust = f" --ca {tls}/ca.crt --key {tls}/keys/client_N" if tls else ""
        for name, until in valid_until(tls).items() if tls else ():
            for line in ending(name, until):
                tell(f"note: {line}")
        for place in asked.for_sites:
            tell(f"at site N: fedalt site --server {place} --client N --data DIR --state DIR{trust}")
        if not tls:
            tell("note: without --tls nothing is encrypted and anyone who reaches the port can join and submit runs")

    hold_plugins(plugins or ())
    with measured(state, metrics):
        _leave(serve(asked, tell, ready))


def site(
    client: Annotated[int, option("N", "the client's number, from 0", min=0)],
    state: Annotated[Path, option("DIR", "private folder of this client: its adapters and mixer; back it up")],
    *,
    server: ServerAt = SERVER,
    data: Annotated[str | None, option("DIR", "this site's rows; the settings' data.source when not given")] = None,
    key: Annotated[Path | None, option("FILE", "this site's private key (fedalt certs: keys/client_N)")] = None,
    ca: Ca = None,
    insecure: Annotated[bool, switch("no encryption; the default without --ca", "--insecure")] = False,
    model: Annotated[str | None, option("PATH", "where the base model is here")] = None,
    device: Annotated[str | None, option("NAME", "auto, cpu, cuda or cuda:N, instead of the settings'")] = None,
    allow_two: Annotated[
        bool,
        switch(
            "take part even where a site may be told what is made of our LoRA alone, as with two sites", "--allow-two"
        ),
    ] = False,
    share: Annotated[
        str | None, option("NAMES", "private parts that this site agrees to upload: mixer, heads, or both")
    ] = None,
    poll: Annotated[
        float,
        option(
            "S",
            "longest wait between looks for messages at the server; looks are more frequent in short rounds",
            min=0.05,
        ),
    ] = LONGEST,
    plugins: Plugins = None,
    metrics: Metrics = None,
    log_json: LogJson = False,
    own: Annotated[
        list[str] | None,
        option(
            "KEY=VALUE",
            "what is this site's to say: secure, task, min_rows, categories, label_column, text_columns, columns, "
            "label_names, config; repeatable",
            "--set",
        ),
    ] = None,
) -> None:
    """Take part as one client: Flower's SuperNode, and a trainer that holds the base model, until Ctrl-C."""
    with needs("flower", NEEDS):
        from fedalt.flower.deploy.metrics import measured
        from fedalt.flower.deploy.supervisor import Site, supervise
        from fedalt.flower.own import site_rows

    if insecure and ca:
        raise UserError("--insecure and --ca exclude each other")
    _check_device(device)
    at, agreed = connection(server, ca), _shared(share)
    hold_plugins(plugins or ())
    held = held_plugins()
    rows, said = _rows(data), dict(parse_override(text) for text in own or ())
    if flags := said.keys() & {"data", "model", "device"}:
        raise UserError(f"--set {min(flags)}: --{min(flags)} says this")
    site_rows({"data": rows, **said})
    asked = Site(at, client, state, poll, key, rows, model, device, allow_two, agreed, held, said)
    asked.check()
    tell = _logged(log_json)
    tell(f"$ {shlex.join(asked.command())}")
    with measured(state, metrics):
        _leave(supervise(asked, tell))


def status(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[RUNS_DIR]", help="runs in a folder of this machine, without asking a server"),
    ] = None,
    *,
    server: ServerAt = SERVER,
    ca: Ca = None,
    state: Annotated[
        Path | None, option("DIR", "on the server's machine: its state folder, for names and rounds")
    ] = None,
    watch: Annotated[bool, switch("again every two seconds, until Ctrl-C", "--watch")] = False,
    as_json: Json = False,
) -> None:
    """Show the runs of a folder, or a server's sites and runs."""
    if folder and state:
        raise UserError("RUNS_DIR asks no server, --state is about one; give one of them")
    if watch and as_json:
        raise UserError("--watch and --json exclude each other")
    found: dict[str, Any] = {}

    def look() -> Group:
        found.clear()
        if folder is None:
            with needs("flower", NEEDS):
                from fedalt.flower.deploy.superlink import now

            nodes, runs = now(connection(server, ca), state, silent if watch else teller(as_json))
            found.update(server=server, sites=nodes, runs=runs, notes=_ending(server, ca))
        if place := folder or state:
            found["folders"] = folders_in(place)
        makers = (("sites", node_table), ("runs", run_table), ("folders", folder_table))
        notes = (Text(f"note: {line}") for line in found.get("notes", ()))
        return Group(*(table(found[name]) for name, table in makers if name in found), *notes)

    tables = look()
    if as_json:
        print_json(found)
    elif not watch:
        show.out.print(tables)
    else:
        with suppress(KeyboardInterrupt), Live(tables, console=show.out, auto_refresh=False) as live:
            while True:
                time.sleep(_PAUSE)
                live.update(look(), refresh=True)


def _ending(server: str, ca: Path | None) -> list[str]:
    """Warnings of certificates that end soon."""
    from fedalt.flower.certs import CA, CERTIFICATE, check_ca, ending
    from fedalt.flower.deploy.address import shown_until

    if ca is None:
        return []
    shown = shown_until(connection(server, ca))
    return [*ending(CERTIFICATE, shown), *ending(CA, check_ca(ca).not_valid_after_utc)]


def silent(line: str) -> None:
    """Say nothing."""


def folders_in(place: Path) -> list[dict[str, Any]]:
    """The runs of a folder, as its files have them."""
    from fedalt.runs.watch import Watch

    if not place.is_dir():
        raise UserError(f"{place}: no such folder here")
    return [asdict(one) for one in Watch(place).summaries()]


def folder_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Run folders, the one that was heard of last first."""
    table = Table(title="run folders", title_justify="left")
    for name in ("run", "method", "state"):
        table.add_column(name, overflow="fold")
    for name in ("round", "time left", "mean", "silent for"):
        table.add_column(name, justify="right")
    table.add_column("last error", overflow="fold")
    for run in runs:
        left = "" if run["eta"] is None else f"{timedelta(seconds=round(run['eta']))}"
        mean = "" if run["mean"] is None else f"{run['mean']:.1f}"
        heard = f"{timedelta(seconds=round(run['heard']))}"
        state, count = _coloured(run["state"]), f"{run['round']} of {run['rounds']}"
        table.add_row(Text(run["path"]), Text(run["method"]), state, count, left, mean, heard, Text(run["error"]))
    if not runs:
        table.caption = "none"
    return table


def connection(server: str, ca: Path | None) -> Connection:
    """How to reach a server, from the command line's words."""
    from fedalt.flower.certs import check_ca
    from fedalt.flower.deploy.address import Connection, parse_address

    if ca:
        check_ca(ca)
    return Connection(parse_address(server, "--server"), ca)


def teller(as_json: bool) -> Callable[[str], None]:
    """Where to say what goes on: on stderr where stdout is for JSON."""
    return (lambda line: show.err.print(line, soft_wrap=True, highlight=False, markup=False)) if as_json else say


def _rows(data: str | None) -> str | None:
    if data is None or data in _BUNDLED:
        return data
    if not Path(data).exists():
        raise UserError(f"--data {data}: no such folder or file here")
    return str(Path(data).absolute())


def _shared(share: str | None) -> tuple[str, ...]:
    from fedalt.flower.consent import PRIVATE

    return tuple(choose("--share", name.strip(), PRIVATE) for name in (share or "").split(",") if name.strip())


def _check_device(device: str | None) -> None:
    if device is not None:
        from fedalt.config import parse_config

        parse_config({"model": {"device": device}}, "--device")


def _logged(as_json: bool) -> Callable[[str], None]:
    """Says lines with their time, in UTC."""

    def tell(line: str) -> None:
        time = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        say(json.dumps({"time": time, "line": line}, ensure_ascii=False) if as_json else f"{time} {line}")

    return tell


def _leave(code: int) -> Any:
    raise typer.Exit(code)


_COLOURS = {
    "online": "green",
    "offline": "yellow",
    "registered": "blue",
    "running": "blue",
    "finished": "green",
    "stopped": "yellow",
    "finished:completed": "green",
    "finished:failed": "red",
}


def node_table(nodes: Sequence[Mapping[str, Any]]) -> Table:
    """Sites: a registered one has a key here and has never been online."""
    table = Table(title="sites (Flower: SuperNodes)", title_justify="left")
    for name in ("site", "node id", "status", "since"):
        table.add_column(name)
    for node in nodes:
        table.add_row(Text(node["site"] or ""), node["node"], _coloured(node["status"]), node["since"] or "")
    if not nodes:
        table.caption = "none"
    return table


def run_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Runs, the latest first."""
    table = Table(title="runs", title_justify="left")
    for name in ("run id", "status", "started"):
        table.add_column(name, overflow="fold")
    table.add_column("seconds", justify="right")
    for run in runs:
        ended = _coloured(run["status"])
        if run["details"]:
            ended.append(f"\n{run['details']}", style="default")
        table.add_row(run["run"], ended, run["started"] or "", f"{run['seconds']:.0f}")
    if not runs:
        table.caption = "none"
    return table


def _coloured(status: str) -> Text:
    return Text(status, style=_COLOURS.get(status, ""))


_SLACK = 5.0
"""Seconds that a file server's clock may be late."""


@settings()
def submit(
    config: RunConfig,
    if_exists: IfExists,
    *,
    server: ServerAt = SERVER,
    ca: Ca = None,
    tls: Annotated[Path | None, option("DIR", "the same as --ca DIR/ca.crt")] = None,
    allow_two: Annotated[
        bool, switch("the same as --set flower.allow_two=true; all sites must agree, too", "--allow-two")
    ] = False,
    simulation: Annotated[
        bool, switch("Flower's simulation on this machine instead of a server", "--simulation")
    ] = False,
    attached: Annotated[
        str | None,
        option("[RUN]", "follow a run that goes on, the latest one unless named, and start none", "--attach"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Hand a run to a server (flwr run), show its log, and wait until it has ended.

    The run folder is made where fedalt server runs, models stay at the sites. A run with the same settings that goes on
    there is followed, and no other started, unless this one is to resume or overwrite.
    """
    with needs("flower", NEEDS):
        from fedalt.flower.deploy.submission import attach
        from fedalt.flower.deploy.submission import submit as hand_over
        from fedalt.flower.server_app import checked

    if ca and tls:
        raise UserError("--ca and --tls exclude each other")
    if attached:
        only_with("--attach", "attached", "server", "ca", "tls", "as_json")
        at = connection(server, tls / "ca.crt" if tls else ca)
        with _failing():
            run = attach(attached, at, teller(as_json))
        print_json({"run": run}) if as_json else say(f"run {run} has finished")
        return
    if allow_two:
        config = with_settings(config, {"flower.allow_two": True})
    checked(config)
    since = time.time()
    if simulation:
        _simulate(config, if_exists)
    else:
        with _failing():
            hand_over(config, connection(server, tls / "ca.crt" if tls else ca), if_exists, teller(as_json))
    _show(config, since, as_json)


@contextmanager
def _failing() -> Iterator[None]:
    """A run that has failed is one line, and exit code 1."""
    from fedalt.flower.deploy.submission import RunFailedError

    try:
        yield
    except RunFailedError as error:
        complain(str(error))
        raise typer.Exit(1) from None


def drain(
    state: Annotated[Path, typer.Argument(metavar="STATE", help="the --state of a fedalt site or server that runs")],
) -> None:
    """Let a site or server finish what it is at, take nothing else, and end; returns when it has."""
    with needs("flower", NEEDS):
        from fedalt.flower.deploy.folders import drain

    drain(state)
    say(f"{state} is drained; start it again to go on")


def _simulate(config: RunConfig, if_exists: IfExists) -> None:
    with needs("simulation", "Flower's simulations"):
        import ray  # noqa: F401

    from fedalt.flower.simulate import simulate

    with show.live(config.federation.rounds) as progress:
        simulate([config], if_exists, progress)


def _show(config: RunConfig, since: float, as_json: bool) -> None:
    """The table, where the run folder is one of this machine."""
    from fedalt.methods.registry import title_of
    from fedalt.runs.folder import RunFolder, final_scores, read_history

    folder = RunFolder(config.folder)
    if not folder.final_scores.is_file() or folder.final_scores.stat().st_mtime < since - _SLACK:
        say(f"the run folder is {folder.path}, where fedalt server runs")
        return
    tasks = {str(client): task for client, task in read_history(folder.path).tasks.items()}
    show.say_run(folder, {"title": title_of(config.method), **final_scores(folder)}, tasks, as_json)
