"""``python -m tools.sites``: a round across sites beside its training, and a server's cost per site.

Two things, printed as JSON:

- ``round``: one server and ``--sites`` sites on loopback, started as ``fedalt server`` and ``fedalt site`` do, with
  adapters of ``--megabytes`` each. For every round but the first: its seconds at the server, less those of the slowest
  site's training, what it writes to its disk before it replies included; and the processor time of the server's
  processes, joining and scoring included, over the number of rounds.
- ``server``: seconds and bytes of the server for ``--clients`` uploads in a round: reading them off the wire, checking,
  summing, and packing the answer; without a network and with one core.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from fedalt.config import RunConfig, load_config
from fedalt.runs.events import read_events

_SERVER_UP = "fedalt site --server"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Cost of a round across sites.")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 100, 1000])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedalt-sites-") as folder:
        found = {"round": _rounds(Path(folder), asked.sites, asked.megabytes, asked.rounds)} if asked.rounds else {}
    served = [_serve(clients, asked.megabytes) for clients in asked.clients]
    sys.stdout.write(json.dumps({**found, "server": served}, indent=2) + "\n")


def _rounds(folder: Path, sites: int, megabytes: float, rounds: int) -> dict[str, Any]:
    config = load_config(
        None,
        [
            ("data.clients", sites),
            ("data.train_limit", 8),
            ("data.test_limit", 1),
            ("training.local_epochs", 1),
            ("lora.r", _rank(megabytes)),
            ("federation.rounds", rounds),
            ("evaluation.every", rounds),
            ("evaluation.points", ["after"]),
            ("evaluation.max_new_tokens", 4),
            ("out", str(folder / "run")),
        ],
    )
    with _federation(folder, sites) as (address, server):
        before = _core_seconds(server)
        _submit(folder, config, address)
        core = _core_seconds(server) - before
    seconds = {e["round"]: e["seconds"] for e in read_events(folder / "run/events.jsonl") if e["event"] == "round"}
    up = [e["bytes_up"] for e in read_events(folder / "run/events.jsonl") if e["event"] == "client"]
    training: dict[int, list[float]] = {}
    for log in folder.glob("state*/run-*/events.jsonl"):
        for event in read_events(log):
            if event["event"] == "client":
                training.setdefault(event["round"], []).append(event["seconds"])
    beside = [seconds[number] - max(training[number]) for number in seconds if number > 1]
    spread = {"median": median(beside), "min": min(beside), "max": max(beside)}
    return {
        "sites": sites,
        "bytes_up_per_site": median(up),
        "rounds": len(beside),
        "seconds_beside_training": spread,
        "server_core_seconds": core / rounds,
    }


def _core_seconds(process: subprocess.Popen[bytes]) -> float:
    """Processor time of a process and all below it, those that have ended included."""
    here = psutil.Process(process.pid)
    return sum(sum(one.cpu_times()[:4]) for one in (here, *here.children(recursive=True)))


def _rank(megabytes: float) -> int:
    """The rank at which tiny-base's adapters have about this size in fp32."""
    from fedalt.runs.setup import load_resident

    sizes = load_resident(RunConfig()).model.layer_sizes.values()
    return max(1, round(megabytes * 1e6 / 4 / sum(d_in + d_out for d_in, d_out in sizes)))


@contextmanager
def _federation(folder: Path, sites: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    from fedalt.flower.deploy.address import free_port

    address = f"127.0.0.1:{free_port()}"
    processes = [_start(folder, "server", ["server", "--address", address, "--state", str(folder / "server")])]
    try:
        while _SERVER_UP not in (folder / "server.log").read_text():
            time.sleep(0.1)
        for site in range(sites):
            state = str(folder / f"state{site}")
            command = ["site", "--server", address, "--client", str(site), "--state", state, "--set", "min_rows=1"]
            processes.append(_start(folder, f"site{site}", command))
        yield address, processes[0]
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()


def _submit(folder: Path, config: RunConfig, address: str) -> None:
    settings = folder / "run.yaml"
    settings.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")  # JSON is YAML
    if _start(folder, "submit", ["submit", str(settings), "--server", address]).wait():
        raise RuntimeError((folder / "submit.log").read_text())


def _start(folder: Path, name: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from fedalt.cli import main; main()", *arguments]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=os.environ | threads)


def _serve(clients: int, megabytes: float) -> dict[str, Any]:
    """One round of a server with so many sites, each with the same upload; tensors come off the wire for each."""
    import torch

    from fedalt.config import FederationConfig, RunConfig
    from fedalt.federation.server import PerClient, Server
    from fedalt.flower.wire import pack, unpack
    from fedalt.methods.registry import build
    from fedalt.names import INDIVIDUAL, A, Key
    from fedalt.runtime import forget_peak_memory, peak_memory

    torch.set_num_threads(1)
    count = int(megabytes * 1e6 / 4)
    key = Key("layer", INDIVIDUAL, A)
    block = pack({key: torch.randn(8, count // 8)})
    ids = range(clients)
    server = Server(build(RunConfig(), clients), FederationConfig(), dict.fromkeys(ids, 1), {key: (8, count // 8)})
    forget_peak_memory()
    started = time.perf_counter()
    server.receive(ids, PerClient(ids, lambda client: unpack(block)).__getitem__, 1)
    answer = len(pack(server.messages([0])[0].tensors))
    seconds = time.perf_counter() - started
    return {
        "clients": clients,
        "seconds": seconds,
        "seconds_per_site": seconds / clients,
        "bytes_up": clients * len(block),
        "bytes_down": clients * answer,
        "peak_memory": peak_memory()["process"],
    }


if __name__ == "__main__":
    main()
