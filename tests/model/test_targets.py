"""Which layers get adapters."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM, RwkvConfig, RwkvForCausalLM

import classifiers
from fedalt.errors import UserError
from fedalt.model.adapted import AdaptedModel
from fedalt.model.classifier import head_paths
from fedalt.model.targets import find_targets
from support import LAYERS, bloom, gpt2, llama, opt, relative

LLAMA = tuple(f"model.layers.{i}.self_attn.{name}" for i in range(LAYERS) for name in ("q_proj", "v_proj"))


def bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48)
    )


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (llama, LLAMA),
        (bloom, tuple(f"transformer.h.{i}.self_attention.query_key_value" for i in range(LAYERS))),
        (gpt2, tuple(f"transformer.h.{i}.attn.c_attn" for i in range(LAYERS))),
        (bert, tuple(f"bert.encoder.layer.{i}.attention.self.{n}" for i in range(LAYERS) for n in ("query", "value"))),
    ],
    ids=["llama", "bloom", "gpt2", "bert"],
)
def test_alias_by_architecture(make: object, expected: tuple[str, ...]) -> None:
    assert find_targets(make()) == expected  # type: ignore[operator]


def test_opt_has_the_names_of_llama() -> None:
    assert {path.rsplit(".", 1)[-1] for path in find_targets(opt())} == {"q_proj", "v_proj"}


def test_names_given_by_the_user() -> None:
    assert find_targets(llama(), ["o_proj"]) == tuple(f"model.layers.{i}.self_attn.o_proj" for i in range(LAYERS))
    assert find_targets(llama(), ["q_proj", LLAMA[1]]) == (LLAMA[0], LLAMA[1], LLAMA[2])


def test_a_name_matches_whole_parts_of_a_path_only() -> None:
    with pytest.raises(UserError, match='"proj" matches no linear layer'):
        find_targets(llama(), ["proj"])


def test_unknown_target_names_candidates_and_the_closest() -> None:
    with pytest.raises(UserError) as error:
        find_targets(llama(), ["q_porj"])
    assert 'did you mean "q_proj"' in str(error.value)
    assert f"v_proj ({LAYERS})" in str(error.value)


def test_a_module_that_is_no_linear_layer_is_no_target() -> None:
    with pytest.raises(UserError, match="matches no linear layer"):
        find_targets(llama(), ["input_layernorm"])


def test_unknown_architecture_names_candidates() -> None:
    model = RwkvForCausalLM(
        RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=LAYERS, attention_hidden_size=32)
    )
    with pytest.raises(UserError) as error:
        find_targets(model)
    assert "RwkvForCausalLM is not in the alias list; give all-linear" in str(error.value)
    assert f"receptance ({2 * LAYERS}), output ({LAYERS})" in str(error.value)
    assert "head" not in str(error.value)
    assert len(find_targets(model, ["output"])) == LAYERS


def test_the_output_head_is_no_target() -> None:
    """Training gathers the head's input across clients, so rows there have no owner."""
    with pytest.raises(UserError, match="lm_head"):
        find_targets(llama(), ["lm_head"])


@pytest.mark.parametrize("make", [llama, bloom, gpt2], ids=["llama", "bloom", "gpt2"])
def test_wrapping_changes_nothing_until_adapters_are_placed(make: object) -> None:
    model, ids = make(), torch.arange(3, 11)[None]  # type: ignore[operator]
    before = model(input_ids=ids).logits
    adapted = AdaptedModel(model)
    assert relative(model(input_ids=ids).logits, before) < 1e-6  # packed weights and fused norms round in another order
    assert adapted.layer_sizes == {
        path: (layer.in_features, layer.out_features) for path, layer in adapted.layers.items()
    }
    assert not any(p.requires_grad for p in model.parameters())


def chosen_by_peft(model: nn.Module, task: TaskType) -> set[str]:
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type=task))  # type: ignore[arg-type]
    names = (name for name, _ in wrapped.named_modules() if name.endswith("lora_A"))
    return {name.removeprefix("base_model.model.").removesuffix(".lora_A") for name in names}


@pytest.mark.parametrize("make", [llama, bloom, gpt2, opt], ids=["llama", "bloom", "gpt2", "opt"])
def test_all_linear_layers_are_those_that_peft_chooses(make: object) -> None:
    targets = find_targets(make(), ["all-linear"])  # type: ignore[operator]
    assert set(targets) == chosen_by_peft(make(), TaskType.CAUSAL_LM)  # type: ignore[operator]
    assert len(targets) == len(set(targets)) >= 4 * LAYERS


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "gpt2", "vit"])
def test_heads_that_clients_train_themselves_are_not_among_all_linear_layers(kind: str) -> None:
    model = classifiers.build(kind)
    heads = head_paths(model, ())
    theirs = chosen_by_peft(classifiers.build(kind), TaskType.SEQ_CLS)
    inside = {path for path in theirs if any(f"{path}.".startswith(f"{head}.") for head in heads)}
    assert set(AdaptedModel(model, targets=["all-linear"], heads=heads).layers) == theirs - inside


def test_all_linear_stands_alone() -> None:
    with pytest.raises(UserError, match="leave the other names out"):
        find_targets(llama(), ["all-linear", "q_proj"])
    with pytest.raises(UserError, match='did you mean "all-linear"'):
        find_targets(llama(), ["all_linear"])
