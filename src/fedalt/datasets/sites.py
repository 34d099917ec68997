"""Federations of natural sites: AfriSenti, a client per language, and MedQuAD, a client per institute; CC BY 4.0 both.

AfriSenti-SemEval 2023 (Muhammad et al.): https://github.com/afrisenti-semeval/afrisent-semeval-2023
MedQuAD (Ben Abacha and Demner-Fushman, 2019): https://github.com/abachaa/MedQuAD
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from fedalt.data.federation import SPLITS, Row
from fedalt.datasets.flan.build import Prepared, write
from fedalt.errors import UserError, first_line, needs
from fedalt.seeding import rng

Rows = dict[str, list[Row]]
"""Split → rows of one client."""
LANGUAGES = ("amh", "arq", "ary", "hau", "ibo", "kin", "pcm", "por", "swa", "tso", "twi", "yor")
"""Those with training rows in their own language, as their folders are called."""
INSTITUTES = ("cancergov", "gard", "ghr", "mplus", "niddk", "ninds", "seniorhealth", "nhlbi", "cdc")
"""How the names of sources begin; the three without answers (ADAM, drugs, herbs) are left out."""
_NO_ANSWERS = ("mplus_adam", "mplusdrugs", "mplusherbs", "mplus_drugs", "mplus_herbs", "adam")
_LABELS = ("positive", "neutral", "negative")
_WORDS, _MOST = 60, 90
"""Words to which an answer is cut, at the end of a sentence; the longest first sentence that is kept."""


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        hub: Its name on the Hugging Face hub.
        sizes: Split → rows of a client, at most.
        read: From a folder to clients.
        load: From a name on the hub to clients.
    """

    hub: str
    sizes: Mapping[str, int]
    read: Any
    load: Any


def build(name: str, out: Path, sizes: Mapping[str, int], seed: int, *, place: str | None = None) -> list[Prepared]:
    """Write a client per site into a new folder, from a folder or from the hub."""
    source = SOURCES[name]
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is there already; choose another --out")
    local = Path(place).expanduser() if place else None
    if local is not None and (local.exists() or len(local.parts) != 2):
        if not local.is_dir():
            raise UserError(
                f"--from {place}: no folder, and no name of a data set on the hub, for example {source.hub}"
            )
        found = source.read(local, sizes, seed)
    else:
        found = _from_hub(source, place or source.hub, sizes, seed)
    clients = [site for site, rows in found.items() if rows.get("train") and rows.get("test")]
    if not clients:
        why = "too few rows for training and test" if found else f"nothing of {name} (see docs/howto/rows.md)"
        raise UserError(f"--from {place or source.hub}: {why}")
    write(out, [found[site] for site in clients])
    told = []
    for site, rows in found.items():
        counts = {split: len(mine) for split, mine in rows.items()}
        short = tuple(f"{s}: {counts.get(s, 0)} rows of {n}" for s, n in sizes.items() if counts.get(s, 0) < n)
        client, why = (clients.index(site), "") if site in clients else (None, "; ".join(short))
        told.append(Prepared(f"{name}_{site}", name, client, counts, () if why else short, why))
    return told


def _from_hub(source: Source, name: str, sizes: Mapping[str, int], seed: int) -> dict[str, Rows]:
    with needs("datasets", "data sets of the hub"):
        import datasets  # noqa: F401
    try:
        found: dict[str, Rows] = source.load(name, sizes, seed)
    except UserError:
        raise
    except Exception as error:  # whatever the hub or the network gives rise to
        raise UserError(f"{name} cannot be had ({first_line(error)}); --from DIR takes a copy of it") from None
    return found


# ------------------------------------------------------------------------------------------------------- AfriSenti


def _afrisenti_folder(folder: Path, sizes: Mapping[str, int], seed: int) -> dict[str, Rows]:
    """``data/amh/train.tsv``, or ``amh_train.tsv``, and so on."""
    top, found = folder / "data" if (folder / "data").is_dir() else folder, {}
    for language in LANGUAGES:
        ends = {"train": "train", "validation": "dev", "test": "test"}.items()
        files = {split: sorted((top / language).glob(f"*{end}.tsv")) for split, end in ends}
        if files["train"] and files["test"]:
            splits = {split: _tweets(mine[0]) for split, mine in files.items() if mine}
            found[language] = _sentiment(language, splits, sizes, seed)
    return found


def _tweets(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if not {"tweet", "label"} <= set(rows.fieldnames or ()):
            raise UserError(f"{path}: no columns tweet and label; it has {', '.join(rows.fieldnames or ['none'])}")
        yield from ((row["tweet"] or "", row["label"] or "") for row in rows)


def _afrisenti_hub(name: str, sizes: Mapping[str, int], seed: int) -> dict[str, Rows]:
    from datasets import load_dataset

    found = {}
    for language in LANGUAGES:
        splits = {}
        for split, rows in load_dataset(name, language, revision="refs/convert/parquet").items():
            names = getattr(rows.features["label"], "names", None)
            labels = [names[label] if names else label for label in rows["label"]]
            splits[split] = zip(rows["tweet"], labels, strict=True)
        found[language] = _sentiment(language, splits, sizes, seed)
    return found


def _sentiment(
    language: str, splits: Mapping[str, Iterable[tuple[str, str]]], sizes: Mapping[str, int], seed: int
) -> Rows:
    options = "\n".join(("What is the sentiment of this post?", "OPTIONS:", *(f"- {label}" for label in _LABELS)))
    seen, found = set[str](), dict[str, list[Row]]()
    for split in ("test", "train", "validation"):
        posts = dict[str, str]()
        for tweet, label in splits.get(split, ()):
            if tweet.strip() and label in _LABELS and tweet not in seen:
                posts.setdefault(tweet, label)
        chosen = _shuffled(list(posts), seed, "afrisenti", language, split)[: sizes[split]]
        seen.update(posts)
        found[split] = [Row(f"{t}\n\n{options}", posts[t], f"afrisenti_{language}", "sentiment") for t in chosen]
    return {split: found[split] for split in SPLITS if sizes[split]}


# --------------------------------------------------------------------------------------------------------- MedQuAD

Question = tuple[str, str, str, str]
"""Document, kind of question, question, answer."""


def _medquad_folder(folder: Path, sizes: Mapping[str, int], seed: int) -> dict[str, Rows]:
    places = {site: one for one in sorted(folder.iterdir()) if one.is_dir() and (site := _institute(one.name))}
    return {site: _answers(site, _documents(places[site]), sizes, seed) for site in INSTITUTES if site in places}


def _institute(source: str) -> str | None:
    name = re.sub(r"^\d+_", "", source).lower()
    if name.startswith(_NO_ANSWERS):
        return None
    return next((site for site in INSTITUTES if name.startswith(site)), None)


def _documents(folder: Path) -> Iterator[Question]:
    for path in sorted(folder.glob("*.xml")):
        try:
            root = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise UserError(f"{path}: no XML ({error})") from None
        for pair in root.iter("QAPair"):
            question, answer = pair.find("Question"), pair.find("Answer")
            if question is not None and answer is not None:
                yield path.name, question.get("qtype", ""), question.text or "", "".join(answer.itertext())


def _medquad_hub(name: str, sizes: Mapping[str, int], seed: int) -> dict[str, Rows]:
    from datasets import load_dataset

    found = defaultdict[str, list[Question]](list)
    for row in load_dataset(name, split="train"):
        if site := _institute(row["document_source"]):
            found[site].append((row["document_id"], row["question_type"] or "", row["question"], row["answer"] or ""))
    return {site: _answers(site, found[site], sizes, seed) for site in INSTITUTES if site in found}


def _answers(site: str, questions: Iterable[Question], sizes: Mapping[str, int], seed: int) -> Rows:
    """Whole documents go into one split, the test rows' first."""
    documents = defaultdict[str, dict[str, Row]](dict)
    for document, kind, question, answer in questions:
        text, asked = shortened(answer), " ".join(question.split())
        if text and asked:
            documents[document].setdefault(asked, Row(asked, text, f"medquad_{site}", kind))
    left, seen, found = _shuffled(list(documents), seed, "medquad", site), set[str](), Rows()
    for split in ("test", "validation", "train"):
        rows: list[Row] = []
        while left and len(rows) < sizes[split]:
            mine = documents[left.pop()]
            rows += [row for asked, row in mine.items() if asked not in seen]
            seen.update(mine)
        found[split] = _shuffled(rows, seed, "medquad", site, split)[: sizes[split]]
    return {split: found[split] for split in SPLITS if sizes[split]}


def shortened(answer: str) -> str:
    """Whole sentences of about 60 words; nothing where the first one is far longer."""
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(answer.split())):
        if kept and len(" ".join([*kept, sentence]).split()) > _WORDS:
            break
        kept.append(sentence)
    text = " ".join(kept)
    return text if len(text.split()) <= _MOST else ""


def _shuffled(values: Sequence[Any], seed: int, *purpose: str) -> list[Any]:
    return [values[i] for i in torch.randperm(len(values), generator=rng(seed, *purpose)).tolist()]


SOURCES = {
    "afrisenti": Source(
        "shmuhammad/AfriSenti-twitter-sentiment",
        {"train": 300, "validation": 50, "test": 200},
        _afrisenti_folder,
        _afrisenti_hub,
    ),
    "medquad": Source("lavita/MedQuAD", {"train": 200, "validation": 25, "test": 60}, _medquad_folder, _medquad_hub),
}
