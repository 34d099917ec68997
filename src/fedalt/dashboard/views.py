"""What the pages show, as JSON: the reports' figures, and tables of text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any

from fedalt.comparisons.tables import Grid, Score, budget_grid, conditions, finding, score_grid, verdict_grid
from fedalt.dashboard.form import unusual
from fedalt.errors import UserError
from fedalt.evaluation.metrics import metric_of, metrics_in, over_clients
from fedalt.files import intact, read_json
from fedalt.methods.registry import title_of
from fedalt.report import comparison as compared
from fedalt.report import figures
from fedalt.report.html import cost_rows, notes, planted
from fedalt.report.page import keys_of
from fedalt.report.theme import Drawing, caption, shown
from fedalt.runs.events import Event, first_start
from fedalt.runs.folder import RunFolder
from fedalt.runs.watch import COMPARISON

Table = dict[str, Any]
_LAST_ROUNDS = 30


def drawn(drawing: Drawing) -> dict[str, Any]:
    """A figure for Plotly, and what stands above it."""
    keys = [{**key, "name": unescape(key["name"])} for key in keys_of(drawing.plot)]
    about = {"id": drawing.id, "title": drawing.title, "note": drawing.note, "least": drawing.least}
    return {**about, "keys": keys, "plot": json.loads(drawing.plot.to_json())}


def tabled(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> Table:
    """A table, with so many columns of words in front."""
    return {"title": title, "head": list(head), "rows": [list(row) for row in rows], "words": words}


def run_view(folder: RunFolder, events: Sequence[Event]) -> dict[str, Any]:
    """A run so far: scores and losses by client, rest-of-world LoRA, mixer, cost, notes."""
    start = first_start(events)
    if start is None:
        return {"title": folder.path.name, "about": "no round yet", "figures": [], "tables": [], "notes": []}
    metric = metric_of(start["metric"])
    after = [e for e in events if e["event"] == "scores" and e["point"] == "after"]
    latest, trained = {str(e["client"]): e for e in after}, {str(e["client"]): e for e in _of(events, "client")}
    failed = {str(e["client"]): f"round {e['round']}: {e['reason']}" for e in _of(events, "client_failed")}
    scores = {c: latest.get(c, {}).get(metric.name, 0.0) for c in start["tasks"]}
    clients = shown(scores, metric.higher_is_better)
    tasks = {c: escape(start["tasks"][c]) for c in clients}  # Plotly reads some HTML
    few = [e for e in events if str(e.get("client", "")) in tasks or "client" not in e]
    layers = max((len(e["alpha"]) for e in trained.values()), default=0)
    drawings = [figures.score_curves(few, tasks, metric.name)] if latest else []
    drawings += [figures.loss_curves(few, tasks)] if trained else []
    apart = layers or any(e["row_lora_drift"] is not None for e in trained.values())
    drawings += [figures.row_curves(few)] if apart else []
    drawings += [figures.alpha_map(few, tasks, layers)] if layers else []
    metrics = [
        metric_of(name) for name in {metric.name: 0, **metrics_in({name: 0 for e in latest.values() for name in e})}
    ]
    rows = [
        [
            c,
            start["tasks"][c],
            *(m.text(latest.get(c, {}).get(m.name)) for m in metrics),
            f"{trained[c]['loss']:.3f}" if c in trained and trained[c]["loss"] is not None else "–",
            f"{trained[c]['round']}" if c in trained else "–",
            failed.get(c, ""),
        ]
        for c in clients
    ]
    cost, costs = cost_rows(events)
    head = ["client", "task", *(m.title for m in metrics), "loss", "last trained in round", "set aside"]
    return {
        "title": f"{start.get('title') or title_of(start['method'])} on {start['source']}",
        "about": f"{len(start['clients'])} clients, {start['trainable_parameters']:,} trainable and "
        f"{start['shared_parameters']:,} shared parameters per client. {caption(scores)}",
        "figures": [drawn(one) for one in drawings],
        "tables": [
            tabled("Clients", head, rows, 2),
            tabled("Cost of the last rounds", cost, costs[: -_LAST_ROUNDS - 1 : -1], 0),
            tabled("Settings that differ from the defaults", ["setting", "value"], _settings(folder).items(), 2),
        ],
        "notes": notes(events),
        "mixed": bool(layers),
        "clients": start["clients"],
    }


def comparison_view(path: Path) -> dict[str, Any]:
    """A comparison: what came out, and its tables and figures."""
    comparison = read_json(path / COMPARISON)
    with intact(path / COMPARISON):
        titles = {name: block.get("title") or title_of(name) for name, block in comparison["methods"].items()}
        grids = [score_grid(comparison), verdict_grid(comparison), budget_grid(comparison)]
        return {
            "title": f"Comparison on {comparison['source']}",
            "finding": finding(comparison),
            "notes": conditions(comparison),
            "tables": list(map(_grid, grids)),
            "figures": _compared(comparison, titles),
        }


def runs_compared(folders: Mapping[str, RunFolder], logs: Mapping[str, Sequence[Event]]) -> dict[str, Any]:
    """Several runs side by side: scores so far, cost, and the settings in which they differ."""
    starts = {name: first_start(events) for name, events in logs.items()}
    begun = {name: start for name, start in starts.items() if start}
    metrics = {start["metric"] for start in begun.values()}
    if len(metrics) != 1 or len(begun) < len(folders):
        raise UserError("these runs cannot be compared: one has not begun, or their scores are different metrics")
    metric, blocks = metric_of(metrics.pop()), dict[str, dict[str, Any]]()
    for name, events in logs.items():
        latest = {str(e["client"]): e[metric.name] for e in _of(events, "scores") if e["point"] == "after"}
        if not latest:
            continue
        rounds = _of(events, "round")
        cost = {key: sum(e[key] for e in rounds) for key in ("bytes_up", "bytes_down", "seconds")}
        means = over_clients(list(latest.values()), metric.name)
        blocks[name] = {"per_client": latest, "per_seed": {}, "runs": [folders[name].path], **cost, **means}
    common = [c for c in next(iter(begun.values()))["tasks"] if all(c in b["per_client"] for b in blocks.values())]
    some = shown({c: sum(b["per_client"][c] for b in blocks.values()) for c in common}, metric.higher_is_better)
    tasks = {c: next(iter(begun.values()))["tasks"][c] for c in some}
    comparison = {"metric": metric.name, "tasks": tasks, "methods": blocks}
    settings = {name: _settings(folder) for name, folder in folders.items()}
    keys = dict.fromkeys(key for mine in settings.values() for key in mine)
    rows = [[key, *(mine.get(key, "default") for mine in settings.values())] for key in keys]
    scores = [
        [
            name,
            *(metric.text(block[key]) for key in ("mean", "worst", "p10")),
            f"{(block['bytes_up'] + block['bytes_down']) / 1e6:.1f}",
            f"{block['seconds']:.0f}",
        ]
        for name, block in blocks.items()
    ]
    head = ["run", f"mean {metric.title}", "worst client", "10th percentile", "MB in all", "training, s"]
    return {
        "title": f"{len(folders)} runs compared",
        "notes": [
            "Scores so far, of every client's last evaluation. Tests over seeds and draws: fedalt compare.",
            *dict.fromkeys(line for events in logs.values() for line in planted(events)),
        ],
        "tables": [
            tabled("Scores and cost", head, scores),
            tabled("Settings in which they differ", ["setting", *folders], (r for r in rows if len(set(r[1:])) > 1)),
        ],
        "figures": _compared(comparison, {name: name for name in blocks}) if tasks else [],
    }


def _compared(comparison: Mapping[str, Any], titles: Mapping[str, str]) -> list[dict[str, Any]]:
    metric = metric_of(comparison["metric"])
    totals = {c: sum(b["per_client"][c] for b in comparison["methods"].values()) for c in comparison["tasks"]}
    few = {**comparison, "tasks": {c: escape(comparison["tasks"][c]) for c in shown(totals, metric.higher_is_better)}}
    titles = {name: escape(title) for name, title in titles.items()}
    made = [compared.method_curves(few, titles), compared.score_bars(few, titles), compared.cost_plot(few, titles)]
    return [drawn(one) for one in made if isinstance(one, Drawing)]


def _grid(grid: Grid) -> Table:
    rows = [[cell.text if isinstance(cell, Score) else cell for cell in row] for row in (*grid.rows, *grid.below)]
    return tabled(grid.title, grid.head, rows) | {"notes": list(grid.notes)}


def _of(events: Iterable[Event], kind: str) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def _settings(folder: RunFolder) -> dict[str, str]:
    return unusual(folder.config) if folder.config.is_file() else {}
