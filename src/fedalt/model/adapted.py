"""One frozen base model, resident once, carrying the adapters of whichever clients are on it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from inspect import signature
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedalt.model.batch_layout import BatchContext, BatchLayout, MixerProbe
from fedalt.model.classifier import Summary, class_logits, first_token, pooler_path, summary_of, take_heads
from fedalt.model.fast.branching import agree, branches_exactly, untouched
from fedalt.model.fast.packing import enable_packing, smallest_window
from fedalt.model.fast.patches import enable_trimming, fuse, pack_weights
from fedalt.model.layer import AdaptedLinear, Placement, features
from fedalt.model.offload import device_of, fetch_again, offloads
from fedalt.model.state import ClientState
from fedalt.model.targets import backbone_of, find_targets, is_linear, narrowed
from fedalt.names import Key

_KEPT, _KEPT_BY_KERNELS = 3, 2
"""Times what linear layers put out that a step keeps. Where attention is a kernel for packed rows less is kept: 1.6 to
1.8 times with Llama's 7B shape in bf16 on an H100."""


class AdaptedModel:
    """A frozen model whose target layers hold K clients' adapters, stacked ``[K, …]``.

    Args:
        base: Any Hugging Face causal LM, or a text or image classifier. It is changed in place: its targets are
            wrapped, its parameters frozen, its heads replaced.
        targets: Names of the linear layers to adapt; by architecture when not given.
        gradient_checkpointing: Recompute activations in the backward pass, with the row map of their forward.
        packing: Whether rows may be packed instead of padded, where that is exact for this model.
        heads: Paths of the modules that every client has its own of; a classifier has at least one.
        pooling: Whether heads see what the model's own do, or the mean of all tokens' states, past any pooler.
        layers: Blocks whose targets are adapted; all when not given.
        exclude: Targets that are not.

    Attributes:
        packs: Whether rows are packed.
        unpacked: Why not, where packing was tried.
        window: The fewest tokens that some layer looks back; None without such a limit.
        causal: Whether no token sees what comes after it.
        pads: Whether rows of unlike length may be padded on the right; else each length is read by itself.
        heads: Path → the head of whichever clients are on the model.
        summary: Which token's state stands for a row: the last one's, for encoders the first one's, or the mean of all;
            with "all" a head takes all of an image's.
        sees: Whether it looks at images.
        image_tokens: Tokens that an image becomes.
        trainable: What trains, stacked over clients.
    """

    def __init__(
        self,
        base: Any,
        *,
        targets: Sequence[str] | None = None,
        gradient_checkpointing: bool = False,
        packing: bool = True,
        heads: Sequence[str] = (),
        pooling: Literal["own", "mean"] = "own",
        layers: Sequence[int] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        self.base = base
        self.base.requires_grad_(False)
        self.context = BatchContext()
        self.sees = base.main_input_name == "pixel_values"
        self.summary: Summary | Literal["mean"] = "last"
        self.image_tokens, self._shares = 0, dict[str, float]()
        if heads:
            self.summary, self.image_tokens, self._shares = summary_of(base)
        if pooling == "mean":
            self.summary = "mean"
        self.heads = take_heads(base, heads, self.context)
        self.pooler = self.heads.get(pooler_path(base))
        self.backbone = backbone_of(base)
        if self.pooler is not None and self.summary != "all":
            self.backbone.pooler = None
        paths = narrowed(find_targets(base, targets), layers, exclude)
        self.layers = {path: self._wrap(path, index) for index, path in enumerate(paths)}
        self.clients = 1
        self.trainable: dict[Key, nn.Parameter] = {}
        self._accepted = frozenset(signature(self.backbone.forward).parameters)
        if offloads(base):  # what reads weights past their layer's forward does not find them
            fetch_again(base)
        else:
            pack_weights(base)
            fuse(base)
        packing = packing and not self.sees
        if packing:
            self.context.attention = enable_packing(base, self.context)
            enable_trimming(self.backbone, self.context, self.layers.values())
        if gradient_checkpointing:
            options = {"use_reentrant": False, "context_fn": self.context.checkpoint_contexts}
            name = "activation_checkpointing_enable"  # since transformers 5.23
            getattr(self.base, name, self.base.gradient_checkpointing_enable)(options)
            for module in self.base.modules():
                if getattr(module, "gradient_checkpointing", False):
                    _silence(module)
        self.window = smallest_window(base.config.get_text_config())
        self.unpacked, self.pads, self.causal = "", True, False
        self.first_position = _first_position(self.backbone)
        if not self.sees:
            self._try_ways(packing)
        self.packs = packing and not self.unpacked

    @property
    def head_start(self) -> dict[Key, Tensor]:
        """The heads' own parameters, as they came with the base."""
        return {key: value for head in self.heads.values() for key, value in head.start.items()}

    @property
    def device(self) -> torch.device:
        """Where the base computes, and so every batch lives."""
        return device_of(self.base)

    @torch.no_grad()
    def _try_ways(self, packing: bool) -> None:
        """Try on this very model, before it has adapters, which ways of reading rows are exact.

        Padded or packed rows must give what each gives alone, packed ones must not care what the row between them
        says.
        """
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.base.get_input_embeddings().num_embeddings
        ids, others = (torch.randint(vocabulary, (23,), generator=generator).to(self.device) for _ in range(2))
        for some in (ids, others) if self.first_position else ():
            some[some == self.first_position - 1] += 1  # padding has no place among the positions of a text
        others[:9], others[12:] = ids[:9], ids[12:]
        rows, dtype = BatchLayout((1,), (9, 3, 11)), self.base.dtype
        wanted = torch.tensor([0, 8, 10, 12, 22], device=self.device)
        middle = 2  # of the wanted ones

        def read(ids: Tensor, packed: bool, rows: BatchLayout = rows) -> Tensor:
            states: Tensor = self.hidden(ids, rows, packed=packed).last_hidden_state
            return states

        parts = ids.split(list(rows.lengths))
        alone = torch.cat([read(part, False, BatchLayout((1,), (len(part),))) for part in parts])
        ending = parts[2].clone()
        ending[-1] = (ending[-1] + 1) % vocabulary
        after = read(ending, False, BatchLayout((1,), (11,)))
        self.causal = untouched(after[[0, 9, 10]], alone[[12, 21, 22]], 2, dtype)
        self.pads = agree(read(ids, False), alone, dtype)
        if not packing:
            return
        try:
            packed, changed = (read(these, True)[wanted] for these in (ids, others))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model makes of one long row
            self.unpacked = f"{type(error).__name__}: {error}".strip(": ").split("\n")[0]
            return
        if not untouched(changed, packed, middle, dtype):
            self.unpacked = "its rows see each other when they are packed"
        elif not agree(packed, alone[wanted], dtype):
            self.unpacked = "packed rows give other states than rows alone"

    @cached_property
    def pads_left(self) -> bool:
        """Whether prompts of unlike length may be padded on the left; tried on this very model."""
        parts = [torch.arange(1, 10, device=self.device), torch.arange(11, 14, device=self.device)]
        with torch.no_grad():
            alone = [self.hidden(part, self._rows(1, len(part)), packed=False).last_hidden_state[-1] for part in parts]
            mask = torch.ones(2, 9, dtype=torch.long, device=self.device)
            mask[1, :6] = 0
            ids = torch.stack([parts[0], torch.cat([parts[0][:6], parts[1]])])
            named = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            with self.rows(self._rows(2, 9)):
                out = self.backbone(**{k: v for k, v in named.items() if k in self._accepted}, use_cache=False)
        return agree(out.last_hidden_state[:, -1], torch.stack(alone), self.base.dtype)

    @cached_property
    def caches(self) -> bool:
        """Whether ``generate`` gives a batch the same with what it keeps of earlier tokens as without."""
        ids = torch.arange(1, 19, device=self.device).view(2, 9)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        options |= {"num_return_sequences": 1}
        with self.rows(self._rows(2, 9)):
            kept, read = (self.base.generate(ids, **options, use_cache=cached) for cached in (True, False))
        return torch.equal(kept, read)

    def _rows(self, count: int, length: int) -> BatchLayout:
        """Rows of the first client on the model."""
        return BatchLayout((count, *(0,) * (self.clients - 1)), (length,) * count)

    def branches(self, slots: int) -> bool:
        """Whether several next tokens of a text can be read in one row of so many slots; no window may end in it."""
        return (self.window is None or slots <= self.window) and self._branches

    @cached_property
    def _branches(self) -> bool:
        return branches_exactly(self.base, self.context, self.clients)  # tried on this very model

    @property
    def bytes_per_token(self) -> int:
        """About what a training step keeps of every token, in terms of what all linear layers put out."""
        linear = [
            features(module)[1] * self._shares.get(path.removesuffix(".base_layer"), 1)
            for path, module in self.backbone.named_modules()
            if is_linear(module)
        ]
        kernels = self.packs and self.device.type == "cuda" and self.base.dtype in (torch.bfloat16, torch.float16)
        return int((_KEPT_BY_KERNELS if kernels else _KEPT) * sum(linear) * self.base.dtype.itemsize)

    @property
    def layer_sizes(self) -> dict[str, tuple[int, int]]:
        """Module path → (d_in, d_out) of every adapted layer."""
        return {path: (layer.in_features, layer.out_features) for path, layer in self.layers.items()}

    def load(self, states: Sequence[ClientState], placement: Placement, trainable: Sequence[Key] = ()) -> None:
        """Put a cohort's adapters on the base, stacked in the order of ``states``.

        The tensors are copies: training changes the model, never the states.
        """
        self.trainable, self.clients = {}, len(states)
        for path, layer in self.layers.items():
            keys = [key for key in states[0].tensors if key.module == path and placement.holds(key)]
            stacked = {key: torch.stack([state.tensors[key] for state in states]).to(self.device) for key in keys}
            mine = [key for key in keys if key in trainable]
            layer.place(placement, stacked, mine)
            self.trainable |= {key: layer.get_parameter(f"{key.slot}_{key.factor}") for key in mine}
        for head in self.heads.values():
            stacked = {key: torch.stack([state.heads[key] for state in states]).to(self.device) for key in head.start}
            mine = [key for key in head.start if key in trainable]
            head.place(stacked, mine)
            self.trainable |= {key: head.parameter(key) for key in mine}

    def unstack(self) -> list[dict[Key, Tensor]]:
        """The trainable tensors of every client on the base, back on the CPU."""
        stacked = {key: parameter.detach().cpu() for key, parameter in self.trainable.items()}
        count = len(next(iter(stacked.values()))) if stacked else 0
        return [{key: value[k].clone() for key, value in stacked.items()} for k in range(count)]

    def clear(self) -> None:
        """Take all adapters off: the base answers alone."""
        self.trainable = {}
        for layer in self.layers.values():
            layer.clear()
        for head in self.heads.values():
            head.clear()

    def train(self, mode: bool = True) -> None:
        """Switch adapter dropout and checkpointing on or off. The frozen base always runs in eval mode.

        Its own dropout would draw from a stream that everybody in the batch shares; only the flag that Hugging Face's
        checkpointing asks for is set, on the modules that ask, and those modules' own dropout is taken out.
        """
        self.base.eval()
        for module in self.base.modules():
            if isinstance(module, AdaptedLinear) or getattr(module, "gradient_checkpointing", False):
                module.training = mode

    def rows(self, rows: BatchLayout, probe: MixerProbe | None = None) -> AbstractContextManager[None]:
        """Say which client each row of the enclosed forward passes belongs to."""
        return self.context.rows(rows, probe)

    def hidden(
        self,
        inputs: Int[Tensor, " t"] | Float[Tensor, "n c h w"],
        rows: BatchLayout,
        wanted: Int[Tensor, " s"] | None = None,
        probe: MixerProbe | None = None,
        packed: bool | None = None,
    ) -> Any:
        """Read rows without generating: the backbone's own output, with final hidden states ``[s, d]``.

        ``inputs`` are the tokens of all rows, one after another, or images; ``wanted`` the positions among these tokens
        whose states are asked for; ``probe`` collects mixer weights ``[t, m]``. Rows are packed or padded as is exact
        for this model, unless ``packed`` says.
        """
        if packed is None:  # packed attention does not know a window that lives in a mask alone
            window = self.window
            packed = self.packs and (window is None or window in self.context.windows or max(rows.lengths) <= window)
        if not packed and not self.pads and len(set(rows.lengths)) > 1:
            return self._by_length(inputs, rows, wanted, probe)
        rows = replace(rows, packed=packed, wanted=wanted if packed else None)
        named = {"pixel_values": inputs} if self.sees else _padded(inputs, rows)
        if packed:
            named = _packed(inputs, rows, self.first_position)
        options = {} if self.sees else {"use_cache": False}
        with self.rows(rows, probe):
            out = self.backbone(**{name: value for name, value in named.items() if name in self._accepted}, **options)
        places = rows.places(out.last_hidden_state.shape[:2].numel()).to(inputs.device)
        if probe:
            probe.weights = {path: alpha[places] for path, alpha in probe.weights.items()}
        out.last_hidden_state = out.last_hidden_state.flatten(0, 1)[places if wanted is None else places[wanted]]
        return out

    def _by_length(
        self, ids: Int[Tensor, " t"], rows: BatchLayout, wanted: Int[Tensor, " s"] | None, probe: MixerProbe | None
    ) -> Any:
        """``hidden`` for a model whose states depend on padding."""
        outs, places, weights = [], [], []
        for here, part in rows.by_length():
            places.append(here.to(ids.device))
            outs.append(self.hidden(ids[places[-1]], part, probe=probe, packed=False))
            weights.append(dict(probe.weights) if probe else {})
        back = torch.cat(places).argsort()
        if probe:
            probe.weights = {path: torch.cat([of[path] for of in weights])[back] for path in weights[0]}
        states = torch.cat([out.last_hidden_state for out in outs])[back]
        outs[0].last_hidden_state = states if wanted is None else states[wanted]
        return outs[0]

    def class_scores(
        self,
        inputs: Int[Tensor, " t"] | Float[Tensor, "n c h w"],
        rows: BatchLayout,
        probe: MixerProbe | None = None,
    ) -> Float[Tensor, "n classes"]:
        """Class logits of each sequence under its client's adapters and head."""
        if self.summary == "all":
            with self.rows(rows, probe):
                scores: Tensor = self.base(pixel_values=inputs).logits
            return scores
        out = self.summaries(inputs, rows, probe)
        pooler = first_token if self.summary == "mean" else self.pooler
        with self.rows(BatchLayout(rows.sizes)):
            return class_logits(self.base, out, out.last_hidden_state, pooler)

    def summaries(
        self,
        inputs: Int[Tensor, " t"] | Float[Tensor, "n c h w"],
        rows: BatchLayout,
        probe: MixerProbe | None = None,
    ) -> Any:
        """As ``hidden``, with the one state ``[n, d]`` that stands for each row."""
        if self.summary == "first" or self.summary == "last":  # noqa: PLR1714 - read by mypy
            return self.hidden(inputs, rows, rows.summaries(self.summary).to(inputs.device), probe)
        out = self.hidden(inputs, rows, probe=probe)
        lengths = torch.tensor(rows.lengths, device=inputs.device)
        row = torch.arange(len(lengths), device=inputs.device).repeat_interleave(lengths)  # [t]
        states = out.last_hidden_state
        total = states.new_zeros(len(lengths), states.shape[1]).index_add(0, row, states)
        out.last_hidden_state = total / lengths[:, None]
        return out

    def _wrap(self, path: str, index: int) -> AdaptedLinear:
        layer = AdaptedLinear(self.base.get_submodule(path), path, index, self.context)
        self.base.set_submodule(path, layer)
        return layer


def _first_position(backbone: nn.Module) -> int:
    """The position of a row's first token: 0, but past the padding's own position in RoBERTa and its kin."""
    tables = (module for name, module in backbone.named_modules() if name.endswith("position_embeddings"))
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    return 0 if padding is None else int(padding) + 1


def _packed(ids: Tensor, rows: BatchLayout, first: int = 0) -> dict[str, Tensor]:
    """One long row; positions count anew in each of the rows."""
    positions = torch.cat([torch.arange(first, first + length) for length in rows.lengths]).to(ids.device)
    return {"input_ids": ids[None], "position_ids": positions[None]}


def _padded(ids: Tensor, rows: BatchLayout) -> dict[str, Tensor]:
    """A row each, padded on the right under an attention mask."""
    parts = ids.split(list(rows.lengths))
    mask = [torch.ones_like(part) for part in parts]
    return {"input_ids": pad_sequence(parts, True), "attention_mask": pad_sequence(mask, True)}


def _silence(module: nn.Module) -> None:
    """Set a module's dropout probabilities (``dropout``, ``hidden_dropout``, ``layerdrop``, …) to 0."""
    for name, value in vars(module).items():
        if "drop" in name and isinstance(value, float):
            setattr(module, name, 0.0)
