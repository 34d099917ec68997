"""Bad inputs that attackers and accidents came upon, each in one line; those by kind are in ``test_bad_inputs.py``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedalt.runs.rounds
from fedalt.files import write_json
from micro import call, finished, labelled_table, model_folder, refused, settings, shared_data, write_yaml


def validated(folder: Path, **changes: Any) -> str:
    """The error line of ``fedalt validate``."""
    return refused("validate", write_yaml(folder / "x.yaml", settings(folder / "run", **changes)))


# ---------------------------------------------------------------------------------------------------------------- rows


def test_text_and_label_are_one_column(tmp_path: Path) -> None:
    changes = {"data__text_columns": ["sentence"], "data__label_column": "sentence", "data__clients": 2}
    line = validated(tmp_path, data=labelled_table(header=True), **changes)
    assert line.endswith('data.label_column = "sentence": is a column of the text, too'), line


def test_names_of_columns_for_a_file_that_has_them(tmp_path: Path) -> None:
    table = labelled_table(header=True)
    line = validated(tmp_path, data=table, data__columns=["sentence", "label"], data__clients=2)
    assert line.endswith(".tsv:1: is a header line; leave data.columns out, which is for files without one")


def test_a_client_of_eight_digits(tmp_path: Path) -> None:
    """A list of as many clients would not fit into memory."""
    shutil.copytree(shared_data(), tmp_path / "rows")
    (tmp_path / "rows/train/local_training_1.json").rename(tmp_path / "rows/train/local_training_99999999.json")
    (tmp_path / "rows/test/local_testing_1.jsonl").rename(tmp_path / "rows/test/local_testing_99999999.jsonl")
    line = validated(tmp_path, data=tmp_path / "rows")
    assert "99999999" in line and len(line) < 300


# --------------------------------------------------------------------------------------------------------------- models


def with_template(folder: Path, template: str) -> Path:
    model = model_folder(folder / "model")
    (model / "chat_template.jinja").write_text(template)
    return model


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ message.content }}",
        "{{ nothing.at.all }}",
        "{{ messages[99].content }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_broken_chat_template(tmp_path: Path, template: str) -> None:
    line = validated(tmp_path, model=with_template(tmp_path, template), data__template="chat")
    assert line.startswith("client 0: data.template: chat: the tokenizer's template refuses turns of user: ")
    assert len(line) < 400


def test_code_of_a_model_is_never_run_and_nobody_is_asked(tmp_path: Path) -> None:
    """Each of its files would write another one."""
    model, ran = model_folder(tmp_path / "model"), tmp_path / "ran"
    for name, classes in {
        "config.json": ["AutoConfig", "AutoModelForCausalLM", "AutoModel"],
        "tokenizer_config.json": ["AutoTokenizer"],
    }.items():
        about = json.loads((model / name).read_text())
        about["auto_map"] = {one: [f"code.{one}", None] if one == "AutoTokenizer" else f"code.{one}" for one in classes}
        write_json(model / name, about)
    (model / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    values = settings(tmp_path / "run", model)
    done = call("validate", write_yaml(tmp_path / "x.yaml", values), stdin="y\ny\n")
    assert done.code in (0, 2) and "y/N" not in done.out + done.err, "known classes go without their own code"
    about = json.loads((model / "config.json").read_text()) | {"model_type": "mine", "architectures": ["Mine"]}
    write_json(model / "config.json", about)
    done = call("validate", tmp_path / "x.yaml", stdin="y\ny\n")
    assert done.code == 2 and "y/N" not in done.out + done.err
    assert done.error.startswith(f"model.name: {model} ") and len(done.error) < 600
    assert not ran.exists()


# ------------------------------------------------------------------------------------------------------------- machines


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(fedalt.runs.rounds.Loop, "round", fail)
    line = refused("run", write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run")))
    assert line.startswith(
        "too little memory; less is needed with a smaller training.batch_size, data.cutoff or lora.r"
    )


def test_certs_into_the_folder_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("x")
    assert refused("certs", ".", "--sites", 1) == ".: exists already; keys are never overwritten, choose another folder"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "mine.txt").unlink()
    assert refused("certs", ".", "--sites", 1).startswith(".: ") or (tmp_path / "keys/client_0.pub").is_file()


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("line", ['{"event": "round", "rou', "{}", "3", "[" * 10_000, '{"event": 1e', "\x00"])
def test_a_damaged_line_of_the_log_before_the_last(tmp_path: Path, line: str) -> None:
    shutil.copytree(finished(), tmp_path / "run")
    (tmp_path / "run/digests.json").unlink()
    log = tmp_path / "run/events.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:3], line, *lines[3:]]) + "\n")
    said = f"{log}:4: damaged (no event)"
    for command in ("report", "onboard"):
        assert refused(command, tmp_path / "run") == said
    values = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert refused("run", write_yaml(tmp_path / "x.yaml", values), "--out", tmp_path / "run", "--resume") == said
