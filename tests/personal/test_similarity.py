"""Cosines of LoRAs against dense products."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fedalt.names import INDIVIDUAL, A, B, Key
from fedalt.personal.insight import inner_products, similarity
from fedalt.runs.folder import RunFolder
from micro import CLIENTS, finished


def lora(seed: int, rank: int) -> dict[Key, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name, (d_in, d_out) in {"one": (7, 5), "two": (3, 9)}.items():
        made[Key(name, INDIVIDUAL, A)] = torch.randn(rank, d_in, generator=draw)
        made[Key(name, INDIVIDUAL, B)] = torch.randn(d_out, rank, generator=draw)
    return made


def dense(tensors: dict[Key, torch.Tensor]) -> torch.Tensor:
    """All products BA of a client, one after another."""
    return torch.cat(
        [
            (tensors[Key(n, INDIVIDUAL, B)].double() @ tensors[Key(n, INDIVIDUAL, A)].double()).ravel()
            for n in ("one", "two")
        ]
    )


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 4, 3), (2,)])
def test_inner_products_are_those_of_dense_products(ranks: tuple[int, ...]) -> None:
    loras = [lora(seed, rank) for seed, rank in enumerate(ranks)]
    stacked = torch.stack([dense(one) for one in loras])
    torch.testing.assert_close(inner_products(loras), stacked @ stacked.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("method", "slot"), [("fedalt", "individual"), ("local", "individual"), ("fedit", "global")])
def test_similarity_of_a_runs_clients(method: str, slot: str) -> None:
    run = finished(method)
    found, values = similarity(RunFolder(run), range(CLIENTS))
    assert found == slot
    products = []
    for client in range(CLIENTS):
        tensors = load_file(run / f"clients/{client}/{slot}/adapter_model.safetensors")
        names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
        factors = [(tensors[f"{n}.lora_B.weight"].double(), tensors[f"{n}.lora_A.weight"].double()) for n in names]
        products.append(torch.cat([(b @ a).ravel() for b, a in factors]))
    unit = torch.stack([product / product.norm() for product in products])
    torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), unit @ unit.T, rtol=0, atol=1e-9)
    assert (min(map(min, values)) > 1 - 1e-9) == (method == "fedit"), "only FedIT leaves everybody with the same"


def test_a_lora_that_is_zero_is_like_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loras = iter([lora(0, 2), {key: value * 0 for key, value in lora(1, 2).items()}])
    monkeypatch.setattr("fedalt.personal.insight.read_folder", lambda *_, **__: next(loras))
    _, values = similarity(RunFolder(finished()), [0, 1])
    assert values == [[pytest.approx(1), 0], [0, 0]]


def test_clients_without_a_lora_of_their_own_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedalt.personal.insight.read_json", lambda path: {"slots": ["rest_of_world"]})
    assert similarity(RunFolder(finished()), [0, 1]) is None
