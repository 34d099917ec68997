"""Reports in a real browser: everything is drawn, nothing is fetched, nothing is wider than a phone, dark and light."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from micro import call, finished, rows, settings, shared_data, write_rows, write_yaml
from report.browser import DESKTOP, PHONE, Scheme, Tab, browser, find_browser

NEEDED = "FEDALT_TESTS_NEED_A_BROWSER"
pytestmark = pytest.mark.skipif(
    NEEDED not in os.environ and (find_browser() is None or find_spec("websocket") is None),
    reason="needs Chromium (apt-get install chromium) and websocket-client (pip install websocket-client)",
)
MANY = 21
HOSTILE = "</script><img src=https://evil.example/y onerror=alert(1)><b>bold</b><a href='javascript:alert(2)'>link</a>"
FIGURES = """[...document.querySelectorAll(".plotly-graph-div")].map(figure => [
  figure.id,
  figure.classList.contains("js-plotly-plot"),
  figure.querySelectorAll("svg .trace, svg .hm image, svg .bars .point").length,
])"""
COLOURS = """[
  getComputedStyle(document.body).backgroundColor,
  getComputedStyle(document.querySelector(".xtick text")).fill,
  getComputedStyle(document.querySelector(".legend")).color,
]"""
SHADED = """[...document.querySelectorAll("details[open] .tokens span")].map(token => [
  token.textContent,
  token.getBoundingClientRect().width,
  getComputedStyle(token).backgroundColor,
])"""
TOO_WIDE = """[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg"))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a comparison, of its runs, with all figures, of a sweep, and of more clients than fit."""
    folder = tmp_path_factory.mktemp("reports")
    config = write_yaml(folder / "x.yaml", settings(folder / "all", report__insight=3))
    done = call("compare", config, "--methods", "local,fedit,fedalt")
    assert done.code == 0, done.err
    quick = {"federation__rounds": 1, "training__local_epochs": 1, "report__insight": 1}
    sweep = write_yaml(folder / "sweep.yaml", settings(folder / "sweep", **quick))
    done = call("compare", sweep, "--methods", "local,fedit,ffa_lora", "--seeds", "0,1", "--sweep", "lora.r=2,16")
    assert done.code == 0, done.err
    many = settings(folder / "many", data=shared_data(clients=MANY), **quick)
    done = call("run", write_yaml(folder / "many.yaml", many))
    assert done.code == 0, done.err
    for client in range(2):
        bad = [{**row, "task": HOSTILE, "category": HOSTILE, "output": HOSTILE} for row in rows(client, 4)]
        write_rows(folder / f"data/train/local_training_{client}.json", bad, lines=False)
        write_rows(folder / f"data/test/local_testing_{client}.jsonl", bad, lines=True)
    hostile = settings(folder / "hostile", data=folder / "data", **quick, data__cutoff=200)
    done = call("run", write_yaml(folder / "hostile.yaml", hostile))
    assert done.code == 0, done.err
    runs = {name: folder / "all" / f"{name}-seed3" for name in ("local", "fedit", "fedalt")}
    paths = {"comparison": folder / "all", **runs, **{name: folder / name for name in ("many", "hostile", "sweep")}}
    return {name: path / "report.html" for name, path in paths.items()}


EXPECTED = {
    "comparison": ["bars", "method-curves", "gain", "cost-plot"],
    "sweep": ["by-value", "by-bytes"],
    "local": ["score-curves", "loss", "matrix", "similarity", "partition"],
    "fedit": ["score-curves", "loss", "matrix", "partition"],
    "fedalt": ["score-curves", "loss", "matrix", "similarity", "alpha", "histogram", "row", "partition"],
    "hostile": ["score-curves", "loss", "matrix", "similarity", "alpha", "histogram", "row", "partition"],
    "many": ["score-curves", "loss", "matrix", "similarity", "alpha", "histogram", "row", "partition"],
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", EXPECTED)
def test_a_report_in_a_browser(
    tab: Tab, reports: dict[str, Path], name: str, size: tuple[int, int], scheme: Scheme
) -> None:
    visit = tab.open(reports[name], size, scheme)
    assert visit.errors == []
    assert [url for url in visit.requests if not url.startswith("data:")] == [reports[name].as_uri()]
    drawn = tab.evaluate(FIGURES)
    assert [figure for figure, _, _ in drawn] == EXPECTED[name]
    assert all(plotted and traces for _, plotted, traces in drawn), drawn
    assert tab.evaluate("document.documentElement.scrollWidth") == size[0]
    assert tab.evaluate(TOO_WIDE) == []
    background, *texts = tab.evaluate(COLOURS)
    assert set(texts) == {"rgb(28, 30, 33)" if scheme == "light" else "rgb(228, 230, 234)"}
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 24, 28)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["fedalt", "hostile", "many"])
def test_tokens_are_shaded_by_their_weight(tab: Tab, reports: dict[str, Path], name: str, scheme: Scheme) -> None:
    tab.open(reports[name], PHONE, scheme)
    texts, widths, colours = zip(*tab.evaluate(SHADED), strict=True)
    assert "".join(texts).strip()
    assert max(widths) > 0
    assert len(set(colours)) > 3, "not one colour for all"


FIRST = """[...document.querySelectorAll("#scores .scroll")].map(table => {
  table.scrollLeft = table.scrollWidth;
  const [head, ...others] = table.querySelectorAll("tr:first-child > *");
  return [head.getBoundingClientRect().left, head.getBoundingClientRect().width,
    others.at(-1).getBoundingClientRect().right];
})"""
GLARE = """[...document.querySelectorAll(".hm")].map(map => getComputedStyle(map).filter)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_the_first_column_stays_and_the_last_method_is_reached(
    tab: Tab, reports: dict[str, Path], scheme: Scheme
) -> None:
    tab.open(reports["comparison"], PHONE, scheme)
    left, width, right = tab.evaluate(FIRST)[0]
    assert 0 <= left < 20 and width < 130 and right <= PHONE[0]
    assert set(tab.evaluate(GLARE)) == {"none" if scheme == "light" else "brightness(0.7)"}
    assert tab.evaluate("document.querySelector('p.finding').textContent").startswith("FedALT: ")


def test_a_key_of_the_legend_hides_its_client(tab: Tab) -> None:
    tab.open(finished() / "report.html", DESKTOP, "light")
    visible = "document.getElementById('score-curves').data.map(trace => trace.visible ?? true)"
    assert tab.evaluate(visible) == [True] * 6
    click = "document.querySelector('[data-figure=score-curves]').click()"
    tab.evaluate(click)
    assert tab.evaluate(visible) == [False, False, True, True, True, True]
    tab.evaluate(click)
    assert tab.evaluate(visible) == [True] * 6


def test_a_request_and_an_error_would_be_noticed(tab: Tab, tmp_path: Path) -> None:
    """The visitor of the tests above is not blind."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<script src='http://127.0.0.1:9/x.js'></script><script>console.error('no'); alert('yes'); oops()</script>"
    )
    visit = tab.open(page, PHONE, "light")
    assert "http://127.0.0.1:9/x.js" in visit.requests
    assert len(visit.errors) == 4, visit.errors  # the file that is not there, the line, the dialog, the exception
