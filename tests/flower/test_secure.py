"""A secure sum: the numbers of one machine, no single upload at the server, and drop-outs at every step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import micro
from fedalt.config import parse_config
from fedalt.errors import UserError
from fedalt.federation.fixed import LIMIT, STEPS, codes, mean_by_codes, on_grid
from fedalt.flower.certs import check_site_key, client_keys, keys_in, make_certs
from fedalt.flower.consent import Consent
from fedalt.flower.masks import Session, Sums, Total, check_offers, ring
from fedalt.flower.requests import Offer, Opened, Reply, Request
from fedalt.flower.server_app import serve
from fedalt.methods.registry import build, configured
from fedalt.model.state import load_tensors
from fedalt.names import A, B, Key
from fedalt.runs.folder import RunFolder
from fedalt.runs.setup import Bases
from flower.grid import LocalGrid
from flower.wired import wired

pytestmark = pytest.mark.usefixtures("clock")
SITES = 5
SECURE: dict[str, Any] = {
    "data__source": str(micro.shared_data(clients=SITES)),
    "data__clients": SITES,
    "federation__secure": True,
    "training__local_epochs": 1,
    "evaluation__every": 3,
    "evaluation__max_new_tokens": 2,
    "federation__rounds": 3,
}


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


def far(
    out: Path, bases: Bases, arrange: Callable[[LocalGrid], None] = lambda grid: None, **changes: Any
) -> tuple[LocalGrid, list[dict[str, Any]]]:
    """A run across five sites, secure unless said otherwise; its events."""
    values = micro.settings(out, **{**SECURE, "flower__round_deadline": 60, **changes})
    grid = LocalGrid(out.with_name(f"{out.name}-sites"), range(SITES), bases)
    arrange(grid)
    seen: list[dict[str, Any]] = []
    serve(grid, parse_config(values, "s").model_dump(mode="json"), "ask", seen.append)  # type: ignore[arg-type]
    return grid, seen


def near(out: Path, **changes: Any) -> Path:
    micro.run_here(micro.settings(out, **{**SECURE, "federation__executor": "loop", **changes}))
    return out


def notes(events: list[dict[str, Any]], word: str) -> list[str]:
    return [event["text"] for event in events if event["event"] == "note" and word in event["text"]]


def sums(grid: LocalGrid, out: Path) -> Iterator[tuple[int, dict[Key, torch.Tensor]]]:
    for path in sorted(out.glob("checkpoints/round_*/sum.safetensors")):
        yield int(path.parent.name.removeprefix("round_")), load_tensors(path)


# ------------------------------------------------------------------------------------------------------ fixed point


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40))
def test_numbers_go_to_the_grid_and_stay_there(values: list[float]) -> None:
    x = {Key("m", "individual", A): torch.tensor([values], dtype=torch.float32)}
    [on], cut = (list(part.values()) if isinstance(part, dict) else part for part in on_grid(x))
    inside = x[Key("m", "individual", A)].clamp(-LIMIT, LIMIT)
    assert (on - inside).abs().max() <= 0.5 / STEPS
    assert cut == sum(abs(value) > LIMIT for value in values)
    again, none = on_grid({Key("m", "individual", A): on})
    assert torch.equal(again[Key("m", "individual", A)], on) and none == 0
    assert torch.equal(codes(again).double() / STEPS, on.double().flatten())


def test_the_narrowest_ring_that_no_sum_overflows() -> None:
    for weight in (1, 63, 64, 10**6):
        assert np.iinfo(ring(weight).str.replace("u", "i")).max >= LIMIT * STEPS * weight
    assert ring(63).itemsize == 4 and ring(64).itemsize == 8
    with pytest.raises(UserError, match="too many"):
        ring(10**13)


# ------------------------------------------------------------------------------------------------------------ masks


def asked(attempt: int = 1, round_: int = 1, offers: tuple[Offer, ...] = ()) -> Request:
    return Request("mask", "run-1", round=round_, attempt=attempt, offers=offers)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "tls"
    make_certs(folder, SITES)
    return folder


@pytest.fixture
def parts(tmp_path: Path, tls: Path) -> dict[int, Sums]:
    def one(client: int) -> Sums:
        key = tls / f"keys/client_{client}"
        folder = RunFolder(tmp_path / str(client))
        folder.path.mkdir()
        return Sums(client, folder, 3, check_site_key(key), keys_in(key.parent))

    return {client: one(client) for client in range(SITES)}


@pytest.mark.parametrize("weights", [(1, 1, 1, 1, 1), (100, 7, 3, 90, 1)])
def test_masks_vanish_in_the_sum_and_nowhere_else(parts: dict[int, Sums], weights: tuple[int, ...]) -> None:
    shapes = {Key("m", "individual", A): (2, 300), Key("m", "individual", B): (5, 2)}
    made = torch.Generator().manual_seed(0)
    uploads = [on_grid({k: torch.randn(s, generator=made) for k, s in shapes.items()})[0] for _ in parts]
    offers = tuple(part.offer(asked(), weights[client]) for client, part in parts.items())
    total = Total(offers, 610)
    blocks = {c: part.mask(asked(offers=offers), codes(uploads[c])) for c, part in parts.items()}
    for client, block in blocks.items():
        total.add(block)
        plain = (codes(uploads[client]) * weights[client]).numpy().astype(ring(sum(weights)))
        alike = (np.frombuffer(block, plain.dtype) == plain).mean()
        assert alike < 0.02
    seeds = {client: part.open(asked(offers=offers)) for client, part in parts.items()}
    mean = mean_by_codes(total.opened(seeds), total.weight, shapes)
    for key, value in mean.items():
        plain_mean = sum(w * u[key].double() for w, u in zip(weights, uploads, strict=True)) / sum(weights)
        assert torch.equal(value, plain_mean.float())


def test_one_seed_short_the_sum_is_noise(parts: dict[int, Sums]) -> None:
    offers = tuple(part.offer(asked(), 1) for part in parts.values())
    total, vector = Total(offers, 1000), torch.zeros(1000, dtype=torch.int64)
    for part in parts.values():
        total.add(part.mask(asked(offers=offers), vector))
    seeds = {client: part.open(asked(offers=offers)) for client, part in parts.items() if client}
    assert total.opened(seeds).abs().double().mean() > 2**28


def test_a_site_masks_for_known_sites_alone_and_opens_for_one_set(parts: dict[int, Sums]) -> None:
    offers = tuple(part.offer(asked(), 1) for part in parts.values())
    vector, site = torch.zeros(4, dtype=torch.int64), parts[0]
    forged = Session.begin(asked(), 4, 1, None).offer
    for wrong, why in (
        (offers[:2], "3 are the fewest"),
        (offers[1:], "without this site's own"),
        ((offers[0], *offers), "twice"),
        ((*offers[:4], forged), "client 4 is not signed"),
        ((*offers[:4], replace(offers[4], weight=9)), "client 4 is not signed"),
        ((*offers[:4], replace(offers[3], client=4)), "client 4 is not signed"),
        ((*offers, replace(offers[4], client=5)), "client 5 is not signed"),
    ):
        with pytest.raises(UserError, match=why):
            site.mask(asked(offers=wrong), vector)
    with pytest.raises(UserError, match="not to be opened"):
        site.open(asked())
    site.mask(asked(offers=offers), vector)
    with pytest.raises(UserError, match="other clients than before"):
        site.mask(asked(offers=offers[:4]), vector)
    seed = site.open(asked())
    assert site.open(asked()) == seed, "a question that is repeated has the same answer"
    fewer = tuple(parts[client].offer(asked(2), 1) for client in range(4))
    with pytest.raises(UserError, match=r"was opened for clients \[0, 1, 2, 3, 4\]"):
        site.mask(asked(2, offers=fewer), vector)
    with pytest.raises(UserError, match="did not begin here"):
        site.open(asked(1))


def test_offers_are_of_their_attempt(parts: dict[int, Sums], tls: Path) -> None:
    early = tuple(part.offer(asked(1), 1) for part in parts.values())
    own = parts[0].offer(asked(2), 1)
    with pytest.raises(UserError, match="not signed"):
        check_offers(asked(2, offers=(own, *early[1:])), own, client_keys(tls), 3)


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("method", ["fedalt", "fedit", "ffa_lora", "fedsa_lora"])
def test_sites_and_one_machine_have_the_same_models(method: str, tmp_path: Path, bases: Bases) -> None:
    changes = {"method": method, "federation__weighting": "samples"} if method != "fedalt" else {"method": method}
    grid, events = far(tmp_path / "far", bases, **changes)
    here = near(tmp_path / "near", **changes)
    for client in grid.sites:
        [run] = [path for path in (grid.folder / str(client)).iterdir() if path.is_dir()]
        assert micro.tree(run / "clients" / str(client)) == micro.tree(here / "clients" / str(client))
    assert not notes(events, "sum") and not [e for e in events if e["event"] == "client_failed"]


def test_a_secure_run_is_the_plain_one_to_a_step_of_the_grid(tmp_path: Path) -> None:
    secure, plain = near(tmp_path / "secure"), near(tmp_path / "plain", federation__secure=False)
    assert 0 < micro.farthest(secure, plain) < 1e-3


def encodings(upload: dict[Key, torch.Tensor]) -> Iterator[bytes]:
    """Every tensor of an upload as it could be seen: fp32, fp64, bf16, int8 by rows, fixed point of both widths."""
    for value in upload.values():
        fixed, scale = codes({Key("m", "s", A): value}).numpy(), value.abs().amax(1, keepdim=True) / 127
        yield value.numpy().tobytes()
        yield value.double().numpy().tobytes()
        yield value.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
        yield (value / scale.clamp(min=1e-30)).round().to(torch.int8).numpy().tobytes()
        yield fixed.astype("<u4").tobytes()
        yield fixed.astype("<u8").tobytes()


@pytest.mark.parametrize("secure", [True, False])
def test_no_single_upload_is_in_any_byte_that_reaches_the_server(secure: bool, tmp_path: Path, bases: Bases) -> None:
    grid, _ = far(tmp_path / "far", bases, federation__secure=secure, federation__rounds=2)
    came = b"".join(wired(answer) for _, _, answer in grid.messages)
    kept = b"".join(path.read_bytes() for path in (tmp_path / "far").rglob("*") if path.is_file())
    found = 0
    for client in grid.sites:
        for path in grid.folder.joinpath(str(client)).glob("*/checkpoints/round_*/reply.safetensors"):
            upload = load_tensors(path)
            assert len(upload) > 1
            found += sum(seen in came or seen in kept for seen in encodings(upload) if len(seen) >= 16)
    assert (found == 0) == secure


STEPS_OF_A_SUM = ["train", "offer", "mask", "open"]


@pytest.mark.parametrize("step", STEPS_OF_A_SUM)
def test_a_site_that_goes_away_is_left_out_or_the_round_has_no_sum(step: str, tmp_path: Path, bases: Bases) -> None:
    def arrange(grid: LocalGrid) -> None:
        grid.fault = lambda c, request: "lost" if (c, request.round, request.do) == (2, 2, step) else None

    grid, events = far(tmp_path / "far", bases, arrange)
    known = dict(sums(grid, tmp_path / "far"))
    failed = [(e["round"], e["client"]) for e in events if e["event"] == "client_failed"]
    assert failed == [(2, 2)]
    assert bool(notes(events, "no sum of this round: client 2 went away")) == (step == "open")
    manifest = json.loads((tmp_path / "far/checkpoints/round_0002/manifest.json").read_text())
    assert sorted(map(int, manifest["uploads"])) == ([0, 1, 2, 3, 4] if step == "open" else [0, 1, 3, 4])
    assert {u["round"] for u in manifest["uploads"].values()} == ({1} if step == "open" else {2})
    assert known.keys() == {2, 3}
    assert (tmp_path / "far/results/final_scores.json").is_file()


def test_the_mean_of_those_left_is_exact_after_a_second_attempt(tmp_path: Path, bases: Bases) -> None:
    def arrange(grid: LocalGrid) -> None:
        grid.fault = lambda c, request: "late" if (c, request.round, request.do) == (1, 1, "mask") else None

    grid, _ = far(tmp_path / "far", bases, arrange, federation__rounds=1)
    [(_, mean)] = sums(grid, tmp_path / "far")
    paths = [
        next(grid.folder.joinpath(str(c)).glob("*/checkpoints/round_0001/reply.safetensors")) for c in (0, 2, 3, 4)
    ]
    uploads = [load_tensors(path) for path in paths]
    for key, value in mean.items():
        assert torch.equal(value, (sum(u[key].double() for u in uploads) / 4).float())
    assert {request.attempt for _, request, _ in grid.sent if request.do == "open"} == {2}


def test_too_few_make_no_sum_and_the_run_goes_on(tmp_path: Path, bases: Bases) -> None:
    def arrange(grid: LocalGrid) -> None:
        grid.fault = lambda c, request: "lost" if c < 3 and (request.round, request.do) == (2, "offer") else None

    _, events = far(tmp_path / "far", bases, arrange)
    assert notes(events, "2 clients were left, 3 are the fewest")
    assert not notes(events, "is not") and events[-1]["event"] == "run_finished"


def test_a_site_that_lies_about_its_vector_is_left_out(tmp_path: Path, bases: Bases) -> None:
    def tamper(client: int, request: Request, reply: Reply) -> Reply:
        lies = client == 3 and request.do == "mask" and request.round == 1
        return replace(reply, block=reply.block[:-4]) if lies else reply

    _, events = far(tmp_path / "far", bases, lambda grid: setattr(grid, "tamper", tamper))
    [failed] = [event for event in events if event["event"] == "client_failed"]
    assert failed["client"] == 3 and "no masked vector" in failed["reason"]


def test_a_trainer_that_begins_anew_joins_the_next_attempt(tmp_path: Path, bases: Bases) -> None:
    def arrange(grid: LocalGrid) -> None:
        def fault(client: int, request: Request) -> None:
            if (client, request.round, request.do, request.attempt) == (4, 2, "mask", 1):
                grid.restart(4)

        grid.fault = fault

    _, events = far(tmp_path / "far", bases, arrange)
    [failed] = [event for event in events if event["event"] == "client_failed"]
    assert failed["client"] == 4 and "takes no part" in failed["reason"]
    assert events[-1]["event"] == "run_finished"


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": "flora"}, "flora makes its answer of single uploads"),
        ({"method": "fedalt_krum"}, "single uploads"),
        ({"method": "zero_pad", "lora__ranks": [2, 4]}, "ranks of their own|single uploads"),
        ({"federation__rest_of_world_delivery": "unicast"}, "unicast"),
        ({"federation__rest_of_world_participation": "staleness_decay"}, "staleness_decay"),
    ],
)
def test_what_needs_single_uploads_is_refused_by_name(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    config = parse_config(micro.settings(tmp_path / "run", **{**SECURE, **changes}), "s")
    with pytest.raises(UserError, match=f"federation.secure: .*({why})"):
        build(configured(config, config.method), SITES)


def test_few_clients_and_other_wires_are_refused(tmp_path: Path, bases: Bases) -> None:
    for changes, why in (
        ({"data__clients": 3}, "3 clients and secure_min=3; with fewer than 4"),
        ({"federation__secure_min": 2}, "sums of fewer than 3"),
        ({"flower__wire": "int8"}, "flower.wire: int8 has no effect on a secure sum"),
    ):
        with pytest.raises(UserError, match=why):
            far(tmp_path / "far", bases, **changes)


def test_a_site_may_want_secure_sums_alone_and_needs_keys_for_them(tmp_path: Path, bases: Bases, tls: Path) -> None:
    from fedalt.flower.own import SiteRows

    values = micro.settings(Path("run"), **SECURE)
    plain = parse_config({**values, "federation": {**values["federation"], "secure": False}}, "s").portable()
    secure = parse_config(values, "s").portable()
    rows = SiteRows(data=values["data"]["source"], model=values["model"]["name"], secure=True, min_rows=1)
    grid = LocalGrid(tmp_path, range(1), bases)

    def joined(settings: dict[str, Any], **named: Any) -> Reply:
        return grid.site(0, alone=False, rows=rows, **named).answer(
            Request("join", "run-1", json.dumps(settings), SITES)
        )

    assert joined(plain).error == "single"
    assert joined(secure).error == "peers"
    assert joined(secure, key=tls / "keys/client_0").error is None
    assert joined(plain, consent=Consent(allow_two=True)).error == "single"


def test_seeds_leave_a_site_in_no_other_answer(tmp_path: Path, bases: Bases) -> None:
    grid, _ = far(tmp_path / "far", bases, federation__rounds=1)
    opened = [reply.body.seed for _, _, reply in grid.sent if isinstance(reply.body, Opened)]
    assert len(set(opened)) == SITES
    others = b"".join(wired(a) for (_, _, a), (_, q, _) in zip(grid.messages, grid.sent, strict=True) if q.do != "open")
    assert not any(seed.encode() in others or bytes.fromhex(seed) in others for seed in opened)
