"""Methods of one's own from Python: classes, methods with settings, files; beside each other and in other processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedalt as fa
from fedalt.config import load_config
from fedalt.errors import UserError
from fedalt.registry import METHODS
from micro import call, settings, shared_data, shared_model, write_yaml

QUICK: dict[str, Any] = {"rounds": 2, "epochs": 1, "batch_size": 4, "lr": 0.02, "rank": 4, "seed": 3, "quiet": True}
REST: dict[str, Any] = {"evaluation.max_new_tokens": 3, "federation.cohort": 2, "lora.alpha": 16}
SOURCE = """
import fedalt as fa


@fa.method("pulled")
class Pulled(fa.Method):
    class Settings(fa.Settings):
        mu: float = 0.01

    def penalty(self, trained, start):
        return self.settings.mu / 2 * fa.squared_distance(trained, start)
"""


@pytest.fixture
def own() -> Iterator[type[fa.Method]]:
    """As a notebook's cell defines it."""
    known = {entry.name: entry for entry in METHODS.entries()}
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(SOURCE, names)
    yield names["Pulled"]
    METHODS._entries = known


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    known = {entry.name: entry for entry in METHODS.entries()}
    path = tmp_path / "own.py"
    path.write_text(SOURCE, encoding="utf-8")
    yield path
    METHODS._entries = known


@pytest.fixture(scope="module")
def data() -> Any:
    return fa.load_data(shared_data(), cutoff=64)


@pytest.fixture(scope="module")
def base() -> Any:
    return fa.load_base(shared_model())


def test_a_class_and_a_method_with_settings(own: Any, data: Any, base: Any) -> None:
    by_class = fa.run(data, base, own, settings=REST, **QUICK)
    by_name = fa.run(data, base, "pulled", settings=REST, **QUICK)
    weak, strong = (fa.run(data, base, own(mu=mu), settings=REST, **QUICK) for mu in (0.01, 50.0))
    assert by_class.history.losses == by_name.history.losses == weak.history.losses != strong.history.losses
    assert strong.config.section("pulled", own.Settings).mu == 50
    again = fa.run(data, base, own, settings={**REST, "pulled": {"mu": 50}}, **QUICK)
    assert again.history.losses == strong.history.losses
    quick = {name: value for name, value in QUICK.items() if name not in ("rounds", "quiet")}
    sim = fa.Simulation(data, base, own(mu=50), settings=REST, **quick)
    losses = [r.losses for r in sim.rounds(2)]
    assert losses == [{c: strong.history.losses[c][n] for c in range(3)} for n in (1, 2)]


def test_the_same_method_twice_beside_others(own: Any, data: Any, base: Any) -> None:
    quick = {name: value for name, value in QUICK.items() if name != "seed"}
    table = fa.compare(data, base, ["local", own, own(mu=50.0), own(mu=9)], seeds=[3], settings=REST, **quick)
    assert list(table.table) == ["local", "pulled", "pulled,mu=50.0", "pulled,mu=9.0"]
    assert [block["title"] for block in table.table.values()][1:] == ["pulled", "pulled (mu=50.0)", "pulled (mu=9.0)"]
    alone = fa.run(data, base, own(mu=50.0), settings=REST, **QUICK)
    assert table.runs["pulled,mu=50.0", 3].history.losses == alone.history.losses
    assert "pulled (mu=50.0)" in table.to_latex() and "pulled (mu=50.0)" in table.report().read_text(encoding="utf-8")
    with pytest.raises(UserError, match="jobs: the method pulled was defined in this session"):
        fa.compare(data, base, ["local", own], jobs=2, **quick)
    with pytest.raises(UserError, match=r"federation\.devices: the method pulled was defined in this session"):
        fa.run(data, base, own, devices="cpu,cpu", **QUICK)


def test_a_file_in_every_process(file: Path, data: Any, base: Any, tmp_path: Path) -> None:
    quick = {name: value for name, value in QUICK.items() if name != "seed"}
    reference = f"{file}:Pulled"
    methods = ["local", reference]
    one, two = (fa.compare(data, base, methods, seeds=[3], jobs=jobs, settings=REST, **quick) for jobs in (1, 2))
    assert list(one.table) == ["local", "pulled"]
    assert one.to_markdown() == two.to_markdown()
    spread = fa.run(data, base, reference, devices="cpu,cpu", settings=REST, **QUICK)
    run = fa.run(data, base, reference, out=tmp_path / "api", settings=REST, **QUICK)
    assert spread.history.losses == run.history.losses == one.runs["pulled", 3].history.losses
    values = settings(tmp_path / "cli", federation__rounds=2, federation__cohort=2, training__local_epochs=1)
    values["evaluation"] = {"max_new_tokens": 3}
    values["lora"] = {"r": 4, "alpha": 16}
    path = write_yaml(tmp_path / "x.yaml", values)
    assert call("compare", path, "--methods", f"local,{reference}", "--seeds", "3", "--jobs", "2").code == 0
    assert fa.load_run(tmp_path / "cli/pulled-seed3").history.losses == run.history.losses
    assert load_config(tmp_path / "api/config.yaml").plugins == (str(file),)


@pytest.mark.parametrize(
    ("method", "line"),
    [
        (3, "int is not a method: derive it from fedalt.Method"),
        (dict, "dict is not a method"),
        (type("Bare", (fa.Method,), {}), 'Bare has no name: write @fedalt.method("name") above it'),
        ("nowhere.py:Pulled", "nowhere.py: no such file"),
    ],
)
def test_what_is_refused(data: Any, base: Any, method: Any, line: str) -> None:
    with pytest.raises(UserError) as error:
        fa.run(data, base, method, **QUICK)
    assert line in str(error.value)
    with pytest.raises(UserError):
        fa.compare(data, base, [method], rounds=1, quiet=True)
