"""A base larger than its device: weights on disk, and the same numbers as with all of them in memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from fedalt.config import ModelConfig
from fedalt.model.adapted import AdaptedModel
from fedalt.model.base import load_base
from fedalt.model.batch_layout import BatchLayout
from fedalt.model.layer import SUM, Placement
from fedalt.model.state import AdapterShape, initial_state
from micro import VOCAB, call, farthest, refused, settings, shared_model, timeless, tokenizer, write_yaml

OFFLOADED: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": "130KB"}}
SMALL = {"model__device": "cpu", **{f"model__{key}": value for key, value in OFFLOADED.items()}}


@pytest.fixture
def as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain run multiplies by weights as they are; packed ones give other last digits."""
    monkeypatch.setattr("fedalt.model.adapted.pack_weights", lambda model: 0)
    monkeypatch.setattr("fedalt.model.adapted.fuse", lambda model: None)


def mixtral(folder: Path) -> Path:
    """Experts are in one tensor in memory, and in one each in the file, so they are written anew to be offloaded."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def told(run: Path) -> list[dict[str, Any]]:
    """Losses, scores, digests of weights, and what uploads amount to."""
    return [event for event in timeless(run) if event["event"] not in ("run_started", "run_finished")]


@pytest.mark.parametrize(("kind", "checkpointing"), [("llama", False), ("gpt2", True), ("mixtral", False)])
@pytest.mark.usefixtures("as_written")
def test_weights_on_disk_give_the_same_losses_uploads_and_answers(
    tmp_path: Path, kind: str, checkpointing: bool
) -> None:
    model = mixtral(tmp_path / kind) if kind == "mixtral" else shared_model(kind)
    more = {"model__gradient_checkpointing": checkpointing, "federation__rounds": 2, "training__local_epochs": 1}
    runs = [tmp_path / "plain", tmp_path / "offloaded"]
    for out, changes in zip(runs, ({}, SMALL), strict=True):
        done = call("run", write_yaml(tmp_path / f"{out.name}.yaml", settings(out, model, **more, **changes)))
        assert done.code == 0, done.err
    plain, offloaded = map(told, runs)
    note = offloaded.pop(1)["text"]
    assert re.match(r"model.device_map: .*disk 0\.\d MB \(.*\); computed on cpu", note), note
    assert plain == offloaded
    assert any("loss" in str(event) for event in plain)
    assert farthest(*runs) == 0
    for name in ("eval_client1_round2.jsonl", "scores_client2_round2.json"):
        assert (runs[0] / "results" / name).read_bytes() == (runs[1] / "results" / name).read_bytes()


def test_a_step_keeps_no_offloaded_weight_and_the_base_is_known_as_the_same() -> None:
    everything = {"device_map": "auto", "max_memory": {"cpu": "1KB"}}
    plain, base = (load_base(ModelConfig(name=str(shared_model()), device="cpu", **how)) for how in ({}, everything))
    assert base.sha256 == plain.sha256
    weights = {tuple(weight.shape) for name, weight in base.model.named_parameters() if weight.dim() == 2}
    model, rows = AdaptedModel(base.model), BatchLayout((2,), (3, 4))
    placement = Placement(("individual",), SUM, 1.0, 0.0)
    shape = AdapterShape({"individual": 5}, False, model.layer_sizes)
    model.load([initial_state(shape, 0, 0, "shared", "kaiming")], placement, tuple(shape.shapes()))
    kept = list[tuple[int, ...]]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.hidden(torch.arange(3, 10), rows).last_hidden_state
    assert not weights & {*kept, *(shape[::-1] for shape in kept)}
    states.sum().backward()
    assert all(value.grad is not None for value in model.trainable.values())
    assert {weight.device.type for weight in base.model.parameters() if not weight.requires_grad} == {"meta"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__task": "sequence_classification"}, "model.task: heads are trained"),
        ({"model__load_in": "8bit"}, "model.load_in: quantised weights are not offloaded"),
        ({"model__adapter": "somewhere"}, "model.adapter: a merge changes weights; adapter_as=start works"),
        ({"model__max_memory": {0: "1GB"}}, "model.max_memory: 0 is not where the base computes; allowed: cpu"),
        ({"model__device_map": None}, "model.max_memory: this is for model.device_map=auto"),
        ({"federation__devices": ["cpu"]}, "model.device_map: with federation.devices"),
        ({"model__max_memory": {"cpu": "much"}}, "model.max_memory: `size` much is not"),
    ],
)
def test_what_cannot_be_offloaded_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    values = settings(tmp_path / "run", **SMALL | changes)
    assert said in refused("validate", write_yaml(tmp_path / "c.yaml", values))
