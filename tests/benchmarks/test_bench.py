"""Order of the runs, statistics, what a side hands back, and the command once for everything it can measure."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedalt.benchmarks import bench, side_fedalt, side_paper, task, workload
from fedalt.benchmarks.task import WHATS, Spec, pair
from fedalt.benchmarks.workload import HashTokenizer, client_examples, shape, upload
from fedalt.errors import UserError
from micro import call, refused, shared_data, shared_model

SMALL = ("--rows", 3, "--batch-size", 2, "--repeats", 1)


# --- order, statistics


def fake(seconds: dict[str, Iterator[float]], order: list[str]) -> bench.Runner:
    def run(spec: Spec) -> bench.Run:
        order.append(spec.side)
        memory = {"process": 100 if spec.side == "fedalt" else 300}
        values = [2.0, 4.0] if spec.side == "fedalt" else [2.0, 5.0]
        same = {"extrapolated": False, "values": values, "answers": ["a", "b" if spec.side == "fedalt" else "c"]}
        return {"seconds": next(seconds[spec.side]), "memory": memory, **same}

    return run


def test_sides_take_turns_and_swap_who_goes_first():
    order: list[str] = []
    ours, other = pair(Spec(what="round"))
    seen: list[Any] = []
    runner = fake({"fedalt": iter([1.0, 2.0, 4.0]), "paper": iter([3.0, 4.0, 4.0])}, order)
    result = bench.compare(ours, other, 3, runner, lambda side, repeat, run: seen.append((side, repeat)))
    assert order == ["fedalt", "paper", "paper", "fedalt", "fedalt", "paper"]
    assert seen == [("fedalt", 0), ("paper", 0), ("paper", 1), ("fedalt", 1), ("fedalt", 2), ("paper", 2)]
    assert result["a"]["seconds"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert result["b"]["seconds"] == {"median": 4.0, "min": 3.0, "max": 4.0}
    assert result["ratio"] == {"of_medians": 2.0, "pairwise": {"median": 2.0, "min": 1.0, "max": 3.0}}
    assert result["memory_ratio"] == {"process": 3.0}
    assert result["agreement"] == {
        "values": {"a": 3.0, "b": 3.5},
        "largest_relative_difference": pytest.approx(0.2),
        "answers": {"same": 1, "of": 2},
    }
    assert [run["seconds"] for run in result["a"]["runs"]] == [1.0, 2.0, 4.0]


def test_of_sides_with_different_numbers_of_clients_only_the_common_ones_are_compared():
    one, many = ({"values": [1.0] * count, "answers": []} for count in (1, 3))
    assert bench.agreement(one, many) == {"values": {"a": 1.0, "b": 1.0}, "largest_relative_difference": 0.0}
    assert bench.agreement({"values": [], "answers": []}, many) == {}


# --- spec and workload


def test_a_spec_survives_json_and_refuses_what_it_does_not_know():
    spec = Spec(what="evaluation", side="paper", clients=3, cohort=2, threads=1, dtype="bfloat16", num_beams=4)
    assert Spec.from_json(spec.to_json()) == spec
    with pytest.raises(UserError, match=r'unknown key "cilents" \(did you mean "clients"\?\)'):
        Spec.from_json('{"cilents": 3}')
    for broken in ("{", "[]", "3"):
        with pytest.raises(UserError):
            Spec.from_json(broken)


@pytest.mark.parametrize("what", WHATS)
def test_every_side_has_its_job(what):
    for side in ("fedalt", *WHATS[what].opponents):
        place, _, job = WHATS[what].job(side).partition(".")
        module = importlib.import_module(f"fedalt.benchmarks.side_{place}")
        assert callable(getattr(module, f"prepare_{job}"))


def test_random_weights_have_the_sizes_of_their_namesakes():
    millions = {
        name: workload.build_model(name, "float32", 0, "meta").num_parameters() / 1e6 for name in workload.SHAPES
    }
    expected = {"llama-25m": 58.1, "llama-7b": 6738.4, "bloom-560m": 559.2, "gpt2-small": 124.4}
    assert millions == pytest.approx(expected, abs=0.1)


def test_the_hashing_tokenizer_is_deterministic_and_about_as_fine_as_a_bpe():
    tokenizer = HashTokenizer(32_000)
    text = "### Instruction:\nSay which administration answered, please.\n\n### Response:\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == HashTokenizer(32_000)(text)["input_ids"]
    assert all(2 <= token < 32_000 for token in ids)
    assert 2.5 < len(text) / len(ids) < 5
    assert tokenizer.batch_decode([[7, 1, 0], [8, 9, 0]]) == ["7", "8 9"]


def test_more_clients_than_the_data_has_get_further_windows_of_its_rows():
    spec = Spec(data=str(shared_data()), clients=7, rows=4)
    train, test = client_examples(spec, HashTokenizer(1000), 512)
    instructions = [[example.row.instruction for example in mine] for mine in train]
    assert [len(mine) for mine in train] == [len(mine) for mine in test] == [4] * 7
    assert len({row for k in (0, 3, 6) for row in instructions[k]}) == 12  # twelve rows, three windows of four
    assert all("(0." in row for k in (0, 3, 6) for row in instructions[k])


# --- aggregation


def test_eight_clients_of_many_are_served_and_the_rest_is_marked_as_extrapolated():
    spec = Spec(what="aggregation", model=str(shared_model()), clients=10)
    ours, paper = side_fedalt.prepare_aggregation(spec).work(), side_paper.prepare_aggregation(spec).work()
    assert paper.scale == 10 / 8 and ours.scale == 1
    assert paper.more_memory > 0
    assert ours.values == pytest.approx(paper.values, rel=1e-5) and len(ours.values) == 8
    few = side_paper.prepare_aggregation(Spec(what="aggregation", model=str(shared_model()), clients=3)).work()
    assert few.scale == 1 and few.more_memory == 0


def test_uploads_are_of_the_size_asked_for_and_of_the_usual_rank_without():
    spec = Spec(what="aggregation", model="llama-25m", clients=2)
    usual, large = (shape(replace(spec, parameters=count)) for count in (None, 1_000_000))
    assert [key.slot for key in upload(spec, usual, 0)].count("individual") == len(upload(spec, usual, 0))
    sizes = [sum(value.numel() for value in upload(spec, adapters, 1).values()) for adapters in (usual, large)]
    assert sizes == [131_072, 62 * 16_384] and 61 * 16_384 < 1_000_000 <= sizes[1]
    one, other = (upload(spec, usual, client) for client in (0, 1))
    assert all(torch.equal(value, upload(spec, usual, 0)[key]) for key, value in one.items())
    assert not any(torch.equal(value, other[key]) for key, value in one.items())


def test_uploads_are_in_files_and_no_more_than_two_are_open_at_a_time(monkeypatch):
    """What a client subtracts and what the server reads: memory does not grow with the number of clients."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def load(path):
        nonlocal most
        tensors = load_file(path)
        alive[:] = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(next(iter(tensors.values()))))
        most = max(most, len(alive))
        return tensors

    monkeypatch.setattr(side_fedalt, "load_file", load)
    job = side_fedalt.prepare_aggregation(Spec(what="aggregation", model=str(shared_model()), clients=12))
    assert len(job.work().values) == 8
    assert 1 <= most <= 2


# --- one client against many


def test_one_client_is_the_one_with_the_largest_step_and_takes_that_very_step():
    spec = Spec(what="memory", model="tiny", clients=4, rows=6, batch_size=2)
    ours, one = pair(spec)
    many, single = workload.load(ours).plans(), workload.load(one)
    sizes = [[workload.tokens(step) for step in plan.steps] for plan in many]
    largest = max(range(4), key=lambda k: max(sizes[k]))
    assert largest > 0, "the first one would do by chance"
    assert [plan.client for plan in single.plans()] == [0]
    (mine,) = single.plans()
    assert [[row.prompt for row in step] for step in mine.steps] == [
        [row.prompt for row in step] for step in many[largest].steps
    ]
    assert max(map(workload.tokens, mine.steps)) == max(map(max, sizes))


# --- the command


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in this process: a new one imports torch for five seconds."""
    through_json = lambda spec: json.loads(json.dumps(bench.measure(Spec.from_json(spec.to_json()))))  # noqa: E731
    monkeypatch.setattr(bench, "run_worker", through_json)


def measured(*args: Any) -> dict[str, Any]:
    done = call("bench", *args, "--json")
    assert done.code == 0, done.err
    assert done.json["machine"]["cpu"] and done.json["machine"]["versions"]["torch"]
    for line in done.json["lines"]:
        assert line["a"]["seconds"]["median"] > 0 and line["b"]["memory"]["process"]["median"] > 0
    return done.json


def test_round_against_the_paper_in_processes_of_their_own(tmp_path):
    out = tmp_path / "round.json"
    done = call("bench", "--model", "tiny", "--clients", 2, "--dropout", 0, "--out", out, *SMALL, "--threads", 1)
    assert done.code == 0, done.err
    assert "paper / fedalt" in done.out and "×" in done.out
    result = json.loads(out.read_text())
    assert result["what"] == "round" and result["machine"]["threads"] == 1
    (line,) = result["lines"]
    assert line["agreement"]["largest_relative_difference"] < 1e-5
    assert line["a"]["spec"]["side"] == "fedalt" and line["b"]["spec"]["side"] == "paper"


@pytest.mark.usefixtures("here")
class TestInThisProcess:
    @pytest.mark.parametrize("what", ["round", "step"])
    def test_tokens_a_second_are_those_of_the_rows_on_either_side(self, what):
        (line,) = measured(what, "--model", "tiny", "--clients", 1, *SMALL)["lines"]
        (ours,), (other,) = line["a"]["runs"], line["b"]["runs"]
        assert ours["tokens"] == other["tokens"] > 50  # padding is not counted
        for side, run in (("a", ours), ("b", other)):
            assert run["tokens_per_second"] == pytest.approx(run["tokens"] / run["elapsed"])
            assert line[side]["tokens_per_second"]["median"] == run["tokens_per_second"]
        done = call("bench", what, "--model", "tiny", "--clients", 1, *SMALL)
        assert "tokens/s" in done.out, done.err

    def test_round_gives_a_line_for_every_number_of_clients(self):
        result = measured("round", "--model", "tiny", "--clients", "1,2", "--against", "loop", "--dropout", 0, *SMALL)
        assert [line["clients"] for line in result["lines"]] == [1, 2]
        assert all(line["agreement"]["largest_relative_difference"] < 1e-5 for line in result["lines"])

    def test_round_against_peft(self):
        (line,) = measured("--model", "tiny", "--clients", 2, "--against", "peft", "--executor", "loop", *SMALL)[
            "lines"
        ]
        assert line["a"]["spec"]["side"] == "loop"
        assert line["agreement"]["largest_relative_difference"] < 0.1  # another method, the same rows

    @pytest.mark.parametrize("against", ["peft", "peft-forward"])
    def test_step(self, against):
        (line,) = measured("step", "--model", "tiny", "--against", against, *SMALL)["lines"]
        assert line["clients"] == 1
        assert line["a"]["runs"][0]["elapsed"] == pytest.approx(2 * line["a"]["runs"][0]["seconds"])  # two steps

    @pytest.mark.parametrize("beams", [1, 4])
    def test_evaluation_gives_the_same_answers(self, beams):
        options = ("--clients", 2, "--max-new-tokens", 4, "--num-beams", beams)
        (line,) = measured("evaluation", *options, *SMALL)["lines"]
        assert line["agreement"]["answers"] == {"same": 6, "of": 6}

    def test_aggregation(self):
        (line,) = measured("aggregation", "--model", "tiny", "--clients", 9, "--repeats", 1)["lines"]
        assert line["b"]["extrapolated"] and not line["a"]["extrapolated"]
        assert line["agreement"]["largest_relative_difference"] < 1e-5

    def test_memory(self):
        result = measured("memory", "--model", "tiny", "--clients", "2,3", *SMALL)
        assert [(line["a"]["spec"]["clients"], line["b"]["spec"]["clients"]) for line in result["lines"]] == [
            (2, 1),
            (3, 1),
        ]

    @pytest.mark.slow
    def test_clients(self):
        data, model = shared_data(clients=8), shared_model()
        (line,) = measured("clients", "--data", data, "--model", model, "--clients", 4, *SMALL)["lines"]
        assert (line["a"]["spec"]["clients"], line["b"]["spec"]["clients"]) == (4, 8)
        assert line["a"]["runs"][0]["seconds"] < line["a"]["runs"][0]["elapsed"] / 8  # start-up is not in it

    @pytest.mark.slow
    def test_start(self):
        (line,) = measured("start", "--data", shared_data(), "--model", shared_model(), "--clients", 2, *SMALL)["lines"]
        assert line["b"]["spec"]["side"] == "transformers"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("ruond",), ['WHAT: "ruond" is unknown (did you mean "round"?)', "evaluation"]),
        (("--against", "papre"), ['"papre" is unknown (did you mean "paper"?)', "peft"]),
        (("step", "--against", "paper"), ['--against for step: "paper" is unknown', "peft"]),
        (("--model", "llama-25"), ['--model: "llama-25" is unknown (did you mean "llama-25m"?)', "a model folder"]),
        (("--dtype", "float16"), ['--dtype: "float16" is unknown', "bfloat16"]),
        (("--executor", "stack"), ['did you mean "stacked"?']),
        (("memory", "--executor", "loop"), ["--executor loop: only round has it"]),
        (("--parameters", "9"), ["--parameters 9: only aggregation has it"]),
        (("--clients", "two"), ["--clients two: a number from 1"]),
        (("--clients", "1,0"), ["--clients 1,0"]),
        (
            ("evaluation", "--clients", "1,2"),
            ["evaluation takes one number; a list goes with round, aggregation, memory"],
        ),
        (("step", "--clients", "2"), ["step is about one client"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_anything_starts(args, words, monkeypatch):
    monkeypatch.setattr(bench, "run_worker", None)
    error = refused("bench", *args)
    assert all(word in error for word in words), error


def test_every_command_in_the_docs_is_one_that_bench_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(task, "require", lambda side: None)
    run = {"seconds": 1.0, "extrapolated": False, "memory": {"process": 1}, "values": [], "answers": [], "threads": 1}
    monkeypatch.setattr(bench, "run_worker", lambda spec: run)
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"`fedalt (bench \w[^`\n]*)`", text)]
    assert {command[1] for command in commands} == set(WHATS)
    for command in commands:
        assert call(*command).code == 0, command


def test_the_help_names_everything_that_can_be_measured():
    text = " ".join(call("bench", "--help").out.split())
    assert f"one of {', '.join(WHATS)}." in text


@pytest.mark.slow
def test_two_clients_in_flowers_simulation(monkeypatch):
    """In processes of their own: the server, and an actor for each thread."""
    pytest.importorskip("ray")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    spec = Spec(side="flower", model="tiny", clients=2, rows=3, batch_size=2, threads=2, dropout=0.0)
    flower, peft = (bench.run_worker(replace(spec, side=side)) for side in ("flower", "peft"))
    assert flower["tokens"] == peft["tokens"] > 0
    assert 0 < flower["seconds"] < flower["elapsed"], "start-up and the first round are not in it"
    assert flower["memory"]["process"] > peft["memory"]["process"], "that of the server and of all actors"
    assert len(flower["values"]) == 2
    assert flower["values"] == pytest.approx(peft["values"], rel=0.1)  # one step ahead of it


def test_flower_is_asked_for_only_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'flwr[simulation]'" in refused("bench", "--against", "flower")


def test_what_a_side_refuses_reaches_the_user_as_one_line():
    assert "start loads a model from disk" in refused("bench", "start", "--model", "gpt2-small")


def test_a_worker_that_dies_is_reported(monkeypatch):
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with code 1"):
        bench.run_worker(Spec())
