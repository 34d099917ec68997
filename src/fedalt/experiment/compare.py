"""Several methods and seeds on the same rows, the same row order and one base in memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedalt.config import RunConfig
from fedalt.errors import UserError
from fedalt.experiment.engine import run
from fedalt.experiment.events import Sink, read_events
from fedalt.experiment.folder import IfExists, RunFolder, check_folder, claim_folder, final_scores
from fedalt.experiment.prepare import Resident, load_resident, prepare
from fedalt.files import write_json
from fedalt.methods.registry import METHODS, configured, get_method

REFERENCE = "local"
"""The method that gains are measured against."""


@dataclass(frozen=True)
class Member:
    """One run of a comparison."""

    method: str
    seed: int
    folder: RunFolder


def compare(
    config: RunConfig, methods: Sequence[str], seeds: Sequence[int], out: Path, if_exists: IfExists, sink: Sink
) -> dict[str, Any]:
    """Run every method with every seed into ``out/<method>-seed<seed>`` and write ``comparison.json``.

    Args:
        config: Settings of all runs; its method and seed are replaced.
        methods: Names in the registry.
        seeds: Seeds of start values, row order, dropout and participation; tinyworld's rows have their own seed.
        out: Folder of the comparison.
        if_exists: What to do with runs that are there already.
        sink: Called with every event of every run.

    Raises:
        UserError: As for a single run; checked for all methods before the first one starts.
    """
    methods, seeds = list(dict.fromkeys(methods)), list(dict.fromkeys(seeds))
    _check_lists(methods, seeds)
    members = [Member(m, s, check_folder(out / f"{m}-seed{s}", if_exists)) for s in seeds for m in methods]
    resident: Resident | None = None
    for member in members:
        mine = configured(config, member.method)
        mine = mine.model_copy(update={"seed": member.seed, "out": str(member.folder.path)})
        resident = resident or load_resident(mine)
        experiment = prepare(mine, resident)
        claim_folder(member.folder.path, if_exists)
        sink({"event": "member", "method": member.method, "seed": member.seed})
        started = time.perf_counter()
        scores = run(experiment, member.folder, sink)
        sink({"event": "member_finished", "scores": scores, "seconds": time.perf_counter() - started})
    comparison = collect(members, config)
    write_json(out / "comparison.json", comparison)
    return comparison


def _check_lists(methods: Sequence[str], seeds: Sequence[int]) -> None:
    if not methods:
        raise UserError(f"--methods: name at least one of {', '.join(METHODS)}")
    for name in methods:
        get_method(name)
    negative = [seed for seed in seeds if seed < 0]
    if negative:
        raise UserError(f"--seeds {negative[0]}: a seed is 0 or more")


def collect(members: Sequence[Member], config: RunConfig) -> dict[str, Any]:
    """Put the final scores of finished runs side by side."""
    metric = config.evaluation.metric
    start = next(read_events(members[0].folder.events))
    methods: dict[str, Any] = {}
    for name in dict.fromkeys(member.method for member in members):
        methods[name] = _method([member for member in members if member.method == name], metric)
    for block in methods.values():
        reference = methods.get(REFERENCE)
        block["gain_over_local"] = block["mean"] - reference["mean"] if reference else None
    seeds = list(dict.fromkeys(member.seed for member in members))
    return {"metric": metric, "source": start["source"], "tasks": start["tasks"], "seeds": seeds, "methods": methods}


def _method(members: Sequence[Member], metric: str) -> dict[str, Any]:
    runs = [final_scores(member.folder)["last"] for member in members]
    rounds = [[e for e in read_events(member.folder.events) if e["event"] == "round"] for member in members]
    means = [one["mean"] for one in runs]
    return {
        "mean": mean(means),
        "sd": stdev(means) if len(means) > 1 else None,
        "worst": mean(one["worst"] for one in runs),
        "per_client": {c: mean(one["clients"][c][metric] for one in runs) for c in runs[0]["clients"]},
        "per_seed": {
            str(m.seed): {c: v[metric] for c, v in r["clients"].items()} for m, r in zip(members, runs, strict=True)
        },
        "bytes_up": mean(sum(e["bytes_up"] for e in mine) for mine in rounds),
        "bytes_down": mean(sum(e["bytes_down"] for e in mine) for mine in rounds),
        "seconds": mean(sum(e["seconds"] for e in mine) for mine in rounds),
        "peak_memory": max(mine[-1]["peak_memory"]["process"] for mine in rounds),
        "runs": [str(member.folder.path) for member in members],
    }
