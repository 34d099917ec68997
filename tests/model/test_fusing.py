"""Norms, rotary positions and activations taken in one go are those of the modules they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import BatchLayout
from fedalt.model.fast.patches import RmsNorm, Rotary, fuse
from support import SMALL, SPECIAL, WIDE, relative

LENGTHS = (9, 3, 14)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def value_and_gradient(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    return y.detach(), torch.autograd.grad(y, x, drawn(*y.shape, dtype=y.dtype, seed=1).to(y.device))[0]


def llama_norm() -> LlamaRMSNorm:
    norm = LlamaRMSNorm(24, eps=1e-2).requires_grad_(False)  # large enough to be seen
    norm.weight.copy_(drawn(24, seed=2))
    return norm


@pytest.mark.parametrize("make", [llama_norm, BloomGelu, NewGELUActivation, FastGELUActivation])
def test_a_fused_module_gives_its_own_values_and_gradients(make: Any) -> None:
    module, x = make(), 2 * drawn(2, 5, 24)
    expected = value_and_gradient(module, x)
    own = module.forward
    fuse(nn.Sequential(module))
    assert module.forward != own
    for mine, plain in zip(value_and_gradient(module, x), expected, strict=True):
        assert relative(mine, plain) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_half_precision_on_a_gpu_rounds_as_its_own(dtype: torch.dtype) -> None:
    module, x = llama_norm().to("cuda", dtype), drawn(2, 5, 24, dtype=dtype).cuda()
    fuse(nn.Sequential(module))
    value, gradient = (part.float() for part in value_and_gradient(module, x))
    plain, slope = (part.float() for part in value_and_gradient(LlamaRMSNorm.forward.__get__(module), x))
    assert relative(value, plain) < torch.finfo(dtype).eps
    assert relative(gradient, slope) < 4 * torch.finfo(dtype).eps


def test_formulas_of_gradients() -> None:
    x, weight = drawn(3, 2, 6, dtype=torch.float64).requires_grad_(), drawn(6, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda x: RmsNorm.apply(x, weight, 1e-2), x)
    cos, sin = (drawn(3, 1, 6, dtype=torch.float64, seed=seed) for seed in (2, 3))
    assert torch.autograd.gradcheck(lambda x: Rotary.apply(x, cos, sin), x)


def test_a_turn_is_that_of_hugging_face_even_where_the_halves_turn_differently() -> None:
    x, cos, sin = drawn(7, 2, 6), drawn(7, 6, seed=1), drawn(7, 6, seed=2)
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos[None], sin[None])
    assert relative(Rotary.apply(x, cos[:, None], sin[:, None]), expected[0].transpose(0, 1)) < 1e-6


def test_norms_of_other_precision_or_with_a_weight_that_trains_are_left_to_themselves() -> None:
    for norm, x in ((llama_norm(), drawn(4, 24).bfloat16()), (llama_norm().requires_grad_(), drawn(4, 24))):
        expected = norm(x)
        fuse(nn.Sequential(norm))
        assert torch.equal(norm(x), expected)
        assert norm(x).requires_grad == expected.requires_grad


def test_classes_that_are_not_known_are_left_alone() -> None:
    """Gemma's norm multiplies by 1 + w; a class of another origin may do anything under a known name."""
    gemma = GemmaForCausalLM(GemmaConfig(head_dim=8, num_key_value_heads=2, **SMALL, **SPECIAL))
    other = type("LlamaRMSNorm", (nn.Module,), {"forward": lambda self, x: 3 * x})()
    fuse(nn.Sequential(gemma.model.norm, other))
    assert "forward" not in vars(gemma.model.norm) and "forward" not in vars(other)


ROTARY = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, initializer_range=WIDE, **SMALL, **SPECIAL)),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(sliding_window=5, num_key_value_heads=2, initializer_range=WIDE, **SMALL, **SPECIAL)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
            num_key_value_heads=2,
            initializer_range=WIDE,
            **SMALL,
            **SPECIAL,
        )
    ),
}


@pytest.mark.parametrize("name", ROTARY)
def test_states_and_gradients_of_packed_rows_are_those_of_each_row_in_the_plain_model(name: str) -> None:
    """The gradient to the embeddings passes through every norm, turn and product."""
    plain, base = (_seeded(name) for _ in range(2))
    model = AdaptedModel(base)
    assert model.packs
    ids = torch.randint(3, 64, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    weight = base.get_input_embeddings().weight
    weight.requires_grad_()
    states = model.hidden(ids, BatchLayout((1, 2), LENGTHS)).last_hidden_state
    slopes = drawn(*states.shape, seed=1)
    mine = torch.autograd.grad(states, weight, slopes)[0]
    expected = torch.cat([plain.model(part[None]).last_hidden_state[0] for part in ids.split(LENGTHS)])
    theirs = torch.autograd.grad(expected, plain.get_input_embeddings().weight, slopes)[0]
    assert relative(states.detach(), expected.detach()) < 1e-5
    assert relative(mine, theirs) < 1e-5


def _seeded(name: str) -> Any:
    torch.manual_seed(0)
    return ROTARY[name]().eval()
