"""report.html: one file that needs no network, rebuilt from a run's files at any time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedalt.comparisons.advice import ABOUT, advice
from fedalt.comparisons.tables import budget_grid, conditions, finding, verdict_grid, who
from fedalt.data.load import Rows
from fedalt.errors import UserError
from fedalt.evaluation.metrics import group_mean, metric_of, metrics_in
from fedalt.files import read_json, write_text
from fedalt.methods.registry import title_of
from fedalt.personal.insight import read_insight
from fedalt.personal.leaks import leak_table, read_audit, sentences
from fedalt.report import comparison as compared
from fedalt.report import figures, insights
from fedalt.report.page import Section, code, grid_table, page, paragraph, table
from fedalt.report.sweep import write_sweep_report
from fedalt.report.theme import Drawing, caption, shown
from fedalt.runs.events import Event, first_start, read_events
from fedalt.runs.folder import RunFolder, kept_scores, open_run

if TYPE_CHECKING:
    from fedalt.runs.setup import Bases


def write_report(folder: RunFolder) -> Path:
    """Rebuild a run's report from its events, and from what ``write_insight`` found."""
    title, about, sections = run_sections(folder)
    write_text(folder.report, page(title, about, sections))
    return folder.report


def run_sections(folder: RunFolder) -> tuple[str, list[str], list[Section]]:
    """Title, lines about it, and sections of a run's report."""
    events = list(read_events(folder.events))
    start = first_start(events)
    if start is None:
        raise UserError(f"{folder.path}: no run to report on (no run_started in events.jsonl)")
    kept = kept_scores(folder)["round"] if folder.final_scores.is_file() else None
    after = [e for e in events if e["event"] == "scores" and e["point"] == "after"]
    latest = {str(e["client"]): e for e in after if kept is None or e["round"] <= kept}
    scores = {c: latest[c][start["metric"]] if c in latest else 0.0 for c in start["tasks"]}
    tasks = {client: start["tasks"][client] for client in shown(scores, metric_of(start["metric"]).higher_is_better)}
    insight = read_insight(folder) or {}
    scored = any(e["event"] == "scores" for e in events)
    layers = max((len(e["alpha"]) for e in events if e["event"] == "client"), default=0)
    mixer: list[str | Drawing] = [figures.alpha_map(events, tasks, layers)] if layers else []
    if insight.get("alpha"):
        mixer += [insights.histogram(insight, tasks), insights.shaded_rows(insight, tasks)]
    others: list[str | Drawing] = [insights.matrix(insight, tasks)] if insight.get("matrix") else []
    others += [insights.similarity(insight, tasks)] if insight.get("similarity") else []
    rows = layers or any(e["event"] == "client" and e["row_lora_drift"] is not None for e in events)
    sections = [
        Section("scores", "Scores", [_scores_table(latest, tasks)]),
        Section("curves", "Curves", _curves(events, tasks, start["metric"], scored)),
        Section("clients", "Clients compared", others),
        Section("mixer", "Mixer", mixer),
        Section("sharing", "Who should share", _advice(folder, tasks)),
        Section("row-lora", "Row LoRA", [figures.row_curves(events)] if rows else []),
        Section("data", "Data", [insights.partition_bars(insight, tasks)] if insight else []),
        Section("audit", "Audit", _audit(folder)),
        Section("cost", "Cost", [_cost_table(events)]),
        Section("notes", "Notes", [_notes(events)]),
        Section("configuration", "Configuration", [_config(folder)]),
    ]
    about = [_about(start), caption(scores), *planted(events)]
    return f"{title_of(start['method'])} on {start['source']}", about, sections


def write_comparison_report(out: Path, comparison: Mapping[str, Any]) -> Path:
    """Write the report of a comparison."""
    metric, draws = metric_of(comparison["metric"]), len(comparison.get("draws") or ())
    repeated = f"seeds {', '.join(map(str, comparison['seeds']))}" + (f"; {draws} draws of rows" if draws > 1 else "")
    about = f"{metric.title} on each client's own test rows; {repeated}"
    path, title = out / "report.html", f"Comparison on {comparison['source']}"
    lines = [about, caption(_summed(comparison))]
    write_text(path, page(title, lines, comparison_sections(out, comparison), finding(comparison)))
    return path


def _summed(comparison: Mapping[str, Any]) -> dict[str, float]:
    """Client → its scores under all methods together."""
    return {c: sum(one["per_client"][c] for one in comparison["methods"].values()) for c in comparison["tasks"]}


def comparison_sections(out: Path, comparison: Mapping[str, Any]) -> list[Section]:
    """Sections of the report of a comparison."""
    blocks, higher = comparison["methods"], metric_of(comparison["metric"]).higher_is_better
    titles = {name: block.get("title") or title_of(name) for name, block in blocks.items()}
    few = {**comparison, "tasks": {c: comparison["tasks"][c] for c in shown(_summed(comparison), higher)}}
    curves, notes = compared.method_curves(comparison, titles), map(paragraph, conditions(comparison))
    first = next(iter(blocks.values()))["runs"][:1]
    judged = grid_table(verdict_grid(comparison))
    made = [code(comparison["command"])] if comparison.get("command") else []
    made += [_config(RunFolder(Path(run))) for run in first if RunFolder(Path(run)).config.is_file()]
    return [
        Section(
            "scores", "Scores", [compared.score_table(few, titles), *notes, compared.score_bars(few, titles), curves]
        ),
        Section("gains", "Differences", [judged, *map(paragraph, who(comparison)), compared.gain_map(few, titles)]),
        Section("cost", "Budgets", [compared.cost_plot(few, titles), grid_table(budget_grid(comparison))]),
        Section("audit", "Audit", _audits(blocks)),
        Section("words", "Words", [compared.words(comparison, titles)]),
        Section("runs", "Runs", [compared.links(out, comparison)]),
        Section("settings", "Command and settings", made),
    ]


def write_reports(
    out: Path, comparison: Mapping[str, Any], insight: int = 0, bases: Bases | None = None, rows: Rows | None = None
) -> Path:
    """Write the reports of a comparison and of each of its runs, with a look at so many test rows per client."""
    folders = [open_run(Path(path))[0] for block in comparison["methods"].values() for path in block["runs"]]
    insights.look_at_each(folders, insight, bases, rows)
    for folder in folders:
        write_report(folder)
    return write_comparison_report(out, comparison)


def write_sweep_reports(
    out: Path, sweep: Mapping[str, Any], write: Callable[[Path, Mapping[str, Any]], Path]
) -> tuple[Path, list[Path]]:
    """Write the report of a sweep, and those of its comparisons by ``write``, say ``write_reports``."""
    folders = [out / point["name"] for point in sweep["points"]]
    written = [write(folder, read_json(folder / "comparison.json")) for folder in folders]
    return write_sweep_report(out, sweep), written


def _about(start: Event) -> str:
    known = {k: v for k, v in start["versions"].items() if v and k != "commit"}
    versions = ", ".join(f"{name} {value}" for name, value in known.items())
    count = len(start["clients"])
    return (
        f"{count} client{'s' * (count > 1)}, {start['rounds']} rounds, {start['trainable_parameters']:,} trainable and "
        f"{start['shared_parameters']:,} shared parameters per client. {versions}."
    )


def _curves(events: Sequence[Event], tasks: Mapping[str, str], metric: str, scored: bool) -> list[str | Drawing]:
    scores: list[str | Drawing] = [figures.score_curves(events, tasks, metric)] if scored else []
    return [*scores, figures.loss_curves(events, tasks)]


def _scores_table(latest: Mapping[str, Event], tasks: Mapping[str, str]) -> str:
    if not latest:
        return paragraph("Not scored yet.")
    metrics = [metric_of(name) for name in metrics_in({name: 0 for event in latest.values() for name in event})]
    rows = [[c, tasks[c], *(m.text(latest[c].get(m.name)) for m in metrics)] for c in tasks if c in latest]
    means = (m.text(group_mean(e[m.name] for e in latest.values() if m.name in e)) for m in metrics)
    number = max(e["round"] for e in latest.values())
    head = paragraph(f"Test scores after round {number} on each client's own rows")
    rows.append(["mean", "", *means])
    return head + table(["client", "task", *(metric.title for metric in metrics)], rows, bold=len(rows) - 1)


def cost_rows(events: Sequence[Event]) -> tuple[list[str], list[list[str]]]:
    """What every round took, with ε where there is one: a head, and a line a round."""
    spent: dict[int, float] = {}
    for e in events:
        if e["event"] == "client" and "epsilon" in e:
            spent[e["round"]] = max(spent.get(e["round"], 0.0), e["epsilon"])
    rows = [
        [
            str(e["round"]),
            f"{e['seconds']:.1f}",
            f"{e['bytes_up'] / 1e6:.2f}",
            f"{e['bytes_down'] / 1e6:.2f}",
            f"{e['peak_memory']['process'] / 1e9:.2f}",
            *([f"{spent[e['round']]:.2f}" if e["round"] in spent else "–"] if spent else []),
        ]
        for e in events
        if e["event"] == "round"
    ]
    head = ["round", "training, s", "MB up", "MB down", "peak memory, GB"]
    return [*head, *(["epsilon, most of a client"] if spent else [])], rows


def _cost_table(events: Sequence[Event]) -> str:
    head, rows = cost_rows(events)
    return table(head, rows, words=()) if rows else ""


def _advice(folder: RunFolder, tasks: Mapping[str, str]) -> list[str | Drawing]:
    """Where a finished run's method has chosen on held-out rows."""
    known = advice(folder) if folder.final_scores.is_file() else {}
    told = {c: one for c in tasks if c.isdigit() and (one := known.get(int(c)))}
    if not told:
        return []
    words = [[client, tasks[client], str(one["rows"]), one["words"]] for client, one in told.items()]
    return [
        figures.sharing(told, tasks),
        table(["client", "task", "rows", "advice"], words, words=(1, 3)),
        paragraph(ABOUT),
    ]


ABOUT_ATTACKS = (
    "An attacker who has the base and what is seen tells training rows from others: .5 is guessing, 1 always right. In "
    "brackets the 95 % interval; ± is half of that over clients. Found: of training rows, with 1 % false alarms. "
    "Epsilon ≥: what the run must have told of a row, by the attack's success (95 %), of a mean the largest; promised "
    "≤: by its account. An attack is a lower bound: it finds leaks, and cannot prove that there are none."
)


def _audit(folder: RunFolder) -> list[str | Drawing]:
    """What attacks on a finished run have found, where they have been made."""
    audit = read_audit(folder)
    if audit is None:
        return []
    head, rows = leak_table(audit)
    said = (paragraph(f"{line[0].upper()}{line[1:]}.") for line in sentences(audit))
    return [*said, table(head, rows, words=(1, 2)), paragraph(ABOUT_ATTACKS)]


def _audits(blocks: Mapping[str, Any]) -> list[str | Drawing]:
    """The means of all runs of a comparison that have been attacked."""
    made, head = list[list[str]](), list[str]()
    for block in blocks.values():
        for run in block["runs"]:
            if audit := read_audit(RunFolder(Path(run))):
                head, rows = leak_table(audit)
                made += [[block["title"], Path(run).name, *row[1:]] for row in rows if row[0] == "mean"]
    if not made:
        return []
    return [table(["method", "run", *head[1:]], made, words=(0, 1, 2, 3)), paragraph(ABOUT_ATTACKS)]


def planted(events: Sequence[Event]) -> list[str]:
    """What has to be said beside every score of a run with canaries."""
    return [line for line in notes(events) if line.startswith("data.canaries: ")]


def notes(events: Sequence[Event]) -> list[str]:
    """What a reader should know, each line once."""
    lines = [e["text"] for e in events if e["event"] == "note"]
    lines += [
        f"client {e['client']} set aside in round {e['round']}: {e['reason']}"
        for e in events
        if e["event"] == "client_failed"
    ]
    return list(dict.fromkeys(lines))


def _notes(events: Sequence[Event]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in notes(events))
    return f"<ul>{items}</ul>" if items else ""


def _config(folder: RunFolder) -> str:
    return code(folder.config.read_text(encoding="utf-8"))
