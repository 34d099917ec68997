"""``check_method`` finds what it is for: methods that break one rule each, and the sentence that says which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from fedalt.methods.base import BOTH, NONE, Message, Method, Phase, Slot, squared_distance
from fedalt.model.layer import SUM
from fedalt.model.state import ClientState
from fedalt.names import GLOBAL, LOCAL, A, Tensors
from fedalt.testing import check_method


class Two(Method):
    """A global and a local LoRA, side by side; nothing is wrong with it."""

    slots = (Slot(GLOBAL), Slot(LOCAL, share=NONE))


class Leaks(Two):
    """Sends everything."""

    def upload(self, state: ClientState) -> Tensors:
        return state.tensors


class Withholds(Method):
    """Sends A alone, and says that it sends B, too."""

    def upload(self, state: ClientState) -> Tensors:
        return {key: value for key, value in state.tensors.items() if key.factor == A}


class Shrinks(Method):
    """Sends less of every A than its rank says."""

    def upload(self, state: ClientState) -> Tensors:
        return {k: v[:-1] if k.factor == A else v for k, v in super().upload(state).items()}


class ChangesItsState(Method):
    """Decays what it has in place."""

    def before_training(self, state: ClientState, round_: int) -> ClientState:
        for value in state.tensors.values():
            value.mul_(0.9)
        return state


class ChangesTheMessage(Method):
    """Decays what it is told in place."""

    def receive(self, state: ClientState, message: Message) -> ClientState:
        for value in message.tensors.values():
            value.mul_(0.9)
        return super().receive(state, message)


class Remembers(Method):
    """Counts rounds in itself, which no checkpoint has."""

    def setup(self) -> None:
        self.rounds = dict[int, int]()

    def after_training(self, state: ClientState, began: ClientState, round_: int) -> ClientState:
        count = self.rounds[state.client] = self.rounds.get(state.client, 0) + 1
        return state.with_tensors({key: value / count for key, value in state.tensors.items()})


class Listens(Method):
    """Adds to a client what the one before it has trained."""

    def setup(self) -> None:
        self.last: Mapping[Any, torch.Tensor] = {}

    def before_training(self, state: ClientState, round_: int) -> ClientState:
        self.last = {}
        return state

    def after_training(self, state: ClientState, began: ClientState, round_: int) -> ClientState:
        heard, self.last = self.last, dict(state.tensors)
        return state.with_tensors({k: v + heard.get(k, torch.zeros(())) for k, v in state.tensors.items()})


class Throws(Method):
    """Adds noise from the global stream."""

    def after_training(self, state: ClientState, began: ClientState, round_: int) -> ClientState:
        return state.with_tensors({k: v + 0.01 * torch.randn_like(v) for k, v in state.tensors.items()})


class Couples(Method):
    """Pulls clients that train at the same time together."""

    def penalty(self, trained: Tensors, start: Tensors) -> torch.Tensor:
        return 10 * sum((value - value.mean(0)).flatten(1).square().sum(1) for value in trained.values())


class Catches(Method):
    """Adds nothing to anybody's loss, as long as everybody is well."""

    def penalty(self, trained: Tensors, start: Tensors) -> torch.Tensor:
        distance = squared_distance(trained, start)
        return distance * (1 + 0 * distance.detach().sum())


class Diverges(Method):
    """Divides by zero."""

    def after_training(self, state: ClientState, began: ClientState, round_: int) -> ClientState:
        return state.with_tensors({key: value / 0 for key, value in state.tensors.items()})


class AnswersWithNothing(Method):
    """Answers with a LoRA that nobody has."""

    @property
    def inference(self) -> Any:
        return ("fused",), SUM


class Alone(Two):
    """Trains its global LoRA in some rounds and its local one in others; nothing is wrong with it, either."""

    def phases(self, round_: int) -> tuple[Phase, ...]:
        slot = LOCAL if round_ == 2 else GLOBAL
        return (Phase((slot,), {slot: BOTH}),)


@pytest.mark.parametrize("method", [Two, Alone])
def test_what_is_right_passes(method: type[Method]) -> None:
    check_method(method)


@pytest.mark.parametrize(
    ("method", "rule", "where"),
    [
        (Leaks, r"an upload has what shares\(\) says", r"client 0, round 1: .*\.local\.A is sent"),
        (Withholds, r"an upload has what shares\(\) says", r"client 0, round 1: .*\.global\.B is shared and was not"),
        (Shrinks, "uploads are as large as declared", r"client 0, round 1: .*\.global\.A is \(3, 32\), .* \(4, 32\)"),
        (ChangesItsState, "a round is pure", r"client 0, round 1, the state that went in: .*\.A differs"),
        (ChangesTheMessage, "a round is pure", r"client 0, round 2, the server's message: .* differs"),
        (Remembers, "a resumed run ends bitwise the same", r"client \d, round 3: .* differs"),
        (Listens, "what a client does reaches others through the server alone|executors agree", "client 1"),
        (Throws, "executors agree|the same seed gives the same run", r"client \d, round 1"),
        (Couples, "executors agree", r"client \d, round 1"),
        (Catches, "a client that fails harms nobody", "client 0, beside one that failed"),
        (Diverges, "training stays finite", "client 0, round 1: .* is not finite"),
        (AnswersWithNothing, "the LoRAs that answer are there", "client 0 has no fused"),
    ],
)
def test_what_breaks_a_rule_is_named(method: type[Method], rule: str, where: str) -> None:
    with pytest.raises(AssertionError, match=rf"^{method.__name__} breaks the rule that .*({rule}).*{where}") as error:
        check_method(method)
    assert "\n" not in str(error.value)


def test_an_instance_has_its_own_settings_and_names_are_known() -> None:
    with pytest.raises(AssertionError, match=r"^Leaks breaks"):
        check_method(Leaks())
    with pytest.raises(AssertionError, match=r"^lora_fair breaks the rule that executors agree .* \(allowed: 1e-30\)$"):
        check_method("lora_fair", settings={"lora_fair.steps": 2}, tolerance=1e-30)
