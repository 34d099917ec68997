"""Draws letters as 8 × 8 grey images in the way scikit-learn's digits were made: 32 × 32 dots, counted in blocks of 4.

Letters that could be taken for a digit are left out (O, Q, D and o look like 0, I, l, i and j like 1, Z and z like 2, S
and s like 5, b and G like 6, B like 8, g and q like 9), so that digits are new to a model that was trained on these.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from fedalt.errors import UserError
from fedalt.seeding import derive_seed

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
