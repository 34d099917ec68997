# ruff: noqa: T201 - a script: its progress lines are its output
"""Trains the vision transformer from random weights on drawn letters, and saves it with its image processor."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from fedalt.data.glyphs.letters import CLASSES, SIDE, draw_letters, picture
from fedalt.errors import UserError
from fedalt.seeding import rng


@dataclass(frozen=True)
class Recipe:
    """How the model is trained.

    Attributes:
        steps: Optimiser steps.
        letters: Letters that are drawn to train on, and read again and again.
        held_out: Letters that are drawn to be tested on.
        batch: Letters per step.
        seed: Seed of letters, initial weights and batches.
        peak: Highest learning rate of the one-cycle schedule.
    """

    steps: int = 2000
    letters: int = 60_000
    held_out: int = 4000
    batch: int = 128
    seed: int = 0
    peak: float = 2e-3


def new_model(seed: int) -> ViTForImageClassification:
    """The untrained model: four layers of 64, and a token for each of 16 patches; about 0.2 million parameters."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: label for label, name in enumerate(CLASSES)},
        dtype="float32",
    )
    return ViTForImageClassification(config)


def new_processor() -> Any:
    """What brings a grey image of any size to the model: 8 × 8, one channel, from 0 … 255 to -1 … 1."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil  # it needs Pillow at import

    return ViTImageProcessorPil(
        do_convert_rgb=False,
        do_resize=True,
        size={"height": SIDE, "width": SIDE},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5],
        image_std=[0.5],
    )


def pixels(count: int, seed: int) -> tuple[Float[Tensor, "n 1 8 8"], Int[Tensor, " n"]]:
    """Drawn letters as the processor gives them, and their classes."""
    images, classes = draw_letters(count, seed)
    read = new_processor()([picture(values) for values in images], return_tensors="pt")["pixel_values"]
    return read, torch.from_numpy(classes)


def train(model: ViTForImageClassification, x: Tensor, y: Tensor, recipe: Recipe) -> None:
    """AdamW with one cycle of the learning rate; prints a line every 100 steps."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.peak, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.peak, total_steps=recipe.steps, pct_start=0.1)
    generator, begun = rng(recipe.seed, "glyphs", "batches"), time.monotonic()
    model.train()
    for step in range(recipe.steps):
        here = torch.randint(len(x), (recipe.batch,), generator=generator)
        loss = cross_entropy(model(pixel_values=x[here]).logits, y[here])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            print(f"step {step:5d}  loss {float(loss.detach()):.4f}  {time.monotonic() - begun:4.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def accuracy(model: ViTForImageClassification, x: Tensor, y: Tensor) -> float:
    """Share of letters whose class is found."""
    right = [
        (model(pixel_values=a).logits.argmax(-1) == b).sum() for a, b in zip(x.split(500), y.split(500), strict=True)
    ]
    return float(torch.stack(right).sum() / len(y))


def make(out: Path, recipe: Recipe) -> float:
    """Draw, train, save; returns the accuracy on letters that were not trained on."""
    begun = time.monotonic()
    x, y = pixels(recipe.letters, recipe.seed)
    held_out = pixels(recipe.held_out, recipe.seed + 1)
    model = new_model(recipe.seed)
    print(
        f"{len(x)} letters of {len(CLASSES)} classes, {model.num_parameters():,} parameters, "
        f"{time.monotonic() - begun:.0f} s"
    )
    train(model, x, y, recipe)
    found = accuracy(model, *held_out)
    model.save_pretrained(out)
    new_processor().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    print(f"{100 * found:.1f} % of {recipe.held_out} held-out letters, {time.monotonic() - begun:.0f} s; wrote {out}")
    return found


def main() -> None:
    """Read the command line and make the folder."""
    parser = argparse.ArgumentParser(prog="python -m fedalt.data.glyphs", description="Pretrain a tiny ViT on letters.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=Recipe().steps, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--letters", type=int, default=Recipe().letters, help="letters drawn (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe().seed, help="seed (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        make(arguments.out, Recipe(arguments.steps, arguments.letters, seed=arguments.seed))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
