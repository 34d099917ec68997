"""Every command of the README's bash block runs, in order, on fewer rows."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from fedalt.cli import main

ROOT = Path(__file__).parent.parent
SMALLER = ["--rounds", "1", "--set", "data.train_limit=8", "--set", "data.test_limit=4"]


def commands() -> list[list[str]]:
    block = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block
    return [shlex.split(line, comments=True) for line in block[1].splitlines() if line.strip()]


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    for command in commands():
        trains = command[1] in ("run", "compare") and "--resume" not in command
        monkeypatch.setattr(sys, "argv", [*command, *(SMALLER if trains else ())])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, (command, capsys.readouterr().err)
    assert Path("client3/mixer.safetensors").is_file()
    assert Path("client3-static/adapter_model.safetensors").is_file()
    assert Path("runs/three-seeds/comparison.json").is_file()
