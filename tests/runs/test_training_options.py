"""Whole runs with the training people expect: bitwise resumed, stopped early, scored by the loss of answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedalt as fa
from fedalt.config import load_config, parse_config
from fedalt.errors import UserError
from fedalt.model.state import load_state
from fedalt.runs.setup import prepare
from micro import (
    CLIENTS,
    TRAINED,
    call,
    events,
    farthest,
    finished,
    left_behind,
    of_kind,
    refused,
    run_here,
    settings,
    shared_data,
    shared_model,
    tree,
    write_yaml,
)

ALL = TRAINED | {"federation__rounds": 4}
WILD: dict[str, Any] = {
    "training__lr": 0.3,
    "training__local_epochs": 1,
    "evaluation__metric": "answer_loss",
    "evaluation__early_stop": 2,
    "federation__rounds": 9,
    "evaluation__max_new_tokens": 2,
}
"""Round 1 is the best one, or nearly so."""


class Stop(Exception):  # noqa: N818 - not an error
    pass


def stopped_after(values: dict[str, Any], round_: int) -> None:
    """A run that ends in the middle of the round that follows."""
    from fedalt.runs.folder import claim_folder
    from fedalt.runs.rounds import run

    def sink(event: Any) -> None:
        if event["event"] == "step" and event["round"] > round_:
            raise Stop

    config = parse_config(values, "settings")
    with pytest.raises(Stop):
        run(prepare(config), claim_folder(config.folder, "ask"), sink)


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has stopped early, changed by no test."""
    out = tmp_path_factory.mktemp("early") / "run"
    run_here(settings(out, data=shared_data(4), data__clients=3, federation__executor="loop", **WILD))
    return out


def final(run: Path) -> Any:
    return json.loads((run / "results/final_scores.json").read_text())


def rounds_in(run: Path, below: str) -> set[int]:
    return {json.loads(path.read_text())["round"] for path in (run / below).glob("*/fedalt_config.json")}


# -------------------------------------------------------------------------------------------------- the same anywhere


def test_kept_moments_and_one_schedule_resume_bitwise_with_clients_that_rest(tmp_path: Path) -> None:
    changes: dict[str, Any] = ALL | {"method": "feddpa_t", "federation__fraction": 0.7}
    whole, other = (settings(tmp_path / name / "run", **changes) for name in ("whole", "other"))
    run_here(whole)
    stopped_after(other, 2)
    run_here(other, "resume")
    one, two = left_behind(tmp_path / "whole/run"), left_behind(tmp_path / "other/run")
    assert {k: v for k, v in one[0].items() if k != "config.yaml"} == {
        k: v for k, v in two[0].items() if k != "config.yaml"
    }
    assert load_state(tmp_path / "other/run/checkpoints/round_0004/clients/1.safetensors").optimizer["first"]


@pytest.mark.slow
def test_all_of_it_on_two_devices_is_one_run(tmp_path: Path) -> None:
    for name, devices in (("one", None), ("two", "cpu,cpu")):
        run_here(settings(tmp_path / name, federation__devices=devices, federation__cohort=2, **ALL))
    assert farthest(tmp_path / "one", tmp_path / "two") == 0


def test_a_schedule_over_the_run_is_of_so_many_rounds(tmp_path: Path) -> None:
    values = settings(tmp_path / "run", **ALL | {"federation__rounds": 1})
    run_here(values)
    with pytest.raises(UserError, match="another run"):
        run_here(settings(tmp_path / "run", **ALL | {"federation__rounds": 2}), "resume")


# ------------------------------------------------------------------------------------------------------ early stopping


def test_a_run_stops_when_validation_rows_have_not_been_better_for_so_long(early: Path) -> None:
    scores, seen = final(early), of_kind(early, "evaluated")
    best, last = scores["best_validation"]["round"], scores["last"]["round"]
    assert last == seen[-1]["round"] == best + 2 < WILD["federation__rounds"]
    losses: dict[int, list[float]] = {}
    for event in of_kind(early, "scores"):
        if event["point"] == "validation":
            losses.setdefault(event["round"], []).append(event["answer_loss"])
    means = {number: sum(mine) / len(mine) for number, mine in losses.items()}
    assert min(means, key=means.__getitem__) == best, "lower is better"
    note = [event["text"] for event in of_kind(early, "note")][-1]
    assert note == f"stopped after round {last}: no better score on validation rows since round {best}"
    assert scores["kept"] == "best_validation"
    assert of_kind(early, "run_finished")[0]["mean"] == scores["best_validation"]["mean"]


def test_clients_keep_the_best_rounds_adapters_and_the_last_ones_lie_beside(early: Path, tmp_path: Path) -> None:
    scores = final(early)
    best, last = scores["best_validation"]["round"], scores["last"]["round"]
    assert rounds_in(early, "clients") == {best} and rounds_in(early, "last") == {last}
    short = settings(tmp_path / "short", data=shared_data(4), data__clients=3, federation__executor="loop", **WILD)
    short["federation"]["rounds"] = best
    run_here(short)
    names = [name for name in tree(early / "clients") if name.endswith(".safetensors")]
    ours, theirs = tree(early / "clients"), tree(tmp_path / "short" / "clients")
    assert all(ours[name] == theirs[name] for name in names) and names


@pytest.mark.parametrize("which", [None, "best", "last"])
def test_evaluate_export_and_generate_take_the_round_that_is_asked_for(
    early: Path, which: str | None, tmp_path: Path
) -> None:
    flag = () if which is None else ("--round", which)
    scores = final(early)["last" if which == "last" else "best_validation"]
    assert "equal to the run's own scores" in call("evaluate", early, *flag).out
    assert call("export", early, "--client", 1, "--out", tmp_path / "out", *flag).code == 0
    assert json.loads((tmp_path / "out/fedalt_config.json").read_text())["round"] == scores["round"]
    assert call("generate", early, "Is 3 more than 1?", "--client", 0, *flag).code == 0


def test_tables_and_reports_show_the_round_that_is_kept(early: Path) -> None:
    best = final(early)["best_validation"]
    assert fa.load_run(early).scores.round == best["round"]
    assert call("report", early).code == 0
    assert f"Test scores after round {best['round']} " in (early / "report.html").read_text()


def test_without_early_stopping_the_last_round_is_kept_and_the_best_one_lies_beside(tmp_path: Path) -> None:
    changes = {k: v for k, v in WILD.items() if k != "evaluation__early_stop"} | {"federation__rounds": 3}
    run_here(settings(tmp_path / "run", data=shared_data(4), **changes))
    scores = final(tmp_path / "run")
    best = scores["best_validation"]["round"]
    assert best < 3 and "kept" not in scores
    assert rounds_in(tmp_path / "run", "clients") == {3} and rounds_in(tmp_path / "run", "best") == {best}
    for which in ("best", "last"):
        assert "equal to the run's own scores" in call("evaluate", tmp_path / "run", "--round", which).out


def test_a_run_without_validation_rows_has_no_best_round(tmp_path: Path) -> None:
    line = refused("generate", finished(), "Hello", "--client", 0, "--round", "best")
    assert "no client has validation rows" in line
    yaml = write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", evaluation__early_stop=1))
    assert refused("run", yaml).startswith("evaluation.early_stop: no client has validation rows")


@pytest.mark.parametrize("method", ["feddpa_f", "fedit_ft"])
def test_a_method_whose_last_round_is_another_is_not_stopped_early(method: str, tmp_path: Path) -> None:
    values = settings(tmp_path / "run", data=shared_data(4), method=method, evaluation__early_stop=1)
    assert "plans by the number of rounds" in refused("run", write_yaml(tmp_path / "x.yaml", values))


def test_a_stopped_run_resumes_as_it_is_and_goes_on_with_more_patience(early: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(early, run)
    before = left_behind(run)[0]
    again = settings(run, data=shared_data(4), data__clients=3, federation__executor="loop", **WILD)
    run_here(again, "resume")
    assert {k: v for k, v in left_behind(run)[0].items() if k != "config.yaml"} == {
        k: v for k, v in before.items() if k != "config.yaml"
    }
    again["evaluation"]["early_stop"] = 4
    run_here(again, "resume")
    scores = final(run)
    assert scores["last"]["round"] == min(scores["best_validation"]["round"] + 4, 9) > final(early)["last"]["round"]


# --------------------------------------------------------------------------------------------------------- answer loss


@pytest.mark.parametrize("method", ["local", "feddpa_t"])
def test_answer_loss_is_the_mean_cross_entropy_of_reference_tokens(method: str, tmp_path: Path) -> None:
    run_here(settings(tmp_path / "run", data=shared_data(4), method=method, **ALL | {"federation__rounds": 2}))
    config = load_config(tmp_path / "run/config.yaml")
    experiment = prepare(config)
    for client in range(CLIENTS):
        lines = [
            json.loads(line)
            for line in (tmp_path / f"run/results/eval_client{client}_round2.jsonl").read_text().splitlines()
        ]
        scores = json.loads((tmp_path / f"run/results/scores_client{client}_round2.json").read_text())
        assert scores["answer_loss"] == pytest.approx(sum(v["loss"] for v in lines) / sum(v["tokens"] for v in lines))
        assert scores["validation"]["answer_loss"] > 0
        if method != "local":  # whose weights depend on the prompt
            continue
        base = AutoModelForCausalLM.from_pretrained(shared_model(), dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(tmp_path / f"run/clients/{client}/individual")).eval()
        nats, tokens = 0.0, 0
        for example in experiment.examples[client].test:
            ids = torch.tensor([[*example.prompt, *example.answer]])
            labels = torch.tensor([[-100] * len(example.prompt) + list(example.answer)])
            with torch.no_grad():
                nats += float(model(input_ids=ids, labels=labels).loss) * len(example.answer)
            tokens += len(example.answer)
        assert scores["answer_loss"] == pytest.approx(nats / tokens, rel=1e-4)


def test_measuring_the_loss_changes_nothing_else() -> None:
    one, other = finished(), finished(evaluation__loss=True)
    assert tree(one / "clients") == tree(other / "clients")
    assert all("answer_loss" in event for event in events(other) if event["event"] == "scores")
    assert not any("answer_loss" in event for event in events(one))
    assert "answer loss" in (other / "report.html").read_text()


def test_classes_have_log_loss_already(tmp_path: Path) -> None:
    values = settings(tmp_path / "run", evaluation__loss=True, model__task="sequence_classification")
    assert "evaluation.loss: classes have log_loss" in refused("run", write_yaml(tmp_path / "x.yaml", values))


# ------------------------------------------------------------------------------------------------------------ refusals

REFUSED: list[tuple[str, Any, str]] = [
    ("training__momentum", 0.9, "training.momentum: training.optimizer=adamw has none"),
    ("training__warmup", 2.5, "training.warmup: 2.5 is no number of steps"),
    ("training__betas", [0.9], "training.betas"),
    ("training__max_steps", 0, "training.max_steps"),
    ("training__gradient_accumulation_steps", 2, 'did you mean "training.accumulate"?'),
    ("training__warmup_ratio", 0.1, 'did you mean "training.warmup"?'),
    ("evaluation__early_stop", 0, "evaluation.early_stop"),
]


@pytest.mark.parametrize(("key", "value", "said"), REFUSED, ids=[key for key, _, _ in REFUSED])
def test_what_cannot_be_is_one_line(key: str, value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(settings(tmp_path, **{key: value}), "x")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_betas_of_sgd_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.betas: training\.optimizer=sgd has none"):
        parse_config(settings(tmp_path, training__optimizer="sgd", training__betas=[0.8, 0.9]), "x")


def test_max_steps_says_that_epochs_do_not_count(tmp_path: Path) -> None:
    config = parse_config(settings(tmp_path, training__max_steps=1), "x")
    assert any("training.max_steps=1 stands in place" in note for note in prepare(config).notes)
