"""report.html: one file that needs no network, rebuilt from events at any time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from fedalt.errors import UserError
from fedalt.evaluation.metrics import METRICS
from fedalt.experiment.events import Event, read_events
from fedalt.experiment.folder import RunFolder
from fedalt.files import write_text
from fedalt.methods.registry import title_of
from fedalt.report import figures
from fedalt.report.shown import caption, shown

_STYLE = """
:root { color-scheme: light dark; --fg: #1c1e21; --bg: #fff; --line: #d8dade; --soft: #6b7078; }
@media (prefers-color-scheme: dark) { :root { --fg: #e4e6ea; --bg: #16181c; --line: #33373e; --soft: #9aa0a8; } }
body { color: var(--fg); background: var(--bg); font: 16px/1.5 system-ui, sans-serif; max-width: 70rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.about { color: var(--soft); margin-top: .2rem; }
.scroll { overflow-x: auto; margin-bottom: 1.5rem; } a { color: inherit; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; } tr.total { font-weight: 600; }
pre { background: rgba(128,128,128,.12); padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


def write_report(folder: RunFolder) -> Path:
    """Rebuild a run's report from its events.

    Raises:
        UserError: The run has no events.
    """
    events = list(read_events(folder.events))
    start = next((e for e in events if e["event"] in ("run_started", "run_resumed")), None)
    if start is None:
        raise UserError(f"{folder.path}: no run to report on (no run_started in events.jsonl)")
    latest = {str(e["client"]): e for e in events if e["event"] == "scores" and e["point"] == "after"}
    scores = {c: latest[c][start["metric"]] if c in latest else 0.0 for c in start["tasks"]}
    tasks = {client: start["tasks"][client] for client in shown(scores)}
    parts = [_scores_table(latest, tasks), figures.loss_curves(events, tasks)]
    if any(e["event"] == "scores" for e in events):
        parts.insert(1, figures.score_curves(events, tasks, start["metric"]))
    layers = max((len(e["alpha"]) for e in events if e["event"] == "client"), default=0)
    if layers:
        parts.append(figures.alpha_map(events, tasks, layers))
        parts.append(figures.row_curves(events))
    parts += [_cost_table(events), _notes(events), _config(folder)]
    title = f"{title_of(start['method'])} on {start['source']}"
    write_text(folder.report, _page(title, [_about(start), caption(scores)], parts))
    return folder.report


def write_comparison_report(out: Path, comparison: Mapping[str, Any]) -> Path:
    """Write the report of a comparison."""
    titles = {name: title_of(name) for name in comparison["methods"]}
    seeds = ", ".join(map(str, comparison["seeds"]))
    about = f"{comparison['metric']} on each client's own test rows; seeds {seeds}"
    blocks = comparison["methods"].values()
    scores = {c: sum(block["per_client"][c] for block in blocks) for c in comparison["tasks"]}
    few = {**comparison, "tasks": {c: comparison["tasks"][c] for c in shown(scores)}}
    parts = [
        _comparison_table(few, titles),
        figures.gain_map(few, titles),
        figures.score_bars(few, titles),
        _links(out, comparison),
    ]
    path = out / "report.html"
    write_text(path, _page(f"Comparison on {comparison['source']}", [about, caption(scores)], parts))
    return path


def _page(title: str, about: Sequence[str], parts: Sequence[str | go.Figure]) -> str:
    lines = "".join(f'<p class="about">{escape(line)}</p>' for line in about if line)
    body = "\n".join(part if isinstance(part, str) else _figure(part) for part in parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body><h1>{escape(title)}</h1>{lines}\n{body}\n</body></html>\n"
    )


def _figure(figure: go.Figure) -> str:
    config = {"responsive": True, "displayModeBar": False}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=config))


def _about(start: Event) -> str:
    shown = {k: v for k, v in start["versions"].items() if v and k != "commit"}
    versions = ", ".join(f"{name} {value}" for name, value in shown.items())
    return (
        f"{len(start['clients'])} clients, {start['rounds']} rounds, {start['trainable_parameters']:,} trainable and "
        f"{start['shared_parameters']:,} shared parameters per client. {versions}."
    )


def _scores_table(latest: Mapping[str, Event], tasks: Mapping[str, str]) -> str:
    if not latest:
        return "<p>Not scored yet.</p>"
    rows = [[c, tasks[c], *(f"{latest[c][name]:.1f}" for name in METRICS)] for c in tasks if c in latest]
    means = [sum(e[name] for e in latest.values()) / len(latest) for name in METRICS]
    number = max(e["round"] for e in latest.values())
    head = f"<h2>Test scores after round {number}</h2>"
    return head + _table(["client", "task", *METRICS], rows, ["mean", "", *(f"{m:.1f}" for m in means)])


def _comparison_table(comparison: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    methods = comparison["methods"]
    rows = [
        [c, task, *(f"{block['per_client'][c]:.1f}" for block in methods.values())]
        for c, task in comparison["tasks"].items()
    ]
    total = ["mean", "", *(f"{b['mean']:.1f}" + (f" ± {b['sd']:.1f}" if b["sd"] else "") for b in methods.values())]
    rows.append(total)
    rows.append(["worst client", "", *(f"{b['worst']:.1f}" for b in methods.values())])
    if "local" in methods:
        rows.append(["gain over Local", "", *(f"{b['gain_over_local']:+.1f}" for b in methods.values())])
    return "<h2>Scores</h2>" + _table(["client", "task", *titles.values()], rows)


def _cost_table(events: Sequence[Event]) -> str:
    rows = [
        [
            str(e["round"]),
            "",
            f"{e['seconds']:.1f}",
            f"{e['bytes_up'] / 1e6:.2f}",
            f"{e['bytes_down'] / 1e6:.2f}",
            f"{e['peak_memory']['process'] / 1e9:.2f}",
        ]
        for e in events
        if e["event"] == "round"
    ]
    return "<h2>Cost</h2>" + _table(["round", "", "training, s", "MB up", "MB down", "peak memory, GB"], rows)


def _notes(events: Sequence[Event]) -> str:
    lines = [e["text"] for e in events if e["event"] == "note"]
    lines += [
        f"client {e['client']} set aside in round {e['round']}: {e['reason']}"
        for e in events
        if e["event"] == "client_failed"
    ]
    items = "".join(f"<li>{escape(line)}</li>" for line in dict.fromkeys(lines))
    return f"<h2>Notes</h2><ul>{items}</ul>" if items else ""


def _config(folder: RunFolder) -> str:
    return f"<h2>Configuration</h2><pre>{escape(folder.config.read_text(encoding='utf-8'))}</pre>"


def _links(out: Path, comparison: Mapping[str, Any]) -> str:
    paths = [Path(run).relative_to(out) for block in comparison["methods"].values() for run in block["runs"]]
    items = "".join(f'<li><a href="{escape(str(p))}/report.html">{escape(str(p))}</a></li>' for p in paths)
    return f"<h2>Runs</h2><ul>{items}</ul>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] = ()) -> str:
    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    end = f'<tr class="total">{cells(total, "td")}</tr>' if total else ""
    return f'<div class="scroll"><table><tr>{cells(head, "th")}</tr>{body}{end}</table></div>'
