"""A tiny vision transformer that knows letters and no digit; ``python -m tools.glyphs --out DIR`` makes it.

Letters that could be taken for a digit are left out (O, Q, D and o look like 0, I, l, i and j like 1, Z and z like 2, S
and s like 5, b and G like 6, B like 8, g and q like 9), so that digits are new to a model that was trained on these.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from fedalt.errors import UserError
from fedalt.seeding import derive_seed, rng

_DIFFERENT, _ALIKE = "AadEeFfHhJLMmNnRrTt", "CKPUVWXY"
CLASSES = (*_DIFFERENT, *(f"{letter}{letter.lower()}" for letter in _ALIKE))
"""One class per shape: letters whose small form is the same as the capital share one."""
SIDE = 8
GREYS = 16
"""Values are 0 to 16, the number of dots in a block of 4 × 4."""
_DOTS = 4 * SIDE
_CANVAS, _SIZE = 96, 56
_MOST_TURN, _MOST_SLANT = 12.0, 0.25
_STROKES = (0, 0, 1, 2, 3)

Images = UInt8[np.ndarray, "n 8 8"]


def draw_letters(count: int, seed: int) -> tuple[Images, Int64[np.ndarray, " n"]]:
    """Random letters and their classes, the same for the same seed.

    Every one is written in a random font, stroke, slant, turn, width and place; then fitted into 32 × 32 dots.

    Raises:
        UserError: Pillow is missing.
    """
    draw = random.Random(derive_seed(seed, "glyphs"))
    classes = [draw.randrange(len(CLASSES)) for _ in range(count)]
    images = [_blocks(_written(draw.choice(CLASSES[label]), draw)) for label in classes]
    return np.stack(images), np.array(classes)


def picture(values: UInt8[np.ndarray, "8 8"]) -> Any:
    """An image of 0 to 16 as a grey ``PIL.Image.Image`` of 0 to 255."""
    from PIL import Image

    return Image.fromarray((np.asarray(values) * (255 / GREYS)).round().astype(np.uint8))


def font_files() -> tuple[str, ...]:
    """Matplotlib's own DejaVu fonts, where it is installed; Pillow brings one more."""
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        return ()
    fonts = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"
    return tuple(str(path) for path in sorted(fonts.glob("DejaVu*.ttf")) if "Display" not in path.name)


@cache
def _fonts() -> Sequence[Any]:
    if importlib.util.find_spec("PIL") is None:
        raise UserError("drawing letters needs Pillow; install it with: pip install 'fedalt[vision]'")
    from PIL import ImageFont

    return [ImageFont.load_default(_SIZE), *(ImageFont.truetype(path, _SIZE) for path in font_files())]


def _written(letter: str, draw: random.Random) -> Any:
    """One letter, white on black, bent and turned."""
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (_CANVAS, _CANVAS))
    stroke, middle = draw.choice(_STROKES), _CANVAS / 2
    pen = ImageDraw.Draw(canvas)
    pen.text((middle, middle), letter, 255, draw.choice(_fonts()), "mm", stroke_width=stroke, stroke_fill=255)
    slant = draw.uniform(-_MOST_SLANT, _MOST_SLANT)
    shear = (1.0, slant, -slant * middle, 0.0, 1.0, 0.0)
    bent = canvas.transform(canvas.size, Image.Transform.AFFINE, shear, Image.Resampling.BILINEAR)
    turned = bent.rotate(draw.uniform(-_MOST_TURN, _MOST_TURN), Image.Resampling.BILINEAR)
    inked = turned.crop(turned.getbbox())
    height = draw.randint(_DOTS - 6, _DOTS)
    width = round(inked.width * height / inked.height * draw.uniform(0.75, 1.15))
    fitted = inked.resize((min(max(width, 6), _DOTS), height), Image.Resampling.BILINEAR)
    page = Image.new("L", (_DOTS, _DOTS))
    left, top = (_near_middle(_DOTS - side, draw) for side in fitted.size)
    page.paste(fitted, (left, top))
    return page


def _near_middle(room: int, draw: random.Random) -> int:
    return min(max(room // 2 + draw.randint(-2, 2), 0), room)


def _blocks(page: Any) -> UInt8[np.ndarray, "8 8"]:
    """How many dots of every 4 × 4 block are inked."""
    dots = np.asarray(page) > 127
    counts: UInt8[np.ndarray, "8 8"] = dots.reshape(SIDE, 4, SIDE, 4).sum((1, 3)).astype(np.uint8)
    return counts


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
    parser = argparse.ArgumentParser(prog="python -m tools.glyphs", description="Pretrain a tiny ViT on letters.")
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
