"""Talking to one client's model: an instruction and its answer, or a text or image and its class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fedalt.data.encode import AnswerEncoder, ImageEncoder, Input, Prompt, TextEncoder, token_texts
from fedalt.data.federation import Row
from fedalt.errors import UserError
from fedalt.evaluation.classify import probabilities
from fedalt.evaluation.generate import answer
from fedalt.evaluation.prompt_similarity import load_to_answer
from fedalt.model.base import positions
from fedalt.runs.client_folder import read_client
from fedalt.runs.folder import Which, finished_run
from fedalt.runs.setup import Resident, load_resident
from fedalt.training.loop import mixer_weights


@dataclass(frozen=True)
class Answer:
    """An answer, and where the mixer looked.

    Attributes:
        text: The answer; the most probable class.
        alpha: (token, mean weight of the first slot over layers) for prompt and answer; empty without a mixer, and for
            images.
        slots: Names of the slots in mixer order.
        chances: Class → probability, highest first; empty for an answer in free text.
    """

    text: str
    alpha: list[tuple[str, float]]
    slots: tuple[str, ...]
    chances: dict[str, float]


class Chat:
    """A finished run's client, loaded once, asked often; the round that is kept, or ``which``."""

    def __init__(self, run: Path, client: int, resident: Resident | None = None, which: Which | None = None) -> None:
        folder, self.config = finished_run(run)
        self.resident = resident or load_resident(self.config)
        personal = read_client(folder, client, self.resident.base, which)
        self.placement = personal.placement
        self.encoder = self.resident.encoder(self.config)
        self.state = personal.state

    def ask(self, asked: str | Row) -> Answer:
        """Answer one instruction, or classify one text, or the image in one file; or the same of a row."""
        read = self._read(asked)
        model = self.resident.model
        weights = load_to_answer(model, [self.state], [[read]], self.placement)
        if self.config.classifies:
            ((chances,),) = probabilities(model, [[read]], 1, weights)
            named = dict(zip(self.config.model.labels or (), chances.tolist(), strict=True))
            ordered = dict(sorted(named.items(), key=lambda one: -one[1]))
            return Answer(next(iter(ordered)), self._alpha(read, ""), self.placement.slots, ordered)
        assert isinstance(read, tuple)
        mine = None if weights is None else weights[0]
        (text,) = answer(model, self.resident.base.tokenizer, [read], [0], self.config.evaluation, weights=mine)
        return Answer(text, self._alpha(read, text), self.placement.slots, {})

    def _read(self, asked: str | Row) -> Input:
        if isinstance(self.encoder, ImageEncoder):
            return self.encoder.image(asked if isinstance(asked, Row) else _in_file(asked))
        assert isinstance(self.encoder, AnswerEncoder | TextEncoder)
        prompt = self.encoder.prompt(asked.instruction if isinstance(asked, Row) else asked)
        return prompt if self.config.classifies else self._fitting(prompt)

    def _fitting(self, prompt: Prompt) -> Prompt:
        limit, longest = positions(self.resident.base.model), self.config.evaluation.max_new_tokens
        if limit and len(prompt) + longest > limit:
            raise UserError(
                f"the prompt has {len(prompt)} tokens; with {longest} new ones it exceeds the model's {limit} positions"
            )
        return prompt

    def _alpha(self, read: Input, text: str) -> list[tuple[str, float]]:
        if not self.placement.mixed or not isinstance(read, tuple):
            return []
        tokenizer = self.resident.base.tokenizer
        ids = (*read, *tokenizer(text, add_special_tokens=False)["input_ids"])
        weights = mixer_weights(self.resident.model, [[ids]])
        mean = torch.stack([alpha[:, 0] for alpha in weights.layers.values()]).mean(0).tolist()
        return list(zip(token_texts(tokenizer, ids), mean, strict=True))


def _in_file(path: str) -> Row:
    from fedalt.data.formats.images import FilePicture

    return Row(path, "", image=FilePicture(Path(path)))
