"""Private steps: clipped sums by hand, a row's bounded part in them, noise that is what it says, and its cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, norm
from torch import Tensor, nn

import classifiers
from fedalt.data.batches import Noise, Plan, cohort_steps, collate, plan_round
from fedalt.data.encode import Example
from fedalt.errors import UserError
from fedalt.federation.client import SPENT
from fedalt.model.adapted import AdaptedModel
from fedalt.model.state import ClientState
from fedalt.names import A, B, Key
from fedalt.seeding import secret_uniform
from fedalt.training.loop import train
from fedalt.training.privacy import clipped_sum, epsilon, noise_multiplier, private_losses
from oracle.reference import PlainClient
from support import (
    MODELS,
    PAD,
    SCALE,
    bert,
    distance,
    examples,
    llama,
    method_of,
    placement,
    random_states,
    relative,
    round_settings,
    run_all,
    shape_of,
    training,
)

METHODS = ("fedalt", "fedit", "ffa_lora", "fedsa_lora")
ROWS = [examples(count, seed=k, longest=6 + 3 * k) for k, count in enumerate((4, 1, 3))]
CLIPS = (0.4, 0.02, 3.0)
KEYS = (101, 102, 103)
NOISE = Noise(bytes(range(32)), 0.4, 2.0, 0.5, 0.0, 1e-3, None)
LAYOUTS = pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])


def loaded(base: Any, method: str, dropout: float = 0.0, **options: bool) -> tuple[AdaptedModel, list[ClientState]]:
    model, rule = AdaptedModel(base, **options), method_of(method)
    shape = shape_of(rule, model.layer_sizes)
    states = random_states(shape)
    model.load(states, placement(shape, dropout), [key for key in shape.shapes() if rule.trains(key)])
    model.train()
    return model, states


def clipped(grads: Sequence[Mapping[Key, Tensor]], clip: float) -> dict[Key, Tensor]:
    """Σ min(1, C/‖g‖) g, as it is written."""
    total = {key: torch.zeros_like(value) for key, value in grads[0].items()}
    for grad in grads:
        length = math.sqrt(sum(float(value.double().square().sum()) for value in grad.values()))
        for key, value in grad.items():
            total[key] += min(1.0, clip / length) * value
    return total


# ----------------------------------------------------------------------------------------------------- clipped sums


@pytest.mark.parametrize(
    ("method", "name"),
    [*((method, "llama") for method in METHODS), *(("fedalt", name) for name in ("bloom", "gpt2", "bert"))],
)
@LAYOUTS
def test_the_clipped_sum_is_that_of_rows_alone_on_plain_models(method: str, name: str, packing: bool) -> None:
    build = {**MODELS, "bert": bert}[name]
    model, states = loaded(build(), method, packing=packing)
    losses, sums = clipped_sum(model, collate(ROWS), CLIPS)
    found, at = dict(zip(model.trainable, sums, strict=True)), 0
    for k, (state, rows, clip) in enumerate(zip(states, ROWS, CLIPS, strict=True)):
        alone, grads = PlainClient(build(), state.tensors, SCALE), []
        for row in rows:
            loss = alone.loss([row], PAD)
            named = {key: alone.parameters[key] for key in found}  # type: ignore[index]
            grads.append(dict(zip(found, torch.autograd.grad(loss, named.values()), strict=True)))
            assert losses[at].item() == pytest.approx(loss.item(), rel=1e-5)
            at += 1
        for key, expected in clipped(grads, clip).items():
            assert relative(found[key][k], expected) < 1e-5, key


class LinearLora(nn.Module):
    """A LoRA of two linear layers, which Opacus knows."""

    def __init__(self, base_layer: nn.Module, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.a, self.b = (nn.Linear(value.shape[1], value.shape[0], bias=False) for value in (a, b))
        self.a.weight.data, self.b.weight.data = a.clone(), b.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + SCALE * self.b(self.a(x))  # type: ignore[no-any-return]


def test_the_clipped_sum_is_that_of_opacus() -> None:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model, (state, *_) = loaded(llama(), "fedit")
    rows = [replace(row, prompt=row.prompt[:3], answer=row.answer[:1]) for row in ROWS[0]]  # of one length
    sums = dict(zip(model.trainable, clipped_sum(model, collate([rows, (), ()]), [0.5] * 3)[1], strict=True))
    plain = llama().requires_grad_(False)
    layers = {path: LinearLora(plain.get_submodule(path), *parts) for path, parts in _factors(state).items()}
    for path, layer in layers.items():
        plain.set_submodule(path, layer)
    watched = GradSampleModule(plain, loss_reduction="sum")
    weights = [p for p in watched.parameters() if p.requires_grad]
    optimizer = DPOptimizer(
        torch.optim.SGD(weights, 1.0),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        expected_batch_size=1,
        loss_reduction="sum",
    )
    logits = watched(input_ids=torch.tensor([row.prompt for row in rows])).logits[:, -1]
    torch.nn.functional.cross_entropy(logits, torch.tensor([row.answer[0] for row in rows]), reduction="sum").backward()
    optimizer.clip_and_accumulate()
    for path, layer in layers.items():
        for factor, part in ((A, layer.a), (B, layer.b)):
            assert relative(sums[Key(path, "global", factor)][0], part.weight.summed_grad) < 1e-4  # type: ignore[arg-type]


def _factors(state: ClientState) -> dict[str, tuple[Tensor, Tensor]]:
    tensors = state.tensors
    return {key.module: (a, tensors[key._replace(factor=B)]) for key, a in tensors.items() if key.factor == A}


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "vit"])
def test_the_heads_part_of_a_row_is_in_its_length(kind: str) -> None:
    model = classifiers.adapted(kind)
    mine = classifiers.states(model)
    groups = [classifiers.examples(kind, count, seed=k) for k, count in enumerate((3, 0, 2))]
    model.load(mine, classifiers.PLACEMENT, [*mine[0].tensors, *mine[0].heads])
    sums = dict(zip(model.trainable, clipped_sum(model, collate(groups), CLIPS)[1], strict=True))
    for k, state in enumerate(mine):
        leaves = {key: value.clone().requires_grad_() for key, value in {**state.tensors, **state.heads}.items()}
        grads = []
        for row in groups[k]:
            parts = torch.autograd.grad(
                classifiers.plain_losses(kind, leaves, [row])[1], leaves.values(), allow_unused=True
            )
            grads.append(
                {key: torch.zeros_like(leaves[key]) if g is None else g for key, g in zip(leaves, parts, strict=True)}
            )
        for key, expected in (clipped(grads, CLIPS[k]) if grads else {}).items():
            if float(expected.abs().max()) > 1e-4:  # the key's bias in attention has none
                assert relative(sums[key][k], expected) < 2e-3, key
        assert grads or not any(sums[key][k].any() for key in sums)


@pytest.mark.parametrize("method", ["fedalt"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@LAYOUTS
def test_dropout_is_the_same_where_rows_are_measured_and_where_they_are_added(
    method: str, checkpointing: bool, packing: bool
) -> None:
    model, _ = loaded(llama(), method, 0.3, packing=packing, gradient_checkpointing=checkpointing)
    batch = collate(ROWS, KEYS)
    grads: list[dict[Key, Tensor]] = []
    for i in range(sum(map(len, ROWS))):
        weights = torch.zeros(sum(map(len, ROWS))).index_fill(0, torch.tensor(i), 1.0)
        grads.append(dict(zip(model.trainable, gradients(model, batch, weights), strict=True)))
    sums, at = dict(zip(model.trainable, clipped_sum(model, batch, CLIPS)[1], strict=True)), 0
    for k, rows in enumerate(ROWS):
        mine = [{key: value[k] for key, value in grad.items()} for grad in grads[at : at + len(rows)]]
        at += len(rows)
        for key, expected in clipped(mine, CLIPS[k]).items():
            assert relative(sums[key][k], expected) < 1e-5, key


def gradients(model: AdaptedModel, batch: Any, weights: Tensor) -> Sequence[Tensor]:
    """Of the rows' mean losses, weighed, by one ordinary pass."""
    from fedalt.training.loss import row_losses

    return torch.autograd.grad((row_losses(model, batch, mean=True) * weights).sum(), list(model.trainable.values()))


def test_a_layer_that_is_used_twice_is_refused() -> None:
    model, _ = loaded(llama(), "fedit")
    layers = model.backbone.layers
    layers[1] = layers[0]
    with pytest.raises(UserError, match=r"privacy: .* is used twice"):
        clipped_sum(model, collate(ROWS), CLIPS)


MODEL = llama()


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_one_row_more_moves_the_sum_by_no_more_than_the_clip(data: st.DataObject) -> None:
    draw = data.draw
    method, clip = draw(st.sampled_from(METHODS)), draw(st.floats(1e-3, 10))
    model, rule = WRAPPED, method_of(method)
    shape = shape_of(rule, model.layer_sizes)
    states = random_states(shape, (draw(st.integers(0, 10**6)),), spread=draw(st.floats(0.01, 2)))
    model.load(states, placement(shape), [key for key in shape.shapes() if rule.trains(key)])
    rows = examples(draw(st.integers(2, 5)), seed=draw(st.integers(0, 10**6)), longest=draw(st.integers(4, 12)))
    out = draw(st.integers(0, len(rows) - 1))
    with_it, without = (clipped_sum(model, collate([some]), [clip])[1] for some in (rows, rows[:out] + rows[out + 1 :]))
    moved = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(with_it, without, strict=True)))
    assert moved <= clip * (1 + 1e-4)


WRAPPED = AdaptedModel(llama())


# ------------------------------------------------------------------------------------------------------------ steps


def plan(rows: Sequence[Example], client: int = 0, noise: Noise = NOISE, **changes: Any) -> Plan:
    return plan_round(rows, client, training(**changes), 5, 1, noise=noise)


def test_every_row_is_in_a_step_as_often_as_it_should_be_and_nobody_without_the_key_knows_when() -> None:
    rows = examples(50, seed=9)
    steps = plan(rows, max_steps=400).steps
    counts = np.array([sum(row in step for step in steps) for row in rows])
    assert len(steps) == 400 and abs(counts.mean() / 400 - 0.4) < 0.01
    assert kstest((counts - 160) / math.sqrt(400 * 0.24), norm.cdf).pvalue > 1e-3
    assert plan(rows).steps == plan(rows).steps != plan(rows, noise=replace(NOISE, key=bytes(32))).steps
    assert plan(rows).steps != plan(rows, client=1).steps
    assert kstest(secret_uniform(bytes(32), 10_000).numpy(), "uniform").pvalue > 1e-3


def test_a_step_is_the_clipped_sum_over_expected_rows_plus_noise() -> None:
    model, _ = loaded(llama(), "fedalt")
    plans = [
        Plan(k, (rows,), KEYS[k], replace(NOISE, multiplier=0.0, key=bytes([k] * 32))) for k, rows in enumerate(ROWS)
    ]
    [parts] = cohort_steps(plans, 2)
    assert len(parts) == 2, "a step in parts"
    private_losses(model, parts, plans, 0).sum().backward()
    _, sums = clipped_sum(model, collate(ROWS), [NOISE.clip] * 3)
    for value, expected in zip(model.trainable.values(), sums, strict=True):
        assert value.grad is not None and relative(value.grad, expected / 2.0) < 1e-5
        value.grad = None
    noisy = [replace(one, noise=replace(one.noise, multiplier=7.0)) for one in plans if one.noise]
    private_losses(model, parts, noisy, 0).sum().backward()
    for k in range(3):
        grads = zip(model.trainable.values(), sums, strict=True)
        drawn = torch.cat(
            [(2.0 * value.grad[k] - total[k]).flatten() for value, total in grads if value.grad is not None]
        )
        assert kstest((drawn / (7.0 * NOISE.clip)).numpy(), norm.cdf).pvalue > 1e-3


def test_noise_depends_on_key_client_phase_and_step_and_on_nobody_beside() -> None:
    model, _ = loaded(llama(), "fedit")
    noise = replace(NOISE, multiplier=1.0)

    def drawn(step: int, noise: Noise, clients: int = 3, at: int = 0) -> Tensor:
        plans = [Plan(k, ((),) * 3, KEYS[k], noise if k == at else replace(noise, key=bytes(32))) for k in range(3)]
        for value in model.trainable.values():
            value.grad = None
        private_losses(model, [], plans, step).sum().backward()
        return torch.cat([value.grad[at].flatten() for value in model.trainable.values() if value.grad is not None])

    first = drawn(0, noise)
    assert torch.equal(first, drawn(0, noise, at=2)) and first.abs().max() > 0
    for other in (drawn(1, noise), drawn(0, replace(noise, key=bytes([1] * 32)))):
        assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 0.05


@pytest.mark.parametrize("method", ["fedalt", "feddpa_t"])
def test_stacked_is_a_loop_with_steps_that_are_empty_and_clients_that_stop(method: str) -> None:
    rule, rows = method_of(method), dict(enumerate((*ROWS[:2], examples(9, seed=8))))
    config = training(batch_size=2, accumulate=2)

    def results(**executor: Any) -> list[Any]:
        model = AdaptedModel(llama())
        states = random_states(shape_of(rule, model.layer_sizes))
        phases = range(len(rule.phases(2)))
        noises = [replace(NOISE, rate=min(1, 4 / len(mine)) / 2, multiplier=1.1) for mine in rows.values()]
        plans = [
            [plan_round(mine, k, config, 5, 2, phase=phase, noise=noises[k]) for phase in phases]
            for k, mine in rows.items()
        ]
        assert any(not step for one in plans for phase in one for step in phase.steps)
        return run_all(model, states, [None] * 3, plans, round_settings(rule, config, 0.1), 2, **executor)

    together, loop = results(), results(executor="loop")
    for one, other in zip(together, loop, strict=True):
        assert distance(one.state.tensors, other.state.tensors) < 5e-4
        assert one.stats.epsilon == other.stats.epsilon and one.stats.alpha == ()
        assert one.state.private_steps == one.stats.steps


def test_a_client_stops_before_it_spends_too_much_and_the_others_go_on() -> None:
    model, rule, config = AdaptedModel(llama()), method_of("fedit"), training()
    states = random_states(shape_of(rule, model.layer_sizes))
    noise = replace(NOISE, multiplier=1.0, epsilon=epsilon(0.4, 1.0, 4, 1e-3))
    plans = [[plan_round(rows, k, config, 5, 1, noise=noise)] for k, rows in enumerate(ROWS)]
    assert {len(mine.steps) for [mine] in plans} == {2}
    late = [states[0], replace(states[1], private_steps=3), replace(states[2], private_steps=2)]
    one, two, three = run_all(model, late, [None] * 3, plans, round_settings(rule, config), 1)
    assert two.failure == SPENT and two.state is late[1] and not two.upload
    assert one.failure is None and one.upload and one.state.private_steps == 2
    assert three.failure is None and three.stats.epsilon == pytest.approx(noise.epsilon)


def test_max_grad_norm_gives_way_to_the_clip() -> None:
    """With plain SGD a step is minus lr times the noised mean, however long that is."""
    rule = method_of("fedit")
    config = training(optimizer="sgd", weight_decay=0.0, max_steps=1, max_grad_norm=1e-6, schedule="constant")
    model = AdaptedModel(llama())
    states = random_states(shape_of(rule, model.layer_sizes))
    plans = [plan(ROWS[k], k, replace(NOISE, multiplier=3.0), max_steps=1) for k in range(3)]
    results = run_all(model, states, [None] * 3, plans, round_settings(rule, config), 1)
    moved = max(distance(result.state.tensors, state.tensors) for result, state in zip(results, states, strict=True))
    assert moved > 5e-3 * 0.5 * 3 / 2, "a standard deviation of noise at least"


def test_a_penalty_is_added_after_the_noise() -> None:
    """Its gradient tells nothing of a row, so it is neither clipped nor noised."""
    config, heavy = training(optimizer="sgd", weight_decay=0.0, lr=0.01, max_steps=3), {}
    for mu in (0.0, 5.0):
        rule = method_of("fedprox", fedprox__mu=mu)
        model = AdaptedModel(llama())
        states = random_states(shape_of(rule, model.layer_sizes))
        plans = [plan(rows, k, max_steps=3) for k, rows in enumerate(ROWS)]
        heavy[mu] = run_all(model, states, [None] * 3, plans, round_settings(rule, config), 1), states
    ways = {
        mu: [distance(r.state.tensors, s.tensors) for r, s in zip(*both, strict=True)] for mu, both in heavy.items()
    }
    assert all(held < free for held, free in zip(ways[5.0], ways[0.0], strict=True))


def test_training_without_privacy_is_what_it_was() -> None:
    model, _ = loaded(llama(), "fedalt")
    plans = [plan_round(rows, k, training(), 5, 1) for k, rows in enumerate(ROWS)]
    assert all(stats.epsilon is None and stats.alpha for stats in train(model, plans, training()))


# ------------------------------------------------------------------------------------------------------- accounting

KNOWN = [
    (0.01, 1.0, 1000, 1e-5, 2.10137, 1.82824),
    (0.1, 2.0, 300, 1e-4, 3.99189, 3.59654),
    (0.04, 0.8, 500, 1e-3, 7.77759, 6.62819),
]
"""Rate, multiplier, steps, δ; ε by dp-accounting 0.6.0, RDP and PLD."""


def by_integral(rate: float, sigma: float, steps: int, delta: float) -> float:
    """ε by Rényi orders whose moments are integrals on a grid: E_{z∼N(0,σ²)}[(1 − q + q e^{(2z−1)/2σ²})^α]."""
    best = math.inf
    for order in np.arange(1.1, 64, 0.1):
        z = np.arange(-14 * sigma, order + 14 * sigma, sigma / 40)
        ratio = (
            np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * sigma**2))
            if rate < 1
            else (2 * z - 1) / (2 * sigma**2)
        )
        moment = np.logaddexp.reduce(order * ratio + norm.logpdf(z, scale=sigma)) + math.log(sigma / 40)
        cost = steps * moment / (order - 1)
        best = min(best, cost + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return best


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta"), [(*one[:4],) for one in KNOWN] + [(1.0, 5.0, 10, 1e-5)])
def test_epsilon_is_that_of_the_integral(rate: float, sigma: float, steps: int, delta: float) -> None:
    wanted = by_integral(rate, sigma, steps, delta)
    assert wanted - 1e-6 <= epsilon(rate, sigma, steps, delta) < 1.02 * wanted, "fewer orders are looked at"


@pytest.mark.parametrize("known", KNOWN)
def test_epsilon_is_that_of_dp_accounting_written_down(known: tuple[float, ...]) -> None:
    rate, sigma, steps, delta, by_rdp, by_pld = known
    found = epsilon(rate, sigma, int(steps), delta)
    assert found == pytest.approx(by_rdp, rel=0.01) and by_pld <= found < 1.25 * by_pld


def test_epsilon_is_that_of_dp_accounting_asked() -> None:
    pytest.importorskip("dp_accounting")
    for rate, sigma, steps, delta, *wanted in KNOWN:
        assert asked(rate, sigma, int(steps), delta) == pytest.approx(wanted, rel=1e-3)


def asked(rate: float, sigma: float, steps: int, delta: float) -> list[float]:
    """ε by RDP and by PLD of Google's library."""
    import dp_accounting as dp

    event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma))
    accountants = (dp.rdp.RdpAccountant(), dp.pld.PLDAccountant())
    return [accountant.compose(event, steps).get_epsilon(delta) for accountant in accountants]


def test_epsilon_is_that_of_the_accountant_of_opacus() -> None:
    from opacus.accountants import RDPAccountant

    for rate, sigma, steps, delta, *_ in KNOWN:
        accountant = RDPAccountant()
        accountant.history = [(sigma, rate, int(steps))]
        assert epsilon(rate, sigma, int(steps), delta) == pytest.approx(accountant.get_epsilon(delta), rel=0.01)


def test_without_sampling_epsilon_bounds_the_exact_one() -> None:
    """T releases of a Gaussian are one with μ = √T/σ: δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ)."""
    for steps, sigma in ((1, 1.0), (10, 5.0), (100, 30.0)):
        mu, found = math.sqrt(steps) / sigma, epsilon(1.0, sigma, steps, 1e-5)
        assert norm.cdf(mu / 2 - found / mu) - math.exp(found) * norm.cdf(-mu / 2 - found / mu) <= 1e-5
        tighter = 0.7 * found
        assert norm.cdf(mu / 2 - tighter / mu) - math.exp(tighter) * norm.cdf(-mu / 2 - tighter / mu) > 1e-5


@settings(max_examples=4, deadline=None)
@given(st.floats(0.3, 20), st.floats(0.005, 1), st.integers(1, 2000), st.sampled_from([1e-2, 1e-3, 1e-5]))
def test_the_least_noise_that_keeps_to_a_budget(target: float, rate: float, steps: int, delta: float) -> None:
    sigma = noise_multiplier(target, rate, steps, delta)
    assert epsilon(rate, sigma, steps, delta) <= target
    assert sigma <= 0.2 or epsilon(rate, sigma / 1.002, steps, delta) > target


def test_more_steps_and_less_noise_cost_more() -> None:
    costs = [epsilon(0.05, 1.0, steps, 1e-4) for steps in (0, 1, 10, 100, 1000)]
    assert costs == sorted(costs) and costs[0] == 0
    assert epsilon(0.05, 2.0, 100, 1e-4) < epsilon(0.05, 1.0, 100, 1e-4)
