"""The head and the last feed-forward layer see answers only, a few at a time, and losses and gradients are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from fedalt.data.batches import collate
from fedalt.model.adapted import AdaptedModel
from fedalt.model.fast import patches
from fedalt.names import Key
from fedalt.training import loss
from fedalt.training.loss import client_losses, token_losses
from oracle.reference import PlainClient
from support import (
    MODELS,
    PAD,
    SCALE,
    SMALL,
    VOCAB,
    WIDE,
    bloom,
    examples,
    gpt2,
    llama,
    method_of,
    placement,
    random_states,
    relative,
    shape_of,
)

GROUPS = [examples(count, seed=k, longest=6 + 3 * k) for k, count in enumerate((3, 2, 2))]
ANSWERS = sum(len(row.answer) for mine in GROUPS for row in mine)
TOKENS = sum(len(row) for mine in GROUPS for row in mine)


def gemma() -> Gemma2ForCausalLM:
    """Logits are soft-capped, to within 2 here, where most of them are larger."""
    torch.manual_seed(0)
    config = Gemma2Config(
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=WIDE,
        final_logit_softcapping=2.0,
        pad_token_id=PAD,
        **SMALL,
    )
    return Gemma2ForCausalLM(config).eval()


def cohere() -> CohereForCausalLM:
    """Logits are multiplied by a number of the model's."""
    torch.manual_seed(0)
    config = CohereConfig(num_key_value_heads=2, initializer_range=WIDE, logit_scale=3.0, pad_token_id=PAD, **SMALL)
    return CohereForCausalLM(config).eval()


HEADS = {"gemma2": gemma, "cohere": cohere}


def loaded(base: Any) -> AdaptedModel:
    model, rule = AdaptedModel(base), method_of("fedalt")
    shape = shape_of(rule, model.layer_sizes)
    model.load(random_states(shape), placement(shape), [key for key in shape.shapes() if rule.trains(key)])
    return model


def step(model: AdaptedModel) -> tuple[Tensor, dict[Key, Tensor]]:
    """Losses and gradients of one step."""
    for parameter in model.trainable.values():
        parameter.grad = None
    losses = client_losses(model, collate(GROUPS))
    losses.sum().backward()
    return losses.detach(), {key: p.grad for key, p in model.trainable.items() if p.grad is not None}


@pytest.mark.parametrize("name", [*MODELS, *HEADS])
def test_gradients_do_not_depend_on_how_many_logits_there_are_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = loaded({**MODELS, **HEADS}[name]()), list[int]()
    model.base.get_output_embeddings().register_forward_hook(lambda m, x, y: seen.append(x[0].shape[-2]))
    losses, whole = step(model)
    assert seen == [ANSWERS]
    for tokens in (1, 3, ANSWERS - 1):
        seen.clear()
        monkeypatch.setattr(loss, "_LOGITS", {"cpu": tokens * VOCAB})
        monkeypatch.setattr(loss, "_TOKENS", 1)
        few, grads = step(model)
        assert max(seen) == tokens and sum(seen) == ANSWERS
        torch.testing.assert_close(few, losses, rtol=1e-6, atol=1e-6)
        assert grads.keys() == whole.keys()
        assert all(relative(grads[key], whole[key]) < 1e-5 for key in whole)


@pytest.mark.parametrize("name", HEADS)
def test_what_a_model_does_behind_its_head_counts(name: str) -> None:
    model = loaded(HEADS[name]())
    losses, grads = step(model)
    for k, state in enumerate(random_states(shape_of(method_of("fedalt"), model.layer_sizes))):
        alone = PlainClient(HEADS[name](), state.tensors, SCALE)
        expected = alone.loss(GROUPS[k], PAD)
        expected.backward()
        assert losses[k].item() == pytest.approx(expected.item(), rel=1e-5)
        for key, grad in grads.items():
            assert relative(grad[k], alone.parameters[key].grad) < 1e-5  # type: ignore[index, arg-type]


@pytest.mark.parametrize(
    ("make", "inner"),
    [
        (llama, "model.layers.{}.mlp.down_proj"),
        (bloom, "transformer.h.{}.mlp.dense_4h_to_h"),
        (gpt2, "transformer.h.{}.mlp.c_fc"),
    ],
)
def test_head_and_last_feed_forward_layer_see_answers_only(make: Any, inner: str) -> None:
    model = loaded(make())
    rows: dict[str, int] = {}

    def count(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda m, x, y: rows.update({name: x[0].shape[:-1].numel()}))

    count("first", model.base.get_submodule(inner.format(0)))
    count("last", model.base.get_submodule(inner.format(1)))
    count("head", model.base.get_output_embeddings())
    step(model)
    assert rows == {"first": TOKENS, "last": ANSWERS, "head": ANSWERS}


@pytest.mark.parametrize("name", [*MODELS, *HEADS])
def test_losses_without_a_gradient_are_the_same_and_do_not_go_through_the_head_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    own = patches._Product.backward
    monkeypatch.setattr(patches._Product, "backward", staticmethod(lambda *args: (calls.append(1), own(*args))[1]))
    model = loaded({**MODELS, **HEADS}[name]())
    with_gradient = token_losses(model, collate(GROUPS))
    assert calls == [1]
    with torch.no_grad():
        without = token_losses(model, collate(GROUPS))
    assert calls == [1]
    assert torch.equal(without, with_gradient)
