"""The documentation as a site: it builds strictly, asks no other server, and fits a phone, dark and light."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from report.browser import DESKTOP, PHONE, Scheme, browser, find_browser

pytest.importorskip("mkdocs", reason="needs pip install 'fedalt[docs]'")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PAGES = (
    "index",
    "concepts",
    "howto/compare",
    "reference/settings",
    "reference/commands",
    "reference/methods",
    "results",
    "deploy",
)
TOO_WIDE = """[...document.querySelectorAll(".md-content *")]
  .filter(e => !e.closest(".md-typeset__scrollwrap, pre, .highlight, svg, .headerlink"))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    written = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    made = ["reference/settings", "reference/commands", "reference/methods", "reference/api", "adr/index", "changelog"]
    assert written
    assert [page for page in (*written, *(f"{name}.html" for name in made)) if not (site / page).is_file()] == []


def test_no_page_names_a_file_of_another_server(site: Path) -> None:
    loaded = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")
    found = {(page.name, *loaded.findall(page.read_text(encoding="utf-8"))) for page in site.rglob("*.html")}
    assert {entry for entry in found if len(entry) > 1} == set()
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    if "FEDALT_TESTS_NEED_A_BROWSER" not in os.environ and (find_browser() is None or find_spec("websocket") is None):
        pytest.skip("needs Chromium and websocket-client")
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_in_a_browser(site: Path, tab, page: str, scheme: Scheme) -> None:
    for size in (PHONE, DESKTOP):
        visit = tab.open(site / f"{page}.html", size, scheme)
        assert visit.errors == []
        assert [url for url in visit.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert visit.page.evaluate(TOO_WIDE) == []
        assert visit.page.evaluate("document.body.dataset.mdColorScheme") == (
            "slate" if scheme == "dark" else "default"
        )
