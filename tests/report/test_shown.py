"""Tables and figures show all clients as long as they fit, then the first, the worst and the best."""

from __future__ import annotations

import pytest

from fedalt.report.theme import MOST, caption, groups, shown


def scores(count: int) -> dict[str, float]:
    return {str(client): float((7 * client) % count) for client in range(count)}


@pytest.mark.parametrize("count", [1, MOST])
def test_all_clients_while_they_fit(count: int) -> None:
    assert groups(scores(count)) == {"": list(scores(count))}
    assert shown(scores(count)) == list(scores(count))
    assert caption(scores(count)) == ""


@pytest.mark.parametrize("count", [MOST + 1, 1000])
def test_of_more_the_first_the_worst_and_the_best(count: int) -> None:
    values = scores(count)
    found = groups(values)
    assert list(found) == ["first 8", "worst 6", "best 6"]
    assert found["first 8"] == list("01234567")
    ordered = sorted(values.values())
    assert [values[client] for client in found["worst 6"]] == ordered[:6]
    assert [values[client] for client in found["best 6"]] == ordered[:-7:-1]
    assert shown(values) == sorted({client for group in found.values() for client in group}, key=int)
    assert len(shown(values)) <= MOST
    assert caption(values) == f"first 8, worst 6, best 6 of {count} clients; means are over all"
