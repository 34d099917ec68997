"""The one entrance for rows: a configuration in, a federation out.

A source is a function that returns rows, mappings such as ``{"instruction": …, "output": …}``: a list of them or a
Hugging Face ``Dataset``, split → such a thing, or client's name → (train, test) or (train, validation, test):

    @SOURCES.register("reviews")
    def reviews():
        return {"shop A": (train_rows, test_rows), "shop B": (train_rows, test_rows)}

A class is made once, and called in the same way; its settings are ``self.settings``: those of its nested ``Settings``,
or the section ``data``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedalt.config.data import DataConfig, PartitionConfig
from fedalt.data.canaries import plant
from fedalt.data.clients import keep_tasks, mix_tasks, one_client, sampled, split_rows, to_clients, with_tests
from fedalt.data.encode import Encoder, Once
from fedalt.data.federation import SPLITS, ClientData, Federation, Pool, Row, check_names, nearly_constant, pooled
from fedalt.data.formats.files import (
    POSSIBLE,
    ending,
    is_shard,
    is_table_folder,
    read_table,
    read_together,
    split_of,
    tables_in,
)
from fedalt.data.formats.folder import is_client_folder, named_clients, read_folder, read_named
from fedalt.data.formats.images import is_image_folder, read_images
from fedalt.data.partition import unused
from fedalt.data.record import held_out_in, reproduce
from fedalt.data.sources.given import PREFIX, Given, read_handed_on
from fedalt.data.sources.hub import is_loadable, is_saved, read_hub
from fedalt.errors import UserError, alternatives, did_you_mean, listed
from fedalt.hub import is_file_name, is_hub_name
from fedalt.registry import OURS, SOURCES
from fedalt.seeding import rng

_FOLDERS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, DataConfig], Federation | Pool]]] = {
    "client files": (is_client_folder, read_folder),
    "a saved Hugging Face data set": (is_saved, lambda path, config: read_hub(str(path), config)),
    "a client per file": (lambda path: not is_saved(path) and bool(named_clients(path)), read_named),
    "tables": (is_table_folder, read_table),
    "images by class": (is_image_folder, read_images),
}
"""What a folder may hold → whether it does, and what reads it."""
_POSSIBLE = (
    "no training rows; expected train/local_training_0.json, …_1.json and so on, or a file per client, or train.csv "
    f"(or {POSSIBLE}), or a subfolder of images per class, or what datasets.save_to_disk wrote or load_dataset reads"
)


def read_source(config: DataConfig) -> Federation | Pool:
    """Read rows from a path, or from the hub."""
    if config.source.startswith(PREFIX):
        return read_handed_on(config.source).read(config)
    path = Path(config.source).expanduser()
    if path.is_file():
        if not ending(path):
            raise UserError(f"data.source: {path} is no folder, and no table ({POSSIBLE})")
        return read_table(path, config)
    if path.is_dir():
        return _folder(path, config)
    if ending(path) or is_file_name(path.name):
        beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"data.source: there is no file {path}{did_you_mean(path.name, beside)}")
    if is_hub_name(config.source):
        return read_hub(config.source, config)
    raise UserError(
        f"data.source: {path} is no folder{did_you_mean(config.source, SOURCES)}; give a folder, a table "
        f"({POSSIBLE}), the name of a Hugging Face data set, FILE.py:Name, {alternatives(SOURCES.names())}"
    )


def _folder(path: Path, config: DataConfig) -> Federation | Pool:
    files = tables_in(path)
    match config.files:
        case "clients":
            if not is_client_folder(path) and not named_clients(path):
                raise UserError(f"data.files: clients asked for, but {path} holds no file of rows for each of several")
            return read_folder(path, config) if is_client_folder(path) else read_named(path, config)
        case "splits":
            return read_table(path, config)
        case "pool":
            if not files:
                raise UserError(f"data.files: pool asked for, but {path} holds no tables ({POSSIBLE})")
            return read_together(path, config)
    kinds = [kind for kind, (there, _) in _FOLDERS.items() if there(path)]
    if len(kinds) > 1:
        raise UserError(f"{path}: holds {' and '.join(kinds)}; give a folder with one of them")
    named = [file.name for file in files if not split_of(file) and not is_shard(file)]
    if kinds == ["tables"] and named:
        raise UserError(
            f"{path}: rows by split, or a client per file? {listed([file.name for file in files], 6)}: write "
            "data.files=splits for the rows of train, validation and test alone, data.files=pool to put all files "
            "together, or give a folder without train, validation and test for a client per file"
        )
    if kinds:
        return _FOLDERS[kinds[0]][1](path, config)
    if len(files) == 1 and named:
        return read_table(files[0], config)
    if is_loadable(path):
        return read_hub(str(path), config)
    raise UserError(f"{path}: {_POSSIBLE}")


_AS_IT_IS = {"clients": None, "tasks": None, "held_out": 0, "split_rows": False, "tasks_per_client": 1, "canaries": 0}
_OF_PROMPTS = {"template", "cutoff", "boundary"}
"""Settings that no row depends on."""
_DEALT = ("held_out", "tasks_per_client", "test_share", "validation_rows", "shuffle", "limit_by", "canaries")
_OF_DEALS: dict[str, Any] = {
    **dict.fromkeys(_DEALT, True),
    "partition": set(PartitionConfig.model_fields) - {"by", "column", "file"},
}
"""Settings that act once a source has been read."""


def load_federation(config: DataConfig, seed: int) -> Federation:
    """Read or generate the rows of every client that takes part, dealt, split, held out, limited and mixed as set."""
    return load_both(config, seed)[0]


def load_held_out(config: DataConfig, seed: int) -> Federation:
    """The clients that take no part in the run, with their ids: the last ones, or those of ``data.partition.file``."""
    return load_both(config, seed)[1]


def elsewhere(config: DataConfig, source: str) -> DataConfig:
    """Settings for other rows than a run's own: how that run chose, dealt and mixed its rows does not hold there."""
    reference = SOURCES.reference(source)
    name = SOURCES.name_in(*reference) if reference else source
    return config.model_copy(update={"source": name, "partition": PartitionConfig(), **_AS_IT_IS})


def load_as_it_is(config: DataConfig, seed: int) -> Federation:
    """The clients of a source as they are, or all rows of one that has none as one client, split and limited as set.

    Its rows are a part of something larger, so that ``data.label_names`` may name labels that none of them has.
    """
    found = read(config)
    if isinstance(found, Federation):
        return _cut(with_tests(found, config.test_share, seed), config, seed)
    anew = config.model_copy(update={"shuffle": True})
    return _cut(one_client(found, config.test_share, seed), anew, seed)


class Rows:
    """The rows of a run, or of several that share them: read once, dealt once for runs that deal alike, encoded once.

    What was read, dealt and encoded last is kept; settings that ask for something else replace it.

    Args:
        given: Rows in memory, if ``data.source`` stands for such.
    """

    def __init__(self, given: Given | None = None) -> None:
        self.given = given
        self._read: tuple[Hashable, Federation | Pool] | None = None
        self._dealt: tuple[Hashable, tuple[Federation, Federation]] | None = None
        self._encoder: tuple[Any, Hashable, Encoder] | None = None

    def both(self, config: DataConfig, seed: int) -> tuple[Federation, Federation]:
        """As ``load_both``."""
        key = (config.model_dump_json(exclude=_OF_PROMPTS), config.own, seed)
        if self._dealt is None or self._dealt[0] != key:
            self._dealt = key, load_both(config, seed, self.read)
        return self._dealt[1]

    def read(self, config: DataConfig) -> Federation | Pool:
        """As ``read``; what is given is read in its place."""
        key = (config.model_dump_json(exclude={**dict.fromkeys(_OF_PROMPTS, True), **_OF_DEALS}), config.own)
        if self._read is None or self._read[0] != key:
            self._encoder = None
            self._read = key, self.given.read(config) if self.given else read(config)
        return self._read[1]

    def encoder(self, reader: Any, settings: Hashable, make: Callable[[], Encoder]) -> Encoder:
        """The encoder of a tokenizer or image processor with some settings, which knows the rows that it has met."""
        known = self._encoder
        if known is None or known[0] is not reader or known[1] != settings:
            known = self._encoder = reader, settings, Once(make())
        return known[2]


def load_both(
    config: DataConfig, seed: int, reader: Callable[[DataConfig], Federation | Pool] | None = None
) -> tuple[Federation, Federation]:
    """The clients that take part, and those that do not; ``reader`` is asked for a source in place of ``read``."""
    everybody = _everybody(config, seed, reader or read)
    left = _left_out(config, everybody.ids)
    taken = {c: rows for c, rows in everybody.clients.items() if c not in left}
    members = replace(everybody, clients=taken)
    members = plant(members, config.canaries, seed) if config.canaries else members
    return members, replace(everybody, clients={c: everybody.clients[c] for c in left})


def _left_out(config: DataConfig, ids: tuple[int, ...]) -> tuple[int, ...]:
    """The last clients, or those that a partition.json calls held out."""
    if written := held_out_in(_file(config)) if config.partition.file else ():
        if config.held_out not in (0, len(written)):
            raise UserError(
                f"data.held_out: {config.held_out} clients asked for, but {config.partition.file} holds "
                f"{len(written)} out; leave data.held_out away"
            )
        return written
    if config.held_out >= len(ids):
        raise UserError(f"data.held_out: {config.held_out} clients asked for, but there are only {len(ids)}")
    return ids[len(ids) - config.held_out :]


def _everybody(config: DataConfig, seed: int, reader: Callable[[DataConfig], Federation | Pool]) -> Federation:
    source = reader(config)
    if isinstance(source, Federation):
        source = with_tests(source, config.test_share, _seed(config, seed))
    elif source.by:
        column = config.partition.model_copy(update={"by": "column", "column": source.by})
        config = config.model_copy(update={"partition": column})
    options = config.partition
    if config.label_names:
        check_names(config.label_names, source)
    pool = pooled(source) if isinstance(source, Federation) else source
    if options.file:
        federation = _as_in_file(_file(config), pool, config)
        return replace(federation, notes=(*federation.notes, *unused(config, False, pool.source)))
    if isinstance(source, Federation):
        federation = keep_tasks(source, config.tasks) if config.tasks else source
        if options.by:
            again = pooled(federation)
            federation = to_clients(again, config, _seed(config, seed), len(federation.clients), "task")
        else:
            federation = replace(federation, notes=(*federation.notes, *unused(config, False, source.source)))
            if config.clients and config.clients > len(federation.clients):
                federation = split_rows(federation, config.clients)
    elif config.tasks:
        raise UserError(
            f"data.tasks: {source.source} has no clients with tasks; this is for tinyworld and client files"
        )
    else:
        federation = to_clients(source, config, _seed(config, seed), None)
    clients = dict(list(federation.clients.items())[: config.clients])
    made = mix_tasks(_cut(replace(federation, clients=clients), config, seed), config.tasks_per_client)
    return replace(made, notes=(*made.notes, *nearly_constant(made)))


def _cut(federation: Federation, config: DataConfig, seed: int) -> Federation:
    """Every client's rows shuffled, with some held out, and limited, as set."""
    clients = federation.clients.items()
    mixed = {c: _shuffled(c, d, _seed(config, seed)) if config.shuffle else d for c, d in clients}
    held = {c: _hold_out(c, d, config, seed) for c, d in mixed.items()}
    return replace(federation, clients={c: _limit(c, d, config, _seed(config, seed)) for c, d in held.items()})


def _file(config: DataConfig) -> Path:
    return Path(config.partition.file or "").expanduser()


def _as_in_file(file: Path, pool: Pool, config: DataConfig) -> Federation:
    federation = reproduce(file, pool)
    if config.clients not in (None, len(federation.clients)):
        raise UserError(f"data.clients: {config.clients} asked for, but {file} has {len(federation.clients)} clients")
    return federation


def _seed(config: DataConfig, seed: int) -> int:
    return seed if config.partition.seed is None else config.partition.seed


def read(config: DataConfig) -> Federation | Pool:
    """The rows of a source, with clients or without, as it has them; a path that is there comes before our names."""
    name = config.source
    if name not in SOURCES:
        return read_source(config)
    entry, there = SOURCES.entry(name), Path(name).exists()
    if entry.origin == OURS and there:
        return read_source(config)
    source = SOURCES.make(name, config.section, config)
    with SOURCES.blamed(name):
        rows = source()
    found = rows if isinstance(rows, Federation | Pool) else _given(rows, config, entry.origin)
    note = f"data.source: {name} is the source of {entry.origin}; for the path of this name write ./{name}"
    return replace(found, notes=(*found.notes, note)) if there else found


def _given(rows: Any, config: DataConfig, origin: str) -> Federation | Pool:
    try:
        return Given(rows).read(config)
    except UserError as error:
        told = str(error).removeprefix("load_data: ")
        raise UserError(f'source "{config.source}" of {origin}: {told}') from None


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


def _shuffled(client: int, data: ClientData, seed: int) -> ClientData:
    def shuffled(split: str) -> tuple[Row, ...]:
        rows = getattr(data, split)
        return tuple(rows[i] for i in torch.randperm(len(rows), generator=rng(seed, "shuffle", client, split)).tolist())

    return ClientData(**{split: shuffled(split) for split in SPLITS})


def _limit(client: int, data: ClientData, config: DataConfig, seed: int) -> ClientData:
    rows: dict[str, tuple[Row, ...]] = {}
    for split, limit in config.limits.items():
        mine = getattr(data, split)
        if config.limit_by == "first" or limit is None:
            rows[split] = mine[:limit]
        else:
            places = sampled([row.output for row in mine], limit, seed, split, client)
            rows[split] = tuple(mine[i] for i in places)
    return ClientData(**rows)
