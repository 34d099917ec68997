"""What a shell offers after Tab."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedalt.cli import complete
from fedalt.cli.recipes import packaged
from fedalt.registry import METHODS
from micro import ENVIRONMENT


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def offered(line: str, shell: str = "bash") -> list[str]:
    """What the installed command tells a shell, for the last word of a line."""
    asked = {"_FEDALT_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        asked |= {"COMP_WORDS": line, "COMP_CWORD": str(len(shlex.split(line)) - (not line.endswith(" ")))}
    else:
        asked |= {"_TYPER_COMPLETE_ARGS": line}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("fedalt"))],
        env=os.environ | ENVIRONMENT | asked,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def names(offers: complete.Offers) -> list[str]:
    return [one if isinstance(one, str) else one[0] for one in offers]


def test_the_shell_is_told() -> None:
    assert offered("fedalt ru") == ["run"]
    assert offered("fedalt compare --methods local,fedsa") == ["local,fedsa_lora"]
    assert offered("fedalt metrics rouge") == ["rouge1", "rouge2", "rougeL"]
    assert offered("fedalt run --dtype b") == ["bfloat16"]
    assert any("communication rounds" in line for line in offered("fedalt run --set federation.ro", "zsh"))


def test_methods_and_metrics() -> None:
    light = (
        "from fedalt.cli import app, complete; list(complete.methods('')); print('torch' in __import__('sys').modules)"
    )
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    ours = [name for name in METHODS.names() if METHODS.entry(name).origin == "fedalt"]  # other tests may add some
    assert names(complete.methods(""))[: len(ours)] == ours, "in the order of their modules, whatever is imported first"
    assert "exact_match" in names(complete.metrics(""))


def test_what_is_in_the_list_already_is_not_offered_again() -> None:
    offers = names(complete.listed(complete.methods)("local,fedit,"))
    assert "local,fedit,fedalt" in offers
    assert "local,fedit,local" not in offers


def test_configs_are_files_folders_and_recipes(tmp_path: Path) -> None:
    for name in ("mine.yaml", "notes.txt", "sub/deep.yml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names(complete.configs("")) == ["mine.yaml", "sub/", *packaged()]
    assert names(complete.configs("sub/"))[0] == "sub/deep.yml"
    assert names(complete.configs(f"{tmp_path}/m"))[0] == f"{tmp_path}/mine.yaml"


def test_run_folders(tmp_path: Path) -> None:
    for name in ("runs/one", "runs/compared/fedalt-seed0", "runs/swept/r=4/fedit-seed1", "other/two"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "runs" / "no-run").mkdir()
    assert names(complete.runs("")) == ["runs/compared/fedalt-seed0", "runs/one", "runs/swept/r=4/fedit-seed1"]
    assert names(complete.runs("other/")) == ["other/two"]
    assert names(complete.runs(f"{tmp_path}/other/t")) == [f"{tmp_path}/other/two"]


def test_settings_and_their_choices() -> None:
    keys = names(complete.settings("lo"))
    assert {"lora.r=", "data.partition.alpha=", "feddpa.samples=", "seed="} <= set(keys)
    assert not [key for key in keys if key.startswith("sections")]
    assert names(complete.settings("evaluation.stemmer=")) == ["evaluation.stemmer=true", "evaluation.stemmer=false"]
    assert names(complete.settings("training.order=s")) == ["training.order=strict", "training.order=bucketed"]
    assert "fedalt.rest_of_world_aggregator=krum" in names(complete.settings("fedalt.rest_of_world_aggregator="))
    assert names(complete.settings("nonsense=")) == names(complete.settings("lora.r=")) == []
