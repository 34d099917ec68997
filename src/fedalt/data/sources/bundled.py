"""Rows that come with a package: tinyworld of fedalt, and the 1,797 pictures of digits (8 × 8) of scikit-learn."""

from __future__ import annotations

from fedalt.config.data import DataConfig
from fedalt.data.federation import Federation, Pool
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


@SOURCES.register("tinyworld")
class Tinyworld:
    """Eight clients of the usual size; where more are made, only as many rows as are going to be used."""

    settings: DataConfig

    def __call__(self) -> Federation:
        """The rows."""
        from fedalt.datasets.tinyworld import SIZES, generate
        from fedalt.datasets.tinyworld.world import CLIENTS

        config = self.settings
        eight = config.split_rows or config.partition.by or config.tasks
        clients = CLIENTS if eight else max(config.clients or 0, CLIENTS)
        sizes = SIZES
        if clients > CLIENTS:
            sizes = {split: min(size, config.limits[split] or size) for split, size in SIZES.items()}
        return generate(config.tinyworld.seed, config.tinyworld.clash, **sizes, clients=clients)
