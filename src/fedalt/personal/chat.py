"""Talking to one client's model: an instruction and its answer, or a text or image and its class."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from fedalt.data.encode import AnswerEncoder, ImageEncoder, Input, Prompt, TextEncoder, token_texts
from fedalt.data.federation import Row, Turn
from fedalt.errors import UserError
from fedalt.evaluation.evaluate import probabilities
from fedalt.evaluation.generate import Sampling, answer
from fedalt.evaluation.prompt_similarity import load_to_answer
from fedalt.model.base import positions
from fedalt.names import B, W
from fedalt.runs.client_folder import read_client
from fedalt.runs.folder import Which, finished_run
from fedalt.runs.setup import Resident, load_resident
from fedalt.seeding import derive_seed
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


@dataclass(frozen=True)
class Manner:
    """How answers in free text are written, where not as in the run.

    Attributes:
        sampling: Draws tokens; the run's greedy or beam search when not given.
        max_new_tokens: Longest answer; the run's when not given.
        turns: Whether earlier questions and answers are remembered.
    """

    sampling: Sampling | None = None
    max_new_tokens: int | None = None
    turns: bool = False


PLAIN = Manner()


class Chat:
    """A finished run's client, loaded once, asked often; the round that is kept, or ``which``.

    Attributes:
        said: What is remembered.
    """

    def __init__(
        self,
        run: Path,
        client: int,
        resident: Resident | None = None,
        which: Which | None = None,
        manner: Manner = PLAIN,
    ) -> None:
        folder, self.config = finished_run(run)
        if self.config.classifies and manner != PLAIN:
            raise UserError(f"{run}: this run classifies; there is nothing to sample, to lengthen or to remember")
        self.resident = resident or load_resident(self.config)
        personal = read_client(folder, client, self.resident.base, which)
        self.placement = personal.placement
        self.encoder = self.resident.encoder(self.config)
        self.state = personal.state
        self.manner, self.said, self._asked = manner, tuple[Turn, ...](), 0
        longest = manner.max_new_tokens or self.config.evaluation.max_new_tokens
        self.evaluation = self.config.evaluation.model_copy(update={"max_new_tokens": longest})

    def base_alone(self) -> Chat:
        """What the base says without this client's adapters: those whose product is zero change nothing."""
        if self.config.classifies:
            raise UserError("a base alone has no head; only clients classify")
        alone = copy(self)
        none = {key: torch.zeros_like(value) for key, value in self.state.tensors.items() if key.factor in (B, W)}
        alone.state = self.state.with_tensors(none)
        return alone

    @property
    def streams(self) -> bool:
        """Whether pieces of an answer are final as they come."""
        return self.manner.sampling is not None or self.evaluation.num_beams == 1

    def ask(self, asked: str | Row, told: Callable[[str], None] | None = None) -> Answer:
        """Answer one instruction, or classify one text, or the image in one file; or the same of a row.

        Args:
            asked: The instruction, text, file or row.
            told: Called with every piece of an answer as it comes, where there are no beams.
        """
        read = self._read(asked)
        model, tokenizer = self.resident.model, self.resident.base.tokenizer
        weights = load_to_answer(model, [self.state], [[read]], self.placement)
        if self.config.classifies:
            ((chances,),) = probabilities(model, [[read]], 1, weights)
            named = dict(zip(self.config.model.labels or (), chances.tolist(), strict=True))
            ordered = dict(sorted(named.items(), key=lambda one: -one[1]))
            return Answer(next(iter(ordered)), self._alpha(read, ""), self.placement.slots, ordered)
        assert isinstance(read, tuple)
        mine, sampling = None if weights is None else weights[0], self.manner.sampling
        if sampling:
            sampling = replace(sampling, seed=derive_seed(sampling.seed, "answer", self._asked))
        streamer = _Streamer(tokenizer, told) if told else None
        (text,) = answer(
            model, tokenizer, [read], [0], self.evaluation, weights=mine, sampling=sampling, streamer=streamer
        )
        self._asked += 1
        if self.manner.turns:
            self.said = (*self.said, ("assistant", text))
        return Answer(text, self._alpha(read, text), self.placement.slots, {})

    def _read(self, asked: str | Row) -> Input:
        if isinstance(self.encoder, ImageEncoder):
            return self.encoder.image(asked if isinstance(asked, Row) else _in_file(asked))
        text = asked.instruction if isinstance(asked, Row) else asked
        if isinstance(self.encoder, TextEncoder):
            return self.encoder.prompt(text)
        assert isinstance(self.encoder, AnswerEncoder)
        if not self.manner.turns:
            return self._fitting(self.encoder.prompt(text))
        self.said = (*self.said, ("user", text))
        prompt = self.encoder.prompt(self.said)
        while len(self.said) > 1 and self._over(prompt):  # the oldest question and its answer are forgotten
            self.said = self.said[2:]
            prompt = self.encoder.prompt(self.said)
        return self._fitting(prompt)

    def _over(self, prompt: Prompt) -> bool:
        limit = positions(self.resident.base.model)
        return bool(limit) and len(prompt) + self.evaluation.max_new_tokens > (limit or 0)

    def _fitting(self, prompt: Prompt) -> Prompt:
        if self._over(prompt):
            limit, longest = positions(self.resident.base.model), self.evaluation.max_new_tokens
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


class _Streamer(TextStreamer):
    """Tells an answer piece by piece, without white space before it."""

    def __init__(self, tokenizer: Any, told: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.next_tokens_are_prompt = False
        self.told, self.begun = told, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Whole words, and what is left at the end."""
        piece = text if self.begun else text.lstrip()
        if piece:
            self.begun = True
            self.told(piece)


def _in_file(path: str) -> Row:
    from fedalt.data.formats.images import FilePicture

    return Row(path, "", image=FilePicture(Path(path)))
