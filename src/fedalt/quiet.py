"""Libraries that print to our terminal."""

from __future__ import annotations

import logging
import os
import warnings


def keep_libraries_quiet() -> None:
    """Keep the libraries' own progress bars and hints out of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, in a notebook without widgets
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
