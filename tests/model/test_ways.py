"""Ways of reading rows at their edges: past windows that live in a mask alone, beside padding, and looking ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    ConvBertConfig,
    ConvBertForSequenceClassification,
    DogeConfig,
    DogeForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from fedalt.config import EvaluationConfig
from fedalt.evaluation.generate import answer
from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import BatchLayout
from fedalt.model.targets import backbone_of
from micro import VOCAB, refused, shared_data, tokenizer

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
HEADS = {"num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**HEADS, "num_key_value_heads": 2, "sliding_window": 12}
LENGTHS = (30, 5, 21)


def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def made(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()


@torch.no_grad()
def apart(base: Any, **options: Any) -> float:
    """How far a batch's states are from those that the plain model has of each row alone."""
    plain = backbone_of(base)
    alone = torch.cat([plain(input_ids=part[None])[0][0] for part in ids().split(list(LENGTHS))])
    together = AdaptedModel(base, **options).hidden(ids(), BatchLayout((3,), LENGTHS)).last_hidden_state
    return float((together - alone).norm() / alone.norm())


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (MistralForCausalLM, MistralConfig(**SIZES, **GROUPED)),
        (PhimoeForCausalLM, PhimoeConfig(**SIZES, **GROUPED, num_local_experts=2)),
        (DogeForCausalLM, DogeConfig(**SIZES, **GROUPED)),
    ],
)
def test_rows_longer_than_a_window_are_read_as_alone(kind: Any, config: Any) -> None:
    base = made(kind, config)
    assert apart(base) < 1e-5
    model = AdaptedModel(made(kind, config))
    assert model.packs and model.window == 12
    assert model.branches(12) and not model.branches(13)


def test_rows_beside_padding_are_read_by_length_where_padding_is_seen() -> None:
    """ConvBERT's convolutions run into the padding."""
    config = ConvBertConfig(**SIZES, **HEADS, embedding_size=32)
    base = made(ConvBertForSequenceClassification, config)
    assert apart(base, targets=["query"], heads=("classifier",)) < 1e-5
    model = AdaptedModel(made(ConvBertForSequenceClassification, config), targets=["query"], heads=("classifier",))
    assert not model.packs and not model.pads


def test_dropout_of_rows_read_by_length_is_that_of_the_whole_batch() -> None:
    whole = BatchLayout((2, 1), (3, 2, 3), keys=(5, 6))
    drawn = whole.dropout(torch.ones(8, 10), 0.5, layer=1).kept
    for places, part in whole.by_length():
        assert torch.equal(part.dropout(torch.ones(len(places), 10), 0.5, layer=1).kept, drawn[places])
        for here, same in part.by_length():  # a part of a part
            assert torch.equal(same.dropout(torch.ones(len(here), 10), 0.5, layer=1).kept, drawn[places][here])
    assert [part.sizes for _, part in whole.by_length()] == [(1, 1), (1, 0)]


def test_answers_do_not_depend_on_who_is_in_the_batch() -> None:
    """RWKV takes padding for text, and in Transformers its kept state mixes up the rows of a batch."""
    config = RwkvConfig(**{**SIZES, "attention_hidden_size": 32, "intermediate_size": 64})
    base = made(RwkvForCausalLM, config)
    for value in base.parameters():
        value.data.add_(torch.randn_like(value) * 0.3)
    model = AdaptedModel(base, targets=["all-linear"])
    assert not model.pads_left and not model.caches
    prompts = [tuple(part.tolist()) for part in ids().split([5, 9, 5, 7, 9, 21])]
    how = EvaluationConfig(max_new_tokens=6)
    alone = [answer(model, tokenizer(), [prompt], [0], how)[0] for prompt in prompts]
    assert answer(model, tokenizer(), prompts, [0] * len(prompts), how) == alone
    assert len(set(alone)) > 1


def test_a_model_that_sees_the_answer_it_learns_to_write_is_refused(tmp_path: Path) -> None:
    made(BertLMHeadModel, BertConfig(**SIZES, **HEADS)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    line = refused("run", "--model", tmp_path, "--data", shared_data(), "--out", tmp_path / "run")
    assert line.endswith("in BertLMHeadModel a token sees those after it, so it cannot learn to write answers")
