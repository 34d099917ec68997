"""Several methods and seeds on the same rows, the same row order and one base in memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from fedalt.comparisons.jobs import Budget, Member, train, train_in_jobs
from fedalt.comparisons.majority import majority
from fedalt.comparisons.statistics import against, half_width
from fedalt.comparisons.tables import LOCAL, write_comparison
from fedalt.comparisons.tune import at_edge, spans, trials
from fedalt.config import RunConfig, with_settings
from fedalt.data.federation import Pool
from fedalt.data.load import Rows
from fedalt.errors import UserError
from fedalt.evaluation.metrics import Measure, Metric, measure_of, metric_of, over_clients, row_scores
from fedalt.files import read_json, read_json_lines, write_json
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
_UNTRAINED = ("zero_shot",)
"""What has nothing to tune."""

MARGIN = 1.0
"""Points of score below which a difference does not matter, when nothing else is said."""

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
    partitions: int | None = None,
    margin: float | None = None,
    tune: int | None = None,
) -> dict[str, Any]:
    """Run every method with every seed into ``out/<method>-seed<seed>`` and write ``comparison.json``, .csv and .md.

    A ``budget`` chooses every method's rank so that it has the parameters, or sends the bytes, of the configured rank.
    Of processes (``jobs``), each holds a base of its own. Rows are drawn, or dealt, ``partitions`` times, and every
    draw meets every seed; without, each seed has a draw of its own. Differences below ``margin`` do not matter. With
    ``tune``, each method first has so many trials.
    """
    if margin is not None and not 0 < margin < float("inf"):
        raise UserError(f"--margin {margin:g}: a number above 0")
    held: Any = {"jobs": jobs, "bases": bases or Bases(), "rows": rows or Rows()}
    members = plan(config, methods, seeds, out, if_exists, budget=budget, partitions=partitions)
    tuned = None
    if tune:
        methods, tuned = _tuned(config, methods, tune, out / "tune", if_exists, sink=sink, budget=budget, **held)
        members = plan(config, methods, seeds, out, if_exists, budget=budget, partitions=partitions)
    return finish(members, config, out, if_exists, sink, margin=margin, tuned=tuned, **held)


def _tuned(
    config: RunConfig,
    methods: Sequence[str | Variant],
    count: int,
    out: Path,
    if_exists: IfExists,
    *,
    sink: Sink,
    budget: Budget | None,
    jobs: int,
    bases: Bases,
    rows: Rows,
) -> tuple[list[Variant], dict[str, Any]]:
    """The methods with the settings that were best on validation rows, and how they were found."""
    metric = metric_of(config.metric)
    if not all(data.validation for data in rows.both(config.data, config.seed)[0].clients.values()):
        raise UserError("--tune: a client has no validation rows; set data.validation_rows, for example to 50")
    chosen, told = list[Variant](), dict[str, Any]()
    todo = []
    for method in methods:
        known, choice = _named(config, method)
        where = spans(known, choice)
        tries = trials(where, choice, config.seed, 1 if choice.method in _UNTRAINED else count)
        todo.append((choice, where, tries, plan(known, tries, [config.seed], out, if_exists, budget=budget)))
    _train([member for *_, members in todo for member in members], if_exists, sink, jobs, bases=bases, rows=rows)
    for choice, where, tries, members in todo:
        scores = [_on_validation([m], [kept_scores(m.folder)], metric.name) for m in members]
        found = [score for score in scores if score is not None]
        best = tries[scores.index(metric.best(found))]
        own = {key: value for key, value in best.settings.items() if key in where}
        chosen.append(replace(choice, settings=best.settings))
        told[_entrant(config, choice)[0]] = {"validation": scores, "settings": own, "edge": at_edge(where, own)}
    write_json(out / "tune.json", {"trials": count, "methods": told})
    return chosen, {"trials": count, "methods": told}


def plan(
    config: RunConfig,
    methods: Sequence[str | Variant],
    seeds: Sequence[int],
    out: Path,
    if_exists: IfExists,
    *,
    budget: Budget | None = None,
    partitions: int | None = None,
) -> list[Member]:
    """The runs of a comparison, with every check that needs neither rows nor base."""
    seeds = list(dict.fromkeys(seeds))
    _check_lists(methods, seeds)
    entrants = dict(_entrant(config, method) for method in methods)
    for _, mine in entrants.values():
        check_devices(mine)
        build(mine, _ANY).rank_of(0)  # refuses settings that it has no use for
    members = []
    for draw in range(partitions) if partitions else (None,):
        for seed in seeds:
            for name, (title, mine) in entrants.items():
                place = f"{name}-seed{seed}" + ("" if draw is None else f"-draw{draw}")
                folder = check_folder(out / place, if_exists)
                settings = mine if draw is None else with_settings(mine, _draw(mine, draw))
                settings = settings.model_copy(update={"seed": seed, "out": str(folder.path)})
                members.append(Member(name, settings, folder, budget, title, draw))
    return members


def _draw(config: RunConfig, number: int) -> dict[str, Any]:
    """Settings with which rows are drawn, or dealt, otherwise; tinyworld makes another world."""
    data = config.data
    first = config.seed if data.partition.seed is None else data.partition.seed
    world = {"data.tinyworld.seed": data.tinyworld.seed + number} if data.source == "tinyworld" else {}
    return {"data.partition.seed": first + number, **world}


def _entrant(config: RunConfig, method: str | Variant) -> tuple[str, tuple[str, RunConfig]]:
    """What a method is called in this comparison, its title in tables, and its settings."""
    config, choice = _named(config, method)
    mine = with_settings(configured(config, choice.method), choice.settings)
    name, title = mine.method, title_of(mine.method)
    if choice.given:
        name, title = re.sub(r"[^\w.,=+-]", "_", f"{name},{choice.given}"), f"{title} ({choice.given})"
    return name, (title, mine)


def _named(config: RunConfig, method: str | Variant) -> tuple[RunConfig, Variant]:
    """The method by its name; a file is imported, and the settings know it."""
    choice = method if isinstance(method, Variant) else Variant(method, "")
    if not split_reference(choice.method):
        return config, choice
    config = with_settings(config, {"method": choice.method})
    return config, replace(choice, method=config.method)


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
    margin: float | None = None,
    tuned: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the runs of a comparison and put them side by side."""
    _check_draws(members, rows)
    _train(members, if_exists, sink, jobs, bases=bases, rows=rows)
    comparison = collect(members, config, rows, margin) | ({"tuned": tuned} if tuned else {})
    write_comparison(out, comparison)
    return comparison


def _train(members: Sequence[Member], if_exists: IfExists, sink: Sink, jobs: int, *, bases: Bases, rows: Rows) -> None:
    if jobs > 1:
        for member in members:
            refuse_session(member.config, "jobs")
        train_in_jobs(members, jobs, if_exists, sink)
    else:
        train(members, if_exists, sink, bases, rows)


def _check_draws(members: Sequence[Member], rows: Rows) -> None:
    """Refuse draws that are all the same."""
    firsts = list({member.draw: member.config for member in reversed(members)}.values())[-2:]
    if len(firsts) == 2:
        one, other = (rows.both(config.data, config.seed)[0] for config in firsts)
        if one.clients == other.clients:
            raise UserError(
                f"--partitions: every draw has the same rows of {one.source}; set data.train_limit below what clients "
                "have, or data.partition.by to deal them"
            )


def _check_lists(methods: Sequence[str | Variant], seeds: Sequence[int]) -> None:
    if not methods:
        raise UserError(f"--methods: name at least one of {', '.join(method_names())}")
    negative = [seed for seed in seeds if seed < 0]
    if negative:
        raise UserError(f"--seeds {negative[0]}: a seed is 0 or more")


def collect(
    members: Sequence[Member], config: RunConfig, rows: Rows | None = None, margin: float | None = None
) -> dict[str, Any]:
    """Put the final scores of finished runs side by side."""
    metric, rows = metric_of(config.metric), rows or Rows()
    margin = margin or (MARGIN if metric.points else None)
    start = next(read_events(members[0].folder.events))
    methods = {
        name: _method([member for member in members if member.name == name], metric)
        for name in dict.fromkeys(member.name for member in members)
    }
    reference = next((name for name in (REFERENCE, *methods) if name in methods and name not in REFERENCE_ROWS), None)
    reference = reference or next(iter(methods))
    runs = [member for member in members if member.name == reference]
    draws = list(dict.fromkeys(member.draw for member in runs))
    dealt = len(draws) > 1 and (config.data.partition.by is not None or isinstance(rows.read(config.data), Pool))
    others = {name: _cells(block, methods[reference], len(draws)) for name, block in methods.items()}
    del others[reference]
    tests = against(others, dealt=dealt, margin=margin, higher_is_better=metric.higher_is_better)
    for name, block in methods.items():
        block.update(_gains(block, methods.get(LOCAL), name not in REFERENCE_ROWS, metric), against=tests.get(name))
    if LOCAL in methods and not metric.corpus:
        measure = measure_of(metric.name, config.evaluation)
        alone = _by_row(members, LOCAL, measure)
        for name in set(methods) - {LOCAL, *REFERENCE_ROWS}:
            ours = _by_row(members, name, measure)
            methods[name]["gain_ci95"] = {
                client: _apart([run[client] for run in ours], [run[client] for run in alone])
                for client in methods[name]["per_client"]
            }
    constant = majority([(member.label, member.config) for member in runs], metric, rows)
    if constant:
        block = {**_block(constant, metric, len(draws)), "title": "majority", "against": None}
        constant = block | _gains(block, methods.get(LOCAL), False, metric)
    return {
        "metric": metric.name,
        "source": start["source"],
        "tasks": start["tasks"],
        "seeds": list(dict.fromkeys(member.config.seed for member in members)),
        "draws": [] if draws == [None] else draws,
        "dealt": dealt,
        "margin": margin,
        "reference": reference,
        "below": [name for name in methods if name in REFERENCE_ROWS],
        "budget": members[0].budget,
        "early_stop": config.evaluation.early_stop is not None,
        "methods": methods,
        "majority": constant,
        **({"canaries": config.data.canaries} if config.data.canaries else {}),
    }


def _cells(block: Mapping[str, Any], reference: Mapping[str, Any], draws: int) -> np.ndarray:
    """A method less the reference, by draw, client and seed."""
    runs = [
        [scores[c] - reference["per_seed"][label][c] for c in reference["per_client"]]
        for label, scores in block["per_seed"].items()
    ]
    return np.array(runs).reshape(draws, -1, len(reference["per_client"])).swapaxes(1, 2)


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


def _by_row(members: Sequence[Member], name: str, measure: Measure) -> list[dict[str, dict[Any, float]]]:
    """Of each run of a method: client → scores of its test rows, by what they say and which of the same they are."""
    found = []
    for member in (one for one in members if one.name == name):
        kept = kept_scores(member.folder)
        files = {client: member.folder.answers(int(client), kept["round"]) for client in kept["clients"]}
        found.append({client: _row_scores(read_json_lines(file), measure) for client, file in files.items()})
    return found


def _row_scores(lines: Sequence[Mapping[str, Any]], measure: Measure) -> dict[Any, float]:
    counts, found = Counter[Any](), {}
    for line, score in zip(lines, row_scores(lines, [measure]), strict=True):
        counts[row := (line["text"], line["reference"])] += 1
        if score:
            found[row, counts[row]] = score[measure.metric.name]
    return found


def _apart(ours: Iterable[Mapping[Any, float]], alone: Iterable[Mapping[Any, float]]) -> float | None:
    """Half of the 95 % interval of a client's gain over Local, over its test rows; runs with a row are averaged."""
    gains: dict[Any, list[float]] = {}
    for mine, local in zip(ours, alone, strict=True):
        for row in (row for row in mine if row in local):
            gains.setdefault(row, []).append(mine[row] - local[row])
    return half_width([mean(one) for one in gains.values()])


def _method(members: Sequence[Member], metric: Metric) -> dict[str, Any]:
    runs = [kept_scores(member.folder) for member in members]
    scores = {m.label: {c: v[metric.name] for c, v in r["clients"].items()} for m, r in zip(members, runs, strict=True)}
    return {
        "title": members[0].title,
        **_block(scores, metric, len({member.draw for member in members})),
        "validation": _on_validation(members, runs, metric.name),
        **_cost([list(read_events(member.folder.events)) for member in members]),
        "runs": [str(member.folder.path) for member in members],
    }


def _block(runs: Mapping[str, Mapping[str, float]], metric: Metric, draws: int) -> dict[str, Any]:
    """What is told of scores by run (all seeds of a draw, then the next one's) and client."""
    each = [over_clients(list(scores.values()), metric.name) for scores in runs.values()]
    means = [one["mean"] for one in each]
    apart = [mean(part) for part in np.array(means).reshape(draws, -1).tolist()] if draws > 1 else means
    clients = {c: mean(scores[c] for scores in runs.values()) for c in next(iter(runs.values()))}
    return {
        "mean": mean(means),
        "ci95": half_width(apart),
        "worst": mean(one["worst"] for one in each),
        "p10": mean(one["p10"] for one in each),
        "worst_client": next(c for c, score in clients.items() if score == metric.worst(clients.values())),
        "per_client": clients,
        "per_seed": {label: dict(scores) for label, scores in runs.items()},
    }


def _on_validation(members: Sequence[Member], runs: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """Mean score on validation rows of the round whose test scores are compared; None where a client has none."""
    files = [m.folder.scores(int(c), r["round"]) for m, r in zip(members, runs, strict=True) for c in r["clients"]]
    found = [read_json(path).get("validation") for path in files if path.is_file()]
    return mean(one[metric] for one in found) if len(found) == len(files) and all(found) else None


def _cost(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """What a method costs: means over seeds, but the highest peak. A method may have no rounds at all.

    Steps and tokens are those of a client that trains, in the whole run.
    """

    def total(kind: str, key: str) -> float:
        return float(mean(sum(event[key] for event in events if event["event"] == kind) for events in runs))

    trainers = max(1, len({event["client"] for event in runs[0] if event["event"] == "client"}))
    peaks = [event["peak_memory"] for events in runs for event in events if "peak_memory" in event]
    spent = [
        event["epsilon"] for events in runs for event in events if event["event"] == "client" and "epsilon" in event
    ]
    return {
        **({"epsilon": max(spent)} if spent else {}),
        "steps": total("client", "steps") / trainers,
        "tokens": total("client", "tokens") / trainers,
        "parameters": runs[0][0].get("trainable_parameters", 0),
        "bytes_up": total("round", "bytes_up"),
        "bytes_down": total("round", "bytes_down"),
        "seconds": total("round", "seconds"),
        "scoring_seconds": total("evaluated", "seconds"),
        "peak_memory": max((peak["process"] for peak in peaks), default=0),
        "peak_memory_gpu": max((peak["gpu"] for peak in peaks if "gpu" in peak), default=None),
    }
