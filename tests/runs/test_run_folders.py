"""A run folder belongs to one process at a time, and what is damaged in it is never gone on with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedalt.files import only_one
from fedalt.runs.checkpoint import load_checkpoint, prune
from fedalt.runs.folder import claim_folder
from micro import call, data_folder, finished, refused, settings, shared_data, shared_model, tree, write_yaml


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished(), tmp_path / "run"))


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("round_*"))


# --- any present folder


def test_a_run_with_relative_paths_is_used_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "inside").mkdir(parents=True)
    shutil.copytree(shared_model(), tmp_path / "home" / "base")
    shutil.copytree(shared_data(), tmp_path / "home" / "rows")
    (tmp_path / "home" / "prompt.txt").write_text("Say: {instruction}\n")
    monkeypatch.chdir(tmp_path / "home")
    changes = {"federation__rounds": 1, "training__local_epochs": 1, "data__template": "prompt.txt"}
    values = settings(Path("mine"), Path("base"), Path("rows"), **changes)
    assert call("run", write_yaml(Path("x.yaml"), values)).code == 0
    assert call("run", "x.yaml", "--resume").code == 0
    monkeypatch.chdir(tmp_path / "home" / "inside")
    assert "equal to the run's own scores" in call("evaluate", "../mine").out
    monkeypatch.chdir(tmp_path)
    done = call("run", "--out", "home/mine", "--resume", "--rounds", "2")
    assert done.code == 0, done.err


# --- one process at a time

HOLD = """
import pathlib, sys
from fedalt.files import only_one
with only_one(pathlib.Path(sys.argv[1])):
    print(flush=True)
    input()
"""


def test_a_folder_that_another_process_uses(run: Path) -> None:
    before = tree(run)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout and other.stdout.readline()
        for option in ("--resume", "--overwrite"):
            line = refused("run", run / "config.yaml", "--out", run, option)
            assert line == f"{run}: another process uses this folder now; wait for its end"
        assert tree(run) == before
    finally:
        other.kill()
        other.wait()
    assert call("run", run / "config.yaml", "--out", run, "--resume").code == 0


def test_a_lock_ends_with_its_block_and_leaves_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        with only_one(tmp_path), pytest.raises(Exception, match="another process"), only_one(tmp_path):
            pass
    assert not tree(tmp_path)


def test_what_is_overwritten_is_gone(tmp_path: Path) -> None:
    (tmp_path / "run/clients/0").mkdir(parents=True)
    (tmp_path / "run/clients/0/x").write_text("x")
    (tmp_path / "run/partition.json").write_text("{}")
    claim_folder(tmp_path / "run", "overwrite")
    assert not list((tmp_path / "run").iterdir())


# ------------------------------------------------------------------------------------------------------------- damage


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.unlink()
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def edit(path: Path) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "cohort": manifest["cohort"] + 1}))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped byte of a state": lambda last: flip(last / "clients/1.safetensors"),
    "a flipped byte of an upload": lambda last: flip(last / "uploads/1.safetensors"),
    "swapped states": lambda last: swap(last / "clients/0.safetensors", last / "clients/1.safetensors"),
    "swapped uploads": lambda last: swap(last / "uploads/0.safetensors", last / "uploads/1.safetensors"),
    "a state that is gone": lambda last: (last / "clients/1.safetensors").unlink(),
    "a number in the manifest": lambda last: edit(last / "manifest.json"),
    "another round's name": lambda last: last.rename(last.with_name("round_0017")) and None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(run: Path, damage: str) -> None:
    DAMAGE[damage](newest(run))
    line = refused("run", run / "config.yaml", "--out", run, "--resume", "--rounds", 5)
    assert line.startswith(f"{newest(run)}: damaged checkpoint ("), line
    assert line.endswith("remove this folder to resume one round earlier")


def test_a_state_of_another_client_is_found_without_digests(run: Path) -> None:
    """As in fedalt 0.1."""
    last = newest(run)
    manifest = json.loads((last / "manifest.json").read_text())
    (last / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k not in ("files", "digest")}))
    assert load_checkpoint(run / "checkpoints") is not None
    swap(last / "clients/0.safetensors", last / "clients/1.safetensors")
    assert "of client 1" in refused("run", run / "config.yaml", "--out", run, "--resume", "--rounds", 5)


def test_rounds_sort_by_number(tmp_path: Path) -> None:
    for number in (9999, 10000, 10001):
        (tmp_path / f"round_{number:04d}").mkdir()
    prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_10000", "round_10001"]


# ------------------------------------------------------------------------------------------- models that are not there


def test_evaluate_without_a_clients_folder(run: Path) -> None:
    shutil.rmtree(run / "clients/1")
    assert refused("evaluate", run) == f"{run}: no client 1 here; known: 0, 2"
    assert call("evaluate", run, "--client", 2).code == 0
    (run / "clients/x").mkdir()
    shutil.copy(run / "clients/0/fedalt_config.json", run / "clients/x")
    assert call("evaluate", run, "--client", 2).code == 0


def test_evaluate_where_sites_have_the_models(run: Path) -> None:
    shutil.rmtree(run / "clients")
    line = refused("evaluate", run)
    assert line == f"{run}: no client's model is here; of a run across sites each site has its own"


def test_onboarding_again_after_a_kill(run: Path, tmp_path: Path) -> None:
    newcomers = data_folder(tmp_path / "newcomers", 1)
    (run / ".newcomers.tmp/clients").mkdir(parents=True)  # what a kill leaves
    (run / ".newcomers.tmp/partition.json").write_text("{}")
    words = ("onboard", run, "--data", newcomers, "--epochs", 0)
    assert call(*words).code == 0
    assert not (run / ".newcomers.tmp").exists()
    line = refused(*words)
    assert line == f"{run / 'newcomers'}: holds a run already; add --overwrite to replace it"
    (run / "newcomers/mine.txt").write_text("x")
    assert call(*words, "--overwrite").code == 0
    assert not (run / "newcomers/mine.txt").exists()
    assert refused(*words, "--overwrite", "--out", run) == f"{run}: holds the run itself; choose another --out"
