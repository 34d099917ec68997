"""Classification: class scores by a classifier's own forward, and a head for every client."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from fedalt.errors import UserError, first_line
from fedalt.model.batch_layout import BatchContext
from fedalt.model.targets import backbone_of, is_linear
from fedalt.names import HEAD, Key, Tensors

Summary = Literal["first", "last", "all"]
"""Which token's state a head takes: the first (encoders, ViT), the last (decoders), or all of an image (DINOv2)."""


def class_logits(
    base: Any, out: Any, states: Float[Tensor, "n d"], pooler: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, "n c"]:
    """What a classifier makes of the state of one token of every row: pooler, head and all, by its own forward.

    ``states`` take the place of those in ``out``, an output of its backbone; ``pooler`` stands in for the backbone's
    own.
    """
    backbone = backbone_of(base)
    one = states[:, None]
    pooler = pooler or getattr(backbone, "pooler", None)
    pools = pooler is not None and "pooler_output" in {field.name for field in fields(type(out))}
    pooled = {"pooler_output": pooler(one)} if pools and pooler else {}
    replaced = type(out)(last_hidden_state=one, **pooled)
    token = 1 if getattr(base.config.get_text_config(), "pad_token_id", None) == 0 else 0  # any but padding
    ids = torch.full((len(states), 1), token, dtype=torch.long, device=states.device)
    inputs = {base.main_input_name: ids}
    with patch.object(backbone, "forward", lambda *args, **kwargs: replaced):
        scores: Tensor = base(**inputs).logits
    return scores


@torch.no_grad()
def summary_of(base: Any) -> tuple[Summary, int, dict[str, float]]:
    """Which token's state the model's own head looks at, found by trying; and how many tokens the tried rows had.

    Of an image model also how many tokens each linear layer sees for one of the final ones.
    """
    outs: list[Any] = []
    try:
        inputs, last = _trial(base)
        hook = backbone_of(base).register_forward_hook(lambda module, args, out: outs.append(out))
        wanted = base(**inputs).logits.float()
        hook.remove()
        states = outs[0].last_hidden_state
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model makes of such rows
        raise UserError(
            f"model.task: {type(base).__name__} cannot be tried as a classifier ({first_line(error)})"
        ) from None
    images = inputs.get("pixel_values")
    last = torch.full_like(last, states.shape[1] - 1) if states.dim() == 3 and images is not None else last
    for name, index in (("last", last), ("first", torch.zeros_like(last))):
        try:
            found = class_logits(base, outs[0], states[torch.arange(len(last)), index]).float()
        except Exception:  # a head that wants something else than one token's state
            continue
        if torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
            return name, states.shape[1], {}  # type: ignore[return-value]
    if images is not None:
        return "all", states.shape[1], _image_by_image(base, images, states)
    raise UserError(
        f"model.task: {type(base).__name__} looks at neither the first nor the last token's state; "
        "use a model of another family"
    )


def _image_by_image(base: Any, images: Tensor, states: Tensor) -> dict[str, float]:
    """How many tokens each layer sees for one of the final ones, where every layer takes one image after another."""
    both, alone = (_layer_inputs(base, some) for some in (images, images[:1]))
    why = "" if both else "it has no linear layers for adapters"
    if both and states.dim() != 3:
        why = "its states are no tokens"
    for path, x in alone.items():
        if len(both[path]) != len(images) * len(x) or not torch.allclose(both[path][: len(x)], x, rtol=1e-3, atol=1e-4):
            why = f"{path} does not take the tokens of one image after another"
    if why:
        raise UserError(
            f"model.task: {type(base).__name__} cannot be adapted: {why}; use ViT, DeiT, BEiT, DINOv2 or Swin"
        )
    return {path: len(x) / states.shape[1] for path, x in alone.items()}


def _layer_inputs(base: Any, images: Tensor) -> dict[str, Float[Tensor, "n d"]]:
    """What every linear layer of the backbone sees."""
    seen: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: seen.update({path: args[0].flatten(0, -2).float()})

    backbone = backbone_of(base)
    linear = {p: m for p, m in backbone.named_modules() if is_linear(m) and not p.startswith("pooler.")}
    hooks = [module.register_forward_pre_hook(hook(path)) for path, module in linear.items()]
    base(pixel_values=images)
    for one in hooks:
        one.remove()
    return seen


def _trial(base: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Two rows that a classifier can read, and where the last token of each is."""
    device, generator = next(base.parameters()).device, torch.Generator().manual_seed(0)
    if base.main_input_name == "pixel_values":
        height, width = _image_size(base.config)
        pixels = torch.rand(2, getattr(base.config, "num_channels", 3), height, width, generator=generator)
        return {"pixel_values": pixels.to(device, base.dtype)}, torch.zeros(2, dtype=torch.long, device=device)
    pad = getattr(base.config.get_text_config(), "pad_token_id", None) or 0
    ids = torch.randint(base.get_input_embeddings().num_embeddings - 1, (2, 7), generator=generator)
    ids += ids >= pad  # any but padding
    mask = torch.ones_like(ids)
    ids[0, 4:], mask[0, 4:] = pad, 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, torch.tensor([3, 6], device=device)


def _image_size(config: Any) -> tuple[int, int]:
    """Height and width, which may stand in a configuration within this one, once or for either side."""
    inside = (getattr(config, name, None) for name in config.sub_configs)
    size = next((one.image_size for one in (config, *inside) if getattr(one, "image_size", None)), 224)
    while isinstance(size, list | tuple) and len(size) == 1:
        size = size[0]
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def first_token(states: Float[Tensor, "n t d"]) -> Float[Tensor, "n d"]:
    """A pooler that changes nothing."""
    return states[:, 0]


def pooler_path(base: Any) -> str:
    """Where an encoder's pooler is, if it has one."""
    return f"{base.base_model_prefix}.pooler"


def head_paths(base: Any, missing: Collection[str]) -> tuple[str, ...]:
    """What every client trains for itself: all beside the backbone, and a pooler that has no weights yet."""
    prefix, pooler = base.base_model_prefix, pooler_path(base)
    beside = [
        name for name, module in base.named_children() if name != prefix and any(True for _ in module.parameters())
    ]
    return (*([pooler] if any(name.startswith(f"{pooler}.") for name in missing) else []), *beside)


class ClientHead(nn.Module):
    """A head with K sets of parameters: each row goes through the head of the client it belongs to.

    Any module can be a head; it is called as it is, in eval mode, with the client's parameters in its own's place.
    """

    def __init__(self, head: nn.Module, path: str, context: BatchContext) -> None:
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
        dtype, rows, norms = next(iter(stacked.values())).dtype, self.context.current, self.context.norms
        counts = rows.counts(len(x))
        if norms is not None:
            owners = torch.arange(len(rows.sizes)).repeat_interleave(torch.tensor(rows.sizes)).to(x.device)
            stacked = {name: value[owners] for name, value in stacked.items()}
            norms.apart += [value for value in stacked.values() if value.requires_grad]
            counts = rows.row_counts(len(x))
        parts = x.to(dtype).split(list(counts))
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


def take_heads(base: nn.Module, paths: Sequence[str], context: BatchContext) -> dict[str, ClientHead]:
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
