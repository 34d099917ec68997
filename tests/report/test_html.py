"""report.html: every figure, one file, no network, and other people's text stays text."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from fedalt.comparisons.statistics import half_width
from fedalt.comparisons.tables import finding
from fedalt.config import load_config
from fedalt.report.html import write_comparison_report, write_report
from fedalt.report.page import SCRIPT
from fedalt.runs.folder import RunFolder
from micro import (
    CLIENTS,
    call,
    data_folder,
    events,
    finished,
    of_kind,
    rows,
    run_here,
    settings,
    write_rows,
    write_yaml,
)

QUICK = {"federation__rounds": 2, "training__local_epochs": 1}
HOSTILE = '</script><script src="https://evil.example/x.js"></script><img src=https://evil.example/y onerror=alert(1)>'


class Page(HTMLParser):
    """Everything a browser would look at: tags with their attributes, text, and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        else:
            self.text.append(data)

    @property
    def figures(self) -> dict[str, list[Any]]:
        """Anchor and traces of every figure."""
        return {anchor: data for script in self.scripts[1:-1] for anchor, data, _ in [call_of(script)]}


def call_of(script: str) -> tuple[str, list[Any], str]:
    """Anchor, data and whatever else than these and the layout a script hands to ``Plotly.newPlot``."""
    decoder = json.JSONDecoder()
    before, rest = script.split("Plotly.newPlot(", 1)
    parts = []
    for _ in range(3):
        value, end = decoder.raw_decode(rest.lstrip(", \n"))
        rest = rest.lstrip(", \n")[end:]
        parts.append(value)
    return parts[0], parts[1], before + rest


def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@cache
def fedalt_page() -> Page:
    return page(finished() / "report.html")


def loads_nothing(html: Page) -> None:
    """No tag makes the browser fetch anything, and no script but Plotly's own mentions an address."""
    for tag, attributes in html.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster", "background"):
            value = attributes.get(name) or ""
            assert not re.match(r"\s*(https?:)?//", value), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    bundle, *own, keys = html.scripts
    assert bundle == get_plotlyjs()
    assert keys == SCRIPT
    for script in own:
        assert set(re.findall(r"https?:[^\"', ]*", call_of(script)[2])) <= {"https://plot.ly"}  # of a hidden button


# ------------------------------------------------------------------------------------------------------- one run


def test_a_fedalt_report_has_every_figure_with_the_runs_numbers() -> None:
    figures = fedalt_page().figures
    assert list(figures) == ["score-curves", "loss", "similarity", "alpha", "row", "partition"]
    loss, scores, alpha, gap = (figures[anchor] for anchor in ("loss", "score-curves", "alpha", "row"))
    assert "each client's last step" in " ".join(fedalt_page().text), "which is what the log has"
    clients = of_kind(finished(), "client")
    assert [trace["y"] for trace in loss] == [
        [e["loss"] for e in clients if e["client"] == client] for client in range(CLIENTS)
    ]
    assert [trace["name"] for trace in loss] == [f"{client} task{client}" for client in range(CLIENTS)]
    assert len(scores) == 2 * CLIENTS
    after = [e["rouge1"] for e in of_kind(finished(), "scores") if (e["client"], e["point"]) == (0, "after")]
    assert scores[0]["y"] == after
    assert alpha[0]["z"] == [
        next(e["alpha"] for e in clients if (e["round"], e["client"]) == (3, client)) for client in range(CLIENTS)
    ]
    rounds = of_kind(finished(), "round")
    assert gap[0]["y"] == [e["product_gap"] for e in rounds]
    assert gap[1]["y"] == [e["row_lora_drift"] for e in rounds[1:]]


def test_tables_hold_the_scores_and_the_cost() -> None:
    text = " ".join(fedalt_page().text)
    final = json.loads((finished() / "results" / "final_scores.json").read_text())["last"]
    assert "Test scores after round 3" in text
    for client in range(CLIENTS):
        assert re.search(rf"{client}\s+task{client}\s+{final['clients'][str(client)]['rouge1']:.1f}", text)
    assert re.search(rf"mean\s+{final['mean']:.1f}", text)
    assert "MB up" in text
    assert "peak memory, GB" in text
    assert "mixer_init: kaiming" in text, "the resolved configuration is there"


def test_a_report_loads_nothing() -> None:
    loads_nothing(fedalt_page())


def test_a_method_without_a_mixer_has_no_mixer_figures() -> None:
    assert list(page(finished("local") / "report.html").figures) == ["score-curves", "loss", "similarity", "partition"]


def test_the_list_at_the_top_leads_to_every_section() -> None:
    tags = fedalt_page().tags
    sections = [attributes["id"] for tag, attributes in tags if tag == "section"]
    links = [attributes["href"] for tag, attributes in tags if tag == "a"]
    assert len(sections) == len(set(sections)) > 5
    assert links[: len(sections)] == [f"#{anchor}" for anchor in sections]


def test_every_client_has_a_key_in_the_legend() -> None:
    keys = [attributes for tag, attributes in fedalt_page().tags if attributes.get("data-figure") == "score-curves"]
    traces = fedalt_page().figures["score-curves"]
    assert len(keys) == CLIENTS
    for client, key in enumerate(keys):
        mine = [place for place, trace in enumerate(traces) if trace["name"].startswith(f"{client} ")]
        assert json.loads(key["data-traces"] or "") == mine
        assert len(mine) == 2, "after and before aggregation"


def test_a_report_halfway_through_a_run(tmp_path: Path) -> None:
    """From a log that stops before the first scores."""
    run = tmp_path / "run"
    shutil.copytree(finished(), run)
    kept = []
    for event in events(run):
        if event["event"] == "scores":
            break
        kept.append(event)
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    (run / "results" / "final_scores.json").unlink()
    assert call("report", run).code == 0
    html = page(run / "report.html")
    assert "Not scored yet." in " ".join(html.text)
    assert list(html.figures) == ["loss", "alpha", "row"]


def test_notes_and_failures_are_listed_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished(), run)
    lines = [
        {"event": "note", "round": 0, "text": "client 1: 2 rows skipped"},
        {"event": "note", "round": 2, "text": "client 1: 2 rows skipped"},
        {"event": "client_failed", "round": 2, "client": 1, "reason": "loss is nan"},
    ]
    with (run / "events.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    write_report(RunFolder(run))
    text = " ".join(page(run / "report.html").text)
    assert text.count("client 1: 2 rows skipped") == 1
    assert "client 1 set aside in round 2: loss is nan" in text


# -------------------------------------------------------------------------------------------------- hostile text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task names, categories, rows and the folder's own name try to leave their place."""
    root = tmp_path_factory.mktemp("hostile")
    folder = data_folder(root / "<b>rows<script>alert(1)<" / "x", clients=2)
    for client in range(2):
        for path, count in (("train/local_training_{}.json", 6), ("test/local_testing_{}.jsonl", 2)):
            bad = [{**row, "task": HOSTILE, "category": HOSTILE, "output": HOSTILE} for row in rows(client, count)]
            write_rows(folder / path.format(client), bad, lines=False)
    run_here(settings(root / "run", data=folder, **QUICK, data__cutoff=200))
    write_report(RunFolder(root / "run"))
    return root


def test_text_from_rows_stays_text(hostile: Path) -> None:
    html = page(hostile / "run" / "report.html")
    loads_nothing(html)
    assert not any(tag == "img" for tag, _ in html.tags)
    assert len(html.scripts) == len(html.figures) + 2, "no script has been added, none has been cut short"
    assert list(html.figures) == ["score-curves", "loss", "alpha", "row"]
    text = " ".join(html.text)
    assert HOSTILE in text
    assert "<b>rows<script>alert(1)<" in text


def test_names_in_figures_are_whole(hostile: Path) -> None:
    loss = page(hostile / "run" / "report.html").figures["loss"]
    assert [trace["meta"] for trace in loss] == [f"{client} {HOSTILE}" for client in range(2)]
    assert [trace["name"] for trace in loss] == [f"{client} {HOSTILE}"[:21] + "…" for client in range(2)]


# ------------------------------------------------------------------------------------------------------- with insight


def test_a_look_into_the_models_is_shown_with_its_numbers() -> None:
    """The client × client matrix, and every token of the shaded rows with its weight."""
    run = finished(report__insight=2)
    html, insight = page(run / "report.html"), json.loads((run / "results" / "insight.json").read_text())
    (matrix,) = html.figures["matrix"]
    assert matrix["z"] == insight["matrix"]
    assert [len(row) for row in matrix["z"]] == [CLIENTS] * CLIENTS
    titles = [values["title"] for tag, values in html.tags if tag == "span" and "--a:" in (values.get("style") or "")]
    rows = [row["tokens"] for seen in insight["alpha"]["clients"].values() for row in seen["rows"]]
    assert titles == [f"{a:.2f}" for tokens in rows for _, a in tokens]
    assert len(rows) == 2 * CLIENTS and min(map(len, rows)) > 10
    assert sum(values.get("class") == "tokens" for _, values in html.tags) == len(rows)


# ----------------------------------------------------------------------------------------------------- comparisons


def compared(folder: Path, values: dict[str, Any]) -> Path:
    config = write_yaml(folder / "x.yaml", values | {"out": str(folder / "all")})
    done = call("compare", config, "--methods", "local,fedalt", "--seeds", "0,1")
    assert done.code == 0, done.err
    return folder / "all"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    return compared(folder, settings(folder))


def test_a_comparisons_report(comparison: Path) -> None:
    html = page(comparison / "report.html")
    loads_nothing(html)
    figures = html.figures
    assert list(figures) == ["bars", "method-curves", "gain", "cost-plot"]
    gain, scores = figures["gain"], figures["bars"]
    methods = json.loads((comparison / "comparison.json").read_text())["methods"]
    local, own = (list(methods[name]["per_client"].values()) for name in ("local", "fedalt"))
    assert own != local
    assert [row[0] for row in gain[0]["z"]] == pytest.approx([b - a for a, b in zip(local, own, strict=True)])
    assert [(trace["name"], trace["x"]) for trace in scores] == [("Local", local), ("FedALT", own)]
    halves = [half_width([run[c] for run in methods["fedalt"]["per_seed"].values()]) for c in ("0", "1", "2")]
    assert scores[1]["error_x"]["array"] == pytest.approx(halves)
    curves = figures["method-curves"]
    assert [(trace["name"], trace["x"]) for trace in curves] == [("Local", [1, 2, 3]), ("FedALT", [1, 2, 3])]
    assert curves[1]["y"][-1] == pytest.approx(methods["fedalt"]["mean"])
    text = " ".join(html.text)
    assert finding(json.loads((comparison / "comparison.json").read_text())) in text
    for word in (
        "Local",
        "FedALT",
        "worst client",
        "10th percentile",
        "gain over Local",
        "seeds 0, 1",
        f"{methods['fedalt']['mean']:.1f}",
    ):
        assert word in text


def test_score_against_cost_has_a_point_per_method_and_cost(comparison: Path) -> None:
    points = page(comparison / "report.html").figures["cost-plot"]
    methods = json.loads((comparison / "comparison.json").read_text())["methods"]
    expected = []
    for block in methods.values():
        expected += [([(block["bytes_up"] + block["bytes_down"]) / 1e6], [block["mean"]])]
        expected += [([block["seconds"]], [block["mean"]])]
    assert [(trace["x"], trace["y"]) for trace in points] == expected


def test_a_comparison_shows_what_else_is_known(comparison: Path, tmp_path: Path) -> None:
    """Titles, confidence, harmed clients and tests, where ``comparison.json`` holds them."""
    known = json.loads((comparison / "comparison.json").read_text())
    gains = {str(client): 1.5 + client for client in range(CLIENTS)}
    against = {
        **{"difference": 2.5, "ci95": 1.25, "p": 0.031, "p_adjusted": 0.062, "verdict": "not worse", "clients": 3},
        **{"beyond": [-1.0, 6.25], "sources": {"clients": 1.5, "seeds": 0.7}},
    }
    known["methods"]["local"] |= {"title": "Alone", "ci95": None, "gain_per_client": dict.fromkeys(gains, 0.0)}
    known["methods"]["fedalt"] |= {"title": "Ours", "ci95": 0.5, "gain_per_client": gains, "harmed": 1}
    known["methods"]["fedalt"]["against"] = against
    known["methods"]["local"]["against"] = None
    known["reference"] = "local"
    known["methods"] = {n: b | {"runs": [str(tmp_path / n)]} for n, b in known["methods"].items()}
    html = page(write_comparison_report(tmp_path, known))
    text = " ".join(html.text)
    for word in (
        "Alone",
        "Ours",
        "± 0.5",
        "clients harmed",
        "+2.5 ± 1.2",
        "-1.0 to +6.2",
        ".062",
        "not worse",
        "Against Alone and Local",
        "Ours clients 1.5, seeds 0.7",
        "Alone: not 1 point better than Ours (ROUGE-1, 3 clients, 2 seeds).",
        "two one-sided tests find the difference to be smaller than the margin",
        "always each client's most frequent training answer",
    ):
        assert word in text
    assert html.figures["gain"][0]["z"] == [[gain] for gain in gains.values()]
    assert [t["error_y"]["array"] for t in html.figures["cost-plot"] if "error_y" in t] == [[0.5], [0.5]]


def test_text_from_rows_stays_text_in_a_comparison(hostile: Path) -> None:
    values = load_config(hostile / "run" / "config.yaml").model_dump(mode="json")
    html = page(compared(hostile, values) / "report.html")
    loads_nothing(html)
    assert len(html.scripts) == 2 + len(html.figures) == 6
    assert not any(tag == "img" for tag, _ in html.tags)
    assert HOSTILE in " ".join(html.text)


def test_a_comparisons_links_lead_to_its_runs(comparison: Path) -> None:
    tags = page(comparison / "report.html").tags
    links = [attributes["href"] or "" for tag, attributes in tags if tag == "a"]
    links = [link for link in links if not link.startswith("#")]
    assert len(links) == 4
    for link in links:
        assert (comparison / link).is_file()


def test_a_report_is_the_same_for_equal_runs(tmp_path: Path) -> None:
    """No time of day, no random order and no random ids: only what was measured may differ."""
    shutil.copytree(finished(), tmp_path / "run")
    write_report(RunFolder(tmp_path / "run"))
    assert (tmp_path / "run" / "report.html").read_bytes() == (finished() / "report.html").read_bytes()
