"""Newcomers: what each method tells somebody it has never seen, and what a few epochs of their own add."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from fedalt.names import Key, Tensors
from fedalt.personal.onboard import onboard
from fedalt.runs.client_folder import read_client
from fedalt.runs.folder import finished_run
from fedalt.runs.setup import load_resident
from micro import (
    CLIENTS,
    answers,
    call,
    finished,
    label_rows,
    labelled_data,
    refused,
    rows,
    run_here,
    settings,
    shared_classifier,
    shared_model,
    tree,
    write_rows,
    write_yaml,
)
from model.test_peft_files import reply
from support import METHODS, VARIANTS


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients that the run has not seen."""
    folder = tmp_path_factory.mktemp("strangers")
    for i in range(2):
        write_rows(folder / f"train/local_training_{i}.json", rows(CLIENTS + i, 8), False)
        write_rows(folder / f"test/local_testing_{i}.jsonl", rows(CLIENTS + i, 3, 100), True)
    return folder


def test_the_row_of_a_newcomer_is_the_mean_of_all_individual_loras(strangers: Path, tmp_path: Path) -> None:
    run = finished()
    before = tree(run)
    joined = onboard(run, str(strangers), 0, tmp_path / "new")
    assert list(joined["clients"]) == ["3", "4"]
    file = "adapter_model.safetensors"
    individual = [load_file(run / f"clients/{c}/individual/{file}") for c in range(CLIENTS)]
    row = load_file(tmp_path / f"new/clients/3/rest_of_world/{file}")
    own = load_file(tmp_path / f"new/clients/3/individual/{file}")
    assert row and all(
        torch.allclose(value, sum(one[name] for one in individual) / CLIENTS, atol=1e-6) for name, value in row.items()
    )
    assert all(not value.any() for name, value in own.items() if "lora_B" in name)
    assert tree(run) == before


def test_at_once_the_row_alone_answers_past_the_mixer(strangers: Path, tmp_path: Path) -> None:
    """PEFT gives the same answers with the row as its only LoRA, at full weight; at the mixer's half it does not."""
    onboard(finished(), str(strangers), 0, tmp_path / "new")
    lines = answers(tmp_path / "new", 3, [3, 4])
    said = [line["answer"] for line in lines]
    model = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "new/clients/3/rest_of_world", dtype=torch.float32
    ).eval()
    assert reply(model, shared_model(), lines) == said
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(0.5)
    assert reply(model, shared_model(), lines) != said


def test_training_changes_what_is_private_and_not_the_row(strangers: Path, tmp_path: Path) -> None:
    run = finished()
    joined = onboard(run, str(strangers), 6, tmp_path / "new")
    file = "adapter_model.safetensors"
    own = load_file(tmp_path / f"new/clients/4/individual/{file}")
    assert all(value.any() for name, value in own.items() if "lora_B" in name)
    untrained = onboard(run, str(strangers), 0, tmp_path / "untrained")
    row = [load_file(tmp_path / f"{name}/clients/4/rest_of_world/{file}") for name in ("new", "untrained")]
    assert all(torch.equal(value, row[1][name]) for name, value in row[0].items())
    for client, one in joined["clients"].items():
        assert one["before"] == untrained["clients"][client]["before"] == untrained["clients"][client]["after"]
    scores = json.loads((tmp_path / "new/results/onboarding.json").read_text())
    assert scores["clients"] == joined["clients"]


def test_a_newcomer_does_not_depend_on_the_others(strangers: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    write_rows(alone / "train/local_training_0.json", rows(CLIENTS, 8), False)
    write_rows(alone / "test/local_testing_0.jsonl", rows(CLIENTS, 3, 100), True)
    both = onboard(finished(), str(strangers), 2, tmp_path / "a")
    one = onboard(finished(), str(alone), 2, tmp_path / "b")
    assert one["clients"]["3"] == both["clients"]["3"]


BOTH = "global.A global.B"
RULES = {
    "local": ("individual.A individual.B", ""),
    "fedit": (BOTH, BOTH),
    "fedit_split": ("mixer.G part0.A part0.B part1.A part1.B", "mixer.G part0.A part0.B part1.A part1.B"),
    "ffa_lora": ("global.B", BOTH),
    "fedsa_lora": (BOTH, "global.A"),
    "feddpa_f": ("anchor.E local.A local.B", BOTH),
    "feddpa_t": ("anchor.E local.A local.B", BOTH),
    "pf2lora": (f"{BOTH} private.A private.B", BOTH),
    "fdlora": ("fused.A fused.B", ""),
    "fedalt": ("individual.A individual.B mixer.G", "rest_of_world.A rest_of_world.B"),
    "lora_fair": (BOTH, BOTH),
    "fedprox": (BOTH, BOTH),
    "ditto": ("personal.A personal.B", ""),  # what answers is the personal LoRA alone
    "select": ("evidence.E individual.A individual.B", BOTH),  # B is halved with everybody
    "fedalt_calibrated": ("evidence.E individual.A individual.B mixer.G", "mixer.C rest_of_world.A rest_of_world.B"),
    "fedalt_joint": ("evidence.E individual.A individual.B mixer.G", f"{BOTH} mixer.C"),  # nothing is corrected
    "fedalt_heldout_mixer": ("individual.A individual.B mixer.G", "rest_of_world.A rest_of_world.B"),
    "fedalt_shared_a": ("individual.A individual.B mixer.G", "individual.A rest_of_world.A rest_of_world.B"),
    "fedit_ft": (BOTH, ""),  # members have gone on alone
    "fedrot_lora": (BOTH, BOTH),
    "rolora": (BOTH, BOTH),
    "fedex_lora": (BOTH, f"{BOTH} merged.W"),
    "fed_sb": ("global.B", BOTH),  # B⁰ R
    "zero_pad": (BOTH, BOTH),
    "hetlora": (BOTH, BOTH),
    "flexlora": (BOTH, BOTH),
    "flora": (BOTH, "global.B merged.W"),  # B is zero with everybody
    "centralized": (BOTH, BOTH),
    "zero_shot": ("", BOTH),
}
"""Method → what an epoch changes in a newcomer, and what it has at once that is the members' mean."""


def tensors(run: Path, clients: Sequence[int]) -> list[Tensors]:
    folder, config = finished_run(run)
    base = load_resident(config).base
    return [read_client(folder, client, base).state.tensors for client in clients]


def kinds(keys: Iterable[Key]) -> str:
    return " ".join(sorted({f"{key.slot}.{key.factor}" for key in keys}))


OF_MANY = ("fedalt_trimmed_mean", "fedalt_krum")  # refused with three clients
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name not in OF_MANY]


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_every_method_has_its_own_rule(name: str, strangers: Path, tmp_path: Path) -> None:
    quick: dict[str, Any] = {"training__local_epochs": 1, "data__train_limit": 6, "evaluation__every": 2}
    small = {"fdlora__budget": 40, "lora_fair__steps": 20, "federation__rounds": 2}
    folder, _ = run_here(settings(tmp_path / "run", method=name, **quick, **small))
    joined = onboard(folder.path, str(strangers), 1)
    assert set(joined["clients"]) == {"3", "4"}
    done = call("generate", folder.path / "newcomers", "--client", 3, "Say 1 2.")
    assert done.code == 0, done.err
    if name in RULES:
        onboard(folder.path, str(strangers), 0, tmp_path / "untrained")
        [trained] = tensors(folder.path / "newcomers", [3])
        [start] = tensors(tmp_path / "untrained", [3])
        members = tensors(folder.path, range(CLIENTS))
        mean = {key: torch.stack([member[key] for member in members]).mean(0) for key in start}
        found = (
            kinds(key for key, value in start.items() if not torch.equal(value, trained[key])),
            kinds(key for key, value in start.items() if torch.allclose(value, mean[key], atol=1e-6)),
        )
        assert found == RULES[name]


def test_the_rules_are_those_of_all_methods() -> None:
    assert RULES.keys() == set(METHODS)


def test_local_gives_nothing_and_fedit_gives_its_model(strangers: Path, tmp_path: Path) -> None:
    base = onboard(finished("zero_shot"), str(strangers), 0, tmp_path / "zero")
    local = onboard(finished("local"), str(strangers), 0, tmp_path / "local")
    assert local["before"] == base["before"]
    onboard(finished("fedit"), str(strangers), 0, tmp_path / "fedit")
    file = "global/adapter_model.safetensors"
    new, old = (load_file(one / file) for one in (tmp_path / "fedit/clients/3", finished("fedit") / "clients/0"))
    assert all(torch.equal(value, old[name]) for name, value in new.items())


def held_out(out: Path, **changes: Any) -> dict[str, Any]:
    task = {"model__task": "sequence_classification", "federation__rounds": 2, "training__lr": 2e-2}
    return settings(out, shared_classifier(), labelled_data(4), **{"data__held_out": 1} | task | changes)


def test_held_out_clients_join_with_heads_of_their_own(tmp_path: Path) -> None:
    folder, _ = run_here(held_out(tmp_path / "run"))
    assert not folder.client(3).exists()
    done = call("onboard", folder.path, "--epochs", 3, "--json")
    assert done.code == 0, done.err
    assert list(done.json["clients"]) == ["3"] and done.json["metric"] == "accuracy"
    file = "individual/adapter_model.safetensors"
    head = load_file(folder.path / "newcomers/clients/3" / file)["base_model.model.classifier.weight"]
    assert head.shape == (3, 32)
    assert "after 3 epochs" in call("onboard", folder.path, "--epochs", 3, "--overwrite").out


def test_a_shared_head_is_a_newcomers_too(tmp_path: Path) -> None:
    folder, _ = run_here(held_out(tmp_path / "run", federation__heads="shared", method="fedit"))
    onboard(folder.path, None, 0)
    name, file = "base_model.model.classifier.weight", "global/adapter_model.safetensors"
    heads = [load_file(folder.path / f"{who}/{file}")[name] for who in ("clients/0", "newcomers/clients/3")]
    assert torch.equal(*heads)


def test_what_cannot_join_is_refused(tmp_path: Path) -> None:
    run = finished()
    assert "--data: give the newcomers' rows" in refused("onboard", run)
    assert "is no folder" in refused("onboard", run, "--data", tmp_path / "nowhere")
    assert "not a run folder" in refused("onboard", tmp_path)
    folder, _ = run_here(held_out(tmp_path / "run"))
    data = tmp_path / "data"
    write_rows(data / "train/local_training_0.json", [{"instruction": "1", "output": "tiny"}], False)
    write_rows(data / "test/local_testing_0.jsonl", label_rows(0, 2), True)
    assert 'label "tiny" is on no training row' in refused("onboard", folder.path, "--data", data)
    config = write_yaml(tmp_path / "c.yaml", held_out(tmp_path / "none", data__held_out=4))
    assert "data.held_out" in refused("run", config)
