"""Greedy and beam search in which finished rows leave the batch, token for token what `generate` gives.

`generate` keeps every row until the last one has finished, reads every prompt once per beam, and makes its cache anew
for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, EosTokenCriteria, MaxLengthCriteria
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from fedalt.model.fast.branching import additive


class AnswerLayer(DynamicLayer):
    """One layer's keys and values ``[rows, heads, tokens, width]``, written in place.

    Hugging Face's own layer makes the whole cache anew for every token, and again for every choice of beams. Prompts
    are read some rows at a time: ``rows`` says which, and their tokens end where all prompts end.

    Args:
        rows: Number of prompts.
        prompt: Tokens of the longest prompt.
        room: Tokens of the longest answer.
    """

    def __init__(self, rows: int, prompt: int, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.prompt = (rows, prompt + room), prompt
        self.rows: list[int] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add tokens; returns all keys and values of the rows that are being read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, tokens = self.shape
            self._keys, self._values = (
                states.new_zeros(rows, states.shape[1], tokens, states.shape[3])
                for states in (key_states, value_states)
            )
        if self.rows is not None:
            first = self.prompt - key_states.shape[2]
            self._keys[self.rows, :, first : self.prompt] = key_states
            self._values[self.rows, :, first : self.prompt] = value_states
            return key_states, value_states
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self._look(end)
        return self.keys, self.values

    def close(self) -> None:
        """All prompts have been read; answers follow."""
        self.rows = None
        self._look(self.prompt)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Go on from other beams of the same prompts, whose prompts' keys and values are equal."""
        moved = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero()[:, 0]
        for buffer in (self._keys, self._values):
            answers = buffer[:, :, self.prompt : self.get_seq_length()]
            answers[moved] = answers[beam_idx[moved]]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times, for beams."""
        rows = torch.arange(len(self._keys), device=self._keys.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        length = self.get_seq_length()
        self._keys, self._values = self._keys[indices], self._values[indices]
        self._look(length)

    def _look(self, length: int) -> None:
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]


def answer_cache(cache: Any, rows: int, prompt: int, room: int) -> DynamicCache | None:
    """An empty cache with room for answers, like the one a model asks for; nothing if that one is no ordinary one."""
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    mine = DynamicCache()
    mine.layers = [AnswerLayer(rows, prompt, room) for _ in cache.layers]
    return mine if cache.layers else None


_TOKENS = 2_048
"""Tokens of prompts that are read at a time."""

Owners = Callable[[Sequence[int], Tensor | None], AbstractContextManager[None]]
"""Tells the adapted layers which prompts, by index, the rows of the enclosed forward passes belong to, and at which
positions, the same in each row, a state is wanted (nothing: at all)."""


class Batch:
    """Prompts and their answers so far; beams, if any, have a row each.

    Args:
        owners: Tells the adapters whose rows they see.

    Attributes:
        prompts: Which prompts are still in it.
        answers: Their tokens so far, all beams of a prompt one after another.
    """

    def __init__(
        self, model: Any, owners: Owners, ids: Int[Tensor, "n t"], mask: Int[Tensor, "n t"], cache: DynamicCache
    ) -> None:
        self.model, self.owners, self.ids, self.mask, self.cache = model, owners, ids, mask, cache
        self.prompts = list(range(len(ids)))
        self.answers: Int[Tensor, "n t"] = ids[:, :0]
        self._known = signature(model.forward).parameters
        self._cached = "cache" if "cache" in self._known else "past_key_values"  # before transformers 5.24

    def read_prompts(self) -> Float[Tensor, "n vocab"]:
        """Read the prompts, those of like length together, without shared padding; scores of the next token."""
        layers: Any = self.cache.layers
        lengths, parts = self.mask.sum(1).tolist(), []
        for rows in _alike(lengths):
            width = max(lengths[row] for row in rows)
            for layer in layers:
                layer.rows = rows
            ids, mask = self.ids[rows, -width:], self.mask[rows, -width:]
            last = torch.tensor([width - 1], device=ids.device)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            parts.append((rows, self._read(ids, mask, positions, [self.prompts[row] for row in rows], wanted=last)))
        for layer in layers:
            layer.close()
        scores = parts[0][1].new_empty(len(self.ids), parts[0][1].shape[1])
        for rows, some in parts:
            scores[rows] = some
        return scores

    def _read(
        self,
        tokens: Int[Tensor, "n t"],
        mask: Tensor,
        positions: Int[Tensor, "n t"],
        prompts: Sequence[int],
        *,
        wanted: Tensor | None = None,
        last: int = 1,
    ) -> Float[Tensor, "s vocab"]:
        """Scores after the last tokens of every row."""
        optional = {"position_ids": positions, "logits_to_keep": last}
        extra = {name: value for name, value in optional.items() if name in self._known} | {self._cached: self.cache}
        with self.owners(prompts, wanted):
            out = self.model(input_ids=tokens, attention_mask=mask, use_cache=True, **extra)
        scores: Tensor = out.logits[:, -last:].flatten(0, 1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def grow(self, beams: int) -> None:
        """So many beams for every prompt from here on."""
        self.answers = self.answers.repeat_interleave(beams, 0)
        self._grow(beams)

    def add(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n vocab"]:
        """Add one token to every answer; scores of the next one."""
        self.answers = torch.cat([self.answers, tokens[:, None]], 1)
        return self._add(tokens)

    def keep(self, prompts: Bool[Tensor, " p"]) -> None:
        """Let go of all other prompts."""
        rows = prompts.repeat_interleave(len(self.answers) // len(prompts))
        self.answers = self.answers[rows]
        self._keep(prompts, rows)
        self.prompts = [prompt for prompt, stays in zip(self.prompts, prompts.tolist(), strict=True) if stays]

    def reorder(self, source: Int[Tensor, " n"]) -> None:
        """Go on from other beams of the same prompts."""
        self.answers = self.answers[source]
        self._reorder(source)

    def _grow(self, beams: int) -> None:
        self.cache.batch_repeat_interleave(beams)
        self.mask = self.mask.repeat_interleave(beams, 0)

    def _add(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n vocab"]:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return self._read(tokens[:, None], self.mask, self.mask.sum(1, keepdim=True) - 1, self.prompts)

    def _keep(self, prompts: Bool[Tensor, " p"], rows: Bool[Tensor, " n"]) -> None:
        self.cache.batch_select_indices(rows.nonzero()[:, 0])
        self.mask = self.mask[rows]

    def _reorder(self, source: Int[Tensor, " n"]) -> None:
        self.cache.reorder_cache(source)  # type: ignore[arg-type]


class Branched(Batch):
    """Beams of a prompt are branches of one row: nothing is kept twice, and nothing moves when beams change."""

    def _grow(self, beams: int) -> None:
        self._seen = self.mask.bool().repeat_interleave(beams, 0)

    def _add(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n vocab"]:
        rows = len(self.prompts)
        beams = len(tokens) // rows
        itself = torch.eye(beams, dtype=torch.bool, device=tokens.device).repeat(rows, 1)
        self._seen = torch.cat([self._seen, itself], 1)
        seen = self._seen.view(rows, beams, -1)
        mask = additive(seen, self.model.dtype)
        return self._read(tokens.view(rows, beams), mask, seen.sum(2) - 1, self.prompts, last=beams)

    def _keep(self, prompts: Bool[Tensor, " p"], rows: Bool[Tensor, " n"]) -> None:
        self.cache.batch_select_indices(prompts.nonzero()[:, 0])
        self._seen = self._seen[rows]

    def _reorder(self, source: Int[Tensor, " n"]) -> None:
        self._seen = self._seen[source]


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of like length, longest first, in parts of ``_TOKENS`` with their padding; a part keeps the rows' order."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while order:
        fit = max(1, _TOKENS // max(1, lengths[order[0]]))
        yield sorted(order[:fit])
        order = order[fit:]


_LEAVE = 0.2
"""Finished rows leave together, when they are at least this share of the batch; leaving copies the cache."""


class Unsupported(Exception):  # noqa: N818 - a finding, not an error
    """The model or its generation settings need something this search does not do."""


class Search:
    """A decoding loop for ``model.generate(custom_generate=...)``, which prepares everything and calls it.

    Args:
        owners: Tells the adapters whose rows they see.
        beams: 1 for greedy search.
        longest: Most new tokens.
        branched: Whether beams, more than one, share a row; that must be exact for this model.
        streamer: Gets the tokens of a single prompt as greedy search finds them.
    """

    def __init__(
        self, owners: Owners, beams: int, longest: int, branched: bool, streamer: BaseStreamer | None = None
    ) -> None:
        self.streamer = streamer
        self.owners, self.beams, self.longest, self.branched = owners, beams, longest, branched

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        """New tokens of every prompt, the end-of-sequence token included.

        Raises:
            Unsupported: No ordinary cache, or scores that are changed, or a rule for stopping that is not the default.
        """
        rows, prompt = input_ids.shape
        room = self.longest * self.beams if self.branched else self.longest
        given = kwargs.get("cache", kwargs.get("past_key_values"))  # the second before transformers 5.24
        cache = answer_cache(given, rows, prompt, room)
        usual = all(isinstance(rule, MaxLengthCriteria | EosTokenCriteria) for rule in stopping_criteria)
        taken = {"cache", "past_key_values"} & signature(model.forward).parameters.keys()  # else it is swallowed unread
        if (
            cache is None
            or not taken
            or not usual
            or len(logits_processor)
            or generation_config.early_stopping is not False
        ):
            raise Unsupported
        self.ends = generation_config._eos_token_tensor
        self.penalty = generation_config.length_penalty
        mask = kwargs.get("attention_mask")  # nothing when no prompt is padded
        mask = torch.ones_like(input_ids) if mask is None else mask
        batch = (Branched if self.branched else Batch)(model, self.owners, input_ids, mask, cache)
        return self._greedy(batch) if self.beams == 1 else self._beams(batch)

    def _greedy(self, batch: Batch) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in batch.prompts]
        going = torch.ones(len(answers), dtype=torch.bool, device=batch.mask.device)
        scores = batch.read_prompts()
        while True:
            tokens = scores.argmax(-1)
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            for prompt, token, goes in zip(batch.prompts, tokens.tolist(), going.tolist(), strict=True):
                if goes:
                    answers[prompt].append(token)
            going = going & ~torch.isin(tokens, self.ends)
            if not going.any() or max(map(len, answers)) == self.longest:
                if self.streamer is not None:
                    self.streamer.end()
                return answers
            if (~going).float().mean() >= _LEAVE:
                batch.keep(going)
                tokens, going = tokens[going], going[going]
            scores = batch.add(tokens)

    def _beams(self, batch: Batch) -> list[list[int]]:
        best: list[list[int]] = [[] for _ in batch.prompts]
        beams = Beams.start(len(best), self.beams, self.longest, batch.mask.device)
        scores = batch.read_prompts().repeat_interleave(self.beams, 0)
        batch.grow(self.beams)
        for length in range(1, self.longest + 1):
            last = length == self.longest
            source, tokens = beams.step(
                torch.log_softmax(scores, -1), batch.answers, length, self.ends, self.penalty, last=last
            )
            over = ~beams.open | last
            if over.all() or over.float().mean() >= _LEAVE:
                for at in over.nonzero()[:, 0].tolist():
                    best[batch.prompts[at]] = beams.best(at)
                if over.all():
                    break
                rows = (~over).repeat_interleave(self.beams)
                batch.reorder(source)
                batch.keep(~over)
                beams, tokens = beams.select(~over), tokens[rows]
            else:
                batch.reorder(source)
            scores = batch.add(tokens)
        return best


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
