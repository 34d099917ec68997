"""Several methods and seeds on the same rows, the same row order and one base in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedalt.comparisons.jobs import Budget, Member, train, train_in_jobs
from fedalt.comparisons.statistics import against, half_width
from fedalt.comparisons.tables import LOCAL, write_comparison
from fedalt.config import RunConfig, with_settings
from fedalt.data.load import Rows
from fedalt.errors import UserError
from fedalt.evaluation.metrics import Metric, metric_of
from fedalt.files import read_json
from fedalt.methods.registry import Variant, build, configured, method_names, refuse_session, title_of
from fedalt.registry import split_reference
from fedalt.runs.devices import check_devices
from fedalt.runs.events import Sink, read_events
from fedalt.runs.folder import IfExists, check_folder, kept_scores
from fedalt.runs.setup import Bases

REFERENCE = "fedalt"
"""The method that others are tested against; the first one where it is not among them."""
REFERENCE_ROWS = ("centralized", "zero_shot")
"""What frames the others in tables: not federated, so nobody is harmed by it."""

_ANY = 3
"""Clients that a method is told of to see whether it can be had at all."""


def compare(
    config: RunConfig,
    methods: Sequence[str | Variant],
    seeds: Sequence[int],
    out: Path,
    *,
    if_exists: IfExists,
    sink: Sink,
    jobs: int = 1,
    budget: Budget | None = None,
    bases: Bases | None = None,
    rows: Rows | None = None,
) -> dict[str, Any]:
    """Run every method with every seed into ``out/<method>-seed<seed>`` and write ``comparison.json``, .csv and .md.

    A ``budget`` chooses every method's rank so that it has the parameters, or sends the bytes, of the configured rank.
    Of processes (``jobs``), each holds a base of its own.
    """
    members = plan(config, methods, seeds, out, if_exists, budget=budget)
    return finish(members, config, out, if_exists, sink, jobs=jobs, bases=bases or Bases(), rows=rows or Rows())


def plan(
    config: RunConfig,
    methods: Sequence[str | Variant],
    seeds: Sequence[int],
    out: Path,
    if_exists: IfExists,
    *,
    budget: Budget | None = None,
) -> list[Member]:
    """The runs of a comparison, with every check that needs neither rows nor base."""
    seeds = list(dict.fromkeys(seeds))
    _check_lists(methods, seeds)
    entrants = dict(_entrant(config, method) for method in methods)
    for _, mine in entrants.values():
        check_devices(mine)
        build(mine, _ANY).rank_of(0)  # refuses settings that it has no use for
    members = []
    for seed in seeds:
        for name, (title, mine) in entrants.items():
            folder = check_folder(out / f"{name}-seed{seed}", if_exists)
            settings = mine.model_copy(update={"seed": seed, "out": str(folder.path)})
            members.append(Member(name, settings, folder, budget, title))
    return members


def _entrant(config: RunConfig, method: str | Variant) -> tuple[str, tuple[str, RunConfig]]:
    """What a method is called in this comparison, its title in tables, and its settings."""
    choice = method if isinstance(method, Variant) else Variant(method, "")
    if split_reference(choice.method):
        config = with_settings(config, {"method": choice.method})  # its file is imported, and the method has a name
        choice = replace(choice, method=config.method)
    mine = with_settings(configured(config, choice.method), choice.settings)
    name, title = mine.method, title_of(mine.method)
    if choice.given:
        name, title = re.sub(r"[^\w.,=+-]", "_", f"{name},{choice.given}"), f"{title} ({choice.given})"
    return name, (title, mine)


def finish(
    members: Sequence[Member],
    config: RunConfig,
    out: Path,
    if_exists: IfExists,
    sink: Sink,
    *,
    jobs: int,
    bases: Bases,
    rows: Rows,
) -> dict[str, Any]:
    """Train the runs of a comparison and put them side by side."""
    if jobs > 1:
        for member in members:
            refuse_session(member.config, "jobs")
        train_in_jobs(members, jobs, if_exists, sink)
    else:
        train(members, if_exists, sink, bases, rows)
    comparison = collect(members, config)
    write_comparison(out, comparison)
    return comparison


def _check_lists(methods: Sequence[str | Variant], seeds: Sequence[int]) -> None:
    if not methods:
        raise UserError(f"--methods: name at least one of {', '.join(method_names())}")
    negative = [seed for seed in seeds if seed < 0]
    if negative:
        raise UserError(f"--seeds {negative[0]}: a seed is 0 or more")


def collect(members: Sequence[Member], config: RunConfig) -> dict[str, Any]:
    """Put the final scores of finished runs side by side."""
    metric = metric_of(config.metric)
    start = next(read_events(members[0].folder.events))
    methods = {
        name: _method([member for member in members if member.name == name], metric)
        for name in dict.fromkeys(member.name for member in members)
    }
    reference = next((name for name in (REFERENCE, *methods) if name in methods and name not in REFERENCE_ROWS), None)
    reference = reference or next(iter(methods))
    scores = {
        name: {(client, seed): score for seed, mine in block["per_seed"].items() for client, score in mine.items()}
        for name, block in methods.items()
    }
    others = {name: mine for name, mine in scores.items() if name != reference}
    tests = against(scores[reference], others, metric.higher_is_better)
    for name, block in methods.items():
        block.update(_gains(block, methods.get(LOCAL), name not in REFERENCE_ROWS, metric), against=tests.get(name))
    return {
        "metric": metric.name,
        "source": start["source"],
        "tasks": start["tasks"],
        "seeds": list(dict.fromkeys(member.config.seed for member in members)),
        "reference": reference,
        "below": [name for name in methods if name in REFERENCE_ROWS],
        "budget": members[0].budget,
        "early_stop": config.evaluation.early_stop is not None,
        "methods": methods,
    }


def _gains(block: dict[str, Any], local: dict[str, Any] | None, federated: bool, metric: Metric) -> dict[str, Any]:
    """Gain over Local, positive where it is better, and which clients would rather have trained alone."""
    if local is None:
        return dict.fromkeys(("gain_over_local", "gain_per_client", "harmed", "harmed_clients"))
    gains = {client: metric.gain(score, local["per_client"][client]) for client, score in block["per_client"].items()}
    harmed = [client for client, gain in gains.items() if round(gain, 9) < 0]
    return {
        "gain_over_local": metric.gain(block["mean"], local["mean"]),
        "gain_per_client": gains,
        "harmed": len(harmed) if federated else None,
        "harmed_clients": harmed if federated else None,
    }


def _method(members: Sequence[Member], metric: Metric) -> dict[str, Any]:
    runs = [kept_scores(member.folder) for member in members]
    means = [one["mean"] for one in runs]
    clients = {c: mean(one["clients"][c][metric.name] for one in runs) for c in runs[0]["clients"]}
    return {
        "title": members[0].title,
        "mean": mean(means),
        "sd": stdev(means) if len(means) > 1 else None,
        "ci95": half_width(means),
        "worst": mean(one["worst"] for one in runs),
        "p10": mean(one["p10"] for one in runs),
        "worst_client": next(c for c, score in clients.items() if score == metric.worst(clients.values())),
        "validation": _on_validation(members, runs, metric.name),
        "per_client": clients,
        "per_seed": {
            str(m.config.seed): {c: v[metric.name] for c, v in r["clients"].items()}
            for m, r in zip(members, runs, strict=True)
        },
        **_cost([list(read_events(member.folder.events)) for member in members]),
        "runs": [str(member.folder.path) for member in members],
    }


def _on_validation(members: Sequence[Member], runs: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """Mean score on validation rows of the round whose test scores are compared; None where a client has none."""
    files = [m.folder.scores(int(c), r["round"]) for m, r in zip(members, runs, strict=True) for c in r["clients"]]
    found = [read_json(path).get("validation") for path in files if path.is_file()]
    return mean(one[metric] for one in found) if len(found) == len(files) and all(found) else None


def _cost(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Bytes, seconds and peak memory: means over seeds, but the highest peak. A method may have no rounds at all."""

    def total(kind: str, key: str) -> float:
        return float(mean(sum(event[key] for event in events if event["event"] == kind) for events in runs))

    peaks = [event["peak_memory"] for events in runs for event in events if "peak_memory" in event]
    return {
        "bytes_up": total("round", "bytes_up"),
        "bytes_down": total("round", "bytes_down"),
        "seconds": total("round", "seconds"),
        "scoring_seconds": total("evaluated", "seconds"),
        "peak_memory": max((peak["process"] for peak in peaks), default=0),
        "peak_memory_gpu": max((peak["gpu"] for peak in peaks if "gpu" in peak), default=None),
    }
