"""A client is the site that holds its key: whatever another one signs, repeats or changes does not count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedalt.errors import UserError
from fedalt.flower.certs import PrivateKey, PublicKey, check_site_key, client_keys, make_certs
from fedalt.flower.messages import reply_in, to_node, to_server
from fedalt.flower.requests import Reply, Request
from fedalt.flower.wire import pack, unpack
from fedalt.runs.setup import Bases
from flower.grid import LocalGrid
from flower.rounds import failures, notes, run

pytestmark = pytest.mark.usefixtures("clock")


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "tls"
    make_certs(folder, 3)
    return folder


@pytest.fixture(scope="module")
def private(tls: Path) -> dict[int, PrivateKey]:
    return {client: check_site_key(tls / f"keys/client_{client}") for client in range(3)}


@pytest.fixture(scope="module")
def public(tls: Path) -> dict[int, PublicKey]:
    return client_keys(tls)


def with_keys(keys: dict[int, PrivateKey], then: Callable[[LocalGrid], None] = lambda grid: None) -> Any:
    def arrange(grid: LocalGrid) -> None:
        grid.keys = keys
        then(grid)

    return arrange


def test_sites_with_their_keys_run_as_ever(tmp_path: Path, bases: Bases, private: Any, public: Any) -> None:
    _, events = run(tmp_path, bases, with_keys(private), keys=public, federation__rounds=2)
    assert not list(failures(events)) and not notes(events)


def test_a_site_that_claims_anothers_id_is_refused_in_a_line(
    tmp_path: Path, bases: Bases, private: Any, public: Any
) -> None:
    """Both are there, and the one with the key of client 1 says that it is client 0."""

    def lie(grid: LocalGrid) -> None:
        grid.tamper = lambda client, request, reply: replace(reply, client=0) if client == 1 else reply

    grid, events = run(tmp_path, bases, with_keys(private, lie), keys=public, federation__rounds=2, flower__min_sites=2)
    assert {client for client, request in grid.seen if request.do == "train"} == {0, 2}
    [line] = [text for text in notes(events) if "refused" in text]
    assert line == "node 101 is refused: claims to be client 0, and is not signed with the key of client 0"
    assert {c for _, c, _ in failures(events)} == {1}


@pytest.mark.parametrize("do", ["join", "train", "score", "save"])
def test_an_answer_without_its_signature_does_not_count(
    do: str, tmp_path: Path, bases: Bases, private: Any, public: Any
) -> None:
    def unsigned(grid: LocalGrid) -> None:
        def tamper(client: int, request: Request, reply: Reply) -> Reply:
            grid.keys = {c: key for c, key in private.items() if (c, request.do) != (1, do)}
            return reply

        grid.tamper = tamper

    _, events = run(tmp_path, bases, with_keys(private, unsigned), keys=public, federation__rounds=1)
    assert any(client == 1 and "is not signed with the key of client 1" in line for _, client, line in failures(events))
    assert [e["client"] for e in events if e["event"] == "client"] == ([0, 2] if do in ("join", "train") else [0, 1, 2])


def asked(**changes: Any) -> Message:
    message = to_node(Request(**{"do": "train", "run": "run-1", "round": 2, **changes}), 1)
    message.metadata.__dict__["_message_id"] = "m"
    return message


EARLIER: dict[str, Callable[[Reply], Reply]] = {
    "a replay from an earlier round": lambda reply: replace(reply, round=2),
    "a replay from an earlier run": lambda reply: replace(reply, run="run-1"),
    "an answer to another question": lambda reply: replace(reply, do="train"),
    "another block": lambda reply: replace(reply, block=reply.block[:-1] + b"x"),
    "the same numbers in another dtype": lambda reply: replace(reply, block=pack(unpack(reply.block), "bf16")),
    "no block": lambda reply: replace(reply, block=b""),
    "another client": lambda reply: replace(reply, client=0),
}


@pytest.mark.parametrize("kind", EARLIER)
def test_a_signature_is_over_run_round_client_and_digest(kind: str, private: Any, public: Any) -> None:
    """Whoever changes one of them, and has not the key, has the signature of something else."""
    import torch

    from fedalt.names import INDIVIDUAL, A, Key

    block = pack({Key("m", INDIVIDUAL, A): torch.ones(2, 3)})
    old = Reply("save" if "question" in kind else "train", "run-0", 1, 1, block=block)
    signed = to_server(old, asked(), private[1])
    assert reply_in(signed, public) == old
    changed = to_server(EARLIER[kind](old), asked())
    [header] = changed.content.config_records.values()
    header["signature"] = signed.content.config_records["header"]["signature"]
    with pytest.raises(UserError, match="is not signed with the key"):
        reply_in(changed, public)


@pytest.mark.parametrize("signature", ["", "00", "zz", "ab" * 5000])
def test_what_is_no_signature_is_refused(signature: str, public: Any) -> None:
    changed = to_server(Reply("train", "run-1", 1, 1), asked())
    changed.content.config_records["header"]["signature"] = signature
    with pytest.raises(UserError, match="is not signed with the key of client 1"):
        reply_in(changed, public)


def test_a_client_without_a_key_has_no_say(private: Any, public: Any) -> None:
    with pytest.raises(UserError, match="is not signed with the key of client 7"):
        reply_in(to_server(Reply("train", "run-1", 1, 7), asked(), private[1]), public)


def test_a_site_that_replays_its_own_earlier_upload_is_left_out(
    tmp_path: Path, bases: Bases, private: Any, public: Any
) -> None:
    kept: list[Reply] = []

    def replay(grid: LocalGrid) -> None:
        def tamper(client: int, request: Request, reply: Reply) -> Reply:
            if (client, request.do) == (1, "train"):
                kept.append(reply)
                return kept[0]
            return reply

        grid.tamper = tamper

    _, events = run(tmp_path, bases, with_keys(private, replay), keys=public)
    assert [(n, c) for n, c, _ in failures(events)] == [(2, 1), (3, 1)]
    assert all("answer to train, round 1" in line for _, _, line in failures(events))


def test_a_key_says_in_its_name_whose_it_is(tmp_path: Path) -> None:
    make_certs(tmp_path / "tls", 1)
    (tmp_path / "tls/keys/client_0.pub").rename(tmp_path / "tls/keys/hospital.pub")
    with pytest.raises(UserError, match=r"hospital.pub: call it client_N.pub"):
        client_keys(tmp_path / "tls")
