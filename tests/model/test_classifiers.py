"""Classifiers: K clients with heads of their own in one forward pass are K plain Hugging Face classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from classifiers import CLASSES, KINDS, PLACEMENT, adapted, build, examples, inputs_of, plain_losses, states
from fedalt.data.batches import collate
from fedalt.errors import UserError
from fedalt.model.adapted import AdaptedModel
from fedalt.model.classifier import _image_size, head_paths, summary_of
from fedalt.names import HEAD
from fedalt.training.loss import client_losses
from support import HIDDEN, LAYERS, bitwise, distance, relative

SIZES = (3, 5, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_summary_token_is_found(kind: str) -> None:
    seen = dict.fromkeys(("llama", "bloom", "gpt2"), "last") | dict.fromkeys(("beit", "dinov2", "swin"), "all")
    assert summary_of(build(kind))[0] == seen.get(kind, "first")


def test_a_model_whose_states_are_no_tokens_is_refused() -> None:
    config = hf.ConvNextConfig(image_size=32, num_channels=1, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
    model = hf.ConvNextForImageClassification(config).eval()
    with pytest.raises(
        UserError, match=r"model\.task: ConvNextForImageClassification cannot be adapted: its states are no tokens"
    ):
        AdaptedModel(model, targets=("pwconv1",), heads=head_paths(model, ()))


def test_layers_that_see_unlike_numbers_of_tokens_drop_the_same_stacked_or_alone() -> None:
    model = adapted("swin", targets=("all-linear",))
    mine = states(model)
    groups = [examples("swin", count, seed=k) for k, count in enumerate(SIZES)]
    model.train()

    def losses(which: Sequence[int], dropout: float = 0.5) -> Tensor:
        model.load([mine[k] for k in which], replace(PLACEMENT, dropout=dropout))
        batch = collate([groups[k] for k in which])
        return client_losses(model, replace(batch, rows=replace(batch.rows, keys=tuple(100 + k for k in which))))

    together = losses(range(3))
    for k in range(3):
        assert relative(together[k], losses([k])[0]) < 1e-4
    assert relative(together, losses(range(3), 0.0)) > 1e-2


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_plain_classifiers(kind: str, packing: bool) -> None:
    model = adapted(kind, packing=packing)
    mine = states(model)
    groups = [examples(kind, count, seed=k) for k, count in enumerate(SIZES)]
    model.load(mine, PLACEMENT, [*mine[0].tensors, *mine[0].heads])
    losses = client_losses(model, collate(groups))
    losses.sum().backward()
    grads = {key: value.grad for key, value in model.trainable.items()}
    assert any(key.slot == HEAD for key in grads)
    for k, state in enumerate(mine):
        leaves = {key: value.clone().requires_grad_() for key, value in {**state.tensors, **state.heads}.items()}
        _, loss = plain_losses(kind, leaves, groups[k])
        loss.backward()
        assert abs(losses[k].item() - loss.item()) < 1e-4 * loss.item()
        for key, leaf in leaves.items():
            grad = grads[key]
            assert grad is not None and leaf.grad is not None
            if float(leaf.grad.abs().max()) > 1e-4:  # the key's bias in attention has none
                assert relative(grad[k], leaf.grad) < 2e-3, key


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_client_without_rows_has_loss_and_gradient_zero(kind: str) -> None:
    model = adapted(kind)
    mine = states(model)
    model.load(mine, PLACEMENT, list(mine[0].heads))
    losses = client_losses(model, collate([examples(kind, 3, 0), (), examples(kind, 2, 2)]))
    losses.sum().backward()
    assert losses[1] == 0
    for value in model.trainable.values():
        assert value.grad is not None and not value.grad[1].any() and value.grad[0].any()


def test_bert_packs_and_images_do_not() -> None:
    assert adapted("bert").packs and adapted("roberta").packs and adapted("llama").packs and not adapted("vit").packs


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_who_else_is_there(kind: str) -> None:
    model = adapted(kind)
    groups = [examples(kind, count, seed=k) for k, count in enumerate(SIZES)]
    mine = states(model)
    with torch.no_grad():
        model.load(mine, PLACEMENT)
        batch = collate(groups)
        together = model.class_scores(batch.inputs, batch.rows).split(SIZES)
        for k, state in enumerate(mine):
            model.load([state], PLACEMENT)
            alone = collate([groups[k]])
            assert relative(together[k], model.class_scores(alone.inputs, alone.rows)) < 1e-4
            assert relative(together[k], plain_losses(kind, {**state.tensors, **state.heads}, groups[k])[0]) < 1e-3
    assert together[0].shape == (3, CLASSES)


def test_a_pooler_without_weights_is_a_head() -> None:
    model = build("bert")
    paths = head_paths(model, ["bert.pooler.dense.weight"])
    assert paths == ("bert.pooler", "classifier")
    rows = examples("bert", 4, 0)
    wanted = model(**inputs_of(rows)).logits
    trained = AdaptedModel(model, heads=paths)
    assert {key.module for key in trained.head_start} == {"bert.pooler.dense", "classifier"}
    state = states(trained)[0]
    for tensors in (state.tensors,):
        for value in tensors.values():
            value.zero_()
    own = state.with_tensors({}, trained.head_start)
    trained.load([own], PLACEMENT)
    batch = collate([rows])
    with torch.no_grad():
        assert relative(trained.class_scores(batch.inputs, batch.rows), wanted) < 1e-4


def test_heads_train_and_come_off_the_model() -> None:
    model = adapted("bert")
    mine = states(model, (0, 1))
    model.load(mine, PLACEMENT, list(mine[0].heads))
    with torch.no_grad():
        for value in model.trainable.values():
            value[1] += 1
    first, second = model.unstack()
    assert bitwise(first, mine[0].heads)
    assert abs(distance(second, mine[1].heads) - 1) < 1e-6
    model.clear()
    assert not any("classifier" in name for name, _ in model.base.named_parameters())


def test_a_vit_of_another_size(capsys: Any) -> None:
    config = hf.ViTConfig(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48, image_size=16,
        patch_size=4, num_labels=2,
    )  # fmt: skip
    model = hf.ViTForImageClassification(config).eval()
    assert AdaptedModel(model, heads=head_paths(model, ())).image_tokens == 17


@pytest.mark.parametrize("size", [16, [16], (16, 16), {"height": 16, "width": 16}])
@pytest.mark.parametrize("inside", [False, True])
def test_where_the_size_of_an_image_may_stand(size: Any, inside: bool) -> None:
    about = SimpleNamespace(image_size=size, sub_configs={})
    assert _image_size(SimpleNamespace(vision=about, sub_configs={"vision": None}) if inside else about) == (16, 16)


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
def test_mean_pooling_is_the_head_on_the_mean_of_all_states(kind: str) -> None:
    rows = examples(kind, 4, 0)
    plain = build(kind)
    head = plain.get_submodule(head_paths(plain, ())[0])
    with torch.no_grad():
        wanted = []
        for row in rows:
            inputs = inputs_of([row])
            states = plain.get_decoder()(**inputs).last_hidden_state[0]
            wanted.append(head(states.mean(0)))
        model = adapted(kind, pooling="mean")
        (state,) = states_of_base(model)
        model.load([state], PLACEMENT)
        batch = collate([rows])
        assert relative(model.class_scores(batch.inputs, batch.rows), torch.stack(wanted)) < 1e-4


def states_of_base(model: AdaptedModel) -> list[Any]:
    """A client whose adapters change nothing, with the model's own head."""
    (state,) = states(model, (0,))
    zero = {key: torch.zeros_like(value) for key, value in state.tensors.items()}
    return [state.with_tensors(zero, model.head_start)]
