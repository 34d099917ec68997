"""The table of models in the docs is what trying them gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.models import CASES, main

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def works(text: str) -> dict[str, str]:
    """Model → the first word of what its line says: yes, no or refused."""
    return dict(re.findall(r"^\| ([^|]+?) \| (yes|no|refused)", text, re.MULTILINE))


def test_a_model_is_tried(tmp_path: Path) -> None:
    assert main(["qwen3", "--out", str(tmp_path / "models.md")]) == 0
    assert works((tmp_path / "models.md").read_text()) == {"Qwen 3": "yes"}


@pytest.mark.slow
def test_every_model_does_what_the_docs_say(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path / "models.md")]) == 0
    seen = works((tmp_path / "models.md").read_text())
    assert seen == works(PAGE.read_text(encoding="utf-8"))
    assert len(seen) == len(CASES)
