"""``python -m tools.soak``: a long run across sites on this machine; sites are killed, come late and lie.

A server behind its public door, sites with keys, and a run: by ``fedalt server``, ``site`` and ``submit``. In a share
of ``--failing`` of all rounds of all sites but the first, that site or its trainer is killed with ``kill -9`` and is
started again, or its reply comes after the deadline, or is wrong. After every round memory, handles and disk of each
part are read. Exit code 1 if the run does not end as it should, or if one of them grows by more than ``BOUNDS``.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from fedalt.files import read_json, write_text
from fedalt.flower import trainer
from fedalt.flower.certs import make_certs
from fedalt.flower.deploy import supervisor
from fedalt.flower.deploy.address import free_port
from fedalt.flower.wire import pack, unpack
from fedalt.runs.events import Event, read_events

ROOT = Path(__file__).parents[1]
DEADLINE, PATIENCE = 20.0, 600.0
"""``flower.round_deadline``: what a round takes while a site is away, for about a minute after each kill; and seconds
after which whoever has not come at all never will."""
SETTINGS: Mapping[str, Any] = {
    "data.train_limit": 4,
    "data.test_limit": 2,
    "training.local_epochs": 1,
    "lora.r": 2,
    "evaluation.points": '["after"]',
    "evaluation.max_new_tokens": 1,
    "flower.min_sites": 1,
    "flower.round_deadline": DEADLINE,
}
MEASURES = {"memory": (1e6, "memory (RSS), MB"), "handles": (1, "open handles"), "disk": (1e6, "disk, MB")}
BOUNDS: Mapping[str, Callable[[float, int], float]] = {
    "memory": lambda first, rounds: max(30e6, first / 8),
    "handles": lambda first, rounds: 16,
    "disk": lambda first, rounds: 4e6 + 1e4 * rounds,
}
"""By how much the last quarter of rounds may be above the first, from what the first has and the number of rounds. The
door keeps up to 16 lines to the SuperLink, that up to five lines to its database, of two handles each;
SQLite keeps up to 4 MB in its log, and then once as much in its file."""
PARTS = {"flower-superlink": "SuperLink", "deploy.door": "door"}
"""Word of a command line → which part of the server it is; what else runs below it is Flower's for the run."""
TOLD, WRONG = ("client", "client_failed"), ("late", "lie")
KINDS = ("kill", *WRONG)
_SETTLED = 8.0
"""Seconds that a process must be old to be looked at: the ClientApps of a site live for a message."""
_FAILING, _COMMAND = "FEDALT_SOAK_FAILING", "from fedalt.cli import main; main()"
_FAULTY = "from tools.soak import be_faulty; be_faulty(); "
Lines = Mapping[tuple[str, str], Sequence[float]]
"""(A measure, of which part) → its values by round."""


def fault(failing: float, client: int, number: int) -> str | None:
    """What goes wrong at a site in a round, the same whoever asks."""
    draw = random.Random(f"{failing} {client} {number}")
    return draw.choice(KINDS) if client and draw.random() < failing else None


# ---------------------------------------------------------------------------------------------------- at a faulty site


def be_faulty() -> None:
    """Let ``fedalt site`` in this process start a trainer that is late and lies."""
    place: Any = supervisor
    begin = place.start

    def other(command: Sequence[str], *more: Any, **named: Any) -> subprocess.Popen[str]:
        words = [__name__ if word == trainer.__name__ else word for word in command]
        started: subprocess.Popen[str] = begin(words, *more, **named)
        return started

    place.start = other


def _faulty_trainer() -> None:
    answered, failing, first = trainer._answered, float(os.environ[_FAILING]), list[Any]()

    def sometimes_wrong(site: Any, request: Any) -> Any:
        reply = answered(site, request)
        if request.do != "train" or not reply.block:
            return reply
        first.append(reply)
        what = fault(failing, site.client, request.round)
        time.sleep(DEADLINE + 1 if what == "late" else 0)
        return _lie(reply, first[0]) if what == "lie" else reply

    trainer._answered = sometimes_wrong
    trainer.main()


def _lie(reply: Any, first: Any) -> Any:
    """Another lie in every round: not finite, of another shape, cut off, no tensors, of another round."""

    def of(change: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
        return pack({key: change(value).contiguous() for key, value in unpack(reply.block).items()})

    nan, rank = of(lambda value: torch.full_like(value, torch.nan)), of(lambda value: value[:1])
    blocks = [nan, rank, reply.block[:-4], b"\xff" * 8 + reply.block[8:]]
    which = reply.round % (len(blocks) + (first.round != reply.round))
    return replace(reply, block=blocks[which]) if which < len(blocks) else first


# ------------------------------------------------------------------------------------------------------ the federation


class Federation:
    """A server, its sites and a run; all of it ends with the ``with`` block.

    Attributes:
        odd: What should have been otherwise.
        lines: What was read after each round.
    """

    def __init__(self, folder: Path, sites: int, rounds: int, failing: float) -> None:
        self.folder, self.sites, self.rounds, self.failing = folder, sites, rounds, failing
        self.inside, self.outside = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.away: dict[int, Callable[[], bool]] = {}
        self.excused, self.odd = set[tuple[int, int]](), list[str]()
        self.lines: dict[tuple[str, str], list[float]] = defaultdict(list)

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait()

    def run(self) -> None:
        """Go through all rounds."""
        tls, log = self.folder / "tls", self.folder / "run/events.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        make_certs(tls, self.sites)
        places = ("--address", self.inside, "--public", self.outside, "--state", self.folder / "server")
        self._wait(self._start("server", "fedalt site --server", "server", "--tls", tls, *places))
        for joined in [self._start_site(client) for client in range(self.sites)]:
            self._wait(joined)
        size = ("--clients", self.sites, "--rounds", self.rounds, "--out", self.folder / "run")
        values = {**SETTINGS, "evaluation.every": self.rounds}
        settings = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        self._start("submit", "", "submit", "--server", self.inside, "--tls", tls, *size, *settings)
        run, seen = self.processes["submit"], 0
        while run.poll() is None:
            time.sleep(0.2)
            events = list(read_events(log))
            for event in events[seen:]:
                if event["event"] in ("round_started", "round"):
                    (self._sample if event["event"] == "round" else self._kill)(event["round"])
            seen = len(events)
        self._check(run.returncode, list(read_events(log)))

    def _start(self, name: str, ready: str, *words: object, before: str = "") -> Callable[[], bool]:
        """Start a command; what it gives says whether its log has had a text since."""
        path = self.folder / f"{name}.log"
        modules = os.pathsep.join(
            filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        )  # sites find this module there
        environment = os.environ | {_FAILING: str(self.failing), "OMP_NUM_THREADS": "1", "PYTHONPATH": modules}
        command = [sys.executable, "-c", before + _COMMAND, *map(str, words)]
        with path.open("ab") as log:
            start = log.tell()
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        return lambda: ready.encode() in path.read_bytes()[start:]

    def _start_site(self, client: int) -> Callable[[], bool]:
        tls, state = self.folder / "tls", self.folder / f"state{client}"
        trust = ("--server", self.outside, "--ca", tls / "ca.crt", "--key", tls / f"keys/client_{client}")
        words = ("site", *trust, "--client", client, "--state", state, "--set", "min_rows=1", "--poll", 1)
        return self._start(f"site{client}", "SuperNode ID", *words, before=_FAULTY)

    def _wait(self, until: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not until():
            if time.monotonic() > end or any(process.poll() for process in self.processes.values()):
                sys.exit(f"error: {self.folder}: the federation does not come up; --folder keeps its logs")
            time.sleep(0.1)

    def _kill(self, number: int) -> None:
        """Kill whose turn it is, and look who is back: whoever is not is excused in this round and the next."""
        self.away = {client: back for client, back in self.away.items() if not back()}
        for client in range(self.sites):
            site, draw = self.processes[f"site{client}"], random.Random(f"{number} {client}")
            if site.poll() is not None:
                self.odd.append(f"round {number}: site {client} has ended by itself, with status {site.returncode}")
                self.away[client] = self._start_site(client)
            elif fault(self.failing, client, number) == "kill" and client not in self.away:
                time.sleep(draw.random() / self.sites)
                self.away[client] = draw.choice((self._kill_site, self._kill_trainer))(client)
        self.excused |= {(client, n) for client in self.away for n in (number, number + 1)}

    def _kill_site(self, client: int) -> Callable[[], bool]:
        self.processes[f"site{client}"].kill()
        self.processes[f"site{client}"].wait()
        return self._start_site(client)

    def _kill_trainer(self, client: int) -> Callable[[], bool]:
        path = self.folder / f"state{client}/trainer.json"
        process = read_json(path)["pid"]
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        return lambda: bool(read_json(path)["pid"] != process)

    def _sample(self, number: int) -> None:
        """Read what every part has; of the sites the one in the middle."""
        parts: dict[str, list[psutil.Process]] = defaultdict(list)
        for process in _all_of(self.processes["server"]):
            with suppress(psutil.Error):
                words = " ".join(process.cmdline())
                other = "server" if process.pid == self.processes["server"].pid else "ServerApp"
                parts[next((part for word, part in PARTS.items() if word in words), other)].append(process)
        found = {part: [_read(processes)] for part, processes in parts.items()}
        here = [f"site{client}" for client in range(self.sites) if client not in self.away]
        found["a site"] = [_read(_all_of(self.processes[site])) for site in here]
        for part, values in found.items():
            for measure, each in zip(("memory", "handles"), zip(*values, strict=True), strict=False):
                self.lines[measure, part].append(median(each))
        disk = {"server": ["server"], "run folder": ["run"], "a site": [f"state{c}" for c in range(self.sites)]}
        for part, folders in disk.items():
            self.lines["disk", part].append(median(_bytes(self.folder / folder) for folder in folders))

    def _check(self, status: int, events: Sequence[Event]) -> None:
        rounds = [event["round"] for event in events if event["event"] == "round"]
        if status or rounds != [*range(1, self.rounds + 1)]:
            last = (self.folder / "submit.log").read_text(encoding="utf-8").splitlines()[-1:]
            self.odd.append(f"the run ended with status {status} after {len(rounds)} rounds: {last}")
        ended = next((place for place, event in enumerate(events) if event["event"] == "evaluated"), len(events))
        trained = [e for e in events[:ended] if e["event"] in TOLD and "not scored" not in e.get("reason", "")]
        told = Counter((event["event"], event["client"], event["round"]) for event in trained)
        for client in range(self.sites):
            if not any(told["client", client, number] for number in rounds):
                self.odd.append(f"client {client} never trained")
            for number in rounds:
                good, bad = (told[event, client, number] for event in TOLD)
                now, before = (fault(self.failing, client, n) for n in (number, number - 1))
                where, excused = f"round {number}: client {client}", (client, number) in self.excused
                if good + bad != 1:
                    self.odd.append(f"{where} counts {good} times and is left out in {bad} lines")
                if bad and not excused and now not in WRONG and before != "late":
                    self.odd.append(f"{where} is left out without a fault of its own")
                if good and not excused and now in WRONG:
                    self.odd.append(f"{where} was late or lied, and counts")


def _all_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with suppress(psutil.Error):
        top = psutil.Process(process.pid)
        return [top, *top.children(recursive=True)]
    return []


def _read(processes: Sequence[psutil.Process]) -> tuple[float, float]:
    """Their memory and handles."""
    memory = handles = 0
    for process in processes:
        with suppress(psutil.Error), process.oneshot():
            if time.time() - process.create_time() > _SETTLED:
                memory, handles = memory + process.memory_info().rss, handles + process.num_fds()
    return memory, handles


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # a file may go meanwhile
            total += path.stat().st_size
    return total


# -------------------------------------------------------------------------------------------------------- what is said


def grown(values: Sequence[float], measure: str) -> tuple[float, float, float, float]:
    """Medians of the first and the last quarter, slope per round between their middles, and how much is allowed."""
    quarter = max(1, len(values) // 4)
    first, last = median(values[:quarter]), median(values[-quarter:])
    return first, last, (last - first) / max(1, len(values) - quarter), BOUNDS[measure](first, len(values))


def table(lines: Lines) -> Iterator[str]:
    """One row for each line, in Markdown."""
    yield "| | part | first quarter | last quarter | slope, 100 rounds | may grow by | |"
    yield "|---|---|---|---|---|---|---|"
    for (measure, part), values in lines.items():
        (unit, what), (first, last, slope, bound) = MEASURES[measure], grown(values, measure)
        numbers = " | ".join(f"{value / unit:.4g}" for value in (first, last, 100 * slope, bound))
        yield f"| {what} | {part} | {numbers} | {'**grows**' if last - first > bound else ''} |"


_STYLE = """text { fill: #1c1e21; } path { fill: none; stroke-width: 1.5; } .axis { stroke: #8a94a3; }
    .bg { fill: #ffffff; } @media (prefers-color-scheme: dark) { text { fill: #e4e6eb; } .bg { fill: #16181c; } }"""
_COLOURS = ("#0077bb", "#ee7733", "#009988", "#cc3311", "#aa3377", "#bbaa33")
_WIDTH, _HEIGHT = 270, 200


def picture(lines: Lines, title: str) -> str:
    """An SVG with a panel for each measure and a line for each part, over the rounds."""
    drawn, at = "", '<text x="{}" y="{}" text-anchor="{}">{}</text>'.format
    for place, (measure, (unit, what)) in enumerate(MEASURES.items()):
        mine = {part: values for (of, part), values in lines.items() if of == measure}
        most, longest = 1.05 * max(map(max, mine.values())), max(map(len, mine.values()))
        drawn += f'<g transform="translate({60 + 340 * place} 60)"><path class="axis" d="M0 0V{_HEIGHT}H{_WIDTH}"/>'
        drawn += at(0, -8, "start", what) + at(-6, 8, "end", f"{most / unit:.3g}") + at(-6, _HEIGHT + 4, "end", 0)
        drawn += at(_WIDTH, _HEIGHT + 16, "end", f"round {longest}")
        for row, (colour, (part, values)) in enumerate(zip(_COLOURS, mine.items(), strict=False)):
            x, y, low = _WIDTH / max(1, longest - 1), _HEIGHT / most, _HEIGHT + 36 + 16 * row
            line = "L".join(f"{i * x:.1f} {_HEIGHT - y * value:.1f}" for i, value in enumerate(values))
            drawn += f'<path stroke="{colour}" d="M{line}"/><path stroke="{colour}" d="M0 {low - 4}H20"/>'
            drawn += at(26, low, "start", part)
        drawn += "</g>"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1040 390" font-family="system-ui, sans-serif" '
        f'font-size="12"><style>{_STYLE}</style><rect class="bg" width="100%" height="100%"/>'
        f'<text x="60" y="24" font-size="14" font-weight="600">{title}</text>{drawn}</svg>\n'
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print the table and what is wrong, draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description="A long run with faults.")
    parser.add_argument("--sites", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--failing", type=float, default=0.1, help="share of (site, round) in which something fails")
    parser.add_argument("--out", type=Path, metavar="FILE.svg", help="draw memory, handles and disk over the rounds")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="new folder for everything, which is kept then")
    asked = parser.parse_args(arguments)
    if asked.sites < 3 or asked.rounds < 4 or not 0 <= asked.failing <= 1:
        parser.error("--sites from 3, --rounds from 4, --failing from 0 to 1")
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="fedalt-soak-") as scratch,
        Federation((asked.folder or Path(scratch)).absolute(), asked.sites, asked.rounds, asked.failing) as all_,
    ):
        all_.run()
    minutes = (time.monotonic() - started) / 60
    title = f"{asked.sites} sites, {asked.rounds} rounds, {asked.failing:.0%} failing, {minutes:.0f} minutes"
    if asked.out:
        write_text(asked.out, picture(all_.lines, title))
    rows = [*table(all_.lines)]
    sys.stdout.write("\n".join([title, "", *rows, "", *(all_.odd or ["ended as it should"])]) + "\n")
    return int(bool(all_.odd) or any("**grows**" in row for row in rows))


if __name__ == "__main__":
    if _FAILING in os.environ:
        _faulty_trainer()
    sys.exit(main())
