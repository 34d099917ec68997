"""Which clients tables and figures show where there are too many for all."""

from __future__ import annotations

from collections.abc import Mapping

MOST = 20
"""Clients that fit."""
_FIRST, _ENDS = 8, 6


def groups(scores: Mapping[str, float], highest: bool = True) -> dict[str, list[str]]:
    """Title → clients: all under no title while they fit, else the first ones, the worst and the best.

    Args:
        scores: Client → score, in the order of clients.
        highest: Whether the highest scores are the best.
    """
    if len(scores) <= MOST:
        return {"": list(scores)}
    ranked = sorted(scores, key=lambda client: scores[client] if highest else -scores[client])
    return {
        f"first {_FIRST}": list(scores)[:_FIRST],
        f"worst {_ENDS}": ranked[:_ENDS],
        f"best {_ENDS}": ranked[: -_ENDS - 1 : -1],
    }


def shown(scores: Mapping[str, float], highest: bool = True) -> list[str]:
    """The clients of all groups, each once, in the order of clients."""
    chosen = {client for group in groups(scores, highest).values() for client in group}
    return [client for client in scores if client in chosen]


def caption(scores: Mapping[str, float]) -> str:
    """What a reader must know when not all are shown; otherwise nothing."""
    titles = groups(scores)
    return "" if "" in titles else f"{', '.join(titles)} of {len(scores)} clients; means are over all"
