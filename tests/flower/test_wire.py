from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalt.errors import UserError
from fedalt.flower.wire import Wire, pack, unpack
from fedalt.names import HEAD, INDIVIDUAL, A, B, Key
from fedalt.runs.setup import Bases
from flower.lies import bomb
from flower.test_site import asking, good, site, told


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


WIRES: tuple[Wire, ...] = ("fp32", "bf16", "int8")


def tensors(seed: int, rows: int = 3, columns: int = 50, size: float = 1.0) -> dict[Key, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        Key("model.layers.0.q", INDIVIDUAL, A): size * torch.randn(rows, columns, generator=draw),
        Key("model.layers.0.q", INDIVIDUAL, B): torch.randn(columns, rows, generator=draw).T.contiguous().T,
        Key("classifier", HEAD, "bias"): torch.randn(columns, generator=draw),
    }


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 9), st.floats(1e-6, 1e6))
def test_fp32_is_exact_and_int8_is_within_half_a_step_of_its_row(
    seed: int, rows: int, columns: int, size: float
) -> None:
    sent = tensors(seed, rows, columns, size)
    exact, short = unpack(pack(sent)), unpack(pack(sent, "int8"), "int8")
    assert exact.keys() == short.keys() == sent.keys()
    for key, value in sent.items():
        assert torch.equal(exact[key], value)
        step = value.reshape(-1, value.shape[-1]).abs().amax(1, keepdim=True) / 127
        assert ((short[key] - value).reshape(-1, value.shape[-1]).abs() <= 0.5001 * step + 1e-30).all()


def test_bf16_is_the_nearest_bf16() -> None:
    sent = tensors(0)
    assert all(
        torch.equal(value, sent[key].bfloat16().float()) for key, value in unpack(pack(sent, "bf16"), "bf16").items()
    )


def test_a_byte_a_number_takes_a_quarter() -> None:
    sent = {Key("m", INDIVIDUAL, A): torch.randn(8, 4096)}
    sizes = {wire: len(pack(sent, wire)) / (8 * 4096) for wire in WIRES}
    assert sizes["fp32"] == pytest.approx(4, rel=0.02)
    assert sizes["bf16"] == pytest.approx(2, rel=0.02)
    assert sizes["int8"] == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("wire", WIRES)
def test_zeros_stay_zeros_and_nothing_stays_nothing(wire: Wire) -> None:
    sent = {Key("m", INDIVIDUAL, A): torch.zeros(2, 3)}
    assert torch.equal(unpack(pack(sent, wire), wire)[Key("m", INDIVIDUAL, A)], torch.zeros(2, 3))
    assert unpack(pack({}, wire), wire) == {}


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8"])
def test_what_is_not_finite_does_not_become_finite(wire: Wire) -> None:
    sent = {Key("m", INDIVIDUAL, A): torch.tensor([[1.0, float("nan")], [1.0, 2.0]])}
    assert not unpack(pack(sent, wire), wire)[Key("m", INDIVIDUAL, A)].isfinite().all()


@pytest.mark.parametrize(
    "change", [lambda d: d[:-3], lambda d: b"\x00" * 40, lambda d: b"not tensors", lambda d: d[9:]]
)
def test_broken_bytes_are_refused(change: Any) -> None:
    with pytest.raises(UserError, match="are no tensors"):
        unpack(change(pack(tensors(1), "int8")), "int8")


def test_codes_without_their_scale_are_refused() -> None:
    from safetensors.torch import save

    with pytest.raises(UserError, match="are no tensors"):
        unpack(save({str(Key("m", INDIVIDUAL, A)): torch.ones(2, 2, dtype=torch.int8)}), "int8")


def exactly(shapes: dict[Key, tuple[int, ...]]) -> Any:
    def check(found: Any) -> None:
        if found != shapes:
            raise UserError("other shapes than the run's")

    return check


@pytest.mark.parametrize("wire", WIRES)
def test_other_names_and_shapes_are_refused_before_a_number_is_read(wire: Wire) -> None:
    sent = {Key("m", INDIVIDUAL, A): torch.ones(2, 3)}
    assert unpack(pack(sent, wire), wire, exactly({Key("m", INDIVIDUAL, A): (2, 3)}))
    for other in ({Key("m", INDIVIDUAL, B): (2, 3)}, {Key("m", INDIVIDUAL, A): (3, 2)}, {}):
        with pytest.raises(UserError, match="other shapes than the run's"):
            unpack(pack(sent, wire), wire, exactly(other))
    for another in set(WIRES) - {wire}:
        with pytest.raises(UserError, match="are no tensors in"):
            unpack(pack(sent, another), wire)


@pytest.mark.parametrize("wire", WIRES)
def test_a_bomb_does_not_go_off(wire: Wire) -> None:
    """120 kB of codes [1, n] with scales [1, n, 1] were 3.6 GB once."""
    block = bomb(pack({Key("m", INDIVIDUAL, A): torch.ones(1, 2)}))
    assert len(block) < 200_000
    with pytest.raises(UserError, match="are no tensors in"):
        unpack(block, wire)


BROADCAST: dict[str, Any] = {
    "bomb": bomb,
    "another rank": lambda block: pack({k: v.repeat(2, 1) if k.factor == A else v for k, v in unpack(block).items()}),
    "a private slot": lambda block: pack({k._replace(slot="rest_of_world"): v for k, v in unpack(block).items()}),
    "a tensor more": lambda block: pack({**unpack(block), Key("m", "mixer", "G"): torch.ones(2, 2)}),
    "bf16": lambda block: pack(unpack(block), "bf16"),
    "cut off": lambda block: block[:-8],
    "no tensors": lambda block: b"hello",
    "nothing": lambda block: b"",
}


@pytest.mark.parametrize("kind", BROADCAST)
def test_a_site_takes_no_such_thing_from_a_server_either(kind: str, tmp_path: Path, bases: Bases) -> None:
    mine = site(tmp_path, bases)
    one = good(mine.answer(asking("train", tmp_path, 1)))
    second = told(asking("train", tmp_path, 2), one.block)
    bad = told(asking("train", tmp_path, 2), BROADCAST[kind](one.block))
    assert mine.answer(bad).error == "message"
    assert good(mine.answer(second)).round == 2


def test_methods_that_tell_stacks_tell_no_more_than_all_ranks_together(tmp_path: Path, bases: Bases) -> None:
    mine = site(tmp_path, bases)
    one = unpack(good(mine.answer(asking("train", tmp_path, 1, method="flora"))).block)
    request = asking("train", tmp_path, 2, method="flora")

    def stack(times: int) -> bytes:
        return pack(
            {
                k._replace(slot="round1"): v.repeat(times, 1) if k.factor == A else v.repeat(1, times)
                for k, v in one.items()
            }
        )

    assert mine.answer(told(request, stack(4))).error == "message"
    assert good(mine.answer(told(request, stack(3)))).round == 2


def test_a_site_lets_no_server_overwrite_its_individual_lora(tmp_path: Path, bases: Bases) -> None:
    """Not by a method whose server makes something of single uploads, either."""
    mine = site(tmp_path, bases)
    one = unpack(good(mine.answer(asking("train", tmp_path, 1, method="fedalt_median"))).block)
    request = asking("train", tmp_path, 2, method="fedalt_median")
    assert mine.answer(told(request, pack(one), share=0)).error == "message"
    row = pack({key._replace(slot="rest_of_world"): value for key, value in one.items()})
    assert good(mine.answer(told(request, row, share=0))).round == 2
