"""``fedalt advise``: who should share and who should not, by the losses on held-out rows that a run has kept."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.table import Table

from fedalt.cli import show
from fedalt.cli.out import RunPath
from fedalt.cli.show import Json, print_json, say
from fedalt.errors import UserError

_WORDS = {
    "alone": "train alone: the shared LoRA answers worse than its own",
    "mixed": "mix: both LoRAs together answer better than {}",
    "together": "share: the shared LoRA answers better than its own",
    "undecided": "undecided: {} rows do not tell the two apart",
}
_ABOUT = (
    "nats per answer token on held-out rows, ± half of a 95 % interval over rows; the mix was chosen on these rows, "
    "which flatters it a little"
)


def advise(
    run: RunPath,
    as_json: Json = False,
) -> None:
    """Say in plain words, client by client: train alone, mix, or share."""
    from fedalt.model.peft_files import read_folder
    from fedalt.names import EVIDENCE, E, Key
    from fedalt.runs.client_folder import client_folder, client_ids
    from fedalt.runs.folder import finished_run

    folder, config = finished_run(run)
    found = {c: read_folder(client_folder(folder, c), (), False).get(Key("", EVIDENCE, E)) for c in client_ids(folder)}
    if not any(losses is not None for losses in found.values()):
        raise UserError(
            f"{run}: {config.method} keeps no losses on held-out rows; select, fedalt_calibrated and fedalt_joint do"
        )
    advice = {client: advice_of(losses.double().tolist()) for client, losses in found.items() if losses is not None}
    if as_json:
        print_json({"run": str(run), "method": config.method, "clients": advice})
        return
    table = Table(title=f"{run}: who should share", title_justify="left")
    for name in ("client", "rows", "alone", "mixed", "together", "gain of sharing", "gain of mixing", "advice"):
        table.add_column(name, justify="left" if name == "advice" else "right")
    for client, one in advice.items():
        numbers = (f"{one[name]:.3f}" for name in ("alone", "mixed", "together"))
        gains = (_gain(one[name]) for name in ("sharing", "mixing"))
        table.add_row(str(client), str(one["rows"]), *numbers, *gains, one["words"])
    show.out.print(table)
    for verdict in _WORDS:
        who = [str(client) for client, one in advice.items() if one["advice"] == verdict]
        if who:
            say(f"{verdict:<10} {len(who)} of {len(advice)} clients: {', '.join(who)}")
    for client in found.keys() - advice.keys():
        say(f"client {client} has no held-out rows")
    say(_ABOUT)


def advice_of(losses: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What the losses of the same rows alone, mixed and together say: three means, two gains over alone, and words.

    >>> advice_of([[1.0, 1.2, 1.1, 1.3]] * 2 + [[0.1, 0.2, 0.1, 0.4]])["advice"]
    'together'
    """
    from fedalt.comparisons.statistics import half_width

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
        verdict, words = "mixed", _WORDS["mixed"].format(beaten)
    else:
        verdict = {1: "together", 0: "undecided", -1: "alone"}[_sign(*sharing)]
        words = _WORDS[verdict].format(len(alone))
    means = {name: fmean(mine) for name, mine in zip(("alone", "mixed", "together"), losses, strict=True)}
    gains = {
        name: dict(zip(("mean", "ci95"), one, strict=True))
        for name, one in {"sharing": sharing, "mixing": mixing}.items()
    }
    return {"rows": len(alone), **means, **gains, "advice": verdict, "words": words}


def _sign(mean: float, width: float | None) -> int:
    """Whether an interval is above zero, below it, or neither."""
    return 0 if width is None or abs(mean) <= width else 1 if mean > 0 else -1


def _gain(gain: dict[str, float | None]) -> str:
    width = gain["ci95"]
    return f"{gain['mean']:+.3f}" + (f" ± {width:.3f}" if width is not None else "")
