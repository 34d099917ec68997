"""Faster forwards in the place of a model's own. Modules keep their type, parameters and place; their call is replaced.

Packed weights (CPU): nothing changes frozen weights, so they are laid out once for the forward pass and once,
transposed, for the gradient to the input.

The last block at fewer tokens: behind the last attention a token's state matters to that token alone, and training
looks at answers only, a few percent of the tokens.

Fused operations: norms, rotary positions and GELU as Hugging Face writes them are chains of elementwise operations,
each of which reads and writes all tokens and keeps its inputs for the gradient. A frozen weight needs no gradient of
its own, so a few passes are enough. Only classes that are known are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import psutil
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Float
from torch import Tensor, nn

from fedalt.model.batch_layout import BatchContext

_ROWS = 512
"""Rows of input that packed weights are laid out for; others work as well."""
_SHARE = 0.5
"""Most of the free memory that packed copies may take."""


class _Product(torch.autograd.Function):
    """``x Wᵀ + b`` with both directions packed; W and b are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forwards: Tensor, backwards: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(backwards)
        return _linear(x, forwards, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (backwards,) = ctx.saved_tensors
        return _linear(grad, backwards, None), None, None, None


def pack_weights(model: nn.Module) -> int:
    """Pack the weights of every plain linear layer on the CPU, if both copies fit well into free memory.

    Returns:
        Number of layers packed; 0 on a GPU, for quantised layers, without oneDNN, or when memory is short.
    """
    layers: list[Any] = [module for module in model.modules() if _plain(module)]
    size = sum(2 * layer.weight.numel() * layer.weight.element_size() for layer in layers)
    if not layers or size > _SHARE * psutil.virtual_memory().available or not _available(layers[0].weight):
        return 0
    for layer in layers:
        weight = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().t()
        layer.forward = partial(_call, _pack(weight), _pack(weight.t()), layer.bias)
    return len(layers)


def _call(forwards: Tensor, backwards: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return _Product.apply(x, forwards, backwards, bias)  # type: ignore[no-any-return, no-untyped-call]


def _plain(module: nn.Module) -> bool:
    if type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
        return False
    weight: Any = module.weight
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)


def _available(weight: Tensor) -> bool:
    """Whether this build of torch has the operators, tried on a corner of a weight."""
    corner = weight.detach()[:16, :16].contiguous()
    x = torch.ones(3, corner.shape[1], dtype=corner.dtype)
    try:
        return torch.allclose(_linear(x, _pack(corner), None), x @ corner.t(), rtol=1e-2, atol=1e-3)
    except (AttributeError, RuntimeError):
        return False


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return packed


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")
    return y


def enable_trimming(backbone: nn.Module, context: BatchContext, adapted: Collection[nn.Module]) -> None:
    """Let the last block's ``mlp`` skip tokens that nobody asks for; models without one are left alone.

    Args:
        backbone: The model without its head.
        context: Says which tokens are wanted.
        adapted: Layers with adapters; none may be in that ``mlp``, since they count on seeing all tokens.
    """
    blocks = [module for module in backbone.children() if isinstance(module, nn.ModuleList) and len(module)]
    mlp = getattr(blocks[-1][-1], "mlp", None) if blocks else None
    if isinstance(mlp, nn.Module) and not any(module in adapted for module in mlp.modules()):
        mlp.forward = partial(_forward, mlp.forward, context)


def _forward(own: Callable[..., Any], context: BatchContext, *states: Tensor) -> Any:
    wanted = context.current.wanted
    if wanted is None:
        return own(*states)
    some = own(*(state[:, wanted] for state in states))
    return some.new_zeros(*states[0].shape[:2], some.shape[2]).index_copy(1, wanted, some)


_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"}
_GELUS = {"BloomGelu", "NewGELUActivation", "FastGELUActivation"}
_ATTENTIONS: dict[str | None, Callable[[Any], int | None]] = {
    "LlamaAttention": lambda module: None,
    "MistralAttention": lambda module: module.config.sliding_window,
    "Qwen2Attention": lambda module: module.sliding_window,
}
"""Class → where it says how far a token looks back, if not to the beginning."""

Attention = Callable[..., tuple[Tensor, None]]
"""Packed attention, as Hugging Face's attention interface calls it."""


def fuse(model: nn.Module) -> None:
    """Let RMS norms (fp32; half precision on a GPU) and approximate GELUs of a frozen model take fewer passes."""
    for module in model.modules():
        known = _name(module)
        if known in _NORMS:
            module.forward = partial(_norm, module, module.forward)
        elif known in _GELUS:
            module.forward = partial(F.gelu, approximate="tanh")


def fuse_rotary(model: nn.Module, context: BatchContext, attention: Attention) -> None:
    """Let packed rows' queries and keys be turned where they come out of their layers, without transposed copies."""
    for module in model.modules():
        if window := _ATTENTIONS.get(_name(module)):
            module.forward = partial(
                _attend, module, module.forward, context, attention=attention, window=window(module)
            )


class RmsNorm(torch.autograd.Function):
    """``w ⊙ x / √(mean x² + ε)`` with frozen w. For q = 1/√(…) and g = w ⊙ δ: ∂x = q·g − x·q³·(g·x)/d."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*n d"], weight: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*n d"]:
        """Keeps x and a number per token."""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        q = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, q)
        y: Tensor = x * q
        return y.mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "*n d"]) -> tuple[Tensor, None, None]:
        """The formula above."""
        x, weight, q = ctx.saved_tensors
        g = grad * weight
        along = (g * x).sum(-1, keepdim=True)
        return g.mul_(q).addcmul_(x, along * q**3, value=-1 / x.shape[-1]), None, None


class Rotary(torch.autograd.Function):
    """``x ⊙ cos + turned(x) ⊙ sin`` with ``turned((x₁, x₂)) = (−x₂, x₁)``, its halves; cos and sin are constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "t h c"], cos: Float[Tensor, "t 1 c"], sin: Float[Tensor, "t 1 c"]
    ) -> Float[Tensor, "t h c"]:
        """Keeps cos and sin only."""
        ctx.save_for_backward(cos, sin)
        y, half = x * cos, x.shape[-1] // 2
        y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "t h c"]) -> tuple[Tensor, None, None]:
        """The transposed turn."""
        cos, sin = ctx.saved_tensors
        dx, half = grad * cos, grad.shape[-1] // 2
        dx[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return dx, None, None


def _name(module: nn.Module) -> str | None:
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("transformers.") else None


def _norm(module: Any, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if module.weight.requires_grad:
        return own(x)
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):  # torch's own in one pass, rounded where `own` rounds
        y: Tensor = module.weight * F.rms_norm(x, x.shape[-1:], eps=module.variance_epsilon)
        return y
    if x.dtype != torch.float32:
        return own(x)
    return RmsNorm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]


def _attend(
    module: Any,
    own: Callable[..., Any],
    context: BatchContext,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    *rest: Any,
    attention: Attention,
    window: int | None,
    **options: Any,
) -> Any:
    if not context.current.packed:
        return own(hidden_states, position_embeddings, *rest, **options)
    cos, sin = (part[0, :, None] for part in position_embeddings)  # [t, 1, c]
    projected = [layer(hidden_states)[0] for layer in (module.q_proj, module.k_proj, module.v_proj)]
    query, key, value = (x.view(len(x), -1, module.head_dim) for x in projected)
    turned = (Rotary.apply(query, cos, sin), Rotary.apply(key, cos, sin), value)  # type: ignore[no-untyped-call]
    heads = (x.transpose(0, 1)[None] for x in turned)
    y, weights = attention(module, *heads, None, scaling=module.scaling, sliding_window=window)
    return module.o_proj(y.flatten(2)), weights
