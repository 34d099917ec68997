"""Packed rows: all rows of a batch as one long row, nothing spent on padding, attention kept inside each row.

Everything in a transformer but attention looks at one token at a time, so rows can stand one after another. For
attention, rows of like length are brought to one length and attended to in groups: exact, and without ever making a
mask over the whole pack. A model whose rows touch each other anywhere else (a convolution, a recurrent state) gives
other numbers packed than padded; `AdaptedModel` tries it out and pads such a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from fedalt.model.batch_layout import BatchContext, Group, Layout
from fedalt.model.fast.patches import fuse_rotary

_MISSING = ("softcap", "s_aux", "position_bias")
"""Options of Hugging Face's attention interface that packed attention lacks."""


class NotPackable(Exception):  # noqa: N818 - a finding, not an error
    """The model's attention has a feature that packed attention lacks."""


class _Spread(torch.autograd.Function):
    """Tokens to slots. Padding slots never reach an output, so their gradient is zero and is not read."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "t d"], how: Layout) -> Float[Tensor, "s d"]:
        ctx.how = how
        return x.index_select(0, how.token)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "s d"]) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.how.slot), None


class _Gather(torch.autograd.Function):
    """Slots back to tokens; padding slots get gradient zero."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "s d"], how: Layout) -> Float[Tensor, "t d"]:
        ctx.how = how
        return x.index_select(0, how.slot)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "t d"]) -> tuple[Tensor, None]:
        how = ctx.how
        return grad.new_zeros(len(how.token), grad.shape[1]).index_copy_(0, how.slot, grad), None


def _spread(x: Float[Tensor, "t d"], how: Layout) -> Float[Tensor, "s d"]:
    return _Spread.apply(x, how)  # type: ignore[no-any-return, no-untyped-call]


def _gather(x: Float[Tensor, "s d"], how: Layout) -> Float[Tensor, "t d"]:
    return _Gather.apply(x, how)  # type: ignore[no-any-return, no-untyped-call]


Bias = Callable[[Group], Tensor]


def attend(
    query: Float[Tensor, "1 h t c"],
    key: Float[Tensor, "1 g t c"],
    value: Float[Tensor, "1 g t c"],
    how: Layout,
    scaling: float | None,
    *,
    causal: bool,
    bias: Bias | None = None,
) -> Float[Tensor, "1 t h c"]:
    """Scaled dot-product attention inside every row.

    Args:
        query: Queries of h heads.
        key: Keys of g heads, h a multiple of g.
        value: Values.
        how: The rows.
        scaling: Factor on the scores; 1/√c when not given.
        causal: Whether a token sees only itself and what is before it.
        bias: What is added to a group's scores, or where they count, with the causal mask in it.
    """
    if bias is None and _has_kernel(query, value):
        return attend_by_kernel(query, key, value, how, scaling, causal=causal)
    sizes = [group.rows * group.width for group in how.groups]
    spread = [_spread(x[0].transpose(0, 1).flatten(1), how).split(sizes) for x in (query, key, value)]
    out = []
    for group, *parts in zip(how.groups, *spread, strict=True):
        q, k, v = (
            part.view(group.rows, group.width, x.shape[1], -1).transpose(1, 2)
            for part, x in zip(parts, (query, key, value), strict=True)
        )
        mask = bias(group) if bias else (group.mask if group.padded and not causal else None)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, scale=scaling, is_causal=causal and bias is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        out.append(y.transpose(1, 2).reshape(group.rows * group.width, -1))
    slots = out[0] if len(out) == 1 else torch.cat(out)
    return _gather(slots, how).view(1, -1, query.shape[1], value.shape[3])


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether torch's attention for rows of unequal length takes these: half precision on a GPU of 2020 or later."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    width = query.shape[3]
    fits = width == value.shape[3] and width % 8 == 0 and width <= 256
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend_by_kernel(
    query: Float[Tensor, "1 h t c"],
    key: Float[Tensor, "1 g t c"],
    value: Float[Tensor, "1 g t c"],
    how: Layout,
    scaling: float | None,
    *,
    causal: bool,
) -> Float[Tensor, "1 t h c"]:
    """``attend`` in one call, without groups or padding: flash attention's kernel finds the rows by their starts."""
    from torch.nn.attention.varlen import varlen_attn  # takes seconds to import

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [t, heads, c]
    longest = how.groups[0].width
    window = (-1, 0) if causal else (-1, -1)
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch before 2.13
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    y: Any = varlen_attn(
        q, k, v, how.starts, how.starts, longest, longest, scale=scaling, window_size=window, **options
    )
    return y[None]  # type: ignore[no-any-return]


def enable_packing(model: Any, context: BatchContext) -> Callable[[bool], bool]:
    """Give a model a second attention, for packed rows, beside its own.

    Models on Hugging Face's attention interface are switched by name, without a mask ever being made; Bloom, which is
    not on it, has its attention modules' forward extended.

    Returns:
        The switch: true for packed rows, false for the model's own attention; returns what was on before.
    """
    config = model.config.get_text_config()
    own, mine = config._attn_implementation, f"fedalt_{id(context)}"
    attention = partial(_interface, context=context)
    AttentionInterface.register(mine, attention)
    fuse_rotary(model, context, attention)
    for module in model.modules():
        if type(module).__name__ == "BloomAttention":
            module.forward = partial(_bloom, module, module.forward, context)

    def switch(packed: bool) -> bool:
        before: bool = config._attn_implementation == mine
        if packed != before:
            config._attn_implementation = mine if packed else own
        return before

    return switch


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    context: BatchContext,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as Hugging Face's attention interface calls it."""
    rows = context.current
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if sliding_window is not None:
        context.windows.add(sliding_window)
    windowed = sliding_window is not None and sliding_window < max(rows.lengths)
    if (windowed and not causal) or any(options.get(name) is not None for name in _MISSING):
        raise NotPackable(f"a bidirectional window, or one of {', '.join(_MISSING)}")
    bias = partial(_window, sliding_window, query.device) if windowed and sliding_window else None
    return attend(query, key, value, rows.layout(query.device), scaling, causal=causal, bias=bias), None


def smallest_window(config: Any) -> int | None:
    """The fewest tokens that some layer looks back, by the configuration; None where all look back to the start."""
    names = ("sliding_window", "attention_chunk_size", "window_size", "local_attention", "keep_window_size")
    found = [getattr(config, name, None) for name in names[not getattr(config, "use_sliding_window", True) :]]
    return min((size for size in found if isinstance(size, int) and size > 0), default=None)


def _window(size: int, device: torch.device, group: Group) -> Tensor:
    """Where a token looks: at itself and the ``size − 1`` tokens before it."""
    return torch.ones(group.width, group.width, dtype=torch.bool, device=device).tril().triu(1 - size)[None, None]


def _bloom(
    module: Any,
    own: Callable[..., tuple[Tensor, Tensor]],
    context: BatchContext,
    hidden_states: Tensor,
    residual: Tensor,
    *,
    alibi: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Bloom's attention, with its biases by distance (ALiBi) counted inside each row."""
    if not context.current.packed:
        return own(hidden_states, residual, alibi=alibi, attention_mask=attention_mask, **options)
    query, key, value = module._reshape(module.query_key_value(hidden_states))

    def bias(group: Group) -> Tensor:
        width = group.width
        future = torch.full((width, width), float("-inf"), device=alibi.device).triu(1).to(query.dtype)
        return alibi[:, :, :width].to(query.dtype)[None] + future  # [1, heads, width, width]

    rows = context.current
    y = attend(query, key, value, rows.layout(query.device), module.inv_norm_factor, causal=True, bias=bias)
    return module.dense(y.flatten(2)) + residual, None
