"""Who should share and who should not, by the losses on held-out rows that a run has kept."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from fedalt.comparisons.statistics import half_width
from fedalt.model.peft_files import read_folder
from fedalt.names import EVIDENCE, E, Key
from fedalt.runs.client_folder import client_folder, client_ids
from fedalt.runs.folder import RunFolder

WORDS = {
    "alone": "train alone: the shared LoRA answers worse than its own",
    "mixed": "mix: both LoRAs together answer better than {}",
    "together": "share: the shared LoRA answers better than its own",
    "undecided": "undecided: {} rows do not tell the two apart",
}
ABOUT = (
    "nats per answer token on held-out rows, ± half of a 95 % interval over rows; the mix was chosen on these rows, "
    "which flatters it a little"
)


def advice(folder: RunFolder) -> dict[int, dict[str, Any] | None]:
    """What the losses of every client of a finished run say; None of a client without held-out rows."""
    key = Key("", EVIDENCE, E)
    found = {c: read_folder(client_folder(folder, c), (), False).get(key) for c in client_ids(folder)}
    return {c: None if losses is None else advice_of(losses.double().tolist()) for c, losses in found.items()}


def advice_of(losses: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What the losses of the same rows alone, mixed and together say: three means, two gains over alone, and words.

    >>> advice_of([[1.0, 1.2, 1.1, 1.3]] * 2 + [[0.1, 0.2, 0.1, 0.4]])["advice"]
    'together'
    """

    def gain(one: Sequence[float], other: Sequence[float]) -> tuple[float, float | None]:
        differences = [a - b for a, b in zip(one, other, strict=True)]
        return fmean(differences), half_width(differences)

    alone, mixed, together = losses
    sharing, mixing, over_shared = gain(alone, together), gain(alone, mixed), gain(together, mixed)
    signs = [_sign(*one) for one in (mixing, over_shared)]
    if signs == [1, 1] or (_sign(*sharing) == 0 and sorted(signs) == [0, 1]):
        beaten = " and ".join(
            w for w, sign in zip(("its own alone", "the shared one alone"), signs, strict=True) if sign
        )
        verdict, words = "mixed", WORDS["mixed"].format(beaten)
    else:
        verdict = {1: "together", 0: "undecided", -1: "alone"}[_sign(*sharing)]
        words = WORDS[verdict].format(len(alone))
    means = {name: fmean(mine) for name, mine in zip(("alone", "mixed", "together"), losses, strict=True)}
    gains = {
        name: dict(zip(("mean", "ci95"), one, strict=True))
        for name, one in {"sharing": sharing, "mixing": mixing}.items()
    }
    return {"rows": len(alone), **means, **gains, "advice": verdict, "words": words}


def _sign(mean: float, width: float | None) -> int:
    """Whether an interval is above zero, below it, or neither."""
    return 0 if width is None or abs(mean) <= width else 1 if mean > 0 else -1
