"""``/metrics`` for Prometheus, on loopback: what a state folder's logs say, and nothing that they do not."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import quote

from fedalt.errors import UserError, first_line
from fedalt.flower.deploy.superlink import DATABASE
from fedalt.runs.events import Event, ended
from fedalt.runs.watch import Log, found

LOOPBACK = "127.0.0.1"
_HELP = {
    "fedalt_round": "gauge: the last round that was trained",
    "fedalt_rounds": "gauge: rounds that were asked for",
    "fedalt_clients": "gauge: clients whose training counted in that round",
    "fedalt_loss": "gauge: mean training loss of that round, in nats",
    "fedalt_seconds_total": "counter: seconds by phase",
    "fedalt_bytes_total": "counter: bytes of adapters, up to the server and down to clients",
    "fedalt_failures_total": "counter: times that a client was set aside",
    "fedalt_memory_bytes": "gauge: peak memory, by where it is",
    "fedalt_epsilon": "gauge: what a client's training has told of any of its rows so far, in a private run",
    "fedalt_finished": "gauge: 1 when the run has ended well",
    "fedalt_silent_seconds": "gauge: seconds since the log grew",
    "fedalt_site_online": "gauge: 1 while the SuperLink counts a site's node as online",
    "fedalt_site_silent_seconds": "gauge: seconds since it heard an online site, or since one has been offline",
}
Sample = tuple[str, dict[str, str], float]
_NODES = "SELECT name, node_id, online_until, heartbeat_interval FROM node WHERE status != 'unregistered'"
PATIENCE = 2
"""Heartbeats until Flower counts a node as offline."""


def samples(events: Sequence[Event]) -> Iterator[Sample]:
    """What a run's log says, of a server or of a site."""
    trained = [event for event in events if event["event"] == "client"]
    rounds = [event for event in events if event["event"] == "round"]
    number = max((event["round"] for event in (*trained, *rounds)), default=0)
    latest = [event["loss"] for event in trained if event["round"] == number]
    losses = [loss for loss in latest if loss is not None]  # a private run's sites tell none
    yield "fedalt_round", {}, number
    asked = [event["rounds"] for event in events if "rounds" in event]
    yield from (("fedalt_rounds", {}, value) for value in asked[-1:])
    yield "fedalt_clients", {}, len(latest)
    if losses:
        yield "fedalt_loss", {}, sum(losses) / len(losses)
    for phase, kind in (("training", rounds or trained), ("scoring", [e for e in events if e["event"] == "evaluated"])):
        yield "fedalt_seconds_total", {"phase": phase}, sum(event.get("seconds", 0.0) for event in kind)
    moved = [event for event in events if event["event"] == "reply"] or rounds  # a site logs all that it answers
    for way in ("up", "down"):
        yield "fedalt_bytes_total", {"direction": way}, sum(event[f"bytes_{way}"] for event in moved)
    spent = {event["client"]: event["epsilon"] for event in trained if "epsilon" in event}
    yield from (("fedalt_epsilon", {"client": str(client)}, value) for client, value in spent.items())
    yield "fedalt_failures_total", {}, sum(event["event"] == "client_failed" for event in events)
    memory: dict[str, int] = next((event["peak_memory"] for event in reversed(events) if "peak_memory" in event), {})
    yield from (("fedalt_memory_bytes", {"where": where}, size) for where, size in memory.items())
    yield "fedalt_finished", {}, ended(events)


def sites(state: Path) -> Iterator[Sample]:
    """Flower's own word on the sites, from the SuperLink's database; nothing where there is none."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str((state / DATABASE).absolute()))}?mode=ro", uri=True)) as base:
            nodes = base.execute(_NODES).fetchall()
    except sqlite3.Error:  # a site has none, and a server that is starting no table yet
        return
    now = time.time()
    for name, number, until, interval in nodes:
        label, online = {"site": name or str(number % 2**64)}, until is not None and until > now
        yield "fedalt_site_online", label, online
        if until is not None:
            yield "fedalt_site_silent_seconds", label, now - until + (PATIENCE * interval if online else 0)


def exposition(found: Iterable[Sample]) -> str:
    """Samples in Prometheus' text format, those of a name together."""
    lines: dict[str, list[str]] = {name: [] for name in _HELP}
    for name, labels, value in found:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        lines[name].append(f"{name}{{{inside}}} {float(value)!r}\n")
    heads = {name: text.split(": ") for name, text in _HELP.items()}
    return "".join(
        f"# HELP {name} {heads[name][1]}\n# TYPE {name} {heads[name][0]}\n{''.join(mine)}"
        for name, mine in lines.items()
        if mine
    )


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@contextmanager
def measured(state: Path, port: int | None) -> Iterator[None]:
    """Answer ``/metrics`` while the block runs, if there is a port."""
    if port is None:
        yield
        return
    log, busy = lru_cache(64)(Log), Lock()

    def looked() -> Iterator[Sample]:
        for path in found(state):
            events = log(path / "events.jsonl")
            for name, labels, value in samples(events.read()):
                yield name, {"run": path.relative_to(state).as_posix(), **labels}, value
            age = time.time() - events.path.stat().st_mtime
            yield "fedalt_silent_seconds", {"run": path.relative_to(state).as_posix()}, age
        yield from sites(state)

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if self.path != "/metrics" or host not in (LOOPBACK, "localhost"):
                self.send_error(404 if self.path != "/metrics" else 403)
                return
            try:
                with busy:
                    body = exposition(looked()).encode()
            except (UserError, OSError) as error:
                self.send_error(500, first_line(error))
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *about: object) -> None:
            """Say nothing."""

    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Answers)
    except OSError as error:
        raise UserError(f"--metrics {port}: cannot be used ({error.strerror}); choose another") from None
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
