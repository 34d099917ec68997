"""Whole runs on micro models: what they leave behind, and what may not change them."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import yaml
from rouge_score.rouge_scorer import RougeScorer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedalt.config import load_config, parse_config
from fedalt.evaluation.evaluate import evaluate
from fedalt.federation import server
from fedalt.methods.registry import configured, get_method
from fedalt.model.state import load_state
from fedalt.runs.events import EventLog, read_events
from fedalt.runs.setup import prepare
from micro import (
    CLIENTS,
    METRICS,
    TEST,
    TRAIN,
    adapters,
    answers,
    data_folder,
    events,
    farthest,
    finished,
    of_kind,
    read_lines,
    refused,
    rows,
    run_here,
    settings,
    shared_data,
    shared_model,
    timeless,
    tree,
    write_rows,
    write_yaml,
)

MODULES = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"]
UPLOAD = sum(4 * (32 + out) for out in (32, 16)) * 2  # r·(d_in + d_out) over two layers of q and v, r = 4


def state_file(run: Path, round_: int, client: int) -> Path:
    return run / "checkpoints" / f"round_{round_:04d}" / "clients" / f"{client}.safetensors"


def upload_file(run: Path, round_: int, client: int) -> Path:
    return run / "checkpoints" / f"round_{round_:04d}" / "uploads" / f"{client}.safetensors"


def scores_of(run: Path, client: int, round_: int) -> Any:
    return json.loads((run / "results" / f"scores_client{client}_round{round_}.json").read_text())


def final_of(run: Path) -> Any:
    return json.loads((run / "results" / "final_scores.json").read_text())


# ------------------------------------------------------------------------------------------------------- the run folder


def test_the_run_folder_holds_what_is_promised_and_nothing_else() -> None:
    names = set(tree(finished()))
    expected = {"config.yaml", "partition.json", "events.jsonl", "report.html", "digests.json"}
    expected |= {"results/final_scores.json", "results/insight.json"}
    for client in range(CLIENTS):
        for round_ in (1, 2, 3):
            expected |= {f"results/{kind}_client{client}_round{round_}.json" for kind in ("scores",)}
            expected |= {f"results/eval_client{client}_round{round_}.jsonl"}
        expected |= {f"clients/{client}/{name}" for name in ("fedalt_config.json", "mixer.safetensors")}
        for slot in ("individual", "rest_of_world"):
            expected |= {f"clients/{client}/{slot}/adapter_{name}" for name in ("config.json", "model.safetensors")}
        for round_ in (2, 3):
            inside = f"checkpoints/round_{round_:04d}"
            expected |= {f"{inside}/{part}/{client}.safetensors" for part in ("clients", "uploads")}
    expected |= {f"checkpoints/round_{round_:04d}/manifest.json" for round_ in (2, 3)}
    assert names == expected


def test_config_is_resolved_and_runs_again() -> None:
    run = finished()
    text = (run / "config.yaml").read_text()
    config = load_config(run / "config.yaml")
    expected = settings(run)
    expected["federation"]["cohort"] = 3  # found out at the start: all of them
    assert config == configured(parse_config(expected, "x"), "fedalt"), "with its method's section written out"
    assert set(yaml.safe_load(text)) == {
        "method",
        "seed",
        "out",
        "model",
        "data",
        "lora",
        "training",
        "federation",
        "privacy",
        "evaluation",
        "report",
        "flower",
        "fedalt",
    }
    assert yaml.safe_load(text)["lora"]["mixer_init"] == "kaiming", "defaults are written out"
    for name in ("python", "fedalt", "torch", "transformers", "peft"):
        assert f"# {name}: " in text


def test_partition_says_which_row_went_to_which_client() -> None:
    written = json.loads((finished() / "partition.json").read_text())
    assert written["source"] == str(shared_data())
    for client in range(CLIENTS):
        mine = written["clients"][str(client)]
        for split, count, start in (("train", TRAIN, 0), ("test", TEST, 100)):
            digests = [
                hashlib.sha256(f"{row['instruction']}\0{row['output']}".encode()).hexdigest()[:12]
                for row in rows(client, count, start)
            ]
            assert mine[split] == digests
        assert mine["validation"] == []


def test_eval_lines() -> None:
    for client in range(CLIENTS):
        for round_ in (1, 2, 3):
            lines = list(read_lines(finished() / "results" / f"eval_client{client}_round{round_}.jsonl"))
            assert [list(line) for line in lines] == [["text", "answer", "reference", "category", "client_id"]] * TEST
            for line, row in zip(lines, rows(client, TEST, 100), strict=True):
                assert line["text"] == row["instruction"]
                assert line["reference"] == row["output"]
                assert line["category"] == row["category"]
                assert line["client_id"] == client
                assert line["answer"] == line["answer"].strip()


@pytest.mark.parametrize("stemmer", [True, False])
def test_scores_are_googles_rouge_of_the_eval_lines(stemmer: bool) -> None:
    run = finished() if stemmer else finished(evaluation__stemmer=False)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmer)
    for client in range(CLIENTS):
        scores, lines = scores_of(run, client, 3), answers(run, 3, [client])
        assert (scores["round"], scores["client_id"], scores["stemmer"], scores["rows"]) == (3, client, stemmer, TEST)
        assert set(scores["categories"]) == {"compare", "copy"}
        for block, mine in [
            (scores, lines),
            *((scores["categories"][c], [x for x in lines if x["category"] == c]) for c in ("compare", "copy")),
        ]:
            assert block["rows"] == len(mine)
            for name in METRICS[:3]:
                values = [100 * scorer.score(x["reference"], x["answer"])[name].fmeasure for x in mine]
                assert block[name] == pytest.approx(mean(values))
            assert block["exact_match"] == pytest.approx(100 * mean(x["answer"] == x["reference"] for x in mine))
    assert any(scores_of(run, client, 3)["rouge1"] > 0 for client in range(CLIENTS)), "something is learnt"


def test_final_scores_are_those_of_the_last_round() -> None:
    run = finished()
    final = final_of(run)
    assert (final["method"], final["metric"], final["best_validation"]) == ("fedalt", "rouge1", None)
    expected = {str(c): {name: scores_of(run, c, 3)[name] for name in METRICS} for c in range(CLIENTS)}
    assert final["last"]["round"] == 3
    assert final["last"]["clients"] == expected
    assert final["last"]["mean"] == pytest.approx(mean(v["rouge1"] for v in expected.values()))
    assert final["last"]["worst"] == min(v["rouge1"] for v in expected.values())


def test_the_same_settings_give_the_same_run(tmp_path: Path) -> None:
    again, _ = run_here(settings(tmp_path / "again"))
    assert timeless(again.path) == timeless(finished())
    mine, first = tree(again.path), tree(finished())
    same = [name for name in mine if name.startswith(("results/", "clients/", "checkpoints/", "partition"))]
    assert len(same) > 30
    assert all(mine[name] == first[name] for name in same)


def test_another_seed_gives_another_run() -> None:
    assert farthest(finished(), finished(seed=4)) > 1e-3


# --------------------------------------------------------------------------------------------- before and after, best


def test_scores_before_and_after_aggregation_are_those_of_the_states_before_and_after() -> None:
    """Before: the states in the checkpoint. After: the clients' folders, which hold the new rows."""
    run = finished(training__lr=0.1)
    experiment = prepare(load_config(run / "config.yaml"))
    states = [load_state(state_file(run, 3, client)) for client in range(CLIENTS)]
    scored = evaluate(
        experiment.resident.model,
        experiment.resident.base.tokenizer,
        states,
        {client: mine.test for client, mine in experiment.examples.items()},
        experiment.settings.answering,
        config=experiment.config.evaluation,
    )
    by_point = {
        point: {e["client"]: e for e in of_kind(run, "scores") if e["round"] == 3 and e["point"] == point}
        for point in ("before", "after")
    }
    for client, evaluation in enumerate(scored):
        assert scores_of(run, client, 3)["before_aggregation"] == evaluation.scores
        for name in METRICS:
            assert by_point["before"][client][name] == evaluation.scores[name]
            assert by_point["after"][client][name] == scores_of(run, client, 3)[name]
    assert any(
        [line["answer"] for line in e.lines] != [x["answer"] for x in answers(run, 3, [e.client])] for e in scored
    )


def test_local_is_scored_once_because_nothing_is_aggregated() -> None:
    run = finished("local")
    for client in range(CLIENTS):
        scores = scores_of(run, client, 3)
        assert scores["before_aggregation"] == {k: v for k, v in scores.items() if k in scores["before_aggregation"]}


def test_only_the_points_asked_for(tmp_path: Path) -> None:
    run, _ = run_here(settings(tmp_path / "run", federation__rounds=1, evaluation__points=["after"]))
    assert {event["point"] for event in of_kind(run.path, "scores")} == {"after"}
    assert all(scores_of(run.path, client, 1)["before_aggregation"] is None for client in range(CLIENTS))


def test_saved_rows_are_the_mean_of_the_others_last_uploads() -> None:
    run = finished()
    uploads = [load_file(upload_file(run, 3, client)) for client in range(CLIENTS)]
    for client in range(CLIENTS):
        row = load_file(run / "clients" / str(client) / "rest_of_world" / "adapter_model.safetensors")
        own = load_file(run / "clients" / str(client) / "individual" / "adapter_model.safetensors")
        for module in MODULES:
            for factor in "AB":
                name, key = f"base_model.model.{module}.lora_{factor}.weight", f"{module}.individual.{factor}"
                others = [uploads[c][key].double() for c in range(CLIENTS) if c != client]
                assert torch.allclose(row[name].double(), sum(others) / 2, atol=1e-6, rtol=0)
                assert torch.equal(own[name], uploads[client][key])


def test_best_on_validation_is_the_round_with_the_best_validation_scores() -> None:
    run = finished(validation=4, federation__rounds=4)
    by_round = {
        number: mean(e["rouge1"] for e in of_kind(run, "scores") if e["round"] == number and e["point"] == "validation")
        for number in (1, 2, 3, 4)
    }
    best = max(by_round, key=lambda number: by_round[number])
    final = final_of(run)
    assert final["best_validation"]["round"] == best
    assert final["best_validation"]["clients"] == {
        str(c): {name: scores_of(run, c, best)[name] for name in METRICS} for c in range(CLIENTS)
    }
    assert final["last"]["round"] == 4
    assert scores_of(run, 0, 1)["validation"]["rows"] == 4


def test_the_best_round_is_never_chosen_by_test_rows(tmp_path: Path) -> None:
    """With the references exchanged, test scores turn round; the choice, and all training, stay."""
    folder = data_folder(tmp_path / "rows", validation=4)
    for client in range(CLIENTS):
        changed = [{**row, "output": "zzz"} for row in rows(client, TEST, 100)]
        write_rows(folder / "test" / f"local_testing_{client}.jsonl", changed, lines=True)
    run, _ = run_here(settings(tmp_path / "run", data=folder, federation__rounds=4))
    first = finished(validation=4, federation__rounds=4)
    assert final_of(run.path)["last"]["mean"] == 0 != final_of(first)["last"]["mean"]
    assert final_of(run.path)["best_validation"]["round"] == final_of(first)["best_validation"]["round"]
    assert farthest(run.path, first) == 0


def test_the_earliest_of_equally_good_rounds_is_best(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "rows", validation=2)
    for client in range(CLIENTS):
        hopeless = [{**row, "output": "zzz"} for row in rows(client, 2, 200)]
        write_rows(folder / "validation" / f"local_validation_{client}.jsonl", hopeless, lines=True)
    run, _ = run_here(settings(tmp_path / "run", data=folder))
    assert final_of(run.path)["best_validation"]["round"] == 1
    assert "round_0001" in {path.name for path in (run.path / "checkpoints").iterdir()}, "its checkpoint is kept"


def test_how_often_is_evaluated_does_not_change_the_run(tmp_path: Path) -> None:
    rarely, _ = run_here(settings(tmp_path / "rarely", evaluation__every=7, evaluation__points=["after"]))
    assert farthest(rarely.path, finished()) == 0
    assert final_of(rarely.path)["last"] == final_of(finished())["last"]
    evaluated = {path.stem.rsplit("round", 1)[1] for path in (rarely.path / "results").glob("scores_*")}
    assert evaluated == {"3"}, "always at the end"


def test_a_broadcast_is_computed_and_put_into_each_state_once_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For drifts, scores, training and the clients' folders together."""
    counts = Counter[str]()

    def counted(owner: Any, name: str) -> None:
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: (counts.update([name]), plain(*given))[1])

    counted(server, "mean_of")
    counted(get_method("fedalt"), "receive")
    run_here(settings(tmp_path / "run", federation__rounds=3))
    assert counts == {"mean_of": 3, "receive": 3 * CLIENTS}


def test_evaluation_every_second_round(tmp_path: Path) -> None:
    run, _ = run_here(settings(tmp_path / "run", evaluation__every=2, federation__rounds=5))
    assert [event["round"] for event in of_kind(run.path, "evaluated")] == [2, 4, 5]


# --------------------------------------------------------------------------------------------------------------- events


def test_the_order_of_events() -> None:
    kinds = [event["event"] for event in events(finished())]
    scores = ["scores"] * 2 * CLIENTS
    one_round = ["round_started", *["client"] * CLIENTS, "round", *scores, "evaluated"]
    assert kinds == ["run_started", "note", *one_round * 3, "run_finished"]
    assert [event["round"] for event in of_kind(finished(), "round")] == [1, 2, 3]


def test_run_started() -> None:
    start = events(finished())[0]
    assert start["method"] == "fedalt"
    assert start["clients"] == [0, 1, 2]
    assert start["tasks"] == {"0": "task0", "1": "task1", "2": "task2"}
    assert (start["rounds"], start["metric"], start["source"]) == (3, "rouge1", str(shared_data()))
    assert start["shared_parameters"] == UPLOAD
    assert start["trainable_parameters"] == UPLOAD + len(MODULES) * 2 * 32
    assert {"python", "fedalt", "torch", "transformers", "peft", "commit"} <= set(start["versions"])


def test_client_events() -> None:
    for event in of_kind(finished(), "client"):
        assert math.isfinite(event["loss"])
        assert event["loss"] > 0
        assert event["steps"] == 15  # 5 epochs of 12 rows by 4
        assert event["tokens"] > 15 * 4 * 10
        assert event["bytes_up"] == 4 * UPLOAD
        assert event["bytes_down"] == (4 * UPLOAD if event["round"] > 1 else 0)
        assert len(event["alpha"]) == len(MODULES)
        assert all(0 < value < 1 for value in event["alpha"])
        assert (event["row_lora_drift"] is None) == (event["round"] == 1)
    losses = [event["loss"] for event in of_kind(finished(), "round")]
    assert losses == sorted(losses, reverse=True)


def test_round_events() -> None:
    for event in of_kind(finished(), "round"):
        mine = [e for e in of_kind(finished(), "client") if e["round"] == event["round"]]
        assert event["loss"] == pytest.approx(mean(e["loss"] for e in mine))
        assert event["bytes_up"] == sum(e["bytes_up"] for e in mine)
        assert event["bytes_down"] == sum(e["bytes_down"] for e in mine)
        assert event["seconds"] > 0
        assert event["peak_memory"]["process"] > 10**8
        if event["round"] > 1:
            assert event["row_lora_drift"] == pytest.approx(mean(e["row_lora_drift"] for e in mine))


def test_row_gap_is_how_far_the_factor_mean_is_from_the_mean_of_products() -> None:
    run = finished()
    uploads = [load_file(upload_file(run, 3, client)) for client in range(CLIENTS)]
    gap = total = 0.0
    for module in MODULES:
        a, b = (torch.stack([u[f"{module}.individual.{f}"].double() for u in uploads]) for f in "AB")
        product = (b @ a).mean(0)
        gap += (product - b.mean(0) @ a.mean(0)).square().sum().item()
        total += product.square().sum().item()
    assert of_kind(run, "round")[-1]["product_gap"] == pytest.approx((gap / total) ** 0.5, rel=1e-6)
    assert of_kind(run, "round")[-1]["product_gap"] > 0.01


def test_row_drift_is_how_far_a_clients_row_moved() -> None:
    run = finished()
    for client in range(CLIENTS):
        before = load_state(state_file(run, 3, client)).tensors
        after = load_file(run / "clients" / str(client) / "rest_of_world" / "adapter_model.safetensors")
        old = moved = 0.0
        for key, value in before.items():
            if key.slot == "rest_of_world":
                new = after[f"base_model.model.{key.module}.lora_{key.factor}.weight"]
                old += value.double().square().sum().item()
                moved += (new.double() - value.double()).square().sum().item()
        (event,) = [e for e in of_kind(run, "client") if e["round"] == 3 and e["client"] == client]
        assert event["row_lora_drift"] == pytest.approx((moved / old) ** 0.5, rel=1e-6)


def test_a_method_that_shares_nothing_sends_nothing() -> None:
    for event in of_kind(finished("local"), "client"):
        assert (event["bytes_up"], event["bytes_down"], event["alpha"], event["row_lora_drift"]) == (0, 0, [], None)
    assert all(event["product_gap"] is None for event in of_kind(finished("local"), "round"))
    assert events(finished("local"))[0]["shared_parameters"] == 0


def test_the_sink_sees_every_event_and_the_steps(tmp_path: Path) -> None:
    run, seen = run_here(settings(tmp_path / "run", federation__rounds=1))
    assert [event for event in seen if event["event"] != "step"] == events(run.path)
    assert [e["done"] for e in seen if e["event"] == "step"] == list(range(1, 16))
    assert {e["total"] for e in seen if e["event"] == "step"} == {15}


def test_a_half_written_last_line_is_passed_over(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.emit("round", round=1)
    log.emit("round", round=2)
    with log.path.open("a") as file:
        file.write('{"event": "rou')
    assert [event["round"] for event in read_events(log.path)] == [1, 2]
    log.truncate(1)
    log.emit("round", round=9)
    assert [event["round"] for event in read_events(log.path)] == [1, 9]


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\n"])
def test_events_may_hold_any_text(tmp_path: Path, character: str) -> None:
    """A source, task or note with a line separator in it may not end the log there."""
    log = EventLog(tmp_path / "events.jsonl")
    log.emit("note", round=0, text=f"a{character}b")
    log.emit("round", round=1)
    log.truncate(1)
    assert [event["event"] for event in read_events(log.path)] == ["note", "round"]
    assert next(read_events(log.path))["text"] == f"a{character}b"


# -------------------------------------------------------------------------------------------------------- participation


def test_a_fraction_of_the_clients_takes_part(tmp_path: Path) -> None:
    run, _ = run_here(settings(tmp_path / "run", federation__fraction=0.67, federation__rounds=6))
    chosen = [event["clients"] for event in of_kind(run.path, "round_started")]
    assert all(len(clients) == 2 for clients in chosen)
    assert len({tuple(clients) for clients in chosen}) > 1
    for number, clients in enumerate(chosen, 1):
        assert [e["client"] for e in of_kind(run.path, "client") if e["round"] == number] == clients
        assert {e["client"] for e in of_kind(run.path, "scores") if e["round"] == number} == {0, 1, 2}
    absent = next(c for c in range(CLIENTS) if c not in chosen[-1])
    last, before = (state_file(run.path, number, absent).read_bytes() for number in (6, 5))
    assert last == before, "who does not take part keeps its state, row included"
    header = json.loads((run.path / "checkpoints" / "round_0006" / "manifest.json").read_text())
    took_part = {c: max(n for n, clients in enumerate(chosen, 1) if c in clients) for c in range(CLIENTS)}
    assert {int(c): upload["round"] for c, upload in header["uploads"].items()} == took_part
    for client in range(CLIENTS):
        assert load_state(state_file(run.path, 6, client)).round == took_part[client]


def test_rows_from_participants_only(tmp_path: Path) -> None:
    """The absentee's row comes from both participants; a participant's row is the other participant."""
    changes = {
        "federation__fraction": 0.67,
        "federation__rounds": 2,
        "federation__rest_of_world_participation": "participants",
    }
    run, _ = run_here(settings(tmp_path / "run", **changes))
    present = of_kind(run.path, "round_started")[-1]["clients"]
    uploads = {c: load_file(upload_file(run.path, 2, c)) for c in present}
    assert not upload_file(run.path, 2, 3 - sum(present)).exists()
    for client in range(CLIENTS):
        row = load_file(run.path / "clients" / str(client) / "rest_of_world" / "adapter_model.safetensors")
        others = [uploads[c] for c in present if c != client]
        for module in MODULES:
            expected = sum(u[f"{module}.individual.B"].double() for u in others) / len(others)
            got = row[f"base_model.model.{module}.lora_B.weight"].double()
            assert torch.allclose(got, expected, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------- clients that fail


def poison(run: Path, round_: int, client: int, value: float) -> None:
    """Make one number of a client's saved adapter enormous: finite on disk, not finite in a forward pass."""
    path = state_file(run, round_, client)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors[f"own.{MODULES[0]}.individual.B"].fill_(value)
    save_file(tensors, path, header)
    manifest = path.parents[1] / "manifest.json"
    about = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({k: v for k, v in about.items() if k not in ("files", "digest")}))  # no digests


@pytest.fixture
def two_rounds(tmp_path: Path) -> Path:
    run, _ = run_here(settings(tmp_path / "run", federation__rounds=2))
    return run.path


@pytest.mark.parametrize("value", [1e38, math.nan], ids=["overflow", "nan"])
def test_a_client_with_a_loss_that_is_not_finite_is_set_aside(two_rounds: Path, value: float) -> None:
    poison(two_rounds, 2, 1, value)
    kept, upload = state_file(two_rounds, 2, 1).read_bytes(), upload_file(two_rounds, 2, 1).read_bytes()
    run, _ = run_here(settings(two_rounds, federation__rounds=3), "resume")
    (failed,) = of_kind(run.path, "client_failed")
    assert (failed["round"], failed["client"]) == (3, 1)
    assert "nan" in failed["reason"]
    assert [e["client"] for e in of_kind(run.path, "client") if e["round"] == 3] == [0, 2]
    assert state_file(run.path, 3, 1).read_bytes() == kept, "its last state is kept"
    assert upload_file(run.path, 3, 1).read_bytes() == upload, "and so is its last upload"
    (event,) = [e for e in of_kind(run.path, "round") if e["round"] == 3]
    assert math.isfinite(event["loss"])
    assert event["bytes_up"] == 2 * 4 * UPLOAD


def test_the_others_do_not_notice_a_failing_client(two_rounds: Path, tmp_path: Path) -> None:
    healthy, _ = run_here(settings(tmp_path / "healthy"))
    poison(two_rounds, 2, 1, 1e38)
    run, _ = run_here(settings(two_rounds, federation__rounds=3), "resume")
    for client in (0, 2):
        mine, theirs = (load_state(state_file(path, 3, client)) for path in (run.path, healthy.path))
        assert all(torch.equal(value, theirs.tensors[key]) for key, value in mine.tensors.items())
    report = (run.path / "results" / "final_scores.json").read_text()
    assert json.loads(report)["last"]["round"] == 3


def test_when_every_client_fails_the_run_stops_and_keeps_finished_rounds(two_rounds: Path, tmp_path: Path) -> None:
    for client in range(CLIENTS):
        poison(two_rounds, 2, client, 1e38)
    before = tree(two_rounds / "checkpoints")
    config = write_yaml(tmp_path / "x.yaml", settings(two_rounds, federation__rounds=3))
    line = refused("run", config, "--resume")
    assert line.startswith("round 3: every client failed (loss is nan)")
    assert "lower training.lr than 0.02" in line
    assert tree(two_rounds / "checkpoints") == before


def test_an_adapter_that_is_not_finite_after_its_last_step_fails_its_client(tmp_path: Path) -> None:
    """One step only: its loss is finite, and what comes out of it is not."""
    changes = {
        "training__lr": 1e38,
        "training__batch_size": TRAIN,
        "training__local_epochs": 1,
        "training__schedule": "constant",
    }
    config = write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", **changes, training__weight_decay=1e30))
    line = refused("run", config)
    assert line.startswith("round 1: every client failed (")
    assert "is not finite after training" in line
    assert len(of_kind(tmp_path / "run", "client_failed")) == CLIENTS


# ----------------------------------------------------------------------------------------------------- equal settings

GENTLE = 2e-3
"""Learning rate at which AdamW does not blow rounding up over 45 steps."""


@pytest.mark.parametrize("method", ["fedalt", "fedit", "local"])
@pytest.mark.parametrize(
    "changes", [{"federation__executor": "loop"}, {"federation__cohort": 2}], ids=["loop", "cohort"]
)
def test_executors_agree_over_a_whole_run(tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    run, _ = run_here(settings(tmp_path / "run", method=method, training__lr=GENTLE, **changes))
    stacked = finished(method, training__lr=GENTLE)
    assert farthest(run.path, stacked) < 1e-5
    assert max(float(value.abs().max()) for value in adapters(stacked).values()) > 0.01
    for mine, theirs in zip(of_kind(run.path, "client"), of_kind(stacked, "client"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["alpha"] == pytest.approx(theirs["alpha"], abs=1e-5)
    assert final_of(run.path)["last"] == final_of(stacked)["last"]


def test_executors_agree_with_uneven_clients_and_partial_participation(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "rows")
    write_rows(folder / "train" / "local_training_1.json", rows(1, 5), lines=False)
    write_rows(folder / "test" / "local_testing_2.jsonl", rows(2, 7, 100), lines=True)
    changes = {"data": folder, "federation__fraction": 0.67, "federation__rounds": 4, "training__lr": GENTLE}
    stacked, _ = run_here(settings(tmp_path / "stacked", **changes))
    loop, _ = run_here(settings(tmp_path / "loop", **changes, federation__executor="loop"))
    assert farthest(stacked.path, loop.path) < 1e-5
    assert {e["steps"] for e in of_kind(loop.path, "client")} == {15, 10}


def test_rows_delivered_one_by_one_are_the_broadcast_ones(tmp_path: Path) -> None:
    run, _ = run_here(settings(tmp_path / "run", training__lr=GENTLE, federation__rest_of_world_delivery="unicast"))
    assert farthest(run.path, finished(training__lr=GENTLE)) < 1e-5


def test_recomputed_activations_are_the_same(tmp_path: Path) -> None:
    run, _ = run_here(settings(tmp_path / "run", training__lr=GENTLE, model__gradient_checkpointing=True))
    assert farthest(run.path, finished(training__lr=GENTLE)) < 1e-5


# -------------------------------------------------------------------------------------------------- one and two clients


def test_one_client_is_told_that_it_is_alone_and_equals_local(tmp_path: Path) -> None:
    data = data_folder(tmp_path / "rows", clients=1)
    runs = {m: run_here(settings(tmp_path / m, data=data, method=m))[0].path for m in ("fedalt", "local")}
    _, note = of_kind(runs["fedalt"], "note")
    assert note["text"].startswith("one client: ")
    assert "equals local" in note["text"]
    assert len(of_kind(runs["local"], "note")) == 1
    assert farthest(runs["fedalt"], runs["local"]) == 0
    assert final_of(runs["fedalt"])["last"] == final_of(runs["local"])["last"]
    assert sorted(p.name for p in (runs["fedalt"] / "clients" / "0").iterdir()) == ["fedalt_config.json", "individual"]


def test_two_clients_are_warned_that_the_row_is_the_other(tmp_path: Path) -> None:
    run, _ = run_here(settings(tmp_path / "run", data=data_folder(tmp_path / "rows", clients=2)))
    _, note = of_kind(run.path, "note")
    assert note["text"].startswith("two clients: each one's RoW LoRA is the other client's individual LoRA")
    for client in (0, 1):
        row = load_file(run.path / "clients" / str(client) / "rest_of_world" / "adapter_model.safetensors")
        other = load_file(run.path / "clients" / str(1 - client) / "individual" / "adapter_model.safetensors")
        assert all(torch.allclose(value, other[name], atol=1e-6, rtol=0) for name, value in row.items())


def test_three_clients_get_no_note_and_fedit_never_one(tmp_path: Path) -> None:
    (understood,) = of_kind(finished(), "note")
    assert "client files; instruction and output (instruction → output); 3 clients" in understood["text"]
    run, _ = run_here(settings(tmp_path / "run", data=data_folder(tmp_path / "rows", clients=2), method="fedit"))
    assert len(of_kind(run.path, "note")) == 1


def test_fedit_gives_everybody_the_same_model() -> None:
    tensors = adapters(finished("fedit"))
    for name, value in tensors.items():
        if name.startswith("0/"):
            assert all(torch.equal(value, tensors[f"{client}/{name[2:]}"]) for client in (1, 2))


def test_clients_of_fedalt_differ_and_share_no_individual() -> None:
    tensors = adapters(finished())
    own = [name for name in tensors if name.startswith("0/individual")]
    assert own
    assert any(not torch.equal(tensors[name], tensors[f"1/{name[2:]}"]) for name in own)


def test_a_moved_model_folder_is_the_same_run(tmp_path: Path) -> None:
    """The fingerprint decides whether adapters fit a base, not where it lies."""
    shutil.copytree(shared_model(), tmp_path / "model")
    run, _ = run_here(settings(tmp_path / "run", model=tmp_path / "model"))
    assert farthest(run.path, finished()) == 0


def test_everybody_has_feddpas_private_phase_however_few_take_part(tmp_path: Path) -> None:
    """One of three in each round but the last, in which all train their local LoRA and send nothing."""
    values = settings(tmp_path / "run", method="feddpa_f", federation__fraction=0.34)
    folder, _ = run_here(values)
    assert [len(event["clients"]) for event in of_kind(folder.path, "round_started")] == [1, 1, CLIENTS]
    for client in range(CLIENTS):
        tensors = load_state(state_file(folder.path, 3, client)).tensors
        local = {key: value for key, value in tensors.items() if key.slot == "local"}
        assert all(not torch.equal(value, tensors[key._replace(slot="global")]) for key, value in local.items())
    assert [event["bytes_up"] > 0 for event in of_kind(folder.path, "round")] == [True, True, False]


def test_centralized_trains_on_the_rows_of_all(tmp_path: Path) -> None:
    """As many steps as all rows give, and other rows at the last client make another model for everybody."""
    data, runs = data_folder(tmp_path / "data"), []
    for name in ("one", "other"):
        folder, _ = run_here(settings(tmp_path / name, data=data, method="centralized", federation__rounds=1))
        (client,) = of_kind(folder.path, "client")
        assert client["steps"] == 5 * math.ceil(CLIENTS * TRAIN / 4)
        assert (client["bytes_up"], client["bytes_down"]) == (0, 0)
        runs.append({key: value for key, value in adapters(folder.path).items() if key.startswith("0/")})
        write_rows(data / "train" / f"local_training_{CLIENTS - 1}.json", rows(CLIENTS - 1, TRAIN, 50), lines=False)
    assert runs[0].keys() == runs[1].keys() and runs[0]
    assert max(float((value - runs[1][key]).abs().max()) for key, value in runs[0].items()) > 1e-3
