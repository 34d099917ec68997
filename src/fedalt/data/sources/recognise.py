"""Which kind of source a name or path is; one that is none, or two at once, is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from fedalt.data.folder import is_client_folder, read_folder
from fedalt.data.options import DataConfig
from fedalt.data.pool import Pool
from fedalt.data.rows import Federation
from fedalt.data.sources.digits import DIGITS, read_digits
from fedalt.data.sources.given import PREFIX, read_handed_on
from fedalt.data.sources.hub import BUILT_IN, TINYWORLD, is_loadable, is_saved, read_hub
from fedalt.data.sources.images import is_image_folder, read_images
from fedalt.data.sources.table import ENDINGS, is_table_folder, read_table
from fedalt.errors import UserError, did_you_mean

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_FOLDERS: dict[str, Callable[[Path], bool]] = {
    "client files": is_client_folder,
    "a saved Hugging Face data set": is_saved,
    "tables": is_table_folder,
    "images by class": is_image_folder,
}
_POSSIBLE = (
    "no training rows; expected train/local_training_0.json, …_1.json and so on, or train.csv (tsv, json, jsonl), "
    "or a subfolder of images per class, or what datasets.save_to_disk wrote, or what datasets.load_dataset reads"
)


def read_source(config: DataConfig) -> Federation | Pool:
    """Read rows from anywhere but tinyworld.

    Raises:
        UserError: No such source, a folder of no kind or of two, and what the source's reader refuses.
    """
    if config.source.startswith(PREFIX):
        return read_handed_on(config.source).read(config)
    path = Path(config.source).expanduser()
    if path.is_file():
        if path.suffix not in ENDINGS:
            raise UserError(f"data.source: {path} is no folder, and no table ({', '.join(ENDINGS)})")
        return read_table(path, config)
    if path.is_dir():
        return _folder(path, config)
    if config.source == DIGITS:
        return read_digits(config)
    if _HUB_NAME.fullmatch(config.source):
        return read_hub(config.source, config)
    raise UserError(
        f"data.source: {path} is no folder{did_you_mean(config.source, BUILT_IN)}; give a folder, a table "
        f"({', '.join(ENDINGS)}), the name of a Hugging Face data set, {DIGITS} or {TINYWORLD}"
    )


def _folder(path: Path, config: DataConfig) -> Federation | Pool:
    kinds = [kind for kind, there in _FOLDERS.items() if there(path)]
    if len(kinds) > 1:
        raise UserError(f"{path}: holds {' and '.join(kinds)}; give a folder with one of them")
    match kinds:
        case ["client files"]:
            return read_folder(path)
        case ["tables"]:
            return read_table(path, config)
        case ["images by class"]:
            return read_images(path, config)
    if kinds or is_loadable(path):
        return read_hub(str(path), config)
    raise UserError(f"{path}: {_POSSIBLE}")
