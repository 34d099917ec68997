"""The commands end to end on micro models: what they print, what they write, and how they end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedalt.config import RunConfig
from fedalt.methods.fedalt_variants import ABLATIONS
from micro import (
    CLIENTS,
    ENVIRONMENT,
    METRICS,
    TEST,
    answers,
    call,
    data_folder,
    events,
    fedalt,
    finished,
    model_folder,
    of_kind,
    refused,
    rows,
    settings,
    shared_data,
    shared_model,
    timeless,
    tree,
    write_rows,
    write_yaml,
)

QUICK = {"federation__rounds": 1, "training__local_epochs": 2}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default run folders are relative: nothing may land in the checkout."""
    monkeypatch.chdir(tmp_path)


def config_file(folder: Path, **changes: Any) -> Path:
    return write_yaml(folder / "x.yaml", settings(folder / "run", **(QUICK | changes)))


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    return folder


# ----------------------------------------------------------------------------------------------------------------- run


def test_the_installed_command_as_json_prints_nothing_else_on_stdout(tmp_path: Path) -> None:
    done = fedalt("run", config_file(tmp_path), "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "run" / "results" / "final_scores.json").read_text())
    assert {k: v for k, v in done.json.items() if k in written} == written
    assert done.json["run"] == str(tmp_path / "run")
    assert done.json["report"] == str(tmp_path / "run" / "report.html")
    assert "Loading weights" not in done.err, "the libraries' own bars stay out of ours"
    assert [line.split()[0] for line in done.err.splitlines() if line.strip()] == ["note:", "fedalt"]


def test_run_prints_a_table_and_where_everything_is(tmp_path: Path) -> None:
    done = call("run", config_file(tmp_path))
    assert done.code == 0, done.err
    assert str(tmp_path / "run") in done.out
    assert str(tmp_path / "run" / "report.html") in done.out
    assert (tmp_path / "run" / "report.html").is_file()
    for word in ("client", "task", "ROUGE-1", "ROUGE-L", "exact match", "mean"):
        assert word in done.out
    final = json.loads((tmp_path / "run" / "results" / "final_scores.json").read_text())["last"]
    for client in range(CLIENTS):
        values = final["clients"][str(client)]
        numbers = r"\s*│\s*".join(re.escape(f"{values[name]:.1f}") for name in METRICS)
        assert re.search(rf"│ {client}\s*│ task{client}\s*│\s*{numbers}\s*│", done.out), done.out


FLAGS = {
    "--model": shared_model,
    "--data": shared_data,
    "--method": lambda: "fedit",
    "--rounds": lambda: 1,
    "--local-epochs": lambda: 2,
    "--clients": lambda: 2,
    "--lr": lambda: 0.01,
    "--rank": lambda: 2,
    "--seed": lambda: 9,
    "--out": lambda: "mine",
}
OFFICIAL = {
    "--model": "--model_name",
    "--data": "--data_path",
    "--local-epochs": "--local_epochs",
    "--clients": "--client_num",
    "--out": "--result_dir",
}
REST = ["--set", "evaluation.max_new_tokens=2", "--set", "evaluation.points=[after]", "--set", "data.cutoff=64"]


def test_flags_without_a_yaml(tmp_path: Path) -> None:
    done = call("run", *(part for flag, value in FLAGS.items() for part in (flag, value())), *REST)
    assert done.code == 0, done.err
    start, config = events(tmp_path / "mine")[0], (tmp_path / "mine" / "config.yaml").read_text()
    assert (start["method"], start["rounds"], start["clients"]) == ("fedit", 1, [0, 1])
    for line in ("lr: 0.01", "r: 2", "seed: 9", "local_epochs: 2", "max_new_tokens: 2", "clients: 2"):
        assert re.search(rf"^ *{line}$", config, re.M)


def test_the_official_readmes_flags_are_the_same_flags(tmp_path: Path) -> None:
    ours = [part for flag, value in FLAGS.items() for part in (flag, value())]
    theirs = [OFFICIAL.get(str(part), part) for part in ours]
    theirs[theirs.index("mine")] = "theirs"
    assert sum("_" in str(part) for part in theirs) >= 5
    for arguments in (ours, theirs):
        done = call("run", *arguments, *REST)
        assert done.code == 0, done.err
    assert timeless(tmp_path / "mine") == timeless(tmp_path / "theirs")


def test_flags_go_on_top_of_the_yaml_and_set_on_top_of_both(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    assert call("run", config, "--lr", "0.5", "--rank", 3, "--set", "training.lr=1e-3").code == 0
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "lr: 0.001" in text
    assert "r: 3" in text


def test_defaults_name_the_run_folder(tmp_path: Path) -> None:
    values = settings(Path("unused"), **QUICK)
    del values["out"]
    done = call("run", write_yaml(tmp_path / "x.yaml", values))
    assert done.code == 0, done.err
    assert (tmp_path / "runs" / f"fedalt-{shared_data().name}-seed3" / "report.html").is_file()


def test_task_names_are_text_and_not_markup(tmp_path: Path) -> None:
    """Square brackets mean colours to the library that draws tables."""
    folder = data_folder(tmp_path / "rows", clients=2)
    for client, task in enumerate(["[/red] closing", "[bold]qa[/bold]"]):
        named = [{**row, "task": task} for row in rows(client, 3)]
        write_rows(folder / "train" / f"local_training_{client}.json", named, lines=False)
    config = config_file(tmp_path, data=folder)
    done = call("run", config)
    assert done.code == 0, done.err
    assert "[/red] closing" in done.out
    assert "[bold]qa[/bold]" in done.out
    assert call("validate", config).out.count("[bold]qa[/bold]") == 1


def test_paths_are_text_and_not_markup(tmp_path: Path) -> None:
    out = tmp_path / "llama[v2]"
    done = call("run", write_yaml(tmp_path / "x.yaml", settings(out, **QUICK)))
    assert done.code == 0, done.err
    assert f"{out}\n" in done.out
    assert str(out / "report.html") in done.out
    assert f"wrote {out / 'report.html'}" in call("report", out).out
    assert f"wrote {tmp_path / 'x[y]'}" in call("export", out, "--client", 0, "--to", tmp_path / "x[y]").out


# --------------------------------------------------------------------------------------------------------- evaluate


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["fedalt", "fedit", "local"])
def test_evaluate_equals_the_runs_own_scores_exactly(method: str, kind: str) -> None:
    run = finished(method, kind)
    done = call("evaluate", run, "--json")
    assert done.code == 0, done.err
    assert list(done.json["clients"]) == ["0", "1", "2"]
    for client in range(CLIENTS):
        own = json.loads((run / "results" / f"scores_client{client}_round3.json").read_text())
        again = done.json["clients"][str(client)]
        assert again == {name: own[name] for name in again}
        assert {"rouge1", "rouge2", "rougeL", "exact_match", "categories", "stemmer", "rows"} <= set(again)
    assert kind != "llama" or any(scores["rouge1"] > 0 for scores in done.json["clients"].values())


def test_evaluate_in_a_process_of_its_own() -> None:
    done = fedalt("evaluate", finished(), "--json")
    assert done.code == 0, done.err
    own = json.loads((finished() / "results" / "final_scores.json").read_text())["last"]["clients"]
    assert {c: {name: scores[name] for name in METRICS} for c, scores in done.json["clients"].items()} == own


def test_evaluate_changes_nothing() -> None:
    before = tree(finished())
    assert call("evaluate", finished()).code == 0
    assert tree(finished()) == before


def test_evaluate_one_client() -> None:
    done = call("evaluate", finished(), "--client", 2, "--json")
    own = json.loads((finished() / "results" / "final_scores.json").read_text())["last"]["clients"]["2"]
    assert list(done.json["clients"]) == ["2"]
    assert {name: done.json["clients"]["2"][name] for name in METRICS} == own


def test_evaluate_on_other_rows(tmp_path: Path) -> None:
    """Rows whose references are the run's own answers: everything is right."""
    folder = data_folder(tmp_path / "rows")
    for client in range(CLIENTS):
        lines = [{"instruction": x["text"], "output": x["answer"] or "-"} for x in answers(finished(), 3, [client])]
        write_rows(folder / "test" / f"local_testing_{client}.jsonl", lines, lines=True)
    expected = [
        100.0 * sum(bool(line["answer"]) for line in answers(finished(), 3, [client])) / TEST
        for client in range(CLIENTS)
    ]
    done = call("evaluate", finished(), "--data", folder, "--json")
    assert [done.json["clients"][str(c)]["exact_match"] for c in range(CLIENTS)] == expected
    assert max(expected) == 100


def test_evaluate_prints_a_table_with_categories() -> None:
    done = call("evaluate", finished())
    assert done.code == 0
    assert done.out.count("compare, copy") == CLIENTS


def test_evaluate_on_rows_that_lack_a_client(tmp_path: Path) -> None:
    line = refused("evaluate", finished(), "--data", data_folder(tmp_path / "rows", clients=2))
    assert "no rows for client 2" in line
    assert "[0, 1]" in line


# --------------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("method", ["fedalt", "local"])
def test_generate_answers_as_the_client_does(method: str) -> None:
    for line in answers(finished(method), 3, [0, 2])[::3]:
        done = call("generate", finished(method), "--client", line["client_id"], line["text"])
        assert done.code == 0, done.err
        assert done.out.rstrip("\n") == line["answer"]


@pytest.mark.parametrize("ending", ["\n", ""], ids=["empty line", "end of input"])
def test_a_chat_loop_reads_stdin(ending: str) -> None:
    lines = answers(finished(), 3, [1])
    typed = "".join(line["text"] + "\n" for line in lines) + ending
    done = call("generate", finished(), "--client", 1, stdin=typed)
    assert done.code == 0, done.err
    assert done.out.replace("> ", "").rstrip("\n").split("\n") == [line["answer"] for line in lines]
    assert "client 1" in done.err


def test_a_chat_loop_in_a_process_of_its_own() -> None:
    line = answers(finished(), 3, [1])[0]
    done = fedalt("generate", finished(), "--client", 1, "--show-alpha", stdin=line["text"] + "\n")
    assert done.code == 0, done.err
    assert done.out.startswith(f"> {line['answer']}\n")
    assert "mean weight of the individual LoRA: 0." in done.out


def test_show_alpha_gives_the_mean_weight_of_every_token() -> None:
    """Checked against the event of the last round, whose means are over many prompts: the same order of size."""
    done = call("generate", finished(), "--client", 0, "--show-alpha", "Say 7 4. (0.101)")
    assert done.code == 0, done.err
    own, others = map(
        float, re.findall(r"mean weight of the individual LoRA: ([\d.]+), of the others' ([\d.]+)", done.out)[0]
    )
    assert own + others == pytest.approx(1, abs=0.011)
    (event,) = [e for e in of_kind(finished(), "client") if (e["round"], e["client"]) == (3, 0)]
    assert own == pytest.approx(sum(event["alpha"]) / len(event["alpha"]), abs=0.1)
    assert "Say 7 4." in done.out, "the prompt's tokens are shown"


@pytest.mark.parametrize("method", ["local", "fedit"])
def test_show_alpha_needs_a_mixer(method: str) -> None:
    line = refused("generate", finished(method), "--client", 0, "--show-alpha", "Say 1.")
    assert line == f"{finished(method)}: --show-alpha needs a mixer, and this method has none"


def test_square_brackets_in_an_answer_are_text(tmp_path: Path) -> None:
    prompt = "[/bold] [red]x[/red]"
    done = call("generate", finished(), "--client", 0, "--show-alpha", prompt)
    assert done.code == 0, done.err
    assert prompt in done.out


# ----------------------------------------------------------------------------------------------------------- export


def test_export_copies_the_clients_folder(tmp_path: Path) -> None:
    done = call("export", finished(), "--client", 1, "--to", tmp_path / "a" / "taken")
    assert done.code == 0, done.err
    assert tree(tmp_path / "a" / "taken") == tree(finished() / "clients" / "1")


def test_static_export_says_what_it_loses(tmp_path: Path) -> None:
    done = call("export", finished(), "--client", 1, "--to", tmp_path / "taken", "--static")
    assert done.code == 0, done.err
    own = json.loads((finished() / "results" / "final_scores.json").read_text())["last"]["clients"]["1"]["rouge1"]
    found = re.search(r"client 1, own test rows: personal ([\d.]+), static ([\d.]+) \(([+-][\d.]+)\)", done.out)
    assert found
    personal, static, change = map(float, found.groups())
    assert personal == pytest.approx(own, abs=0.05)
    assert change == pytest.approx(static - personal, abs=0.11)
    assert sorted(path.name for path in (tmp_path / "taken").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("extra", [[], ["--static"]], ids=["folders", "static"])
def test_export_into_an_empty_folder_and_never_into_a_full_one(tmp_path: Path, extra: list[str]) -> None:
    (tmp_path / "taken").mkdir()
    assert call("export", finished(), "--client", 1, "--to", tmp_path / "taken", *extra).code == 0
    before = tree(tmp_path / "taken")
    line = refused("export", finished(), "--client", 0, "--to", tmp_path / "taken", *extra)
    assert line == f"{tmp_path / 'taken'}: exists and is not an empty folder; choose another --out"
    assert tree(tmp_path / "taken") == before


@pytest.mark.parametrize("extra", [[], ["--static"]], ids=["folders", "static"])
def test_export_into_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    done = call("export", finished(), "--client", 1, "--to", ".", *extra)
    assert done.code == 0, done.err
    assert list((tmp_path / "empty").rglob("adapter_model.safetensors"))


# ----------------------------------------------------------------------------------------------------------- report


def test_report_is_rebuilt_from_the_log_and_the_insight_alone(tmp_path: Path) -> None:
    run = copy_of(finished(), tmp_path / "run")
    first = (run / "report.html").read_bytes()
    for name in ("clients", "checkpoints"):
        shutil.rmtree(run / name)
    for path in (run / "results").iterdir():
        if path.name not in ("insight.json", "final_scores.json"):
            path.unlink()
    (run / "report.html").unlink()
    done = call("report", run)
    assert done.code == 0, done.err
    assert f"wrote {run / 'report.html'}" in done.out
    assert (run / "report.html").read_bytes() == first


def test_report_of_a_run_without_events(tmp_path: Path) -> None:
    run = copy_of(finished(), tmp_path / "run")
    (run / "events.jsonl").unlink()
    assert "events.jsonl: is gone since the run ended" in refused("report", run)
    (run / "digests.json").unlink()
    assert "no run to report on" in refused("report", run)


# --------------------------------------------------------------------------------------------------------- validate


def test_validate_estimates_and_writes_nothing(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    done = call("validate", config)
    assert done.code == 0, done.err
    assert re.search(r"training +6 steps of [\d.]+ s, about [\d.]+ minutes in 1 rounds", done.out)
    assert re.search(r"memory +process [\d.]+ GB", done.out)
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


def test_validate_as_json(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "rows")
    long = {**rows(1, 1)[0], "instruction": "x " * 300}
    write_rows(folder / "train" / "local_training_1.json", [*rows(1, 5), long], lines=False)
    done = call("validate", config_file(tmp_path, data=folder, federation__rounds=4), "--json")
    assert done.code == 0, done.err
    clients = {row["client"]: row for row in done.json["clients"]}
    assert (clients[1]["train"], clients[1]["skipped"], clients[1]["test"]) == (5, 1, TEST)
    assert clients[0]["task"] == "task0"
    assert done.json["notes"][1:] == ["client 1: 1 train rows skipped, their prompt fills data.cutoff=64"]
    estimate = done.json["estimate"]
    assert estimate["steps"] == 4 * 2 * 3
    assert estimate["bytes_up"] == 3 * 10752 // 3
    assert estimate["seconds"] == pytest.approx(estimate["steps"] * estimate["seconds_per_step"])
    assert estimate["peak_memory"]["process"] > 0


def test_validate_takes_the_options_of_run(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "rows")
    options = ("--data", folder, "--rounds", "3", "--set", "lora.alpha=7")
    done = call("validate", config_file(tmp_path), *options, "--out", tmp_path / "nowhere", "--json")
    assert done.code == 0, done.err
    assert [row["task"] for row in done.json["clients"]] == ["task0", "task1", "task2"]
    settings = done.json["config"]
    assert (settings["federation"]["rounds"], settings["lora"]["alpha"]) == (3, 7)
    assert not (tmp_path / "nowhere").exists()


def test_validate_needs_no_free_run_folder(tmp_path: Path) -> None:
    before = tree(finished())
    assert call("validate", finished() / "config.yaml").code == 0
    assert tree(finished()) == before


# ---------------------------------------------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("comparison")
    config = write_yaml(folder / "x.yaml", settings(folder / "out", training__local_epochs=2))
    done = call("compare", config, "--methods", "local,fedit,fedalt", "--seeds", "0,1")
    assert done.code == 0, done.err
    return folder, done


def test_compare_runs_every_method_with_every_seed(comparison: Any) -> None:
    out = comparison[0] / "out"
    runs = [f"{method}-seed{seed}" for seed in (0, 1) for method in ("local", "fedit", "fedalt")]
    files = ["comparison.csv", "comparison.json", "comparison.md", "report.html"]
    assert sorted(p.name for p in out.iterdir()) == sorted([*runs, *files])
    for name in runs:
        assert (out / name / "report.html").is_file()
        assert (out / name / "results" / "final_scores.json").is_file()


def test_comparison_puts_the_final_scores_side_by_side(comparison: Any) -> None:
    out = comparison[0] / "out"
    written = json.loads((out / "comparison.json").read_text())
    assert (written["seeds"], written["metric"], list(written["methods"])) == (
        [0, 1],
        "rouge1",
        ["local", "fedit", "fedalt"],
    )
    for method, block in written["methods"].items():
        finals = [
            json.loads((out / f"{method}-seed{seed}" / "results" / "final_scores.json").read_text())["last"]
            for seed in (0, 1)
        ]
        means = [final["mean"] for final in finals]
        assert block["mean"] == pytest.approx(sum(means) / 2)
        assert block["ci95"] == pytest.approx(12.7062 * abs(means[0] - means[1]) / 2, rel=1e-4)
        assert block["worst"] == pytest.approx(sum(final["worst"] for final in finals) / 2)
        for client in ("0", "1", "2"):
            values = [final["clients"][client]["rouge1"] for final in finals]
            assert block["per_client"][client] == pytest.approx(sum(values) / 2)
        assert block["gain_over_local"] == pytest.approx(block["mean"] - written["methods"]["local"]["mean"])
    assert written["methods"]["local"]["bytes_up"] == 0 < written["methods"]["fedalt"]["bytes_up"]


def test_a_comparisons_runs_are_ordinary_runs(comparison: Any, tmp_path: Path) -> None:
    """One base in memory for all of them changes nothing."""
    alone = call("run", comparison[0] / "x.yaml", "--seed", 1, "--out", tmp_path / "alone")
    assert alone.code == 0, alone.err
    assert timeless(tmp_path / "alone") == timeless(comparison[0] / "out" / "fedalt-seed1")
    assert tree(tmp_path / "alone" / "clients") == tree(comparison[0] / "out" / "fedalt-seed1" / "clients")


def test_the_comparisons_table(comparison: Any) -> None:
    table = comparison[1].out
    for word in ("Local", "FedIT", "FedALT", "mean of 2 seeds", "worst client", "gain over Local", "±", "report.html"):
        assert word in table


def test_the_command_that_a_comparison_suggests_works(comparison: Any) -> None:
    """The federation has three clients, 0 to 2."""
    (suggested,) = [line for line in comparison[1].out.splitlines() if "fedalt generate" in line]
    arguments = suggested.split("fedalt generate", 1)[1].split()
    done = call("generate", *arguments, "Say 1 2.")
    assert done.code == 0, done.err


def test_compare_as_json(tmp_path: Path) -> None:
    done = call("compare", config_file(tmp_path), "--methods", "local,fedalt", "--json")
    assert done.code == 0, done.err
    assert done.json["out"] == str(tmp_path / "run")
    assert {"local", "fedalt"} == set(done.json["methods"])
    assert done.json["methods"]["fedalt"]["ci95"] is None


def test_compare_is_resumed_and_not_mixed_up(comparison: Any) -> None:
    folder, first = comparison
    before = {name: data for name, data in tree(folder / "out").items() if "/results/" in name or "/clients/" in name}
    assert "holds a run already" in refused("compare", folder / "x.yaml", "--seeds", "0,1")
    done = call("compare", folder / "x.yaml", "--seeds", "0,1", "--resume")
    assert done.code == 0, done.err
    after = {name: data for name, data in tree(folder / "out").items() if "/results/" in name or "/clients/" in name}
    assert after == before
    assert done.out.splitlines()[:12] == first.out.splitlines()[:12]


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["--methods", "local,fedal"], ['"fedal" is unknown', 'did you mean "fedalt"?']),
        (["--methods", ""], ["--methods"]),
        (["--seeds", "1,x"], ["--seeds 1,x", "0,1,2"]),
        (["--seeds", "-1"], ["seed", "-1"]),
        (["--sweep", "lora.r"], ["--sweep lora.r:", "--sweep lora.r=4,6,8"]),
        (["--sweep", "lora.rnk=4"], ['unknown key "lora.rnk"', 'did you mean "ranks"?']),
        (["--sweep", "lora.r=4,four"], ["--sweep lora.r=four", 'lora.r = "four": must be a whole number']),
        (["--sweep", "seed=1,2"], ["use --seeds"]),
        (["--sweep", "lora.r=4", "--sweep", "lora.r=8"], ["--sweep lora.r: given twice"]),
        (["--sweep", "lora.r=4", "--methods", "fedal"], ['did you mean "fedalt"?']),
        (["--sweep", "data.clients=3,4"], ["4 clients asked for", "multiple of 3", "3 or 6"]),
        (["--heterogeneity", "1,4"], ["data.tasks_per_client: 4", "only 3 clients"]),
        (["--heterogeneity", "1,x"], ["--heterogeneity 1,x", "numbers"]),
        (["--heterogeneity", "0"], ["--heterogeneity 0", "from 1"]),
        (["--heterogeneity", ""], ["--heterogeneity"]),
        (["--match-budget", "byte"], ['--match-budget: "byte" is unknown', 'did you mean "bytes"?']),
        (["--set", "data.clients=7"], ["7 clients asked for", "6 or 9"]),
        (["--set", "data.tasks_per_client=4"], ["data.tasks_per_client: 4 asked for"]),
    ],
)
def test_compare_checks_its_lists_before_the_first_run(tmp_path: Path, arguments: list[str], pieces: list[str]) -> None:
    done = call("compare", config_file(tmp_path), *arguments)
    assert done.code == 2, (done.code, done.out, done.err)
    assert all(piece in done.error for piece in pieces)
    assert not (tmp_path / "run").exists()


def test_jobs_are_counted_from_one(tmp_path: Path) -> None:
    done = call("compare", config_file(tmp_path), "--jobs", 0)
    assert done.code == 2
    assert "--jobs" in done.err


def test_a_sweep_prints_methods_by_values_and_where_everything_is(tmp_path: Path) -> None:
    done = call(
        "compare", config_file(tmp_path), "--methods", "local,fedalt", "--sweep", "lora.r=2,4", "--heterogeneity", "1,3"
    )
    assert done.code == 0, done.err
    out = tmp_path / "run"
    names = [f"lora.r={r},data.tasks_per_client={m}" for r in (2, 4) for m in (1, 3)]
    files = ("report.html", "sweep.csv", "sweep.json", "sweep.md")
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, *files])
    for name in names:
        assert (out / name / "report.html").is_file()
        assert str(out / name / "report.html") in done.out
        assert name in done.err
    for word in ("Local", "FedALT", "2, 1", "4, 3", "sweep.md", f"report   {out / 'report.html'}"):
        assert word in done.out
    again = call("compare", config_file(tmp_path), "--methods", "local,fedalt", "--sweep", "lora.r=2,4", "--resume")
    assert again.code == 0, "other points than before"
    assert "holds a run already" in refused(
        "compare", config_file(tmp_path), "--methods", "local", "--sweep", "lora.r=6,4"
    )


def test_a_sweep_as_json(tmp_path: Path) -> None:
    done = call("compare", config_file(tmp_path), "--methods", "local", "--sweep", "lora.r=2,4", "--json")
    assert done.code == 0, done.err
    assert [point["settings"] for point in done.json["points"]] == [{"lora.r": 2}, {"lora.r": 4}]
    assert len(done.json["reports"]) == 2
    assert done.json["report"] == str(tmp_path / "run" / "report.html")


def test_ablations_are_a_list_of_names(tmp_path: Path) -> None:
    done = call("compare", config_file(tmp_path), "--ablations", "--json")
    assert done.code == 0, done.err
    assert tuple(done.json["methods"]) == ABLATIONS
    both = call("compare", config_file(tmp_path), "--methods", "local", "--ablations", "--json", "--resume")
    assert both.code == 0, both.err
    assert tuple(both.json["methods"]) == ("local", *ABLATIONS)


def test_a_comparison_of_equal_budgets(tmp_path: Path) -> None:
    flags = ("--methods", "local,hetlora,zero_shot", "--match-budget", "parameters", "--json")
    done = call("compare", config_file(tmp_path), *flags)
    assert done.code == 0, done.err
    assert done.json["budget"] == "parameters"
    assert done.json["below"] == ["zero_shot"]
    assert done.json["methods"]["zero_shot"]["harmed"] is None
    assert done.json["methods"]["zero_shot"]["bytes_up"] == 0


def test_a_name_given_twice_runs_once(tmp_path: Path) -> None:
    done = call("compare", config_file(tmp_path), "--methods", "local,local", "--seeds", "1,1", "--json")
    assert done.code == 0, done.err
    assert done.json["seeds"] == [1]
    assert len(done.json["methods"]["local"]["runs"]) == 1


def test_compare_checks_every_folder_before_the_first_run(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    copy_of(finished("fedit"), tmp_path / "run" / "fedit-seed3")
    before = tree(tmp_path / "run")
    assert "holds a run already" in refused("compare", config, "--methods", "local,fedit")
    assert tree(tmp_path / "run") == before


# ----------------------------------------------------------------------------------------------------- what is wrong


def test_an_unknown_method_gets_a_suggestion(tmp_path: Path) -> None:
    line = refused("run", config_file(tmp_path), "--method", "fedallt")
    assert line.startswith('--method: "fedallt" is unknown (did you mean "fedalt"?); known: ditto, ')
    assert not (tmp_path / "run").exists()


RUN_COMMANDS: dict[str, Callable[[Path], list[Any]]] = {
    "evaluate": lambda run: ["evaluate", run],
    "generate": lambda run: ["generate", run, "--client", 0, "x"],
    "export": lambda run: ["export", run, "--client", 0, "--to", "taken"],
    "static export": lambda run: ["export", run, "--client", 0, "--to", "taken", "--static"],
    "report": lambda run: ["report", run],
}


@pytest.mark.parametrize("name", RUN_COMMANDS)
def test_a_folder_that_is_no_run(tmp_path: Path, name: str) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        assert refused(*RUN_COMMANDS[name](folder)) == f"{folder}: not a run folder (no config.yaml)"
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize("name", [name for name in RUN_COMMANDS if name != "report"])
def test_a_run_that_has_not_finished(tmp_path: Path, name: str) -> None:
    run = copy_of(finished(), tmp_path / "run")
    (run / "results" / "final_scores.json").unlink()
    line = refused(*RUN_COMMANDS[name](run))
    assert line == f"{run}: this run has not finished; continue it with: fedalt run --out {run} --resume"


@pytest.mark.parametrize("name", ["generate", "export", "static export"])
def test_a_client_that_does_not_exist(name: str) -> None:
    arguments = [7 if part == 0 else part for part in RUN_COMMANDS[name](finished())]
    line = refused(*arguments)
    assert "no client 7 here" in line
    assert "0, 1, 2" in line


def test_evaluating_a_client_that_does_not_exist() -> None:
    line = refused("evaluate", finished(), "--client", 7)
    assert "client 7" in line
    assert "0, 1, 2" in line


def test_rows_that_have_gone(tmp_path: Path) -> None:
    data = data_folder(tmp_path / "rows")
    run = tmp_path / "run"
    assert call("run", config_file(tmp_path, data=data)).code == 0
    shutil.rmtree(data)
    for name in ("evaluate", "static export"):
        assert f"{data} is no folder" in refused(*RUN_COMMANDS[name](run))
    assert not (tmp_path / "taken").exists()
    for name in ("generate", "export", "report"):
        assert call(*RUN_COMMANDS[name](run)).code == 0, "these need no rows"


def test_a_base_that_has_gone(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    run = tmp_path / "run"
    assert call("run", config_file(tmp_path, model=model)).code == 0
    shutil.rmtree(model)
    assert str(model) in refused("evaluate", run)
    assert str(model) in refused("generate", run, "--client", 0, "x")


def test_rows_longer_than_the_models_positions_do_not_crash_the_run(tmp_path: Path) -> None:
    """GPT-2 has learnt 256 positions here; a cut-off above that may be lowered or refused, before the first step."""
    folder = data_folder(tmp_path / "rows")
    long = {**rows(1, 1)[0], "instruction": "x " * 150}
    write_rows(folder / "train" / "local_training_1.json", [*rows(1, 5), long], lines=False)
    done = call("run", config_file(tmp_path, model=shared_model("gpt2"), data=folder, data__cutoff=512))
    assert done.code in (0, 2)
    assert "position" in (done.error if done.code else "".join(e["text"] for e in of_kind(tmp_path / "run", "note")))


def test_a_prompt_longer_than_the_models_positions_is_refused() -> None:
    line = refused("generate", finished("fedalt", "gpt2"), "--client", 0, "x " * 200)
    assert "256" in line


def test_the_users_errors_end_with_2_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = fedalt("run", config_file(tmp_path), "--set", "lora.rnk=4")
    assert (done.code, done.out) == (2, "")
    assert done.error == '--set lora.rnk=4: unknown key "lora.rnk" (did you mean "ranks"?)'
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["--nonsense"], ["nonsense"], ["run", "--rounds", "three"], ["run", "--nonsense"], ["generate", "x"]]
)
def test_flags_that_do_not_exist_end_with_2(arguments: list[str]) -> None:
    done = call(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert done.error


def test_anything_else_ends_with_1() -> None:
    """A damaged installation is nobody's input: there is a traceback, and the exit code says so."""
    code = "import sys; sys.modules['plotly'] = None; from fedalt.cli import main; main()"
    command = [sys.executable, "-c", code, "report", str(finished())]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


# -------------------------------------------------------------------------------------------------------------- help


def test_help_of_run_shows_every_default() -> None:
    done = call("run", "--help")
    assert done.code == 0
    text = re.sub(r"[\s│]+", " ", done.out)
    defaults = RunConfig()
    for value in (
        defaults.model.name,
        defaults.data.source,
        defaults.method,
        defaults.federation.rounds,
        defaults.training.local_epochs,
        defaults.training.lr,
        defaults.lora.r,
        defaults.seed,
    ):
        assert f"(default: {value})" in text
    for flag in (*FLAGS, *OFFICIAL.values(), "--resume", "--overwrite", "--set", "--json"):
        assert flag in text
    assert "fedalt[minilm]" in " ".join(done.out.replace("│", " ").split()), "brackets are no markup"


@pytest.mark.parametrize("command", ["run", "compare", "evaluate", "generate", "export", "report", "validate"])
def test_every_command_has_help(command: str) -> None:
    done = call(command, "-h")
    assert done.code == 0
    assert "Usage" in done.out
    assert command in call("--help").out


def test_no_command_at_all_shows_help() -> None:
    done = call()
    assert done.code in (0, 2)
    assert "Usage" in done.out + done.err
