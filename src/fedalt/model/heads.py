"""Classification heads: a copy for every client on the model, in the place of the model's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from fedalt.model.rowmap import RowContext
from fedalt.names import HEAD, Key, Tensors


class ClientHead(nn.Module):
    """A head with K sets of parameters: each row goes through the head of the client it belongs to.

    Any module can be a head; it is called as it is, in eval mode, with the client's parameters in its own's place.

    Args:
        head: The model's own head.
        path: Its path in the model.
        context: Says whose rows are whose.
    """

    def __init__(self, head: nn.Module, path: str, context: RowContext) -> None:
        super().__init__()
        self._head = (head.eval(),)  # in a tuple, so that its parameters are not among the model's
        self.context = context
        names = dict(head.named_parameters())
        self.start = {_key(path, name): value.detach().float().cpu() for name, value in names.items()}
        self._names = dict(zip(self.start, names, strict=True))

    def place(self, stacked: Mapping[Key, Tensor], trainable: Sequence[Key]) -> None:
        """Take over the stacked parameters of a cohort."""
        self.clear()
        for key, value in stacked.items():
            name = self._field(key)
            if key in trainable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=False)

    def clear(self) -> None:
        """Drop all parameters; the head cannot be called until others are there."""
        self._parameters.clear()
        self._buffers.clear()

    def parameter(self, key: Key) -> nn.Parameter:
        """The stacked parameter behind a key."""
        return self.get_parameter(self._field(key))

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """Each client's rows through its own head."""
        stacked = {name: getattr(self, self._field(key)) for key, name in self._names.items()}
        dtype = next(iter(stacked.values())).dtype
        parts = x.to(dtype).split(list(self.context.current.counts(len(x))))
        outs = [
            functional_call(self._head[0], {name: value[k] for name, value in stacked.items()}, (part,))
            for k, part in enumerate(parts)
        ]
        return torch.cat(outs)

    def _field(self, key: Key) -> str:
        return self._names[key].replace(".", "_")


def _key(path: str, name: str) -> Key:
    *inner, factor = name.split(".")
    return Key(".".join([path, *inner]), HEAD, factor)


def take_heads(base: nn.Module, paths: Sequence[str], context: RowContext) -> dict[str, ClientHead]:
    """Put a ``ClientHead`` in the place of each of the modules."""
    heads = {path: ClientHead(base.get_submodule(path), path, context) for path in paths}
    for path, head in heads.items():
        base.set_submodule(path, head)
    return heads


def drawn_heads(shapes: Tensors, std: float, generator: Callable[[Key], torch.Generator]) -> dict[Key, Tensor]:
    """Start values of new heads, as Hugging Face draws them: N(0, std²), biases 0, and 1 for the weights of norms."""
    drawn: dict[Key, Tensor] = {}
    for key, like in shapes.items():
        if like.dim() > 1:
            drawn[key] = std * torch.randn(like.shape, generator=generator(key))
        else:
            drawn[key] = torch.full_like(like, float(key.factor == "weight"))
    return drawn
