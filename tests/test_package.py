"""What people install: the wheel, made from the source distribution, with its declared dependencies and no others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fedalt"
LARGEST = 8 * 2**20
IGNORED = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def call(*command: object, cwd: Path) -> str:
    """What a command prints; nothing of this repository is on its path."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ignored(folder: str, names: list[str]) -> set[str]:
    """What git does not look at; a pattern with a slash in front counts at the root alone."""
    here = [line for line in IGNORED if not line.startswith("/") or Path(folder) == ROOT]
    return shutil.ignore_patterns(".git", *(line.strip("/") for line in here))(folder, names)


def shipped() -> set[str]:
    """Files of the package, as their paths in the wheel."""
    paths = (path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(SOURCE.parent).as_posix() for path in paths}


def needed(about: Distribution, extras: Iterable[str] = ()) -> Iterator[Distribution]:
    """What one asks for, and what that asks for, again and again."""
    for text in about.requires or ():
        wanted = Requirement(text)
        if not wanted.marker or any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            found = distribution(wanted.name)
            yield found
            yield from needed(found, wanted.extras)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made in a copy: setuptools leaves files behind."""
    out = tmp_path_factory.mktemp("sdist")
    copy = out / "clone"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    call(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", cwd=copy)
    (made,) = out.glob("*.tar.gz")
    return made


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    call(*pip, "--wheel-dir", sdist.parent, sdist, cwd=sdist.parent)
    (made,) = sdist.parent.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def bare(wheel: Path) -> Path:
    """Programs of an environment with the wheel and the dependencies that it declares, linked from this one."""
    home = wheel.parent / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", home, cwd=wheel.parent)
    python = home / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", wheel, cwd=home)
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    (ours,) = distributions(name="fedalt", path=[str(site)])
    for found in needed(ours):
        for name in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(str(found.locate_file(name)))
    return python.parent


def test_the_source_distribution_has_tests_docs_and_recipes(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
    assert {f"src/{name}" for name in shipped()} | recipes <= names
    assert {"CITATION.cff", "LICENSE", "constraints.txt", "tests/test_package.py", "docs/security.md"} <= names


def test_the_wheel_has_all_of_the_package_and_no_more(wheel: Path) -> None:
    assert wheel.stat().st_size < LARGEST
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == shipped()


def test_the_environment_is_bare(bare: Path, tmp_path: Path) -> None:
    """fedalt comes from the wheel, and what it does not ask for is not there."""
    code = "import fedalt, importlib.util as util; print(fedalt.__file__, *map(util.find_spec, ('pytest', 'flwr')))"
    path, *others = call(bare / "python", "-c", code, cwd=tmp_path).split()
    assert Path(path).is_relative_to(bare.parent)
    assert others == ["None", "None"]


RECIPES = """
from importlib.resources import files
from fedalt.config import load_config
for path in sorted((files("fedalt") / "recipes").rglob("*.yaml")):
    load_config(path)
    print(path)
"""


def test_all_recipes_open(bare: Path, tmp_path: Path) -> None:
    found = call(bare / "python", "-c", RECIPES, cwd=tmp_path).splitlines()
    assert len(found) == len(list((SOURCE / "recipes").rglob("*.yaml")))


def test_the_command_trains_and_answers(bare: Path, tmp_path: Path) -> None:
    """A recipe by its name and the base model of the wheel, in a folder without anything."""
    small = ("--rounds", "1", "--set", "data.train_limit=4", "--set", "data.test_limit=1")
    assert "compare" in call(bare / "fedalt", "--help", cwd=tmp_path)
    assert "demo" in call(bare / "fedalt", "recipes", cwd=tmp_path)
    assert "GB" in call(bare / "fedalt", "validate", "demo", *small, cwd=tmp_path)
    call(bare / "fedalt", "run", "recipes/demo.yaml", *small, "--out", "mine", cwd=tmp_path)
    assert (tmp_path / "mine" / "report.html").is_file()
    assert call(bare / "fedalt", "generate", "mine", "--client", "3", "Say what this is about: a boat", cwd=tmp_path)
