"""Every command of the README's bash block runs, in order, on fewer rows; so do its Python and its method in a file."""

import re
import shlex
from pathlib import Path

import pytest

from micro import call

ROOT = Path(__file__).parent.parent
SMALLER = ["--rounds", "1", "--set", "data.train_limit=8", "--set", "data.test_limit=4"]
SHORTER = {"train_limit=100": "train_limit=8, test_limit=4", "rounds=4": "rounds=1", "[0, 1, 2]": "[0]"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    (block,) = blocks("bash")
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]


def test_the_first_commands_are_the_demo_and_the_tests():
    assert [line.split("#")[0].strip() for line in blocks("")[0].splitlines()] == ["make demo", "make test"]


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for program, name, *rest in commands():
        assert program == "fedalt"
        done = call(name, *rest, *(SMALLER if name in ("run", "compare") and "--resume" not in rest else ()))
        assert done.code == 0, (name, rest, done.err)
    assert Path("client3/mixer.safetensors").is_file()
    assert Path("client3-static/adapter_model.safetensors").is_file()
    assert Path("runs/three-seeds/comparison.json").is_file()


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("python")[0]
    for long, short in SHORTER.items():
        assert long in code
        code = code.replace(long, short)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert Path("client3-lora/mixer.safetensors").is_file()
    assert Path("table1.tex").is_file()


@pytest.mark.slow
def test_the_method_of_the_readme_runs_from_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_prox.py").write_text(blocks("python")[1], encoding="utf-8")
    (line,) = re.findall(r"`fedalt (compare .*my_prox.py:MyProx.*)`", README)
    done = call(*shlex.split(line), *SMALLER)
    assert done.code == 0, done.err
    assert "my_prox" in Path("runs/prox/comparison.json").read_text(encoding="utf-8")
