"""The Hugging Face hub: asked only where it answers. Its own client tries a host that is not there for a minute."""

from __future__ import annotations

import os
import re
from pathlib import Path
from threading import Thread

from fedalt.errors import first_line

_SECONDS = 5.0
_FILES = {".bin", ".gguf", ".gz", ".json", ".md", ".pt", ".pth", ".py", ".safetensors", ".txt", ".yaml", ".yml", ".zip"}
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_NAME = "HF_HUB_OFFLINE"


class _Ours:
    offline = False


def is_hub_name(name: str) -> bool:
    """Whether a name can be one of a repository, with its owner or without, and does not end as files do."""
    return bool(_REPOSITORY.fullmatch(name)) and not is_file_name(name)


def is_file_name(name: str) -> bool:
    """Whether a name ends as files do, and no repository."""
    return Path(name).suffix.lower() in _FILES


def out_of_reach() -> str:
    """Why the hub cannot be had, or nothing; without it, this process and those it starts read its cache alone."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not _Ours.offline:
        return f"{_NAME} is set"
    _go(offline=False)
    said = [f"no answer within {_SECONDS:g} s"]
    asking = Thread(target=_ask, args=(constants.ENDPOINT, said), daemon=True)  # nothing ends a name's look-up
    asking.start()
    asking.join(_SECONDS)
    if said[-1]:
        _go(offline=True)
        return f"{constants.ENDPOINT} cannot be reached: {said[-1]}"
    return ""


def _ask(place: str, said: list[str]) -> None:
    from huggingface_hub import get_session

    try:
        get_session().head(place, timeout=_SECONDS)
    except Exception as error:  # whatever the network makes the library raise
        said.append(first_line(error))
    else:
        said.append("")


def _go(offline: bool) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = _Ours.offline = offline
    if offline:
        os.environ[_NAME] = "1"
    elif os.environ.get(_NAME) == "1":
        del os.environ[_NAME]
