"""Talking to one client's model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fedalt.data.encode import Encoder
from fedalt.errors import UserError
from fedalt.evaluation.generate import answer
from fedalt.evaluation.likeness import load_to_answer
from fedalt.experiment.clients import read_client
from fedalt.experiment.folder import finished_run
from fedalt.experiment.prepare import load_resident
from fedalt.model.base import positions
from fedalt.training.mixing import mixer_weights


@dataclass(frozen=True)
class Answer:
    """An answer, and where the mixer looked.

    Attributes:
        text: The answer.
        alpha: (token, mean weight of the first slot over layers) for prompt and answer; empty without a mixer.
        slots: Names of the slots in mixer order.
    """

    text: str
    alpha: list[tuple[str, float]]
    slots: tuple[str, ...]


class Chat:
    """A finished run's client, loaded once, asked often.

    Args:
        run: Run folder.
        client: Client id.

    Raises:
        UserError: No finished run, no such client, base missing or changed.
    """

    def __init__(self, run: Path, client: int) -> None:
        folder, self.config = finished_run(run)
        self.resident = load_resident(self.config)
        personal = read_client(folder, client, self.resident.base)
        self.placement = personal.placement
        self.encoder = Encoder(self.resident.base.tokenizer, personal.template, self.config.data.cutoff)
        self.state = personal.state

    def ask(self, instruction: str) -> Answer:
        """Answer one instruction.

        Raises:
            UserError: Prompt and answer do not fit the model's positions.
        """
        model, tokenizer = self.resident.model, self.resident.base.tokenizer
        prompt = self.encoder.prompt(instruction)
        limit, longest = positions(model.base), self.config.evaluation.max_new_tokens
        if limit and len(prompt) + longest > limit:
            raise UserError(
                f"the prompt has {len(prompt)} tokens; with {longest} new ones it exceeds the model's {limit} positions"
            )
        weights = load_to_answer(model, [self.state], [[prompt]], self.placement)
        (text,) = answer(
            model, tokenizer, [prompt], [0], self.config.evaluation, None if weights is None else weights[0]
        )
        return Answer(text, self._alpha(prompt, text) if self.placement.mixed else [], self.placement.slots)

    def _alpha(self, prompt: tuple[int, ...], text: str) -> list[tuple[str, float]]:
        tokenizer = self.resident.base.tokenizer
        ids = (*prompt, *tokenizer(text, add_special_tokens=False)["input_ids"])
        weights = mixer_weights(self.resident.model, [[ids]])
        mean = torch.stack([alpha[:, 0] for alpha in weights.layers.values()]).mean(0).tolist()
        return [(tokenizer.decode([token]), value) for token, value in zip(ids, mean, strict=True)]
