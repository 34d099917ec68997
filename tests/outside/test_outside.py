"""Two methods, an aggregator, a partitioner and a metric of one's own, each a file beside this one, wherever ours work.

And wrong files, each in one line.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedalt import registry
from fedalt.config import parse_config, used_code, with_settings
from fedalt.errors import UserError
from fedalt.methods.aggregators import RestOfWorldSettings
from fedalt.methods.algebra import norm
from fedalt.methods.base import Gathered
from fedalt.methods.registry import get_method
from fedalt.names import INDIVIDUAL, REST_OF_WORLD, A, B, Key
from fedalt.registry import AGGREGATORS, METHODS, import_plugin
from fedalt.testing import check_method
from micro import (
    adapters,
    call,
    data_folder,
    farthest,
    of_kind,
    refused,
    run_here,
    settings,
    shared_data,
    tree,
    write_rows,
    write_yaml,
)
from micro import rows as made_rows

HERE = Path(__file__).parent
PROX, LOWER, LOUDEST, HALVES, DISTINCT = (
    HERE / f"{name}.py" for name in ("prox", "lower_layers", "loudest", "halves", "distinct")
)
QUICK: dict[str, Any] = {
    "federation__rounds": 2,
    "training__local_epochs": 1,
    "data__train_limit": 6,
    "data__test_limit": 2,
    "evaluation__every": 2,
    "evaluation__max_new_tokens": 2,
}


@pytest.fixture(autouse=True)
def new_process() -> None:
    forget()


def forget() -> None:
    """Nothing from outside has been imported yet."""
    for name in [name for name in sys.modules if name.startswith(registry._FILES)]:
        del sys.modules[name]
    registry._PLUGINS.clear()
    for one in registry.ALL:
        one._entries = {entry.name: entry for entry in one.entries() if entry.origin == registry.OURS}


def values(out: Path, **changes: Any) -> dict[str, Any]:
    return settings(out, **(QUICK | changes))


def run_prox(out: Path, file: Path = PROX, *more: Any) -> Path:
    """A run from the command line with a class that is registered nowhere."""
    config = write_yaml(out.with_suffix(".yaml"), {k: v for k, v in values(out).items() if k != "method"})
    done = call("run", config, "--method", f"{file}:Prox", "--set", "prox.strength=0.5", *more)
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of a copy of a file, and that copy; changed by no test."""
    folder = tmp_path_factory.mktemp("prox")
    file = Path(shutil.copy(PROX, folder / "mine.py"))
    return run_prox(folder / "run", file), file


def copy(run: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The run and its file elsewhere, to be changed."""
    file, folder = Path(shutil.copy(run[1], tmp_path / "copied.py")), tmp_path / "run"
    shutil.copytree(run[0], folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(run[1]), str(file)))
    (folder / "digests.json").unlink(missing_ok=True)
    return folder, file


# ------------------------------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize(("file", "name"), [(PROX, "Prox"), (LOWER, "LowerLayers")])
def test_the_suite_takes_anybodys_method(file: Path, name: str) -> None:
    check_method(getattr(import_plugin(str(file)), name))


def test_a_class_runs_under_a_name_made_of_its_own(run: tuple[Path, Path]) -> None:
    config = (run[0] / "config.yaml").read_text()
    assert "method: prox\n" in config and f"- {run[1]}" in config and "strength: 0.5" in config
    (started,) = of_kind(run[0], "run_started")
    assert started["title"] == "Prox" and list(started["code"]) == ["method prox"]


def test_a_penalty_of_ones_own_is_fedproxs(run: tuple[Path, Path], tmp_path: Path) -> None:
    ours, _ = run_here(values(tmp_path / "run", method="fedprox", fedprox={"mu": 0.5}))
    theirs = adapters(run[0])
    assert theirs.keys() == adapters(ours.path).keys()
    assert all(torch.equal(value, theirs[name]) for name, value in adapters(ours.path).items())


def test_from_python(tmp_path: Path, run: tuple[Path, Path]) -> None:
    given = values(tmp_path / "run", method=f"{PROX}:Prox", prox={"strength": 0.5})
    folder, _ = run_here(given)
    assert farthest(folder.path, run[0]) == 0


def test_some_layers_are_shared_and_the_others_are_each_clients_own(tmp_path: Path) -> None:
    folder, _ = run_here(values(tmp_path / "run", method=f"{LOWER}:LowerLayers"))
    found: dict[str, list[torch.Tensor]] = {}
    for name, value in adapters(folder.path).items():
        found.setdefault(name.split("/", 1)[1], []).append(value)
    alike = {name for name, (one, *others) in found.items() if all(torch.equal(one, other) for other in others)}
    assert {"layers.0" in name for name in alike} == {True}
    assert {"layers.1" in name for name in found.keys() - alike} == {True}
    assert len(alike) == len(found) / 2
    (started,) = of_kind(folder.path, "run_started")
    assert of_kind(folder.path, "client")[0]["bytes_up"] == 4 * started["shared_parameters"]


OWN = {
    "fedalt.rest_of_world_aggregator": f"{LOUDEST}:loudest",
    "data.partition.by": f"{HALVES}:halves",
    "data.partition.min_rows": 1,
    "data.clients": 3,
    "evaluation.metric": f"{DISTINCT}:distinct",
}


def test_all_five_side_by_side_in_two_processes_and_from_python(tmp_path: Path) -> None:
    """Each process reads the files for itself, and gives the run of this one."""
    given = values(tmp_path / "both", training__local_epochs=1)
    config = write_yaml(tmp_path / "c.yaml", {k: v for k, v in given.items() if k not in ("method", "seed")})
    sets = [part for key, value in OWN.items() for part in ("--set", f"{key}={value}")]
    methods = f"{LOWER}:LowerLayers,{PROX}:Prox,fedalt"
    done = call("compare", config, "--methods", methods, "--seeds", "0", "--jobs", "2", "--json", *sets)
    assert done.code == 0, done.err
    assert done.json["metric"] == "distinct" and list(done.json["methods"]) == ["lower_layers", "prox", "fedalt"]
    code = {name: of_kind(tmp_path / f"both/{name}-seed0", "run_started")[0]["code"] for name in ("prox", "fedalt")}
    shared = {"partitioner halves", "metric distinct"}
    assert code["prox"].keys() == {"method prox", *shared}
    assert code["fedalt"].keys() == {"aggregator loudest", *shared}
    assert "distinct words" in (tmp_path / "both/report.html").read_text()
    forget()
    python = with_settings(parse_config(given | {"seed": 0, "out": str(tmp_path / "alone")}, "x"), OWN)
    alone, _ = run_here(python.model_dump(mode="json"))
    assert farthest(alone.path, tmp_path / "both/fedalt-seed0") == 0
    dealt = json.loads((alone.path / "partition.json").read_text())
    assert dealt == json.loads((tmp_path / "both/fedalt-seed0/partition.json").read_text())


# --------------------------------------------------------------------------------------------------------- aggregators


def test_an_aggregator_makes_the_rows(tmp_path: Path) -> None:
    """The RoW LoRA of a client is the largest individual LoRA of the others, as they were sent."""
    given = {"fedalt": {"rest_of_world_aggregator": f"{LOUDEST}:loudest"}}
    folder, _ = run_here(values(tmp_path / "run", **given))
    found = adapters(folder.path)

    def slot(client: int, name: str) -> dict[str, torch.Tensor]:
        return {k.split("/", 2)[2]: v for k, v in found.items() if k.startswith(f"{client}/{name}")}

    individual, rows = ([slot(client, name) for client in range(3)] for name in ("individual", "rest_of_world"))
    for client, row in enumerate(rows):
        same = [c for c in range(3) if all(torch.equal(v, row[k]) for k, v in individual[c].items())]
        assert len(same) == 1 and same[0] != client


def test_the_aggregator_by_hand() -> None:
    import_plugin(str(LOUDEST))
    uploads = {
        c: {Key("m", INDIVIDUAL, A): (c + 1) * torch.ones(1, 2), Key("m", INDIVIDUAL, B): torch.ones(3, 1)}
        for c in range(3)
    }
    row = AGGREGATORS.get("loudest")(Gathered(uploads, dict.fromkeys(uploads, 1.0), {}, 1), 1, RestOfWorldSettings())
    assert norm(*(uploads[2][Key("m", INDIVIDUAL, f)] for f in (A, B))) == pytest.approx(3 * 6**0.5)
    assert [row(client)[Key("m", REST_OF_WORLD, A)][0, 0].item() for client in range(3)] == [3, 3, 2]


# ----------------------------------------------------------------------------------------- what is done with a run


def test_evaluate_report_generate_export_onboard(run: tuple[Path, Path], tmp_path: Path) -> None:
    folder, file = copy(run, tmp_path)
    for client in range(2):
        write_rows(tmp_path / f"new/train/local_training_{client}.json", made_rows(3 + client, 6), False)
        write_rows(tmp_path / f"new/test/local_testing_{client}.jsonl", made_rows(3 + client, 2, 100), True)
    for command in (
        ["report", folder],
        ["evaluate", folder],
        ["generate", folder, "--client", 1, "Say 1 2."],
        ["export", folder, "--client", 1, "--to", tmp_path / "peft"],
        ["onboard", folder, "--data", tmp_path / "new", "--epochs", 1],
    ):
        done = call(*command)
        assert done.code == 0, (command, done.err)
    assert "Prox" in (folder / "report.html").read_text()
    assert (tmp_path / "peft").is_dir()
    newcomers = folder / "newcomers"
    assert (newcomers / "clients/4/global/adapter_model.safetensors").is_file()
    file.write_text(file.read_text().replace("strength / 2", "strength / 4"))
    changed = f"{newcomers}: method prox of file {file} has changed since; put the old code back"
    assert refused("generate", newcomers, "--client", 4, "Say 1 2.") == changed


def test_two_devices(tmp_path: Path) -> None:
    """Workers read the file for themselves, and give the run of one process with the same cohorts."""
    data = data_folder(tmp_path / "data", 4, train=6, test=2)
    given = {"method": f"{PROX}:Prox", "federation__cohort": 2, "data": data}
    folders = [
        run_here(settings(tmp_path / name, **(QUICK | given), **more))[0].path
        for name, more in (("one", {}), ("two", {"federation__devices": "cpu,cpu"}))
    ]
    assert farthest(*folders) == 0


def resume(folder: Path, file: Path, *more: Any) -> list[Any]:
    return ["run", "--out", folder, "--resume", "--method", f"{file}:Prox", "--rounds", 3, *more]


def test_a_run_goes_on_with_equal_code_from_elsewhere(run: tuple[Path, Path], tmp_path: Path) -> None:
    """Bit for bit the run that was never stopped."""
    folder, _ = copy(run, tmp_path)
    moved = Path(shutil.copy(run[1], tmp_path / "moved.py"))
    done = call(*resume(folder, moved))
    assert done.code == 0, done.err
    whole = run_prox(tmp_path / "whole", PROX, "--rounds", 3)
    one, other = adapters(folder), adapters(whole)
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_does_not_go_on_with_other_code(run: tuple[Path, Path], tmp_path: Path) -> None:
    folder, file = copy(run, tmp_path)
    other = tmp_path / "other.py"
    for changed in (file, other):
        changed.write_text(PROX.read_text().replace("strength / 2", "strength / 3"))
    before = tree(folder)
    for again in (["run", "--out", folder, "--resume", "--rounds", 3], resume(folder, file), resume(folder, other)):
        assert refused(*again) == f"{folder}: method prox of file {file} has changed since; put the old code back"
    assert tree(folder) == before


def test_an_aggregator_is_part_of_what_a_run_is(tmp_path: Path) -> None:
    """Of FedALT's, under whatever name it runs; not of a run that does not use it."""
    file = Path(shutil.copy(LOUDEST, tmp_path / "mine.py"))
    given = {"fedalt": {"rest_of_world_aggregator": f"{file}:loudest"}}
    used = {
        name: used_code(parse_config(given | {"method": name}, "x")) for name in ("fedalt", "fedalt_clusters", "fedit")
    }
    assert [list(code) for code in used.values()] == [["aggregator loudest"], ["aggregator loudest"], []]
    folder, _ = run_here(values(tmp_path / "run", **given))
    file.write_text(file.read_text().replace("max(", "min("))
    error = refused("run", "--out", folder.path, "--resume", "--rounds", 3)
    assert error == f"{folder.path}: aggregator loudest of file {file} has changed since; put the old code back"


def test_two_files_with_one_name_are_refused(run: tuple[Path, Path], tmp_path: Path) -> None:
    """The run has its own file among its plugins."""
    folder, file = copy(run, tmp_path)
    other = tmp_path / "other.py"
    other.write_text(PROX.read_text() + "# another one\n")
    error = refused(*resume(folder, other))
    assert str(file) in error and str(other) in error and 'method "prox"' in error and "choose another" in error


@pytest.mark.parametrize("command", ["evaluate", "report", "generate", "export", "onboard"])
def test_a_finished_run_is_not_opened_with_other_code(command: str, run: tuple[Path, Path], tmp_path: Path) -> None:
    folder, file = copy(run, tmp_path)
    file.write_text(file.read_text().replace("strength / 2", "strength / 4"))
    more = {
        "generate": ["--client", 1, "x"],
        "export": ["--client", 1, "--to", tmp_path / "x"],
        "onboard": ["--data", shared_data()],
    }
    error = refused(command, folder, *more.get(command, []))
    assert error == f"{folder}: method prox of file {file} has changed since; put the old code back"


def test_a_finished_run_whose_file_is_gone_or_lacks_the_name_says_which_file(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, file = copy(run, tmp_path)
    file.write_text("from fedalt.registry import METHODS\n")
    error = refused("evaluate", folder)
    assert error == f'{folder}/config.yaml: unknown key "prox" (did you mean "fedprox"?); plugins: {file}'
    file.unlink()
    assert f"{file}: no such file" in refused("evaluate", folder)


# ---------------------------------------------------------------------------------------------------------- wrong files

WRONG: dict[str, tuple[str, str]] = {
    "syntax": ("class Mine(:\n", ":1: SyntaxError: "),
    "import": ("\n\nimport nonesuch\n", ":3: ModuleNotFoundError: No module named 'nonesuch'"),
    "fails": ("def f():\n    1 / 0\n\n\nf()\n", ":2: ZeroDivisionError: "),
    "missing": (
        "from fedalt.methods.base import Method\n\n\nclass Mina(Method):\n    pass\n",
        '(did you mean "Mina"?)',
    ),
    "no method": ("class Mine:\n    pass\n", "Mine in {file} is not a method: derive it from fedalt.Method"),
    "taken": (
        "from fedalt.methods.base import Method\nfrom fedalt.registry import METHODS\n\n\n"
        '@METHODS.register("fedit")\nclass Mine(Method):\n    pass\n',
        'method "fedit" of file {file}: fedalt has one of this name; choose another',
    ),
    "taken by its class": (
        "from fedalt.methods.base import Method\n\n\nclass Mine(Method):\n    name = 'ditto'\n",
        'method "ditto" of file {file}: fedalt has one of this name; choose another',
    ),
    "bad name": (
        "from fedalt.methods.base import Method\nfrom fedalt.registry import METHODS\n\n\n"
        '@METHODS.register("my method")\nclass Mine(Method):\n    pass\n',
        'method "my method": a name has letters, digits and underscores',
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_one_line(kind: str, tmp_path: Path) -> None:
    text, expected = WRONG[kind]
    file = tmp_path / f"{kind.replace(' ', '_')}.py"
    file.write_text(text)
    before = METHODS.names()
    error = refused("run", "--method", f"{file}:Mine", "--out", tmp_path / "run")
    assert str(file) in error or kind == "bad name"
    assert expected.format(file=file) in error
    assert METHODS.names() == before and get_method("fedit").__module__ == "fedalt.methods.fedit"
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert refused("run", "--method", f"{tmp_path}/none.py:Mine") == f"{tmp_path}/none.py: no such file"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("prox.strenght", "1", 'unknown key "prox.strenght" (did you mean "strength"?)'),
        ("prox.strength", "-1", "--set prox.strength=-1: must be at least 0"),
        ("porx.strength", "1", 'unknown key "porx"'),
    ],
)
def test_settings_of_ones_own_are_validated_like_ours(key: str, value: str, expected: str, tmp_path: Path) -> None:
    error = refused("run", "--method", f"{PROX}:Prox", "--set", f"{key}={value}", "--out", tmp_path / "run")
    assert expected in error


def test_a_setting_given_in_python_is_validated_too() -> None:
    prox = import_plugin(str(PROX)).Prox
    with pytest.raises(UserError, match='Prox: unknown key "strenght"'):
        prox(strenght=1)
    assert parse_config({"method": f"{PROX}:Prox"}, "x").method == "prox"
