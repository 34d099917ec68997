"""Letters that are no digits, and the tiny vision transformer that is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tools import glyphs
from tools import glyphs as command
from tools.glyphs import CLASSES, GREYS, Recipe, draw_letters, make, new_model, new_processor, picture, pixels

pytest.importorskip("PIL")
LIKE_DIGITS = set("0123456789") | set("OoQDIlijZzSsbGBgq")


def test_no_letter_is_a_digit_or_looks_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the pen is watched, so that no table can hide a digit."""
    from PIL import ImageDraw

    written: list[str] = []
    plain = ImageDraw.ImageDraw.text

    def watched(self: Any, place: Any, text: str, *rest: Any, **options: Any) -> None:
        written.append(text)
        plain(self, place, text, *rest, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", watched)
    _, classes = draw_letters(600, 1)
    assert len(written) == 600
    assert all(len(letter) == 1 and letter.isalpha() and letter.isascii() for letter in written)
    assert not set(written) & LIKE_DIGITS
    assert set(written) == set("".join(CLASSES))
    assert all(letter in CLASSES[label] for letter, label in zip(written, classes, strict=True))


def test_images_are_like_scikit_learns_digits() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits().images
    images, classes = draw_letters(400, 0)
    assert images.shape == (400, 8, 8) and images.dtype == np.uint8
    assert set(classes.tolist()) == set(range(len(CLASSES)))
    assert images.min() == 0 and images.max() == GREYS == digits.max()
    assert abs(images.mean() - digits.mean()) < 1
    assert len({image.tobytes() for image in images}) > 395, "letters vary"
    assert (images.reshape(400, -1).max(1) > 0).all(), "no image is empty"


def test_the_seed_decides_every_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    one, again, other = (draw_letters(30, seed) for seed in (3, 3, 4))
    assert np.array_equal(one[0], again[0]) and np.array_equal(one[1], again[1])
    assert not np.array_equal(one[0], other[0])
    monkeypatch.setattr(glyphs, "font_files", tuple)
    glyphs._fonts.cache_clear()
    assert not np.array_equal(draw_letters(30, 3)[0], one[0]), "matplotlib's fonts are used where they are"
    glyphs._fonts.cache_clear()


def test_the_folder_loads_and_reads_digits(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    digits = pytest.importorskip("sklearn.datasets").load_digits()
    recipe = Recipe(steps=4, letters=64, held_out=20, batch=16)
    found = make(tmp_path / "vit", recipe)
    assert 0 <= found <= 1
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "vit")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    image = picture(digits.images[0].astype(np.uint8))
    assert (image.mode, image.size) == ("L", (8, 8))
    (values,) = processor(image, return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 8, 8)
    expected = torch.from_numpy(digits.images[0]).float() / 8 - 1
    assert torch.allclose(values[0], expected, atol=0.005)
    assert model(pixel_values=values[None]).logits.shape == (1, len(CLASSES))
    assert tuple(model.config.id2label.values()) == CLASSES
    make(tmp_path / "again", recipe)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "vit/model.safetensors").read_bytes()
    start = new_model(0).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_a_large_image_is_brought_to_eight_by_eight() -> None:
    from PIL import Image

    (values,) = new_processor()(Image.new("L", (28, 20), 255), return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 8, 8) and (values == 1).all()


def test_it_learns() -> None:
    """A few letters by heart."""
    model = new_model(0)
    x, y = pixels(16, 0)

    @torch.no_grad()
    def loss() -> float:
        return float(cross_entropy(model(pixel_values=x).logits, y))

    before = loss()
    command.train(model, x, y, Recipe(steps=40, batch=16))
    assert loss() < before - 1


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    glyphs._fonts.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["glyphs", "--out", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "pip install 'fedalt[vision]'" in capsys.readouterr().err
