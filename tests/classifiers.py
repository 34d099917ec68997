"""Small random classifiers of text and images, rows for them, and the same arithmetic in plain Hugging Face models."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from fedalt.data.encode import Example, Image
from fedalt.data.federation import Row
from fedalt.model.adapted import AdaptedModel
from fedalt.model.classifier import head_paths
from fedalt.model.layer import SUM, Placement
from fedalt.model.state import AdapterShape, ClientState
from fedalt.names import HEAD, A, B, Key
from support import HIDDEN, LAYERS, PAD, SMALL, SPECIAL, VOCAB, WIDE

CLASSES = 5
SLOT = "global"
SCALE = 2.0
LABELS: dict[str, Any] = {"num_labels": CLASSES}
IMAGE = (1, 8, 8)


def build(kind: str) -> Any:
    """A classifier of the family, with weights wide enough for its scores to be far apart."""
    torch.manual_seed(0)
    wide = {"initializer_range": WIDE}
    heads = {"n_layer": LAYERS, "n_head": 4, "vocab_size": VOCAB, **wide, **SPECIAL, **LABELS}
    images = {"image_size": 8, "patch_size": 2, "num_channels": 1, **wide, **LABELS, **_without("vocab_size")}
    builders = {
        "bert": lambda: hf.BertForSequenceClassification(
            hf.BertConfig(max_position_embeddings=64, pad_token_id=PAD, **wide, **SMALL, **LABELS)
        ),
        "roberta": lambda: hf.RobertaForSequenceClassification(
            hf.RobertaConfig(max_position_embeddings=64, pad_token_id=PAD, **wide, **SMALL, **LABELS)
        ),
        "llama": lambda: hf.LlamaForSequenceClassification(
            hf.LlamaConfig(num_key_value_heads=2, **wide, **SMALL, **SPECIAL, **LABELS)
        ),
        "bloom": lambda: hf.BloomForSequenceClassification(hf.BloomConfig(hidden_size=HIDDEN, **heads)),
        "gpt2": lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(n_embd=HIDDEN, n_positions=64, **heads)),
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**images)),
        "beit": lambda: hf.BeitForImageClassification(hf.BeitConfig(**images)),
        "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**images)),
        "swin": lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                embed_dim=8,
                depths=[2, 1],
                num_heads=[2, 2],
                window_size=2,
                drop_path_rate=0.0,
                image_size=8,
                patch_size=1,
                num_channels=1,
                **wide,
                **LABELS,
            )
        ),
    }
    model = builders[kind]()
    with torch.no_grad():  # biases and norms start at 0 and 1, where a mistake may not show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


KINDS = ("bert", "roberta", "llama", "bloom", "gpt2", "vit", "beit", "dinov2", "swin")
IMAGES = ("vit", "beit", "dinov2", "swin")


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in SMALL.items() if key != name}


def adapted(kind: str, new: Sequence[str] = (), **options: Any) -> AdaptedModel:
    model = build(kind)
    return AdaptedModel(model, heads=head_paths(model, new), **options)


def examples(kind: str, count: int, seed: int, longest: int = 9) -> tuple[Example, ...]:
    """Random rows of many lengths, or random images, with random classes."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label = draw.randrange(CLASSES)
        if kind in IMAGES:
            pixels = torch.randn(IMAGE, generator=torch.Generator().manual_seed(1000 * seed + i))
            rows.append(Example((), (), Row("", ""), label, Image(Row("", ""), 17, lambda row, p=pixels: p)))  # type: ignore[misc]
        else:
            ids = tuple(draw.randrange(3, VOCAB) for _ in range(draw.randint(2, longest)))
            rows.append(Example(ids, (), Row("", ""), label))
    return tuple(rows)


def states(model: AdaptedModel, clients: Sequence[int] = (0, 1, 2), spread: float = 0.2) -> list[ClientState]:
    """Clients with adapters and heads of their own, in which nothing is zero."""
    made = []
    shape = AdapterShape({SLOT: 3}, False, model.layer_sizes)
    for client in clients:
        draw = torch.Generator().manual_seed(50 + client)
        tensors = {key: spread * torch.randn(size, generator=draw) for key, size in shape.shapes().items()}
        heads = {key: torch.randn(value.shape, generator=draw) for key, value in model.head_start.items()}
        made.append(ClientState(client, 0, tensors, heads=heads))
    return made


PLACEMENT = Placement((SLOT,), SUM, SCALE, 0.0)


def inputs_of(rows: Sequence[Example]) -> dict[str, Tensor]:
    """What the plain model is called with: images, or rows padded on the right."""
    if rows[0].image:
        return {"pixel_values": torch.stack([row.image.pixels for row in rows if row.image])}
    ids = [torch.tensor(row.prompt) for row in rows]
    mask = pad_sequence([torch.ones_like(one) for one in ids], True)
    return {"input_ids": pad_sequence(ids, True, PAD), "attention_mask": mask}


def plain_losses(kind: str, state: Mapping[Key, Tensor], rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Class scores and mean cross-entropy of one client by the Hugging Face model, with W + s·BA as its weights."""
    model = build(kind)
    weights = dict(copy.deepcopy(model).named_parameters())
    merged: dict[str, Tensor] = {name: value.detach() for name, value in weights.items()}
    for key, a in state.items():
        if key.slot == HEAD:
            merged[f"{key.module}.{key.factor}"] = a
        elif key.factor == A:
            delta = SCALE * state[key._replace(factor=B)] @ a
            conv = type(model.get_submodule(key.module)).__name__ == "Conv1D"
            merged[f"{key.module}.weight"] = merged[f"{key.module}.weight"] + (delta.T if conv else delta)
    scores = functional_call(model, merged, kwargs=inputs_of(rows)).logits
    return scores, torch.nn.functional.cross_entropy(scores, torch.tensor([row.label for row in rows]))
