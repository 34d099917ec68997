"""Some hundred bad inputs, by kind: each ends with exit code 2 and short lines, and nothing is left half."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fedalt.cli.complete import fields
from fedalt.config.hints import in_words
from micro import call, finished, model_folder, settings, shared_data, shared_model

pytestmark = pytest.mark.slow
MAY = " (may be taken)"
LONG = 600
"""Letters of an error line, at most."""
Case = tuple[str, Callable[[Path], list[Any]]]
"""What it is, and what makes it in a folder and says how the command is called."""

# ------------------------------------------------------------------------------------------------------------ settings

WRONG: dict[str, Any] = {
    "nested": {"a": [{"b": [1]}]},
    "digits": 10**4000,
    "nul": "a\0b",
    "long": "x" * 50_000,
    "huge": 1e30,
    "lists": [[[]]],
}
FITS = {"huge": "number", "nul": "text", "long": "text"}
"""Values that suit settings of a kind: a command may take them, too."""


def of_settings() -> Iterator[Case]:
    for key, field in fields().items():
        for name, value in WRONG.items():

            def make(folder: Path, key: str = key, value: Any = value) -> list[Any]:
                values = settings(folder / "run")
                *parents, last = key.split(".")
                section = values
                for parent in parents:
                    section = section.setdefault(parent, {})
                section[last] = value
                (folder / "x.yaml").write_text(yaml.safe_dump(values))
                return ["validate", folder / "x.yaml"]

            kind = in_words(field)
            yield f"{key}={name}{MAY if FITS.get(name, '-') in kind or 'list' in kind else ''}", make


# --------------------------------------------------------------------------------------------------------------- files


def text(content: str | bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def folder_of_that_name(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


LETTERS = "abcdefghi"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{one}: &{one} [{', '.join([f'*{before}'] * 10)}]\n" for before, one in pairwise(LETTERS)
)
TAKEN = {
    *(f"settings: {name}" for name in ("empty", "null", "braces")),  # the defaults
    *(f"config: {name}" for name in ("empty", "null", "braces")),  # a report shows what there is
}
DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": text(""),
    "null": text("null"),
    "number": text("3"),
    "list": text("[]"),
    "lists": text("[[[1]]]"),
    "braces": text("{}"),
    "wrong": text('{"base": 3, "last": [], "clients": 1, "run": {}, "event": []}'),
    "twice": text('{"method": "fedit", "method": "fedalt"}'),
    "deep": text("[" * 100_000),
    "deep pairs": text('{"a":' * 5000 + "1" + "}" * 5000),
    "digits": text('{"a": ' + "9" * 5000 + "}"),
    "cut": text('{"a": [1, 2'),
    "latin": text(b"caf\xe9: \xff"),
    "zeros": text(b"\0" * 1000),
    "bomb": text(BOMB),
    "pipe": pipe,
    "endless": endless,
    "folder": folder_of_that_name,
}


def in_a_run(name: str, *command: Any) -> Callable[[str], Callable[[Path], list[Any]]]:
    """Damage to a file of a finished run, on which a command is called."""

    def of(damage: str) -> Callable[[Path], list[Any]]:
        def make(folder: Path) -> list[Any]:
            run = folder / "run"
            shutil.copytree(finished(), run)
            path = max((run / "checkpoints").glob("round_*")) / "manifest.json" if name == "manifest" else run / name
            DAMAGE[damage](path)
            return [command[0], run, *command[1:]]

        return make

    return of


def given(name: str, *command: Any, **changes: str) -> Callable[[str], Callable[[Path], list[Any]]]:
    """A damaged file that the user gives; ``FILE`` in settings and in the command is its place."""

    def of(damage: str) -> Callable[[Path], list[Any]]:
        def make(folder: Path) -> list[Any]:
            file = folder / name
            DAMAGE[damage](file)
            values = settings(folder / "run", **{key: str(file) for key in changes})
            (folder / "x.yaml").write_text(yaml.safe_dump(values))
            places = {"FILE": file, "CONFIG": folder / "x.yaml", "OUT": folder / "out"}
            return [places.get(word, word) for word in command]

        return make

    return of


RESUMED = ["run", "CONFIG", "--resume"]
FILES: dict[str, Callable[[str], Callable[[Path], list[Any]]]] = {
    "settings": given("bad.yaml", "validate", "FILE", "--model", shared_model(), "--data", shared_data()),
    "rows.json": given("rows.json", "validate", "CONFIG", data__source="FILE"),
    "rows.jsonl": given("rows.jsonl", "validate", "CONFIG", data__source="FILE"),
    "rows.csv": given("rows.csv", "validate", "CONFIG", data__source="FILE"),
    "rows.parquet": given("rows.parquet", "validate", "CONFIG", data__source="FILE"),
    "template": given("template.txt", "validate", "CONFIG", data__template="FILE"),
    "partition": given("partition.json", "validate", "CONFIG", data__partition__file="FILE"),
    "plugin": given("plugin.py", "validate", "CONFIG", method="FILE"),
    "final_scores": in_a_run("results/final_scores.json", "evaluate"),
    "fedalt_config": in_a_run("clients/1/fedalt_config.json", "evaluate", "--client", "1"),
    "weights": in_a_run("clients/1/individual/adapter_model.safetensors", "evaluate", "--client", "1"),
    "mixer": in_a_run("clients/1/mixer.safetensors", "generate", "--client", "1", "Hello"),
    "events": in_a_run("events.jsonl", "report"),
    "config": in_a_run("config.yaml", "report"),
    "manifest": in_a_run("manifest", "onboard", "--data", str(shared_data())),
}


def of_files() -> Iterator[Case]:
    for name, of in FILES.items():
        for damage in DAMAGE:
            case = f"{name}: {damage}"
            yield case + MAY * (case in TAKEN or name == "events"), of(damage)  # a last line that is cut is passed over


# -------------------------------------------------------------------------------------------------------------- models


def _model(change: Callable[[Path], None]) -> Callable[[Path], list[Any]]:
    def make(folder: Path) -> list[Any]:
        model = model_folder(folder / "model")
        change(model)
        (folder / "x.yaml").write_text(yaml.safe_dump(settings(folder / "run", model)))
        return ["validate", folder / "x.yaml"]

    return make


def _of_own_code(model: Path) -> None:
    about = json.loads((model / "config.json").read_text())
    names = ("AutoConfig", "AutoModelForCausalLM")
    about |= {"model_type": "mine", "auto_map": {name: f"code.{name}" for name in names}}
    (model / "config.json").write_text(json.dumps(about))
    (model / "code.py").write_text(f"open({str(model / 'ran')!r}, 'w')")


def _not_a_number(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    next(iter(weights.values()))[0] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def _named(name: str) -> Callable[[Path], list[Any]]:
    def make(folder: Path) -> list[Any]:
        (folder / name).write_bytes(b"\0" * 100)
        return ["validate", "--model", folder / name]

    return make


def of_models() -> Iterator[Case]:
    yield "own code", _model(_of_own_code)
    yield "NaN", _model(_not_a_number)
    for file in ("config.json", "tokenizer.json", "model.safetensors", "generation_config.json"):
        for name, damage in DAMAGE.items():
            if name not in ("pipe", "endless"):  # Transformers itself opens these
                may = MAY * (file == "generation_config.json")  # Transformers passes over a broken one
                yield f"{file}: {name}{may}", _model(lambda model, file=file, damage=damage: damage(model / file))  # type: ignore[misc]
    for name in ("model.gguf", "model.bin", "model.safetensors", "model.pt"):
        yield f"--model {name}", _named(name)


# --------------------------------------------------------------------------------------------------------------- names

NAMES = {
    "long": "y" * 5000,
    "deep": "/".join(["y" * 200] * 100),
    "nul": "a\0b",
    "device": "/dev/null",
    "proc": "/proc/x/y",
}
OUTS = {
    "run": ["run", "CONFIG", "--out"],
    "compare": ["compare", "CONFIG", "--methods", "local", "--out"],
    "partition": ["partition", "CONFIG", "--clients", "2", "--out"],
    "export": ["export", "RUN", "--client", "0", "--out"],
    "onboard": ["onboard", "RUN", "--data", shared_data(), "--epochs", "0", "--out"],
    "certs": ["certs", "--sites", "1", "--out"],
    "recipes": ["recipes", "demo", "--out"],
}


def of_names() -> Iterator[Case]:
    for command, words in OUTS.items():
        for name, out in {**NAMES, "file": "FILE", "below": "BELOW"}.items():

            def make(folder: Path, words: list[Any] = words, out: str = out) -> list[Any]:
                (folder / "x.yaml").write_text(yaml.safe_dump(settings(folder / "run")))
                (folder / "file").write_text("mine")
                places = {"CONFIG": folder / "x.yaml", "RUN": finished(), "FILE": folder / "file"}
                places["BELOW"] = folder / "file" / "below"
                return [places.get(word, word) for word in [*words, out]]

            yield f"{command} --out {name}", make
    for words in (["evaluate"], ["report"], ["generate", "--client", "0", "x"], ["onboard"]):
        for name, run in NAMES.items():
            yield f"{words[0]} {name}", lambda folder, words=words, run=run: [*words[:1], run, *words[1:]]  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------------- options

NUMBERS = ("-1", "1e30", "nan", "9" * 5000, "x", "")
OPTIONS = {
    "certs --days": ["certs", "--sites", "1", "--out", "OUT", "--days"],
    "certs --sites": ["certs", "--out", "OUT", "--sites"],
    "evaluate --client": ["evaluate", "RUN", "--client"],
    "export --client": ["export", "RUN", "--out", "OUT", "--client"],
    "onboard --epochs": ["onboard", "RUN", "--epochs"],
    "run --rounds": ["run", "--out", "OUT", "--rounds"],
    "run --rank": ["run", "--out", "OUT", "--rank"],
    "run --clients": ["run", "--out", "OUT", "--clients"],
    "run --devices": ["run", "--out", "OUT", "--devices"],
    "run --set": ["run", "--out", "OUT", "--set"],
    "compare --seeds": ["compare", "--methods", "local", "--out", "OUT", "--seeds"],
    "compare --sweep": ["compare", "--methods", "local", "--out", "OUT", "--sweep"],
    "compare --jobs": ["compare", "--methods", "local", "--out", "OUT", "--jobs"],
}


def of_options() -> Iterator[Case]:
    for option, words in OPTIONS.items():
        for number in NUMBERS:

            def make(folder: Path, words: list[str] = words, number: str = number) -> list[Any]:
                places = {"OUT": folder / "out", "RUN": finished()}
                return [*(places.get(word, word) for word in words), number]

            yield f"{option} {number[:10]}", make


CASES: dict[str, list[Case]] = {
    "settings": list(of_settings()),
    "files": list(of_files()),
    "models": list(of_models()),
    "names": list(of_names()),
    "options": list(of_options()),
}


def what_is_wrong(words: list[Any]) -> str | None:
    """How a command that must refuse its input behaves otherwise."""
    try:
        done = call(*words)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    if done.code != 2:
        return f"exit code {done.code}: {(done.err or done.out)[:200]}"
    if not lines or len(lines) > 11 or "Traceback" in done.err:
        return f"{len(lines)} lines: {done.err[:200]}"
    longest = max(map(len, lines))
    return f"{longest} letters: {lines[0][:200]}" if longest > LONG else None


def test_there_are_hundreds() -> None:
    assert sum(map(len, CASES.values())) > 300


@pytest.mark.parametrize("kind", CASES)
def test_every_bad_input_is_refused_in_short_lines(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for number, (name, make) in enumerate(CASES[kind]):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        wrong = what_is_wrong(make(folder))
        if wrong and not (name.endswith(MAY) and wrong.startswith("exit code 0")):
            found[name] = wrong
        shutil.rmtree(folder)
    assert not found, "\n".join(f"{name}: {wrong}" for name, wrong in found.items())
