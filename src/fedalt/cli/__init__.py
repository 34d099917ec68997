"""The command ``fedalt``. The only room that prints."""

from __future__ import annotations

import logging
import os
import sys


def main() -> None:
    """Entry point: 0 done, 2 the user's input is wrong, 1 anything else."""
    from fedalt.allocator import keep_freed_memory
    from fedalt.cli.app import app
    from fedalt.cli.show import complain
    from fedalt.errors import UserError

    _quiet()
    keep_freed_memory()
    try:
        app()
    except UserError as error:
        complain(str(error))
        sys.exit(2)


def _quiet() -> None:
    """Keep the libraries' own progress bars and hints out of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
