"""What a site may answer in the place of what it should: headers and blocks that lie, by what they lie about."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save

from fedalt.flower.requests import Reply
from fedalt.flower.wire import pack, unpack

NAN, INF = float("nan"), float("inf")
MUCH = "x" * 5_000_000


@dataclass(frozen=True)
class Lie:
    """In the place of a reply."""

    header: str
    block: bytes


Liar = Callable[[Reply], Lie]


def said(*path: str, be: Any) -> Liar:
    """One field is something else."""

    def lie(reply: Reply) -> Lie:
        header = inside = json.loads(reply.header)
        for part in path[:-1]:
            inside = inside[part]
        inside[path[-1]] = be
        return Lie(json.dumps(header), reply.block)

    return lie


def without(*path: str) -> Liar:
    def lie(reply: Reply) -> Lie:
        header = inside = json.loads(reply.header)
        for part in path[:-1]:
            inside = inside[part]
        del inside[path[-1]]
        return Lie(json.dumps(header), reply.block)

    return lie


def header(change: Callable[[str], str]) -> Liar:
    return lambda reply: Lie(change(reply.header), reply.block)


def block(change: Callable[[bytes], bytes]) -> Liar:
    return lambda reply: Lie(reply.header, change(reply.block))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Liar:
    """The upload as safetensors, changed."""
    return block(
        lambda data: save(
            {str(k): v.contiguous() for k, v in change({str(k): v for k, v in unpack(data).items()}).items()}
        )
    )


def described(change: Callable[[dict[str, Any]], None]) -> Liar:
    """The header of the block says something else about its bytes."""

    def lie(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        about = json.loads(data[8 : 8 + length])
        change(about)
        text = json.dumps(about).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return block(lie)


def first(about: dict[str, Any]) -> Any:
    return about[min(name for name in about if name != "__metadata__")]


def bomb(data: bytes, n: int = 30_000) -> bytes:
    """An int8 tensor [1, n] with scales [1, n, 1]: 120 kB that broadcast to n² numbers."""
    names = [str(key) for key in unpack(data)]
    codes = {name: torch.ones(1, n, dtype=torch.int8) for name in names[:1]}
    return save(codes | {f"{name}|scale": torch.ones(1, n, 1) for name in codes})


ENVELOPE: dict[str, Liar] = {
    **{f"do {value!r}": said("do", be=value) for value in ("save", "who", "delete", None, 3, [])},
    **{f"run {str(value)[:9]!r}": said("run", be=value) for value in ("other", "../x", "", None, 5, MUCH)},
    **{f"round {value!r}": said("round", be=value) for value in (10**6, -1, NAN, INF, "1", 10**30, True, None, 1.5)},
    **{f"client {value!r}": said("client", be=value) for value in (0, 2, 99, -1, 10**30, "1", None, [1])},
    **{f"error {str(value)[:9]!r}": said("error", be=value) for value in ("no such", MUCH, [], 5, "disk", {})},
    **{f"count {value!r}": said("count", be=value) for value in (-1, NAN, 10**30, "1", None)},
    "a field more": said("path", be="/home"),
    "the block in the header": said("block", be="x"),
    "what is wrong": said("unfit", be="nothing"),
    **{f"no {name}": without(name) for name in ("do", "run", "round", "client", "body", "error", "count")},
    "a field twice": header(lambda text: text[:-1] + ', "client": 1}'),
    "a list": header(lambda text: f"[{text}]"),
    "nothing": header(lambda text: ""),
    "null": header(lambda text: "null"),
    "half": header(lambda text: text[: len(text) // 2]),
    "nested": header(lambda text: "[" * 100_000),
    "9 MB": header(lambda text: text[:-1] + " " * 9_000_000 + "}"),
    "5,000 digits": header(lambda text: text.replace('"count":0', f'"count":{"9" * 5000}')),
    "a body of a list": said("body", be=[]),
    "a body of text": said("body", be="x"),
    "no body": said("body", be=None),
    "an empty body": said("body", be={}),
    "a body with more": said("body", "secret", be="x"),
}

TRAIN: dict[str, Liar] = {
    **{
        f"loss {value!r}": said("body", "loss", be=value)
        for value in (NAN, INF, -INF, None, "1", True, [], 1e300, -1e13)
    },
    **{f"steps {value!r}": said("body", "steps", be=value) for value in (NAN, INF, -1, 1.5, "3", None, 10**30, True)},
    **{f"tokens {value!r}": said("body", "tokens", be=value) for value in (NAN, INF, -1, 1.5, "3", None, 10**30)},
    **{
        f"alpha {str(value)[:9]!r}": said("body", "alpha", be=value)
        for value in ([NAN], [INF], ["1"], "text", None, [[0.5]], [0.5], [0.5] * 1_000_000, {"0": 0.5})
    },
    **{f"holds {value!r}": said("body", "holds", be=value) for value in (NAN, -1, 10**30, "1", None)},
    **{f"no {name}": without("body", name) for name in ("loss", "steps", "tokens", "alpha", "holds")},
    "loss 1e999": header(lambda text: text.replace('"loss":', '"loss":1e999,"was":')),
    "loss twice": header(lambda text: text.replace('"loss":', '"loss":0.1,"loss":')),
    "an empty block": block(lambda data: b""),
    "three bytes": block(lambda data: b"abc"),
    "no tensors": block(lambda data: b"hello" * 50),
    "a bomb": block(bomb),
    "a header of exabytes": block(lambda data: b"\xff" * 8 + data[8:]),
    "cut off": block(lambda data: data[:-4]),
    "more than it says": block(lambda data: data + b"\0\0\0\0"),
    "twice": block(lambda data: data + data),
    "bf16": block(lambda data: pack(unpack(data), "bf16")),
    "int8": block(lambda data: pack(unpack(data), "int8")),
    "float64": tensors(lambda own: {name: value.double() for name, value in own.items()}),
    "whole numbers": tensors(lambda own: {name: value.int() for name, value in own.items()}),
    "a tensor less": tensors(lambda own: dict(list(own.items())[1:])),
    "a tensor more": tensors(lambda own: own | {"m.mixer.G": torch.ones(1, 1)}),
    "a name that is none": tensors(lambda own: own | {"m": torch.ones(1, 1)}),
    "a name of 100 kB": tensors(lambda own: own | {"m" * 100_000 + ".x.A": torch.ones(1, 1)}),
    "another slot": tensors(lambda own: {name.replace("individual", "rest_of_world"): v for name, v in own.items()}),
    "an old slot": tensors(lambda own: {name.replace("individual", "row"): v for name, v in own.items()}),
    "transposed": tensors(lambda own: {name: value.T for name, value in own.items()}),
    "one dimension more": tensors(lambda own: {name: value[None] for name, value in own.items()}),
    "another rank": tensors(lambda own: {n: v[:2] if n.endswith("A") else v[:, :2] for n, v in own.items()}),
    "nan": tensors(lambda own: {name: torch.full_like(value, NAN) for name, value in own.items()}),
    "infinite": tensors(lambda own: {name: torch.full_like(value, INF) for name, value in own.items()}),
    "metadata": described(lambda about: about.update(__metadata__={"a": "b"})),
    "a shape of exabytes": described(lambda about: first(about).update(shape=[2**31, 2**31])),
    "a shape below zero": described(lambda about: first(about).update(shape=[-4, -32])),
    "a shape of true": described(lambda about: first(about).update(shape=[True, 32])),
    "a shape of text": described(lambda about: first(about).update(shape="4")),
    "an unknown dtype": described(lambda about: first(about).update(dtype="F8")),
    "bytes of another": described(lambda about: first(about).update(data_offsets=[4, 516])),
    "bytes beyond": described(lambda about: first(about).update(data_offsets=[0, 10**15])),
    "a word more": described(lambda about: first(about).update(more=1)),
}

JOIN: dict[str, Liar] = {
    **{f"samples {v!r}": said("body", "samples", be=v) for v in (INF, NAN, -1, 0, 10**30, 1.5, "5", None, True)},
    "task of 5 MB": said("body", "task", be=MUCH),
    "task of two lines": said("body", "task", be="a\nb"),
    "task of a list": said("body", "task", be=["a"]),
    "holds -1": said("body", "holds", be=-1),
    "skipped 1e30": said("body", "skipped", be=10**30),
    "common of text": said("body", "common", be="x"),
    "common with more": said("body", "common", "path", be="/home"),
    "no common": without("body", "common"),
    "base of 5 MB": said("body", "common", "base", be=MUCH),
    "shapes below zero": said("body", "common", "shapes", be=[["m.x.A", [-1, 3]]]),
    "shapes of 1e30": said("body", "common", "shapes", be=[["m.x.A", [10**30]]]),
    "layers of one number": said("body", "common", "layers", be=[["m", [1]]]),
}

PART = {"rows": 4, "metrics": {"rouge1": 1.0}}
SCORE: dict[str, Liar] = {
    **{f"rouge1 {v!r}": said("body", "after", "metrics", "rouge1", be=v) for v in (NAN, INF, "50", None, [], 1e300)},
    **{f"rows {v!r}": said("body", "after", "rows", be=v) for v in (0, -1, 10**30, 1.5, "4")},
    "no rouge1": without("body", "after", "metrics", "rouge1"),
    "no metrics": said("body", "after", "metrics", be={}),
    "a thousand metrics": said("body", "after", "metrics", be={f"m{i}": 1.0 for i in range(1000)}),
    "a metric that is none": said("body", "after", "metrics", "hidden", be=1.0),
    "a category of two lines": said("body", "after", "categories", be={"a\nb": PART}),
    "10,000 categories": said("body", "after", "categories", be={str(i): PART for i in range(10_000)}),
    "a category of text": said("body", "after", "categories", be={"a": "b"}),
    "before of text": said("body", "before", be="x"),
    "no after": without("body", "after"),
    "drift nan": said("body", "row_lora_drift", be=NAN),
    "a block": block(lambda data: b"hello"),
}


def every() -> Iterator[Liar]:
    for lies in (ENVELOPE, TRAIN, JOIN, SCORE):
        yield from lies.values()
