"""What is in a site's rows, labels, columns, paths and files is in no byte that leaves it, whatever goes wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import micro
from fedalt.config import parse_config
from fedalt.flower import client_app, trainer
from fedalt.flower.messages import reply_in, to_node
from fedalt.flower.own import SiteRows
from fedalt.flower.requests import Reply, Request, Scored
from fedalt.flower.site import Site
from fedalt.runs.setup import Bases
from flower.wired import wired

SECRETS = st.text("abcdefghijklmnopqrstuvwxyzäöüßñ0123456789", min_size=9, max_size=20)
ROUNDS = ("join", "train", "score", "save")
_count = itertools.count()


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


LIGHT = {"training__local_epochs": 1, "evaluation__max_new_tokens": 2, "data__train_limit": 12}


def asked(do: Any, **changes: Any) -> Request:
    """A server's request; its own source is a name that ships, and its base one that the site has elsewhere."""
    values = micro.settings(Path("run"), **{"data__clients": 3, "data__source": "tinyworld", **LIGHT, **changes})
    config = parse_config(values | {"model": {"name": "tiny-base", **changes.get("model", {})}}, "s")
    return Request(do, "run-1", json.dumps(config.portable()), 3, 0 if do == "join" else 1)


def answered(site: Site, state: Path, requests: list[Request], lines: list[str]) -> list[tuple[Reply, bytes]]:
    """What the site's ClientApp answers, and all bytes that Flower sends of it; ``lines`` are the site's log."""
    site.note = lines.append
    context = Context(1, 1, {"client-id": 1, "state": str(state)}, RecordDict(), {})
    (state / "site.json").write_text(json.dumps({"client": 1}))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_app, "ask", lambda _, request: Reply.parse(*_framed(trainer._answered(site, request))))
        for request in requests:
            message = to_node(request, 1)
            message.metadata.__dict__["_message_id"] = "m"
            answer: Message = client_app.app(message, context)
            found.append((reply_in(answer), wired(answer)))
    return found


def _framed(reply: Reply) -> tuple[str, bytes]:
    return reply.header, reply.block


def rows(secret: str, count: int = 60, **columns: str) -> list[dict[str, str]]:
    names = {"instruction": "instruction", "output": "output", "task": "task", "category": "category", **columns}
    made = ({"instruction": f"Is {secret} {i}?", "output": f"{secret} {i % 3}"} for i in range(count))
    return [{names[k]: v for k, v in {**row, "task": secret, "category": f"{secret}s"}.items()} for row in made]


Case = Callable[[Path, str], tuple[dict[str, Any], dict[str, Any], str | None]]
"""(folder, secret) → the site's own settings, changes of the server's settings, and the code of the error."""


def _written(folder: Path, secret: str, values: list[dict[str, str]]) -> Path:
    return micro.write_rows(folder / secret / f"{secret}.jsonl", values, True)


CLASSES = {"model": {"task": "sequence_classification", "labels": ["yes", "no"]}}
CASES: dict[str, Case] = {
    "all is well": lambda f, s: ({"data": str(_written(f, s, rows(s)))}, {}, None),
    "a category is named": lambda f, s: (
        {"data": str(_written(f, s, [{**row, "category": "named"} for row in rows(s)])), "categories": ["named"]},
        {},
        None,
    ),
    "labels of its own": lambda f, s: (
        {"data": str(_written(f, s, rows(s))), "model": str(micro.shared_classifier())},
        CLASSES,
        "labels",
    ),
    "columns of its own": lambda f, s: ({"data": str(_written(f, s, rows(s, instruction=f"{s}x")))}, {}, "rows"),
    "columns of the server": lambda f, s: (
        {"data": str(_written(f, s, rows(s)))},
        {"data__text_columns": ["category"], "data__label_column": "task"},
        None,
    ),
    "columns that are not there": lambda f, s: (
        {"data": str(_written(f, s, rows(s))), "label_column": f"{s}y", "text_columns": ["instruction"]},
        {},
        "rows",
    ),
    "a row that is none": lambda f, s: ({"data": str(_written(f, s, [*rows(s), {f"{s}z": s}]))}, {}, "rows"),
    "no such file": lambda f, s: ({"data": str(f / s / f"{s}.csv")}, {}, "rows"),
    "no such base": lambda f, s: (
        {"data": str(_written(f, s, rows(s))), "model": str(f / s / "base")},
        {},
        "model",
    ),
    "few rows": lambda f, s: ({"data": str(_written(f, s, rows(s, 5)))}, {}, "few_rows"),
    "one row of the server's choice": lambda f, s: (
        {"data": str(_written(f, s, rows(s)))},
        {"data__train_limit": 1},
        "few_rows",
    ),
    "one test row of the server's choice": lambda f, s: (
        {"data": str(_written(f, s, rows(s)))},
        {"data__test_limit": 1},
        "few_rows",
    ),
    "a disk that cannot be written": lambda f, s: (
        {"data": str(_written(f, s, rows(s))), "state": str(_written(f, f"{s}f", []))},
        {},
        "disk",
    ),
}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(secret=SECRETS)
@example(secret="patient4711müller")
def test_no_secret_leaves_a_site(
    case: str, secret: str, tmp_path_factory: pytest.TempPathFactory, bases: Bases
) -> None:
    folder = tmp_path_factory.mktemp(f"secret{next(_count)}")
    own, changes, code = CASES[case](folder, secret)
    model = {"model": str(micro.shared_model())}
    state = Path(own.pop("state", folder / secret / "state"))
    home = folder / secret / "home"
    home.mkdir(parents=True, exist_ok=True)
    site = Site(1, state, bases, SiteRows(**{**model, **own}))
    lines: list[str] = []
    found = answered(site, home, [asked(do, **changes) for do in ("who", *ROUNDS)], lines)
    for reply, sent in found:
        for form in (secret.encode(), json.dumps(secret)[1:-1].encode(), str(folder).encode()):
            assert form not in sent, reply
    errors = {reply.error for reply, _ in found if reply.error}
    assert errors == ({code} if code else set()), (errors, lines)
    if code:
        assert any(secret in line or code == "few_rows" for line in lines), "its own log has the text"
    else:
        assert found[-3][0].block and len(found[-2][0].header) > 100


@pytest.mark.parametrize(
    "changes",
    [
        {"data__source": "{file}"},
        {"data__partition": {"file": "{file}"}},
        {"data__template": "{file}"},
        {"model": {"name": "{file}"}},
        {"data__source": "some/hub"},
    ],
)
@pytest.mark.parametrize("data", [False, True])
def test_settings_choose_no_file_and_do_not_find_out_whether_one_is_there(
    changes: dict[str, Any], data: bool, tmp_path: Path, bases: Bases
) -> None:
    """Without ``--data`` and ``--model``, or with the one that is not asked for."""
    there = micro.write_rows(tmp_path / "there/train.jsonl", rows("secret"), True)
    found = set()
    for file in (there, there.parent, tmp_path / "not-there"):
        filled = json.loads(json.dumps(changes).replace("{file}", str(file)))
        request = asked("join", **filled)
        own = {"data": str(there)} if data and "data__source" not in changes else {}
        own |= {"model": str(micro.shared_model())} if "model" not in changes else {}
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        [(reply, _)] = answered(Site(1, tmp_path / "state", bases, SiteRows(**own)), home, [request], [])
        found.add(reply)
    assert {reply.error for reply in found} == {"path"} and len({reply.header for reply in found}) == 1


@pytest.mark.parametrize(
    "settings_", ["[]", "{", "[" * 100_000, "null", '{"model": 1}', '{"x": {"y": NaN}}', '{"seed": ' + "9" * 5000 + "}"]
)
def test_settings_that_are_none_are_a_code(settings_: str, tmp_path: Path, bases: Bases) -> None:
    request = replace(asked("join"), settings=settings_)
    [(reply, _)] = answered(Site(1, tmp_path / "state", bases), tmp_path, [request], [])
    assert reply.error in ("message", "settings")


def test_a_site_without_a_trainer_says_so_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "PATIENCE", 0.3)
    (tmp_path / "site.json").write_text(json.dumps({"client": 1}))
    context = Context(1, 1, {"client-id": 1, "state": str(tmp_path)}, RecordDict(), {})
    message = to_node(asked("train"), 1)
    message.metadata.__dict__["_message_id"] = "m"
    answer = client_app.app(message, context)
    assert reply_in(answer).error == "trainer" and str(tmp_path).encode() not in wired(answer)


def test_a_key_that_cannot_be_read_is_a_code(tmp_path: Path) -> None:
    key = tmp_path / "secret-place"
    (tmp_path / "site.json").write_text(json.dumps({"client": 1, "key": str(key)}))
    context = Context(1, 1, {"client-id": 1, "state": str(tmp_path)}, RecordDict(), {})
    message = to_node(Request("who"), 1)
    message.metadata.__dict__["_message_id"] = "m"
    answer = client_app.app(message, context)
    assert reply_in(answer).error == "message" and b"secret-place" not in wired(answer)


@pytest.mark.parametrize(("other", "told"), [(20, {"named"}), (3, set())])
def test_no_score_of_few_rows_follows_from_others(other: int, told: set[str], tmp_path: Path, bases: Bases) -> None:
    """Of all rows and of all but three, the score of the three would follow."""
    made = [{**row, "category": "named"} for row in rows("secret", 20)]
    made += [{**row, "category": "other"} for row in rows("secret", other)]
    folder = tmp_path / "rows"
    micro.write_rows(folder / "train/local_training_0.json", rows("secret", 12), False)
    micro.write_rows(folder / "test/local_testing_0.jsonl", made, True)
    own = SiteRows(data=str(folder), model=str(micro.shared_model()), categories=("named",))
    site = Site(1, tmp_path / "state", bases, own)
    *_, (scored, _) = answered(site, tmp_path, [asked("train"), asked("score")], [])
    assert isinstance(scored.body, Scored) and scored.body.after.categories.keys() == told
