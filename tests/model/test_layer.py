"""One adapted layer against the literal formula, over every kind of base layer it may sit on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedalt.model.base import keep_trainable_through
from fedalt.model.batch_layout import BatchContext, BatchLayout, MixerProbe
from fedalt.model.layer import SOFTMAX, AdaptedLinear, Placement
from fedalt.model.peft_files import LoraFolder, read_folder, write_lora, write_mixer
from fedalt.model.state import ClientState, load_state, save_state
from fedalt.names import INDIVIDUAL, MIXER, REST_OF_WORLD, A, B, G, Key
from oracle.reference import fedalt_delta
from support import bitwise, quick, relative

D_IN, D_OUT, R, S = 64, 48, 3, 1.5
SLOTS = (INDIVIDUAL, REST_OF_WORLD)
KEYS = {
    "A_L": Key("w", INDIVIDUAL, A),
    "B_L": Key("w", INDIVIDUAL, B),
    "A_R": Key("w", REST_OF_WORLD, A),
    "B_R": Key("w", REST_OF_WORLD, B),
    "G": Key("w", MIXER, G),
}
SHAPES = {"A_L": (R, D_IN), "B_L": (D_OUT, R), "A_R": (R, D_IN), "B_R": (D_OUT, R), "G": (2, D_IN)}
Factors = dict[str, Tensor]


def linear() -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(D_IN, D_OUT)


def conv1d() -> nn.Module:
    torch.manual_seed(3)
    return Conv1D(D_OUT, D_IN)


def int8() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(D_IN, D_OUT, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(linear().state_dict())
    return layer.to("cpu")


def nf4() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(D_IN, D_OUT, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(linear().state_dict())
    keep_trainable_through(layer)
    return layer.to("cpu")


KINDS: dict[str, Callable[[], nn.Module]] = {"linear": linear, "conv1d": conv1d, "int8": int8, "nf4": nf4}


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest) -> nn.Module:
    return KINDS[request.param]()


def factors(client: int, **changes: Tensor) -> Factors:
    generator = torch.Generator().manual_seed(client)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} | changes


def inputs(n: int, t: int = 5, seed: int = 9) -> Tensor:
    return torch.randn(n, t, D_IN, generator=torch.Generator().manual_seed(seed))


def adapted(base: nn.Module, clients: Sequence[Factors], dropout: float = 0.0, drops: bool = False) -> AdaptedLinear:
    """All clients' adapters on one layer; what trains is what FedALT trains. The base layer is always in eval mode."""
    layer = AdaptedLinear(base.requires_grad_(False), "w", 4, BatchContext())
    stacked = {KEYS[name]: torch.stack([client[name] for client in clients]) for name in SHAPES}
    layer.place(Placement(SLOTS, SOFTMAX, S, dropout), stacked, [KEYS[name] for name in ("A_L", "B_L", "G")])
    layer.eval().training = drops
    return layer


def forward(layer: AdaptedLinear, x: Tensor, rows: BatchLayout, probe: MixerProbe | None = None) -> Tensor:
    with torch.no_grad(), layer.context.rows(rows, probe):
        return layer(x)


def alphas(layer: AdaptedLinear, x: Tensor, rows: BatchLayout) -> Tensor:
    probe = MixerProbe()
    forward(layer, x, rows, probe)
    return probe.weights["w"]


def literal(x: Tensor, client: Mapping[str, Tensor]) -> Tensor:
    arrays = {name: value.numpy() for name, value in client.items()}
    return torch.from_numpy(fedalt_delta(x.numpy(), **arrays, s=S)).float()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_matches_the_literal_formula(base: nn.Module) -> None:
    clients, x = [factors(0), factors(1)], inputs(4)
    y = forward(adapted(base, clients), x, BatchLayout((2, 2)))
    expected = torch.cat([literal(x[:2], clients[0]), literal(x[2:], clients[1])])
    assert float(expected.abs().max()) > 1
    close(y - base(x), expected)


def test_base_output_is_untouched_while_b_is_zero(base: nn.Module) -> None:
    zero = torch.zeros(SHAPES["B_L"])
    layer, x = adapted(base, [factors(0, B_L=zero, B_R=zero)]), inputs(2)
    assert torch.equal(forward(layer, x, BatchLayout((2,))), base(x))
    layer.clear()
    assert torch.equal(forward(layer, x, BatchLayout((2,))), base(x))


def test_zero_mixer_halves_both_branches(base: nn.Module) -> None:
    client, x = factors(0, G=torch.zeros(SHAPES["G"])), inputs(2)
    product = client["B_L"] @ client["A_L"] + client["B_R"] @ client["A_R"]
    close(forward(adapted(base, [client]), x, BatchLayout((2,))) - base(x), S / 2 * x @ product.T)


def test_mixer_far_towards_the_individual_is_a_single_lora(base: nn.Module) -> None:
    x = inputs(2)
    x[..., 0] = 1.0  # a bias-like input lets a linear mixer choose the individual everywhere
    mixer = torch.zeros(SHAPES["G"])
    mixer[SLOTS.index(INDIVIDUAL), 0], mixer[SLOTS.index(REST_OF_WORLD), 0] = 200.0, -200.0
    client = factors(0, G=mixer)
    close(forward(adapted(base, [client]), x, BatchLayout((2,))) - base(x), S * x @ (client["B_L"] @ client["A_L"]).T)


def test_without_a_row_the_mixer_still_scales_the_individual(base: nn.Module) -> None:
    client, x = factors(0, B_R=torch.zeros(SHAPES["B_R"])), inputs(2)
    layer = adapted(base, [client])
    alpha = torch.softmax(x @ client["G"].T, -1)[..., SLOTS.index(INDIVIDUAL), None]
    branch = S * x @ (client["B_L"] @ client["A_L"]).T
    delta = forward(layer, x, BatchLayout((2,))) - base(x)
    close(delta, alpha * branch)
    assert not torch.allclose(delta, branch, atol=1e-2)


def test_mixer_weights_sum_to_one_in_the_order_of_the_slots(base: nn.Module) -> None:
    client, x = factors(0), inputs(3)
    alpha = alphas(adapted(base, [client]), x, BatchLayout((3,)))
    assert alpha.shape == (15, 2)
    close(alpha.sum(-1), torch.ones(15))
    close(alpha[..., SLOTS.index(REST_OF_WORLD)], torch.sigmoid(x @ (client["G"][1] - client["G"][0])).flatten())


def test_mixer_order_survives_both_file_formats(tmp_path: Path) -> None:
    state = ClientState(0, 1, {KEYS[name]: value for name, value in factors(0).items()})
    save_state(state, tmp_path / "state.safetensors")
    for slot in SLOTS:
        write_lora(tmp_path / slot, state.tensors, slot, LoraFolder("base", R, S * R, 0.0, False))
    write_mixer(tmp_path, state.tensors)
    assert bitwise(load_state(tmp_path / "state.safetensors").tensors, state.tensors)
    assert bitwise(read_folder(tmp_path, SLOTS, mixed=True), state.tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_half_precision_inputs_with_huge_logits_stay_finite(dtype: torch.dtype, sign: float) -> None:
    base = linear().to(dtype)
    mixer = torch.zeros(SHAPES["G"])
    mixer[0, 0] = 4e4 * sign  # |z| = 4e4: neither exp nor a 16-bit sum of such logits is finite
    client, x = factors(0, G=mixer), inputs(2).to(dtype)
    x[..., 0] = 1.0
    y = forward(adapted(base, [client]), x, BatchLayout((2,)))
    assert y.dtype == dtype
    assert y.isfinite().all()
    a, b = ("A_L", "B_L") if sign > 0 else ("A_R", "B_R")
    branch = S * x.float() @ (client[b] @ client[a]).T
    torch.testing.assert_close(y, base(x) + branch.to(dtype))


def test_one_dropout_mask_serves_both_loras(base: nn.Module) -> None:
    """With equal LoRAs the mixture is independent of the mixer, which separate masks would break."""
    same = factors(0)
    same |= {"A_R": same["A_L"], "B_R": same["B_L"]}
    x, rows = inputs(3), BatchLayout((3,), (5, 5, 5), (11,))
    mixed = [same | {"G": factors(k)["G"]} for k in (1, 2)]
    one, other = (forward(adapted(base, [client], 0.5, drops=True), x, rows) for client in mixed)
    close(one, other)
    assert not torch.allclose(one, forward(adapted(base, mixed[:1], 0.5), x, rows), atol=0.1)


def test_dropout_keeps_or_scales_every_input() -> None:
    x, rows = torch.ones(15, D_IN), BatchLayout((3,), (5, 5, 5), (11,))
    once = rows.dropout(x, 0.25, layer=0)
    assert once.scale == 1 / 0.75
    assert 0.68 < once.kept.float().mean() < 0.82
    assert torch.equal(once.kept, rows.dropout(x, 0.25, layer=0).kept)
    assert not torch.equal(once.kept, rows.dropout(x, 0.25, layer=1).kept)


@pytest.mark.parametrize("p", [0.05, 0.5, 1e-6])
def test_dropout_drops_as_often_as_it_says(p: float) -> None:
    kept = BatchLayout((1,), (4000,), (3,)).dropout(torch.ones(4000, 501), p, layer=2)
    share = 1 - float(kept.kept.double().mean())
    assert abs(share - (1 - 1 / kept.scale)) < 4 * (p / kept.kept.numel()) ** 0.5
    assert abs((1 - 1 / kept.scale) - p) < 1 / 65_536
    columns = (~kept.kept).double().mean(0)
    assert float((columns - share).abs().max()) < 6 * (p / 4000) ** 0.5 + 1e-9, "every lane of a number alike"


def test_dropout_is_the_same_packed_and_padded() -> None:
    lengths = (5, 2, 4)
    packed = BatchLayout((1, 2), lengths, (11, 12), packed=True).dropout(torch.ones(11, D_IN), 0.3, layer=1).kept
    padded = BatchLayout((1, 2), lengths, (11, 12)).dropout(torch.ones(15, D_IN), 0.3, layer=1).kept
    assert torch.equal(packed, padded[BatchLayout((1, 2), lengths).places(15)])


def test_mixer_sees_the_input_undropped(base: nn.Module) -> None:
    x, rows = inputs(3), BatchLayout((3,), (5, 5, 5), (11,))
    dropping, plain = (adapted(base, [factors(0)], 0.5, drops) for drops in (True, False))
    assert torch.equal(alphas(dropping, x, rows), alphas(plain, x, rows))


def test_no_dropout_in_eval_mode_or_without_keys(base: nn.Module) -> None:
    x, keyed = inputs(3), BatchLayout((3,), (5, 5, 5), (11,))
    plain = forward(adapted(base, [factors(0)]), x, BatchLayout((3,)))
    assert torch.equal(plain, forward(adapted(base, [factors(0)], 0.5), x, keyed))
    assert torch.equal(plain, forward(adapted(base, [factors(0)], 0.5, drops=True), x, BatchLayout((3,))))
    assert not torch.equal(plain, forward(adapted(base, [factors(0)], 0.5, drops=True), x, keyed))


def test_dropout_mask_is_independent_of_company_and_padding(base: nn.Module) -> None:
    clients, x = [factors(0), factors(1)], inputs(5)
    together = forward(adapted(base, clients, 0.5, drops=True), x, BatchLayout((2, 3), (5, 5, 4, 4, 4), (11, 12)))
    short = x[2:, :4].contiguous()  # client 1 alone, without the column that only client 0 needs
    alone = forward(adapted(base, clients[1:], 0.5, drops=True), short, BatchLayout((3,), (4, 4, 4), (12,)))
    close(together[2:, :4], alone)


@quick
@given(sizes=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(sum))
def test_any_sizes_give_every_row_its_own_client(sizes: list[int]) -> None:
    clients = [factors(k) for k in range(len(sizes))]
    x, base = inputs(sum(sizes)), linear()
    y = forward(adapted(base, clients), x, BatchLayout(tuple(sizes)))
    blocks = zip(x.split(sizes), clients, strict=True)
    close(y - base(x), torch.cat([literal(block, client) for block, client in blocks if len(block)]))


def test_block_path_equals_gather_path() -> None:
    clients, x = [factors(0), factors(1), factors(2)], inputs(4)
    block = forward(adapted(linear(), clients[:2]), x, BatchLayout((2, 2)))
    gather = forward(adapted(linear(), clients), x, BatchLayout((2, 2, 0)))
    close(block, gather)


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3)])
def test_rows_expanded_by_beams_keep_their_client(sizes: tuple[int, int]) -> None:
    layer, x = adapted(linear(), [factors(0), factors(1)]), inputs(4)
    once = forward(layer, x, BatchLayout(sizes))
    beams = forward(layer, x.repeat_interleave(3, 0), BatchLayout(sizes))
    close(beams, once.repeat_interleave(3, 0))


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3)])
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_and_tokens_flattened_into_one_axis(sizes: tuple[int, int], beams: int) -> None:
    layer, x = adapted(linear(), [factors(0), factors(1)]), inputs(4).repeat_interleave(beams, 0)
    flat = forward(layer, x.flatten(0, 1), BatchLayout(sizes))
    close(flat, forward(layer, x, BatchLayout(sizes)).flatten(0, 1))


def test_row_is_a_buffer_and_the_base_is_frozen(base: nn.Module) -> None:
    layer = adapted(base, [factors(0)])
    layer(inputs(1)).sum().backward()
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"individual_A", "individual_B", "mixer_G"}
    assert all(layer.get_parameter(name).grad is not None for name in trained)
    assert {name for name, _ in layer.named_buffers() if name.startswith("rest_of_world")} == {
        "rest_of_world_A",
        "rest_of_world_B",
    }
    assert layer.rest_of_world_A.grad is None
    assert layer.rest_of_world_B.grad is None
    assert all(p.grad is None for p in base.parameters())


def test_gradients_are_those_of_the_literal_formula(base: nn.Module) -> None:
    client, x = factors(0), inputs(2)
    layer = adapted(base, [client])
    with layer.context.rows(BatchLayout((2,))):
        (layer(x) ** 2).sum().backward()
    leaves = {name: client[name].clone().requires_grad_() for name in ("A_L", "B_L", "G")}
    alpha = torch.softmax(x @ leaves["G"].T, -1)
    individual = x @ leaves["A_L"].T @ leaves["B_L"].T
    row = x @ client["A_R"].T @ client["B_R"].T
    ((base(x) + S * (alpha[..., :1] * individual + alpha[..., 1:] * row)) ** 2).sum().backward()
    for name, leaf in leaves.items():
        grad = layer.factor(*KEYS[name][1:]).grad
        assert grad is not None
        np.testing.assert_allclose(grad[0], leaf.grad, rtol=1e-4, atol=1e-4 * float(leaf.grad.abs().max()))


def test_gradients_pass_through_the_base_even_after_a_forward_without_them(base: nn.Module) -> None:
    """Adapters further down train through this layer; some quantised layers repack their weight on first use."""
    zero = torch.zeros(SHAPES["B_L"])
    layer, weights = adapted(base, [factors(0, B_L=zero, B_R=zero)]), inputs(2, seed=5)[..., :D_OUT]
    forward(layer, inputs(2), BatchLayout((2,)))
    plain = conv1d() if isinstance(base, Conv1D) else linear()
    grads = []
    for module in (layer, plain):
        x = inputs(2).requires_grad_()
        with layer.context.rows(BatchLayout((2,))):
            (module(x) * weights).sum().backward()
        grads.append(x.grad)
    assert relative(*grads) < (0.2 if base.weight.dtype in (torch.int8, torch.uint8) else 1e-5)  # type: ignore[arg-type]
