"""One YAML per run: every typing error and every value outside its range stops the run with a line that helps."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from fedalt.comparisons.compare import plan
from fedalt.comparisons.sweep import parse_axis, points
from fedalt.config import RunConfig, hints, load_config, parse_config, parse_override, parse_received
from fedalt.config.hints import fields_at
from fedalt.errors import UserError
from fedalt.registry import OURS, PARTITIONERS, SOURCES, TEMPLATES, TRACKERS
from micro import labelled_table, refused
from support import METHODS

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def nested(dotted: str, value: Any) -> dict[str, Any]:
    *parents, last = dotted.split(".")
    values: dict[str, Any] = {last: value}
    for parent in reversed(parents):
        values = {parent: values}
    return values


def complaint(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(values, "x.yaml")
    return str(caught.value)


def read(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


# ------------------------------------------------------------------------------------------------------------- defaults

PAPER = {
    "federation.rounds": 20,
    "federation.fraction": 1.0,
    "training.local_epochs": 5,
    "training.batch_size": 8,
    "training.lr": 3e-4,
    "training.schedule": "linear",
    "training.weight_decay": 0.05,
    "training.max_grad_norm": 1.0,
    "lora.r": 8,
    "lora.alpha": 32,
    "lora.dropout": 0.05,
    "lora.init": "shared",
    "lora.mixer_init": "kaiming",
    "data.cutoff": 512,
    "data.template": "alpaca_short",
    "evaluation.every": 5,
    "evaluation.max_new_tokens": 80,
    "evaluation.stemmer": True,
    "metric": "rouge1",
    "seed": 42,
    "method": "fedalt",
}


@pytest.mark.parametrize("key", PAPER)
def test_defaults_are_the_papers(key: str) -> None:
    value: Any = RunConfig()
    for part in key.split("."):
        value = getattr(value, part)
    assert value == PAPER[key]


def test_every_field_says_what_it_is() -> None:
    def check(section: Any, where: str) -> None:
        for name, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                check(field.annotation, f"{where}{name}.")
            else:
                assert field.description, f"{where}{name}"

    check(RunConfig, "")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_yaml_parses(path: Path) -> None:
    config = load_config(path)
    assert load_config(path) == parse_config(config.model_dump(mode="json"), "dump"), "what is written reads back"


def test_recipes_are_found() -> None:
    assert {"demo", "fedalt_llama2", "fedalt_bloom560m"} <= {path.stem for path in RECIPES}


COMMANDED = [path for path in RECIPES if path.read_text(encoding="utf-8").startswith("# fedalt ")]


@pytest.mark.parametrize("path", COMMANDED, ids=lambda path: path.stem)
def test_a_recipes_first_line_is_a_command_that_is_accepted(path: Path) -> None:
    """Its options exist, its methods and settings are known: all that is checked before rows and base are read."""
    import typer

    from fedalt.cli.app import app

    _, name, *arguments = shlex.split(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    values = command.make_context(name, list(arguments)).params
    assert ROOT / values["config_file"] == path
    assert values["out"].startswith("runs/")
    config = load_config(path)
    if name == "run":
        assert config.method in METHODS
        return
    assert plan(config, (values["methods"] or "fedalt").split(","), [0], Path("nowhere"), "ask")
    axes = [parse_axis(text) for text in values["sweep"] or ()]
    if values["heterogeneity"]:
        axes.append(parse_axis(f"data.tasks_per_client={values['heterogeneity']}"))
    rows = [("data.source", str(labelled_table()))] if values["data"] else []
    assert not axes or len(points(load_config(path, rows), axes)) > 1


def test_recipes_of_the_papers_tables_are_found() -> None:
    names = {path.stem for path in COMMANDED}
    assert {"table1_tinyworld", "table1_flan8", "table2_ablations", "figure4_clients", "figure4_rank"} <= names


@pytest.mark.parametrize("name", ["fedalt_llama2", "fedalt_bloom560m"])
def test_paper_recipes_hold_the_papers_settings(name: str) -> None:
    config = load_config(ROOT / "recipes" / "paper" / f"{name}.yaml")
    defaults = RunConfig()
    assert (config.training, config.federation) == (defaults.training, defaults.federation)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (8, 32, 0.05)
    assert (config.data.clients, config.data.cutoff, config.evaluation.num_beams) == (8, 512, 4)
    assert config.model.load_in == ("8bit" if name == "fedalt_llama2" else None)


# --------------------------------------------------------------------------------------------------------- unknown keys

TYPOS = {
    "metod": "method",
    "trainning": "training",
    "model.nam": "name",
    "data.sorce": "source",
    "data.tinyworld.clsh": "clash",
    "lora.rr": "r",
    "lora.target": "targets",
    "training.learning_rat": None,
    "training.local_epoch": "local_epochs",
    "federation.round": "rounds",
    "evaluation.num_beam": "num_beams",
    "federation.clients": "data.clients",
    "federation.client": "data.clients",
    "federation.batchsize": "training.batch_size",
    "lora.rank": "lora.r",
    "data.partition.dirichlet_alpha": "data.partition.alpha",
    "training.rounds": "federation.rounds",
    "rounds": "federation.rounds",
}


@pytest.mark.parametrize("typo", TYPOS)
def test_an_unknown_key_gets_a_suggestion_at_every_level(typo: str) -> None:
    line = complaint(nested(typo, 1))
    assert line.startswith(f'x.yaml: unknown key "{typo}"')
    if TYPOS[typo]:
        assert line.endswith(f'(did you mean "{TYPOS[typo]}"?)')


def test_every_name_of_another_library_stands_for_a_key_and_is_none_itself() -> None:
    for key, names in hints.ALIASES.items():
        assert all(complaint(nested(name, 1)).endswith(f'(did you mean "{key}"?)') for name in names)
        *sections, last = key.split(".")
        assert last in hints.keys_at(sections, RunConfig)


def test_without_a_close_name_the_known_ones_are_listed() -> None:
    line = complaint({"lora": {"zzzzzz": 1}})
    assert line.startswith('x.yaml: unknown key "lora.zzzzzz"; known here: ')
    assert all(name in line for name in ("r", "alpha", "dropout", "targets", "init", "mixer_init"))


def test_every_problem_gets_a_line() -> None:
    lines = complaint({"metod": "x", "lora": {"r": 0}, "training": {"lr": -1}}).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("x.yaml: ") for line in lines)


# --------------------------------------------------------------------------------------------------------------- values

INFINITY, NAN = float("inf"), float("nan")
WRONG: list[tuple[str, Any]] = [
    ("lora.r", 0),
    ("lora.r", -1),
    ("lora.r", 1.5),
    ("lora.r", "eight"),
    ("lora.alpha", 0),
    ("lora.alpha", INFINITY),
    ("lora.dropout", 1),
    ("lora.dropout", -0.1),
    ("lora.init", "random"),
    ("training.lr", -3e-4),
    ("training.lr", 0),
    ("training.lr", NAN),
    ("training.lr", INFINITY),
    ("training.lr", "nan"),
    ("training.lr", "fast"),
    ("training.local_epochs", 0),
    ("training.batch_size", 0),
    ("training.weight_decay", -1),
    ("training.weight_decay", NAN),
    ("training.max_grad_norm", 0),
    ("training.schedule", "polynomial"),
    ("federation.rounds", 0),
    ("federation.fraction", 0),
    ("federation.fraction", 1.01),
    ("federation.fraction", -0.5),
    ("federation.fraction", NAN),
    ("federation.staleness_decay", 0),
    ("federation.staleness_decay", 2),
    ("federation.executor", "threads"),
    ("federation.cohort", 0),
    ("federation.devices", []),
    ("federation.devices", "cpu,"),
    ("federation.devices", ["gpu"]),
    ("evaluation.every", 0),
    ("evaluation.num_beams", 0),
    ("evaluation.max_new_tokens", 0),
    ("evaluation.points", ["during"]),
    ("evaluation.metric", "bleu"),
    ("data.clients", 0),
    ("data.cutoff", 0),
    ("data.source", 3),
    ("data.tinyworld.clash", 1.5),
    ("model.dtype", "int8"),
    ("model.device", "gpu"),
    ("model.load_in", "3bit"),
    ("seed", -1),
    ("lora", 8),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{key}={value}" for key, value in WRONG])
def test_a_value_that_is_not_allowed_is_named_with_its_key(key: str, value: Any) -> None:
    line = complaint(nested(key, value))
    assert len(line.splitlines()) == 1
    assert line.startswith(f"x.yaml: {key}")


@pytest.mark.parametrize("devices", ["cuda:0, cpu", ["cuda:0", "cpu"]])
def test_devices_may_stand_in_one_word(devices: Any) -> None:
    assert parse_config(nested("federation.devices", devices), "x").federation.devices == ("cuda:0", "cpu")


@pytest.mark.parametrize(
    ("key", "given", "read"),
    [
        ("data.tasks", "snli, cola", ("snli", "cola")),
        ("model.labels", "no,yes", ("no", "yes")),
        ("lora.ranks", "4,8", (4, 8)),
        ("lora.ranks", 4, (4,)),
        ("lora.layers", 0, (0,)),
        ("training.betas", "0.8,0.9", (0.8, 0.9)),
        ("evaluation.points", "after", ("after",)),
    ],
)
def test_a_list_may_be_a_word_with_commas(key: str, given: Any, read: Any) -> None:
    config = parse_config(nested(key, given), "x")
    section, _, name = key.partition(".")
    assert getattr(getattr(config, section), name) == read


def test_what_several_settings_make_wrong_is_said_of_what_was_typed() -> None:
    line = refused("validate", "--set", "evaluation.metric=accuracy")
    assert line.startswith("--set evaluation.metric=accuracy: accuracy does not suit")


def test_final_scores_are_those_after_aggregation() -> None:
    line = complaint({"evaluation": {"points": ["before"]}})
    assert line.startswith("x.yaml: evaluation.points = ")
    assert line.endswith('must contain "after": the final scores are those after aggregation')


@pytest.mark.parametrize("key", ["lora.r", "federation.rounds", "data.clients", "seed"])
def test_yes_is_not_a_number(key: str) -> None:
    assert f"x.yaml: {key} = true: " in complaint(nested(key, True))


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1])
def test_fractions_that_are_allowed(fraction: float) -> None:
    assert parse_config(nested("federation.fraction", fraction), "x").federation.fraction == fraction


def test_scientific_notation_without_a_point_is_a_string_in_yaml_and_a_number_here(tmp_path: Path) -> None:
    assert yaml.safe_load("3e-4") == "3e-4"
    assert read(tmp_path, "training:\n  lr: 3e-4\n").training.lr == 3e-4


# ----------------------------------------------------------------------------------------------------------------- YAML


def test_broken_yaml_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.yaml:3: not valid YAML"):
        read(tmp_path, "seed: 1\nlora:\n\tr: 8\n")


def test_a_list_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.yaml: a configuration is a mapping .* found list"):
        read(tmp_path, "- a\n- b\n")


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing yet\n") == RunConfig()


def test_not_utf8_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"method: \xff\n")
    with pytest.raises(UserError, match=r"x\.yaml"):
        load_config(tmp_path / "x.yaml")


def test_no_such_file(tmp_path: Path) -> None:
    assert "no such configuration file" in refused("run", tmp_path / "none.yaml")
    assert "no such configuration file" in refused("validate", tmp_path)


# ------------------------------------------------------------------------------------------------------------ overrides


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("lora.r=4", "lora.r", 4),
        ("training.lr=3e-4", "training.lr", "3e-4"),
        ("lora.targets=[q_proj, k_proj]", "lora.targets", ["q_proj", "k_proj"]),
        ("data.source=a=b", "data.source", "a=b"),
        ("out=null", "out", None),
        (" seed =1", "seed", 1),
    ],
)
def test_set(text: str, key: str, value: Any) -> None:
    assert parse_override(text) == (key, value)


@pytest.mark.parametrize("text", ["lora.r", "=4", "lora.r=[", ""])
def test_set_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match="--set"):
        parse_override(text)


def test_overrides_go_on_top_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("lora: {r: 2, alpha: 4}\nseed: 1\n")
    config = load_config(path, [("lora.r", 16), ("training.lr", "1e-3"), ("data.tinyworld.clash", 0)])
    assert (config.lora.r, config.lora.alpha, config.seed) == (16, 4, 1)
    assert (config.training.lr, config.data.tinyworld.clash) == (1e-3, 0)


def test_later_overrides_win() -> None:
    assert load_config(None, [("lora.r", 16), ("lora.r", 2)]).lora.r == 2


def test_an_override_through_a_value_is_refused() -> None:
    with pytest.raises(UserError, match=r'"seed\.x": "seed" is a value, not a section'):
        load_config(None, [("seed", 1), ("seed.x", 2)])


def test_bad_settings_on_the_command_line_name_what_was_typed() -> None:
    assert refused("run", "--lr", "-1") == "--lr -1: must be greater than 0"
    assert refused("run", "--rank", "0") == "--rank 0: must be at least 1"
    assert 'unknown key "lora.rank"' in refused("run", "--set", "lora.rank=4")
    assert "--set lora.r: write key.path=value" in refused("run", "--set", "lora.r")


def test_a_run_folder_has_a_name_by_rule() -> None:
    assert RunConfig().folder == Path("runs/fedalt-tinyworld-seed42")
    config = parse_config({"method": "local", "seed": 1, "data": {"source": "../a/flan8/"}}, "x")
    assert config.folder == Path("runs/local-flan8-seed1")
    assert parse_config({"out": "elsewhere"}, "x").folder == Path("elsewhere")


def test_settings_cannot_be_changed_in_passing() -> None:
    with pytest.raises(Exception, match="frozen"):
        RunConfig().seed = 1  # type: ignore[misc]
    assert get_args(RunConfig.model_fields["out"].annotation), "out may be left out"


def test_help_names_what_is_registered() -> None:
    """Descriptions are plain texts, so that help need not import what they name."""
    told = {
        "data.source": SOURCES,
        "data.partition.by": PARTITIONERS,
        "data.template": TEMPLATES,
        "report.trackers": TRACKERS,
    }
    for key, registry in told.items():
        *path, last = key.split(".")
        description = fields_at(path, RunConfig)[last].description or ""
        ours = [entry.name for entry in registry.entries() if entry.origin == OURS]
        assert ours and all(name in description for name in ours), key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.source", "mine.py:rows"),
        ("data.template", "antigravity:geohash"),
        ("data.partition.by", "antigravity:geohash"),
        ("evaluation.metric", "mine.py:chrf"),
        ("evaluation.metrics", ["rouge1", "mine.py:chrf"]),
        ("report.trackers", "tensorboard,mine.py:Lines"),
    ],
)
def test_received_settings_name_no_code(key: str, value: Any) -> None:
    """Whatever the registry; a module that they name is not imported to find out."""
    with pytest.raises(UserError, match=rf"^server: refused: {key} points at code$"):
        parse_received(nested(key, value), "server")
    assert "antigravity" not in sys.modules


def test_rows_in_memory_of_another_machine_are_no_code() -> None:
    assert parse_received({"data": {"source": "memory:abcdef012345"}}, "server").data.source == "memory:abcdef012345"
