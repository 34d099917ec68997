"""Runs from Python: the numbers of the command line, the objects that show them, folders that come and go."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fedalt as fa
from fedalt.data.formats.folder import read_folder
from fedalt.errors import UserError
from fedalt.personal.chat import Chat
from fedalt.runs.checkpoint import load_checkpoint
from micro import CLIENTS, call, finished, refused, settings, shared_data, shared_model, tree, write_yaml
from support import bitwise

QUICK: dict[str, Any] = {"rounds": 3, "epochs": 5, "batch_size": 4, "lr": 0.02, "rank": 4, "seed": 3}
REST: dict[str, Any] = {
    "lora.alpha": 16,
    "evaluation": {"every": 1, "max_new_tokens": 5},
    "federation.cohort": 2,
}
"""The settings of ``micro.SETTINGS``, as Python has them."""


@pytest.fixture(scope="module")
def data() -> Any:
    return fa.load_data(shared_data(), cutoff=64)


@pytest.fixture(scope="module")
def base() -> Any:
    return fa.load_base(shared_model())


@pytest.fixture(scope="module")
def ran(data: Any, base: Any) -> Any:
    return fa.run(data, base, quiet=True, settings=REST, **QUICK)


@pytest.mark.parametrize("method", ["fedalt", "feddpa_t"])
def test_the_numbers_are_those_of_the_command_line(tmp_path: Path, data: Any, base: Any, method: str) -> None:
    values = settings(tmp_path / "cli", method=method, federation__cohort=2)
    assert call("run", write_yaml(tmp_path / "run.yaml", values)).code == 0
    fa.run(data, base, "local", quiet=True, settings=REST, **QUICK)  # another method was on the base before
    mine = fa.run(data, base, method, out=tmp_path / "api", quiet=True, settings=REST, **QUICK)
    for part in ("results", "clients"):
        assert tree(tmp_path / "cli" / part) == tree(mine.folder / part)
    with_yaml = fa.run(data, base, method, config=tmp_path / "run.yaml", quiet=True, out=tmp_path / "yaml")
    assert tree(tmp_path / "cli" / "results") == tree(with_yaml.folder / "results")
    assert (mine.folder / "report.html").is_file()


def test_what_a_run_shows(ran: Any, tmp_path: Path) -> None:
    written = json.loads((ran.folder / "results/final_scores.json").read_text())["last"]
    assert ran.scores.mean == written["mean"] and ran.scores.worst == written["worst"]
    assert ran.scores.clients == {int(c): v["rouge1"] for c, v in written["clients"].items()}
    assert list(ran.history.losses[1]) == [1, 2, 3]
    assert ran.clients == tuple(range(CLIENTS))
    assert repr(ran).startswith(f"<Run fedalt, seed 3: rouge1 mean {written['mean']:.1f}, worst ")
    prompt = read_folder(shared_data()).clients[0].test[0].instruction
    client = ran.client(1)
    assert client.answer(prompt) == Chat(ran.folder, 1).ask(prompt).text == ran.client("task1").answer(prompt)
    assert client.scores == written["clients"]["1"]
    assert tree(client.save_peft(tmp_path / "one")) == tree(ran.folder / "clients/1")
    report = ran.report(tmp_path / "deep" / "page.html", insight=2)
    assert "Every model on every client" in report.read_text(encoding="utf-8")
    assert ran.data.clients == read_folder(shared_data()).clients
    with pytest.raises(UserError, match=r'no client "9" here; known: 0, 1, 2'):
        ran.client(9)
    with pytest.raises(UserError, match=r'no client "tusk1" here \(did you mean "task1"\?\)'):
        ran.client("tusk1")


def test_a_run_of_the_command_line_is_opened(tmp_path: Path) -> None:
    opened = fa.load_run(finished())
    assert opened.history.method == "fedalt" and opened.scores.round == 3
    assert opened.client(0).answer("Is 3 more than 1? (0.0)") == Chat(finished(), 0).ask("Is 3 more than 1? (0.0)").text
    assert opened.data.clients.keys() == {0, 1, 2}
    with pytest.raises(UserError, match="not a run folder"):
        fa.load_run(tmp_path)
    opened.close()
    assert finished().is_dir()


def test_a_temporary_folder_goes_with_its_run(data: Any, base: Any) -> None:
    quick = {"rounds": 1, "epochs": 1, "quiet": True, "settings": {"evaluation.max_new_tokens": 2}}
    run = fa.run(data, base, "local", **quick)
    client, folder = run.client(0), run.folder
    del run
    gc.collect()
    assert folder.is_dir() and client.answer("Say 1 2.")
    del client
    gc.collect()
    assert not folder.exists()
    with fa.run(data, base, "local", **quick) as run:
        assert run.folder.is_dir()
    assert not run.folder.exists()


def test_a_folder_that_is_taken(tmp_path: Path, data: Any, base: Any) -> None:
    quick = {"epochs": 1, "quiet": True, "settings": {"evaluation.max_new_tokens": 2}, "out": tmp_path / "run"}
    fa.run(data, base, "local", rounds=1, **quick)
    with pytest.raises(UserError, match="holds a run already"):
        fa.run(data, base, "local", rounds=1, **quick)
    assert list(fa.run(data, base, "local", rounds=2, resume=True, **quick).history.losses[0]) == [1, 2]
    assert list(fa.run(data, base, "local", rounds=1, overwrite=True, **quick).history.losses[0]) == [1]
    with pytest.raises(UserError, match="exclude each other"):
        fa.run(data, base, "local", resume=True, overwrite=True, **quick)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"epoch": 3}, 'run: no argument "epoch" (did you mean "epochs"?)'),
        ({"clients": 3}, "run: clients is an argument of load_data"),
        ({"dtype": "bfloat16"}, "run: dtype is an argument of load_base"),
        ({"settings": {"model.name": "x"}}, "model.name is the first argument of load_base"),
        ({"settings": {"lora.dropuot": 0}}, 'unknown key "lora.dropuot" (did you mean "dropout"?)'),
        ({"rounds": 0}, "federation.rounds = 0: must be at least 1"),
        ({"method": "fedalr"}, '"fedalr" is unknown (did you mean "fedalt"?)'),
    ],
)
def test_what_is_refused(data: Any, base: Any, given: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        fa.run(data, base, quiet=True, **given)
    assert isinstance(error.value, UserError)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_short_names_are_those_of_the_command_line() -> None:
    from fedalt.api import _ELSEWHERE, KEYWORDS
    from fedalt.cli.flags import _OPTIONS

    elsewhere = {"method", "out", *_ELSEWHERE}
    flags = {name: key for name, (key, *_) in _OPTIONS.items() if name not in elsewhere}
    assert flags.items() <= KEYWORDS.items()


def test_the_bar_is_shown_and_can_be_quiet(data: Any, base: Any, capsys: pytest.CaptureFixture[str]) -> None:
    quick = {"rounds": 1, "epochs": 1, "settings": {"evaluation.max_new_tokens": 2}}
    fa.run(data, base, "local", **quick)
    shown = capsys.readouterr()
    assert "local" in shown.err and "mean" in shown.err and not shown.out
    fa.run(data, base, "local", quiet=True, **quick)
    assert capsys.readouterr() == ("", "")


# --------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("method", ["fedalt", "fedit", "fdlora", "flora", "centralized"])
def test_rounds_by_hand_are_those_of_a_run(data: Any, base: Any, method: str) -> None:
    run = fa.run(data, base, method, quiet=True, settings=REST, **QUICK)
    sim = fa.Simulation(data, base, method, settings=REST, **QUICK)
    seen = list(sim.rounds(3))
    last = load_checkpoint(run.folder / "checkpoints")
    assert last is not None and [r.number for r in seen] == [1, 2, 3]
    for client in last.clients:
        assert bitwise(sim.states[client].tensors, last.state(client).tensors)
        assert [r.losses[client] for r in seen] == list(run.history.losses[client].values())
    for client in last.uploads:
        assert bitwise(seen[-1].uploads[client], last.upload(client))
    assert sim.score() == run.scores


def test_what_lies_between_rounds(data: Any, base: Any) -> None:
    sim = fa.Simulation(data, base, "fedit", settings=REST, **QUICK)
    first, second = sim.rounds(2)
    key = next(iter(first.uploads[0]))
    mean = torch.stack([first.uploads[c][key].double() for c in range(CLIENTS)]).mean(0).float()
    torch.testing.assert_close(first.messages[0].tensors[key], mean)  # long after the next round has been taken
    assert not torch.equal(first.states[0].tensors[key], second.states[0].tensors[key])
    assert [r.number for r in sim.rounds(1)] == [3] and sim.number == 3


def test_half_of_the_clients(data: Any, base: Any) -> None:
    some = {**REST, "federation.fraction": 0.4}
    sim = fa.Simulation(data, base, settings=some, **QUICK)
    run = fa.run(data, base, quiet=True, settings=some, **QUICK)
    for r in sim.rounds():
        assert len(r.uploads) == len(r.losses) == 1 and len(r.states) == CLIENTS
    assert sim.number == 3 and sim.score() == run.scores


def test_a_method_that_plans_by_the_number_of_rounds(data: Any, base: Any) -> None:
    sim = fa.Simulation(data, base, "feddpa_f", settings=REST, **QUICK)
    next(sim.rounds(4))
    with pytest.raises(UserError, match="plans by the number of rounds"):
        next(sim.rounds(9))


def test_everybody_fails(data: Any, base: Any) -> None:
    sim = fa.Simulation(data, base, settings=REST, **{**QUICK, "lr": 1e30})
    with pytest.raises(UserError, match="every client failed"):
        list(sim.rounds(2))


# ----------------------------------------------------------------------------------------------------- given in memory


def given(count: int = 12) -> dict[str, Any]:
    made = read_folder(shared_data()).clients
    rows = {k: [[{"instruction": r.instruction, "output": r.output, "category": r.category} for r in part]
                for part in (mine.train, mine.test)] for k, mine in made.items()}  # fmt: skip
    return {f"task{k}": (train[:count], test) for k, (train, test) in rows.items()}


def test_rows_in_memory_give_the_numbers_of_the_same_rows_in_files(ran: Any, base: Any, tmp_path: Path) -> None:
    data = fa.load_data(given(), cutoff=64)
    assert repr(data).endswith(": 3 clients; 36 train, 12 test rows; tasks: task0, task1, task2>")
    mine = fa.run(data, base, out=tmp_path / "run", quiet=True, settings=REST, **QUICK)
    assert mine.scores == ran.scores
    answers = {name for name in tree(mine.folder / "results") if name.startswith("eval_")}
    assert len(answers) == 3 * CLIENTS
    assert all(tree(mine.folder / "results")[name] == tree(ran.folder / "results")[name] for name in answers)
    more = {**QUICK, "rounds": 4}
    with pytest.raises(UserError, match="another run"):
        fa.run(
            fa.load_data(given(11), cutoff=64), base, out=mine.folder, resume=True, quiet=True, settings=REST, **more
        )
    fa.run(data, base, out=mine.folder, resume=True, quiet=True, settings=REST, **more)
    again = fa.load_run(mine.folder, data)
    assert again.scores.round == 4 and again.data.clients == data.clients
    assert again.client("task2").answer("Say 1 2.")
    for command in (
        ("evaluate", mine.folder),
        ("export", mine.folder, "--client", 0, "--to", tmp_path / "x", "--static"),
        ("report", mine.folder, "--insight", 3),
        ("run", "--out", mine.folder, "--resume", "--rounds", 5),
    ):
        line = refused(*command)
        assert "given in memory" in line and "fedalt.load_run(PATH, data)" in line and "--data" in line, line
    assert call("evaluate", mine.folder, "--data", shared_data()).code == 0
    assert call("onboard", mine.folder, "--data", shared_data(), "--epochs", 0).code == 0
    assert call("generate", mine.folder, "--client", 0, "Say 1 2.").code == 0


def test_rows_in_memory_reach_other_processes(base: Any, tmp_path: Path) -> None:
    data = fa.load_data(given(), cutoff=64)
    quick = {"quiet": True, "settings": REST, **QUICK, "rounds": 1}
    here = fa.run(data, base, **quick)
    there = fa.run(data, base, devices="cpu,cpu", **quick)
    assert here.scores == there.scores
    quick.pop("seed")
    one, two = (fa.compare(data, base, ["local", "fedalt"], [3], jobs=jobs, **quick) for jobs in (1, 2))
    assert one.to_markdown() == two.to_markdown() and two.runs["fedalt", 3].scores == here.scores
