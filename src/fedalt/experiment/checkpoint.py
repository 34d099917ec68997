"""Checkpoints: one folder per finished round, whole or not there, safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from fedalt.errors import UserError
from fedalt.federation.server import Server, Upload
from fedalt.files import new_folder, write_bytes, write_json
from fedalt.model.state import ClientState, load_state, save_state
from fedalt.names import Key


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on after a round.

    Attributes:
        round: Last finished round.
        states: Every client's state.
        uploads: The server's latest upload of every client.
        best: Best round on validation rows so far and its score, if there are validation rows.
    """

    round: int
    states: dict[int, ClientState]
    uploads: dict[int, Upload]
    best: dict[str, Any] | None


def run_id(settings: Mapping[str, Any], base: str, rows: str) -> str:
    """Identifies a run by what determines its numbers: settings, base weights, rows."""
    text = json.dumps([settings, base, rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_checkpoint(folder: Path, run: str, server: Server, states: Mapping[int, ClientState], best: Any) -> None:
    """Write the checkpoint of the server's round; keep it, the one before, and the best round's."""
    path = folder / f"round_{server.round:04d}"
    with new_folder(path) as temporary:
        for client, state in states.items():
            save_state(state, temporary / "clients" / f"{client}.safetensors")
        for client, upload in server.uploads.items():
            tensors = {str(key): value.contiguous() for key, value in upload.tensors.items()}
            write_bytes(temporary / "uploads" / f"{client}.safetensors", save(tensors))
        known = {str(c): {"weight": u.weight, "round": u.round} for c, u in server.uploads.items()}
        header = {"run": run, "round": server.round, "clients": list(states)}
        write_json(temporary / "manifest.json", header | {"uploads": known, "best": best})
    prune(folder, best)


def prune(folder: Path, best: Mapping[str, Any] | None) -> None:
    """Keep the last two checkpoints and the best round's; drop the others, and what a kill left half written."""
    keep = {path.name for path in _rounds(folder)[-2:]} | ({f"round_{best['round']:04d}"} if best else set())
    for path in folder.glob("*round_*"):
        if path.name not in keep:
            shutil.rmtree(path)


def load_checkpoint(folder: Path, run: str) -> Checkpoint | None:
    """The newest checkpoint, or nothing when no round has finished.

    Raises:
        UserError: The checkpoint is of another run, or damaged.
    """
    rounds = _rounds(folder)
    if not rounds:
        return None
    path = rounds[-1]
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        states = {client: load_state(path / "clients" / f"{client}.safetensors") for client in manifest["clients"]}
        uploads = {int(c): _upload(path, int(c), known) for c, known in manifest["uploads"].items()}
    except Exception as error:
        raise UserError(
            f"{path}: damaged checkpoint ({error}); remove this folder to resume one round earlier"
        ) from None
    if manifest["run"] != run:
        raise UserError(
            f"{path}: checkpoint of another run (other settings, base weights or rows); nothing was changed"
        )
    return Checkpoint(manifest["round"], states, uploads, manifest["best"])


def _upload(path: Path, client: int, known: Mapping[str, Any]) -> Upload:
    tensors = load_file(path / "uploads" / f"{client}.safetensors")
    return Upload({Key.parse(key): value for key, value in tensors.items()}, known["weight"], known["round"])


def _rounds(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("round_*") if re.fullmatch(r"round_\d{4,}", path.name))
