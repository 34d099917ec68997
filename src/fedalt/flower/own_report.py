"""A site's own report of a run: what came of it and what left, from the site's files alone, of its client alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from safetensors import safe_open

from fedalt.config import RunConfig
from fedalt.errors import UserError, listed
from fedalt.evaluation.metrics import metric_of, metrics_in
from fedalt.files import read_bytes, write_text
from fedalt.flower.trainer import SITE
from fedalt.report.html import run_sections
from fedalt.report.page import Section, code, glossary, page, paragraph, table
from fedalt.runs.checkpoint import load_checkpoint
from fedalt.runs.events import Event, read_events
from fedalt.runs.folder import RunFolder, open_run

ALONE, BLOCK = "alone", "reply.safetensors"
"""In a run's folder: the same client trained without the others; in a checkpoint: what was uploaded."""
_WORDS = {
    "join": "how many rows it trains on and could not, its task's name, and digests of base, shapes and settings",
    "train": "its upload (below), {}its steps, and of which round its last upload is",
    "offer": "secure sum: its weight and a key for one attempt",
    "mask": "secure sum: its upload, masked; the server sees the sum alone",
    "open": "secure sum: what takes its own mask from the sum",
    "score": "scores on its test and validation rows, and how many there are",
    "save": "that its personal model is saved here",
}
"""Request → what an answer to it holds."""


def state_of(run: Path) -> Path | None:
    """The state folder of the site that a run's folder is of; None where it is no site's."""
    if (run / SITE).is_file():
        names = sorted(file.parent.name for file in run.glob("*/config.yaml"))
        raise UserError(f"{run}: a site's state; name a run in it: {listed(names) if names else 'there is none yet'}")
    state = run.absolute().parent
    return state if (state / SITE).is_file() else None


def write_own_report(folder: RunFolder) -> Path:
    """Rebuild the report of a run at a site."""
    _, config = open_run(folder.path)
    title, about, sections = run_sections(folder)
    events = list(read_events(folder.events))
    client = next(event["clients"][0] for event in events if "clients" in event)
    finding, gained = _gained(folder, events, client)
    sent = [*_sent(events, config), *_uploaded(folder, config)]
    left = [f"<li>{escape(line)}</li>" for line in _left_out(events)]
    others = [section for section in sections if section.id not in ("scores", "row-lora")]
    at = [section.id for section in others].index("cost")
    mine = [
        Section("gain", "What the others gave", gained),
        *others[:at],
        Section("sent", "What left this site", sent),
        Section("left-out", "Rounds left out", [f"<ul>{''.join(left)}</ul>" if left else paragraph("None.")]),
        *others[at:],
    ]
    about = [f"Client {client} at its own site, by the site's own files: {folder.path.name}.", *about]
    write_text(folder.report, page(title, about, mine, finding))
    return folder.report


def _scores(events: Sequence[Event], point: str) -> list[Event]:
    return [event for event in events if event["event"] == "scores" and event["point"] == point]


def _gained(folder: RunFolder, events: Sequence[Event], client: int) -> tuple[str, list[str]]:
    """What came of it in a sentence, if it can be said, and the scores that say so."""
    after, before = _scores(events, "after"), _scores(events, "before")
    alone = _scores(list(read_events(folder.path / ALONE / "events.jsonl")), "after")[-1:]
    if not after:
        return "", [paragraph("Not scored here.")]
    named = {f"round {after[0]['round']}, its first score": after[0]} if len(after) > 1 else {}
    named |= {f"round {one['round']}, as it left training": one for one in before[-1:]}
    named |= {f"round {after[-1]['round']}, with the others": after[-1]}
    named |= {f"alone, {one['round']} rounds": one for one in alone}
    metrics = [metric_of(name) for name in metrics_in(after[-1])]
    rows = [[title, *(metric.text(one.get(metric.name)) for metric in metrics)] for title, one in named.items()]
    shown = table(["", *(metric.title for metric in metrics)], rows, words=(0,))
    count = len(read_bytes(folder.answers(client, after[-1]["round"])).splitlines())
    if not alone:
        how = "What it would have come to alone is not known here. This trains the client by itself and compares:"
        return "", [
            shown,
            paragraph(f"On {count} test rows of its own. {how}"),
            code("fedalt report STATE/RUN --alone"),
        ]
    metric = metric_of(next(event["metric"] for event in reversed(events) if "metric" in event))
    ours, theirs = after[-1][metric.name], alone[0][metric.name]
    word = "the same" if ours == theirs else "better" if metric.better(ours, theirs) else "worse"
    finding = f"{metric.title} {metric.text(ours)} with the others, {metric.text(theirs)} alone: {word}"
    finding += "" if ours == theirs else f" by {metric.text(abs(ours - theirs))}"
    about = f"On {count} test rows of its own, one run each: so few rows and runs have no interval here. "
    about += "Alone: method local, without noise, with the same rows, base, seed and training, for as many rounds."
    return f"{finding}.", [shown, paragraph(about)]


def _sent(events: Sequence[Event], config: RunConfig) -> Iterator[str]:
    """Every answer, by what it holds and by round."""
    replies = [event for event in events if event["event"] == "reply"]
    spent = {event["round"]: event["epsilon"] for event in events if event["event"] == "client" and "epsilon" in event}
    told = [] if config.privacy.on and config.privacy.report != "all" else ["loss, tokens and mixer weights, "]
    told += ["epsilon, "] if spent else []
    words = _WORDS | {"train": _WORDS["train"].format("".join(told))}
    if config.federation.secure:
        words["train"] = words["train"].replace("its upload (below), ", "")
    kinds = {do: [one for one in replies if one["do"] == do] for do in words}
    said = {do: f"{len(some)} times, {_megabytes(some, 'up')} MB" for do, some in kinds.items() if some}
    yield paragraph("Answers to the server. One that says why there is no answer is a code and a count.")
    yield glossary({f"{do}: {about}": words[do] for do, about in said.items()})
    rounds: dict[int | str, list[Event]] = {}
    for one in sorted(replies, key=lambda one: int(one["round"])):
        rounds.setdefault(one["round"], []).append(one)
    head = ["round", "answers", "MB up", "MB down", *(["epsilon so far"] if spent else [])]
    rounds["all"] = replies
    yield table(head, [_line(number, some, spent) for number, some in rounds.items()], len(rounds) - 1, words=())


def _line(number: int | str, replies: Sequence[Event], spent: Mapping[int | str, float]) -> list[str]:
    epsilon = [f"{spent[number]:.2f}" if number in spent else "–"] if spent else []
    return [str(number), str(len(replies)), *(_megabytes(replies, way) for way in ("up", "down")), *epsilon]


def _megabytes(replies: Sequence[Event], way: str) -> str:
    return f"{sum(one[f'bytes_{way}'] for one in replies) / 1e6:.3f}"


def _uploaded(folder: RunFolder, config: RunConfig) -> Iterator[str]:
    """The tensors of the last upload, by name."""
    last = load_checkpoint(folder.checkpoints)
    if last is None or not (path := last.path / BLOCK).is_file() or not path.stat().st_size:
        yield paragraph("No tensor leaves this site.")
        return
    with safe_open(path, "numpy") as file:
        found = {name: file.get_slice(name) for name in sorted(file.keys())}
        lines = [f"{name}  {'×'.join(map(str, one.get_shape()))}  {one.get_dtype()}" for name, one in found.items()]
    how = ", masked, so that the server sees the sum alone" if config.federation.secure else ""
    yield paragraph(f"The upload of round {last.round}{how}: {len(lines)} tensors; nothing else of the model leaves.")
    yield code("\n".join(lines))


def _left_out(events: Sequence[Event]) -> Iterator[str]:
    """Rounds in which this client did not count, as far as the site can know, and why."""
    replies = [event for event in events if event["event"] == "reply"]
    trained = {event["round"] for event in events if event["event"] == "client"}
    why = {event["round"]: event["reason"] for event in events if event["event"] == "client_failed"}
    codes = {one["round"]: one["error"] for one in replies if one["do"] == "train" and one["error"]}
    uploads = any(one["counts"] for one in replies)
    for number in range(1, max((one["round"] for one in replies), default=0) + 1):
        answered = [place for place, one in enumerate(replies) if (one["do"], one["round"]) == ("train", number)]
        later = [one for one in replies[answered[-1] + 1 :] if one["do"] != "join"] if answered else []
        if number in trained and uploads and later and later[0]["counts"] != number:
            yield f"round {number}: trained and answered, and the server did not count it: too late, or refused there"
        elif number not in trained:
            code_ = f"not trained, this site answered {codes[number]}; its log says why" if number in codes else ""
            yield f"round {number}: {why.get(number) or code_ or 'not asked: not drawn, or this site was away'}"
