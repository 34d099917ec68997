"""The ratio is honest only if both sides do the same work: same rows, same adapters after the round, same losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedalt.benchmarks import side_fedalt, side_paper, workload
from fedalt.benchmarks.side_paper import Collator, answer_loss, others_mean, own_loss
from fedalt.benchmarks.task import Spec
from fedalt.benchmarks.workload import HashTokenizer, Workload
from fedalt.model.adapted import AdaptedModel
from fedalt.names import INDIVIDUAL, MIXER, REST_OF_WORLD
from support import MODELS, PAD, bitwise, distance, examples

SPEC = Spec(clients=3, rows=10, batch_size=4, dropout=0.0)


@pytest.fixture(autouse=True)
def heavy_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the paper's 0.05 a forgotten weight decay would hide below the tolerance."""
    usual = workload.training
    monkeypatch.setattr(workload, "training", lambda spec: usual(spec).model_copy(update={"weight_decay": 5.0}))


def work(kind: str, spec: Spec = SPEC) -> Workload:
    rows = [examples(spec.rows + k, seed=k) for k in range(spec.clients)]  # unequal numbers of steps
    tokenizer: Any = HashTokenizer(64)
    assert tokenizer.pad_token_id == PAD
    return Workload(spec, MODELS[kind](), tokenizer, rows, rows)


@pytest.mark.parametrize("clients", [3, 1])
@pytest.mark.parametrize("side", ["fedalt", "loop"])
@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_without_dropout_fedalt_and_the_paper_end_with_the_same_adapters_and_losses(kind, side, clients):
    spec = Spec(clients=clients, rows=10, batch_size=4, dropout=0.0, side=side)
    mine, theirs = work(kind, spec), work(kind, spec)
    ours = side_fedalt.build(spec, mine).whole(mine.plans())
    trained, losses = side_paper.build(spec, theirs).whole(theirs.plans())
    start = workload.federation(spec, AdaptedModel(MODELS[kind]()).layer_sizes).states
    for before, result, paper, loss in zip(start, ours, trained, losses, strict=True):
        assert result.failure is None
        after = {key: value for key, value in result.state.tensors.items() if key.slot != REST_OF_WORLD}
        assert {key.slot for key in after} == {INDIVIDUAL, MIXER}
        assert distance(after, paper) < 1e-5
        assert distance(after, {key: before.tensors[key] for key in after}) > 1e-4  # it did learn something
        assert abs(result.stats.loss - loss) < 1e-5


def test_both_sides_start_from_the_same_row_which_is_not_zero():
    spec = SPEC
    world = workload.federation(spec, AdaptedModel(MODELS["llama"]()).layer_sizes)
    uploads = [state.sent for state in world.states]
    for state in world.installed():
        row = {key: value for key, value in state.tensors.items() if key.slot == REST_OF_WORLD}
        mean = {key._replace(slot=REST_OF_WORLD): value for key, value in others_mean(uploads, state.client).items()}
        assert distance(row, mean) < 1e-6
        assert all(value.abs().max() > 0 for value in row.values())


def test_a_round_can_be_run_again_from_the_same_start():
    mine = work("llama")
    round_ = side_fedalt.build(SPEC, mine)
    one, two = round_.whole(mine.plans()), round_.whole(mine.plans())
    assert all(bitwise(a.state.tensors, b.state.tensors) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_the_loss_at_answer_positions_is_the_models_own(kind):
    batch = Collator(PAD)(examples(5, seed=0))
    assert batch["input_ids"].shape[1] % 8 == 0
    model = MODELS[kind]()
    assert torch.allclose(own_loss(model, batch), answer_loss(model, batch), atol=1e-6)
