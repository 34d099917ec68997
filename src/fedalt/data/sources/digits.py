"""The 1,797 grey pictures of digits that come with scikit-learn: 8 × 8 pixels, no download."""

from __future__ import annotations

from fedalt.config.data import DataConfig
from fedalt.data.federation import Pool
from fedalt.data.formats.columns import Record, has_header, to_pool
from fedalt.data.formats.images import ArrayPicture
from fedalt.errors import needs
from fedalt.registry import SOURCES

DIGITS = "digits"


@SOURCES.register(DIGITS)
class Digits:
    """All digits as training rows, in scikit-learn's order; their 17 shades of grey become 0 to 255."""

    settings: DataConfig

    def __call__(self) -> Pool:
        """The rows."""
        has_header(self.settings, DIGITS)
        with needs("vision", "the digits"):
            from sklearn.datasets import load_digits
        found = load_digits()
        shades = (found.images * 255 / 16).round().astype("uint8")
        records = [
            Record({"label": str(label)}, f"digits: row {i}", f"digit {i}", ArrayPicture(image.tobytes(), (8, 8)))
            for i, (image, label) in enumerate(zip(shades, found.target, strict=True))
        ]
        return to_pool(self.settings, {"train": records}, DIGITS, "scikit-learn's 8 × 8 pictures of digits")
