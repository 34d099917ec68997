"""Beam search's bookkeeping, step by step what Hugging Face's beam search does."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_NEVER = -1e9
"""Score of what must not be chosen, as in Hugging Face's beam search."""


@dataclass
class Beams:
    """Beam search's bookkeeping for p prompts with b beams each, as Hugging Face keeps it (early_stopping False).

    Attributes:
        running: Σ log-probability of every beam that goes on ``[p, b]``.
        scores: Length-normalised score of the best finished answers ``[p, b]``, best first.
        finished: Whether there is such an answer.
        answers: Their tokens ``[p, b, longest]``.
        lengths: Their lengths.
        open: Whether a prompt's finished answers can still get better.
    """

    running: Tensor
    scores: Tensor
    finished: Tensor
    answers: Tensor
    lengths: Tensor
    open: Tensor

    @classmethod
    def start(cls, prompts: int, beams: int, longest: int, device: torch.device) -> Beams:
        """All beams of a prompt are equal at first, so only one of them counts."""
        running = torch.full((prompts, beams), _NEVER, device=device)
        running[:, 0] = 0
        return cls(
            running,
            torch.full((prompts, beams), _NEVER, device=device),
            torch.zeros(prompts, beams, dtype=torch.bool, device=device),
            torch.zeros(prompts, beams, longest, dtype=torch.long, device=device),
            torch.zeros(prompts, beams, dtype=torch.long, device=device),
            torch.ones(prompts, dtype=torch.bool, device=device),
        )

    def step(
        self, scores: Tensor, before: Tensor, length: int, ends: Tensor, penalty: float, *, last: bool
    ) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Take the best continuations of every prompt.

        Args:
            scores: Log-probabilities of the next token ``[p·b, vocab]``.
            before: Tokens of the answers so far ``[p·b, length − 1]``.
            length: Length of the answers with the next token.
            ends: End-of-sequence tokens.
            penalty: Exponent of the length in the score of a finished answer.
            last: Whether every answer ends here.

        Returns:
            The row that each row goes on from, and the token it goes on with.
        """
        p, b = self.running.shape
        vocabulary = scores.shape[-1]
        total = (scores.view(p, b, -1) + self.running[..., None]).view(p, -1)
        top, at = total.topk(max(2, 1 + len(ends)) * b)
        beam, token = at // vocabulary, at % vocabulary
        over = torch.isin(token, ends) | last
        self.running, chosen = (top + over * _NEVER).topk(b)
        self._finish(top, beam, token, over, before.view(p, b, -1), length=length, penalty=penalty)
        worst = torch.where(self.finished, self.scores.min(1, keepdim=True).values, _NEVER)
        self.open = self.open & (self.running[:, :1] / length**penalty > worst).any(1)
        first = torch.arange(p, device=beam.device)[:, None] * b
        return (beam.gather(1, chosen) + first).flatten(), token.gather(1, chosen).flatten()

    def _finish(
        self, top: Tensor, beam: Tensor, token: Tensor, over: Tensor, before: Tensor, *, length: int, penalty: float
    ) -> None:
        b = self.running.shape[1]
        ended = over.clone()
        ended[:, b:] = False  # the others are there so that enough beams go on
        if not ended.any():
            return
        new = top / length**penalty + (~self.open)[:, None] * _NEVER + ~ended * _NEVER
        tokens = self.answers.new_zeros(*top.shape, self.answers.shape[2])
        tokens[:, :, : length - 1] = before.gather(1, beam[..., None].expand(-1, -1, length - 1))
        tokens[:, :, length - 1] = token
        self.scores, best = torch.cat([self.scores, new], 1).topk(b)
        self.finished = torch.cat([self.finished, ended], 1).gather(1, best)
        self.lengths = torch.cat([self.lengths, torch.full_like(top, length, dtype=torch.long)], 1).gather(1, best)
        every = best[..., None].expand(-1, -1, self.answers.shape[2])
        self.answers = torch.cat([self.answers, tokens], 1).gather(1, every)

    def best(self, prompt: int) -> list[int]:
        """The best finished answer."""
        tokens: list[int] = self.answers[prompt, 0, : int(self.lengths[prompt, 0])].tolist()
        return tokens

    def select(self, prompts: Bool[Tensor, " p"]) -> Beams:
        """The beams of some prompts."""
        return Beams(**{field.name: getattr(self, field.name)[prompts] for field in fields(self)})
