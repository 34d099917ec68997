"""Every command of the README's bash block runs, in order, on fewer rows; and so does its Python."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from fedalt.cli import main

ROOT = Path(__file__).parent.parent
SMALLER = ["--rounds", "1", "--set", "data.train_limit=8", "--set", "data.test_limit=4"]
SHORTER = {"train_limit=100": "train_limit=8, test_limit=4", "rounds=4": "rounds=1", "[0, 1, 2]": "[0]"}


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[list[str]]:
    (block,) = blocks("bash")
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]


def test_the_first_commands_are_the_demo_and_the_tests():
    assert [line.split("#")[0].strip() for line in blocks("")[0].splitlines()] == ["make demo", "make test"]


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in commands():
        trains = command[1] in ("run", "compare") and "--resume" not in command
        monkeypatch.setattr(sys, "argv", [*command, *(SMALLER if trains else ())])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, (command, capsys.readouterr().err)
    assert Path("client3/mixer.safetensors").is_file()
    assert Path("client3-static/adapter_model.safetensors").is_file()
    assert Path("runs/three-seeds/comparison.json").is_file()


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in blocks("python"):
        exec(compile(shorter(code), "README.md", "exec"), {"__name__": "readme"})
    assert Path("client3-lora/mixer.safetensors").is_file()
    assert Path("table1.tex").is_file()


def shorter(code: str) -> str:
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    return code


@pytest.mark.slow
def test_the_method_of_the_readme_runs_from_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_prox.py").write_text(blocks("python")[1], encoding="utf-8")
    (line,) = re.findall(r"`fedalt (compare .*my_prox.py:MyProx.*)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    monkeypatch.setattr(sys, "argv", ["fedalt", *shlex.split(line), *SMALLER])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, capsys.readouterr().err
    assert "my_prox" in Path("runs/prox/comparison.md").read_text(encoding="utf-8")
