"""The one entrance for rows: a configuration in, a federation out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fedalt.config import DataConfig
from fedalt.data.folder import read_folder
from fedalt.data.regroup import mix_tasks, split_rows
from fedalt.data.rows import ClientData, Federation
from fedalt.errors import UserError
from fedalt.seeding import rng

TINYWORLD = "tinyworld"


def load_federation(config: DataConfig, seed: int) -> Federation:
    """Read or generate the rows of every client, split them over more, hold out validation rows, apply limits, mix.

    Raises:
        UserError: The source is missing or broken, cannot be split into as many clients as asked for, has too few rows
            to hold out, or too few clients to mix.
    """
    federation = _read(config)
    if config.clients and config.clients > len(federation.clients):
        federation = split_rows(federation, config.clients)
    clients = dict(list(federation.clients.items())[: config.clients])
    limited = {c: _limit(_hold_out(c, d, config, seed), config) for c, d in clients.items()}
    return mix_tasks(replace(federation, clients=limited), config.tasks_per_client)


def _read(config: DataConfig) -> Federation:
    if config.source == TINYWORLD and not Path(TINYWORLD).is_dir():
        return _tinyworld(config)
    return read_folder(Path(config.source).expanduser())


def _tinyworld(config: DataConfig) -> Federation:
    """Eight clients of the usual size; where more are made, only as many rows as are going to be used."""
    from fedalt.data.tinyworld import CLIENTS, SIZES, generate

    clients = CLIENTS if config.split_rows else max(config.clients or 0, CLIENTS)
    limits, sizes = _limits(config), SIZES
    if clients > CLIENTS:
        sizes = {split: min(size, limits[split] or size) for split, size in SIZES.items()}
    return generate(config.tinyworld.seed, config.tinyworld.clash, **sizes, clients=clients)


def _hold_out(client: int, data: ClientData, config: DataConfig, seed: int) -> ClientData:
    count = config.validation_rows
    if count == 0 or data.validation:
        return data
    if count >= len(data.train):
        raise UserError(
            f"data.validation_rows: {count} rows asked for, but client {client} has {len(data.train)} training rows"
        )
    order = torch.randperm(len(data.train), generator=rng(seed, "validation", client)).tolist()
    held = set(order[:count])
    return replace(
        data,
        train=tuple(row for i, row in enumerate(data.train) if i not in held),
        validation=tuple(data.train[i] for i in sorted(held)),
    )


def _limit(data: ClientData, config: DataConfig) -> ClientData:
    return replace(data, **{split: getattr(data, split)[:limit] for split, limit in _limits(config).items()})


def _limits(config: DataConfig) -> dict[str, int | None]:
    return {"train": config.train_limit, "validation": config.test_limit, "test": config.test_limit}
