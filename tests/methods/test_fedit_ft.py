"""FedIT and fine-tuning: FedIT's rounds, and then as many runs of one client from its mean."""

from __future__ import annotations

from typing import Any

import pytest

from fedalt.errors import UserError
from fedalt.model.adapted import AdaptedModel
from fedalt.model.state import ClientState
from support import bitwise, examples, llama, method_of, plans_of, round_settings, run_all, run_rounds, training

ROWS = {client: examples(count, seed=client) for client, count in enumerate((7, 10, 3))}
CONFIG = training(max_grad_norm=0.5)


def rounds(name: str, count: int, **settings: Any) -> Any:
    return run_rounds(AdaptedModel(llama()), method_of(name, **settings), ROWS, CONFIG, count, 0.2, executor="loop")


@pytest.mark.parametrize("alone", [1, 2])
def test_after_fedits_rounds_every_client_goes_on_alone(alone: int) -> None:
    """Bit for bit: FedIT, its mean, and local rounds from there with nobody else in them."""
    together = 2
    history, _ = rounds("fedit_ft", together + alone, federation__rounds=together + alone, fedit_ft__alone=alone)
    expected, server = rounds("fedit", together)
    for results, others in zip(history[:together], expected, strict=True):
        for one, other in zip(results, others, strict=True):
            assert bitwise(one.state.tensors, other.state.tensors)
            assert bitwise(one.upload, other.upload)
    mean, model, fedit = server.mean(), AdaptedModel(llama()), method_of("fedit")
    for client, mine in ROWS.items():
        state = ClientState(client, together, mean)
        for round_ in range(together + 1, together + alone + 1):
            plans = plans_of({client: mine}, CONFIG, round_)
            (one,) = run_all(model, [state], [None], plans, round_settings(fedit, CONFIG, 0.2), round_)
            state = one.state
            result = history[round_ - 1][client]
            assert bitwise(result.state.tensors, state.tensors)
            assert result.upload == {} and result.state.sent is None


def test_everybody_takes_part_in_the_rounds_alone() -> None:
    method = method_of("fedit_ft", federation__rounds=5, federation__fraction=0.4, fedit_ft__alone=2)
    assert [method.fraction(round_) for round_ in range(1, 6)] == [0.4, 0.4, 0.4, 1.0, 1.0]


def test_what_the_server_says_after_the_end_changes_nothing() -> None:
    history, server = rounds("fedit_ft", 3, federation__rounds=3)
    messages = server.messages(tuple(ROWS))
    for result in history[-1]:
        state = result.state
        assert bitwise(server.method.receive(state, messages[state.client]).tensors, state.tensors)
        assert not bitwise(state.tensors, messages[state.client].tensors)


@pytest.mark.parametrize(("rounds_", "alone"), [(1, 1), (3, 3), (3, 4)])
def test_a_run_without_a_shared_round_is_refused(rounds_: int, alone: int) -> None:
    with pytest.raises(UserError, match=rf"fedit_ft\.alone: {alone} of {rounds_} rounds alone leave none for FedIT"):
        method_of("fedit_ft", federation__rounds=rounds_, fedit_ft__alone=alone)
