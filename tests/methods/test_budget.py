"""What methods train and send on LLaMA2-7B's q_proj and v_proj, and the ranks at which their budgets meet."""

from __future__ import annotations

import pytest

from fedalt.comparisons.jobs import matched
from fedalt.config import RunConfig
from fedalt.methods.base import sent, trainable
from fedalt.methods.registry import build
from fedalt.names import A, B
from support import shape_of

WIDTH = 4096
LAYERS = {f"layers.{i}.{name}": (WIDTH, WIDTH) for i in range(32) for name in ("q_proj", "v_proj")}
MIXER = len(LAYERS) * 2 * WIDTH
"""The weights of two LoRAs."""


def n(r: int) -> int:
    """Parameters of one LoRA."""
    return len(LAYERS) * r * 2 * WIDTH


@pytest.mark.parametrize(
    ("name", "r", "slots", "train", "send"),
    [
        ("local", 8, [8], n(8), 0),
        ("fedit", 8, [8], n(8), n(8)),
        ("lora_fair", 8, [8], n(8), n(8)),
        ("hetlora", 8, [8], n(8), n(8)),
        ("fedsa_lora", 8, [8], n(8), n(8) // 2),
        ("fedit_split", 8, [4, 4], n(8) + MIXER, n(8) + MIXER),
        ("ffa_lora", 16, [16], n(8), n(8)),
        ("fed_sb", 32, [32], 64 * 32**2, 64 * 32**2),  # as much as 256 would be, and four times the rank is tried
        ("rolora", 16, [16], n(8), n(16)),
        ("fedex_lora", 8, [8], n(8), n(8)),
        ("feddpa_f", 8, [8, 8], n(8), n(8)),
        ("feddpa_t", 8, [8, 8], n(8), n(8)),
        ("fdlora", 8, [8, 8], n(8), n(8)),
        ("pf2lora", 6, [6, 2], n(8), n(6)),
        ("fedalt", 8, [8, 8], n(8) + MIXER, n(8)),
        ("fedalt_row_update", 4, [4, 4], n(8) + MIXER, n(4)),
        ("fedalt_row_update_half", 8, [4, 4], n(8) + MIXER, n(4)),
        ("centralized", 8, [8], n(8), n(8)),
        ("zero_shot", 8, [8], 0, 0),
    ],
)
def test_every_method_trains_as_much_as_one_lora(name: str, r: int, slots: list[int], train: int, send: int) -> None:
    """The mixer comes on top; LLaMA2-7B's 4 194 304 are the paper's rank 8."""
    config = matched(RunConfig(), name, LAYERS, 8, "parameters")
    method = build(config, 8)
    shape = shape_of(method, LAYERS, r)
    assert (config.lora.r, list(method.ranks.values())) == (r, slots)
    assert config.lora.alpha / r == 4
    assert (trainable(method, shape), sent(method, shape)) == (train, send)
    assert n(8) == 4_194_304


@pytest.mark.parametrize(
    ("name", "r"),
    [
        ("local", 8),
        ("fedit", 8),
        ("ffa_lora", 16),
        ("fedsa_lora", 16),
        ("fedit_split", 8),
        ("pf2lora", 8),
        ("fedalt", 8),
    ],
)
def test_every_method_sends_as_much_as_one_lora(name: str, r: int) -> None:
    """A private LoRA costs nothing on the way, and a method that sends nothing keeps its rank."""
    assert matched(RunConfig(), name, LAYERS, 8, "bytes").lora.r == r


def test_layers_that_are_not_square_count_as_they_are() -> None:
    """Bloom's fused projection, 1024 to 3072: FFA trains three quarters of a LoRA."""
    layers = {"query_key_value": (1024, 3072)}
    method = build(RunConfig(method="ffa_lora"), 8)
    shapes = shape_of(method, layers, 8).shapes()
    assert {key.factor for key in shapes} == {A, B}
    assert trainable(method, shape_of(method, layers, 8)) == 8 * 3072
    assert matched(RunConfig(), "ffa_lora", layers, 8, "parameters").lora.r == 11
