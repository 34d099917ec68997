"""The federation that ships with fedalt, as a source."""

from __future__ import annotations

from fedalt.config.data import DataConfig
from fedalt.data.federation import Federation
from fedalt.registry import SOURCES


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
