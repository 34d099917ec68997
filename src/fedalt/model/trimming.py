"""The last block's feed-forward layer, at the tokens whose states are asked for only.

Behind the last attention a token's state matters to that token alone, and training looks at answers only: a few
percent of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import Tensor, nn

from fedalt.model.rowmap import RowContext


def enable_trimming(backbone: nn.Module, context: RowContext, adapted: Collection[nn.Module]) -> None:
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


def _forward(own: Callable[..., Any], context: RowContext, *states: Tensor) -> Any:
    wanted = context.current.wanted
    if wanted is None:
        return own(*states)
    some = own(*(state[:, wanted] for state in states))
    return some.new_zeros(*states[0].shape[:2], some.shape[2]).index_copy(1, wanted, some)
