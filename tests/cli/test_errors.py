"""What is wrong with a setting or an option, in one line of plain words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic.fields import FieldInfo

from fedalt.cli.complete import fields
from fedalt.cli.flags import _OPTIONS
from fedalt.config import load_config, parse_config
from fedalt.errors import UserError, shortened
from micro import call, refused

SETTINGS: dict[str, FieldInfo] = fields()
LONG = "x" * 3_000_000
WRONG: list[Any] = [
    "nonsense",
    "",
    "two\nlines",
    LONG,
    -1,
    0,
    1.5,
    1e30,
    10**5000,
    True,
    None,
    float("nan"),
    float("inf"),
    [],
    [[]],
    [None],
    ["nonsense", -1],
    {},
    {"a": [1]},
    {1: 2},
]
FORBIDDEN = ("Input should", "pattern", "^", "Value error", "pydantic", "type=", "validation error", "Traceback")


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def complaints(key: str) -> Iterator[str]:
    for value in WRONG:
        try:
            parse_config(nested(key, value), "x.yaml")
        except UserError as error:
            yield from str(error).splitlines()


def plain(line: str) -> None:
    assert len(line) <= 300, line
    assert not [word for word in FORBIDDEN if word in line], line


def test_there_are_settings_of_every_kind() -> None:
    assert len(SETTINGS) > 90
    assert {
        "method",
        "lora.targets",
        "data.partition.by",
        "fedalt.rest_of_world_from",
        "data.label_names",
    } <= SETTINGS.keys()


@pytest.mark.parametrize("key", SETTINGS)
def test_whatever_is_wrong_with_a_setting_is_said_in_plain_words(key: str) -> None:
    lines = list(complaints(key))
    assert lines
    for line in lines:
        imported = key == "plugins" and ": cannot be imported (" in line
        assert line.startswith(f"x.yaml: {key}") or f'unknown key "{key}' in line or imported, line
        plain(line)


@pytest.mark.parametrize("key", sorted({key.rpartition(".")[0] for key in SETTINGS} - {""}))
def test_a_section_is_no_value(key: str) -> None:
    lines = [line for value in ("x", 8, [1], LONG, 1.5) for line in _complaint(nested(key, value))]
    assert len(lines) == 5
    for line in lines:
        assert f"x.yaml: {key} = " in line
        assert f"is a section, of settings such as {key}." in line
        plain(line)


def _complaint(values: dict[Any, Any]) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_config(values, "x.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lora.r", 0, "x.yaml: lora.r = 0: must be at least 1"),
        ("lora.r", "eight", 'x.yaml: lora.r = "eight": must be a whole number'),
        ("lora.r", 1.5, "x.yaml: lora.r = 1.5: must be a whole number"),
        ("lora.r", None, "x.yaml: lora.r = null: must be a whole number"),
        ("lora.dropout", 1, "x.yaml: lora.dropout = 1: must be less than 1"),
        ("training.lr", -1, "x.yaml: training.lr = -1: must be greater than 0"),
        ("training.lr", "fast", 'x.yaml: training.lr = "fast": must be a number'),
        ("training.lr", float("nan"), "x.yaml: training.lr = nan: must be a finite number"),
        ("federation.fraction", 1.01, "x.yaml: federation.fraction = 1.01: must be at most 1"),
        ("evaluation.stemmer", "perhaps", 'x.yaml: evaluation.stemmer = "perhaps": must be true or false'),
        ("data.source", 3, "x.yaml: data.source = 3: must be text"),
        ("data.tasks", {"qa": 1}, "x.yaml: data.tasks: must be a list"),
        ("data.tasks", [], "x.yaml: data.tasks = []: must not be empty"),
        ("data.label_names", "qa", 'x.yaml: data.label_names = "qa": must be a mapping of keys to values'),
        ("model.device", "gpu", 'x.yaml: model.device = "gpu": must be auto, cpu, cuda or cuda:N'),
        ("federation.devices", "cpu,gpu", 'x.yaml: federation.devices: "gpu" must be auto, cpu, cuda or cuda:N'),
        ("seed", True, "x.yaml: seed = true: true and false are allowed for switches only"),
        (
            "training.schedule",
            "linaer",
            'x.yaml: training.schedule = "linaer": must be linear, cosine or constant (did you mean "linear"?)',
        ),
        (
            "report.trackers",
            ["tensorbord"],
            'x.yaml: report.trackers: "tensorbord" must be tensorboard, mlflow, wandb or trackio '
            '(did you mean "tensorboard"?)',
        ),
        ("lora", 8, "x.yaml: lora = 8: is a section, of settings such as lora.r"),
    ],
)
def test_the_words(key: str, value: Any, said: str) -> None:
    assert _complaint(nested(key, value)) == [said]


def test_keys_that_are_no_text() -> None:
    (line,) = _complaint({1: 2})
    assert line == "x.yaml: 1: keys are text"


@pytest.mark.parametrize("text", ["9" * 5000, "2026-13-45"], ids=["number", "date"])
def test_what_yaml_cannot_make_a_value_of(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(f"method: fedit\nseed: {text}\n")
    assert refused("run", tmp_path / "x.yaml") == f"{tmp_path / 'x.yaml'}: not valid YAML"
    assert refused("run", "--set", f"seed={text}").endswith(": the value is not valid YAML")


def test_long_values_do_not_come_back(tmp_path: Path) -> None:
    word = LONG[:100_000]
    for values in ({"method": word}, {"data": {"source": word}}, {"out": word}, {"lora": {word: 1}}, {"seed": word}):
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
        done = call("run", tmp_path / "x.yaml")
        assert done.code == 2, values.keys()
        assert "Traceback" not in done.err
        assert len(done.error) < 2100, values.keys()


@pytest.mark.parametrize("count", [60, 61, 1000])
def test_a_long_value_says_how_long_it_is(count: int) -> None:
    assert shortened("y" * count) == ("y" * 60 if count == 60 else f"{'y' * 40}… ({count:,} characters)")
    assert shortened("a\n  b") == "a b"


# ----------------------------------------------------------------------------------------------------- what was typed

TYPED = {
    "batch_size": ("0", "must be at least 1"),
    "clients": ("none", "must be a whole number"),
    "devices": ("gpu", '"gpu" must be auto, cpu, cuda or cuda:N'),
    "dtype": ("float", 'must be float32, bfloat16 or float16 (did you mean "float32"?)'),
    "epochs": ("1.5", "must be a whole number"),
    "lr": ("nan", "must be a finite number"),
    "rank": ("0", "must be at least 1"),
    "rounds": ("three", "must be a whole number"),
    "seed": ("-1", "must be at least 0"),
}


@pytest.mark.parametrize("name", TYPED)
@pytest.mark.parametrize("command", ["run", "validate", "compare", "partition"])
def test_an_option_is_named_as_it_was_typed(command: str, name: str) -> None:
    flag, (value, problem) = _OPTIONS[name][1], TYPED[name]
    if command == "partition" and name not in ("clients", "seed"):
        assert refused(command, flag, value).startswith(f"{flag}: no such option")
    elif (command, name) == ("compare", "seed"):
        assert refused(command, flag, "x") == "--seeds x: numbers separated by commas, for example 0,1,2"
    else:
        assert refused(command, f"{flag}={value}") == f"{flag} {value}: {problem}"


def test_an_old_spelling_is_named_as_it_was_typed() -> None:
    assert refused("run", "--local-epochs", "0") == "--local-epochs 0: must be at least 1"
    assert refused("run", "--local_epochs=0") == "--local_epochs 0: must be at least 1"


def test_set_is_named_with_its_key() -> None:
    assert refused("run", "--set", "training.lr=-1") == "--set training.lr=-1: must be greater than 0"
    assert refused("run", "--rank", 4, "--set", "lora.r=0") == "--set lora.r=0: must be at least 1"
    assert refused("run", "--set", "lora.rnk=4").startswith('--set lora.rnk=4: unknown key "lora.rnk" (did you mean')


def test_what_comes_from_the_file_is_named_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("lora: {r: 0}\n")
    assert refused("run", tmp_path / "x.yaml", "--lr", "1") == f"{tmp_path / 'x.yaml'}: lora.r = 0: must be at least 1"


def test_problems_found_later_name_the_option_too() -> None:
    assert refused("run", "--method", "fedallt").startswith('--method: "fedallt" is unknown (did you mean "fedalt"?)')
    assert refused("run", "--set", "method=fedallt").startswith('method: "fedallt" is unknown')
    line = refused("validate", "--set", "data.train_limit=8", "--targets", "q_porj")
    assert line.startswith('--targets: "q_porj" matches no linear layer (did you mean "q_proj"?)')


def test_targets_are_names_with_commas() -> None:
    assert load_config(None, [("lora.targets", "q_proj, k_proj")]).lora.targets == ("q_proj", "k_proj")
    assert load_config(None, [("lora.targets", ["q_proj"])]).lora.targets == ("q_proj",)
    assert refused("run", "--set", "lora.targets=[]") == "--set lora.targets=[]: must not be empty"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--nonsense"], "--nonsense: no such option; see fedalt --help"),
        (["runn"], "No such command 'runn'. Did you mean 'run'?; see fedalt --help"),
        (["run", "--ruonds", "1"], '--ruonds: no such option (did you mean "--rounds"?); see fedalt run --help'),
        (["compare", "--jobs", "0"], "--jobs: must be a whole number, at least 1; see fedalt compare --help"),
        (["bench", "--dropout", "2"], "--dropout: must be a number, at least 0, at most 0.99; see fedalt bench --help"),
        (["evaluate", "r", "--client", "x"], "--client: must be a whole number; see fedalt evaluate --help"),
        (["site", "--client-id", "x"], "--client-id: must be a whole number, at least 0; see fedalt site --help"),
        (["export", "r", "--client", "1"], "--out is missing; see fedalt export --help"),
        (["evaluate"], "RUN is missing; see fedalt evaluate --help"),
        (["run", "--lr"], "Option '--lr' requires an argument"),
        (["run", "a", "b"], "Got unexpected extra argument (b); see fedalt run --help"),
        (["certs", "--sites", "1"], "--out: name one new folder, for example fedalt certs --out tls --sites 3"),
    ],
)
def test_usage_errors_are_one_line(line: list[str], said: str) -> None:
    assert refused(*line) == said


def test_a_name_too_long_for_a_file() -> None:
    assert refused("run", "--out", "x" * 300).endswith("too long for the name of a file or folder")
