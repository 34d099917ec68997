"""How alike the LoRAs of clients are, from their folders alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedalt.experiment.clients import CONFIG, client_folder
from fedalt.experiment.folder import RunFolder
from fedalt.files import read_json
from fedalt.model.peft_files import read_folder
from fedalt.names import INDIVIDUAL, REST_OF_WORLD, A, B, Tensors


def similarity(folder: RunFolder, clients: Sequence[int]) -> tuple[str, list[list[float]]] | None:
    """Cosine similarity of every two clients' products BA over all layers, and the slot it is of.

    The slot is the individual LoRA where there is one, else the first that is not the row; nothing where there is
    none. A LoRA that is zero is like nothing (0).

    Raises:
        UserError: No such client, or a damaged folder.
    """
    slots = read_json(client_folder(folder, clients[0]) / CONFIG)["slots"]
    slot = INDIVIDUAL if INDIVIDUAL in slots else next((name for name in slots if name != REST_OF_WORLD), None)
    if slot is None:
        return None
    loras = []
    for client in clients:
        tensors = read_folder(client_folder(folder, client), [slot], mixed=False)
        loras.append({key: value for key, value in tensors.items() if key.slot == slot})
    products = inner_products(loras)
    norms = products.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0.0)
    values: list[list[float]] = (products * scale * scale[:, None]).clamp(-1, 1).tolist()
    return slot, values


def inner_products(loras: Sequence[Tensors]) -> Float[Tensor, "k k"]:
    """Σ over layers of ⟨B_i A_i, B_j A_j⟩ in fp64, of one slot; ranks may differ.

    ⟨BA, B'A'⟩ = tr((Bᵀ B')(A' Aᵀ)) takes only products r × r: one Gram matrix of all clients' factors per layer.
    """
    total = torch.zeros(len(loras), len(loras), dtype=torch.float64)
    for key in (key for key in loras[0] if key.factor == A):
        a = [lora[key].double() for lora in loras]
        b = [lora[key._replace(factor=B)].double() for lora in loras]
        ranks = torch.tensor([len(one) for one in a])
        owner = torch.nn.functional.one_hot(torch.repeat_interleave(ranks)).double()  # [Σr, k]
        rows, columns = torch.cat(a), torch.cat(b, 1)  # [Σr, d_in], [d_out, Σr]
        total += owner.T @ ((columns.T @ columns) * (rows @ rows.T)) @ owner
    return total
