"""The closed world, its eight tasks, the dial, and the small base model that ships with them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedalt.config.data import DataConfig
from fedalt.data.federation import Federation, Row
from fedalt.data.load import load_federation
from fedalt.datasets.tinyworld import LETTERS, generate, letter, shift
from fedalt.datasets.tinyworld.tasks import TASKS
from fedalt.datasets.tinyworld.world import (
    KINDS,
    MEANINGS,
    PEOPLE,
    all_words,
    invented_words,
    known_words,
    public_adjectives,
    public_nouns,
)
from fedalt.errors import UserError
from tools.tiny_base.documents import documents, train_tokenizer

DIGEST = "36d46209edaf5334b6624083a91c8c01014f2ed5a3ea1d3a5983167f5406a622"
TEMPLATE = "### Instruction:\n{}\n\n### Response:\n"
CATEGORIES = [
    "commonsense reasoning",
    "coreference",
    "natural language inference",
    "paraphrase detection",
    "reading comprehension",
    "sentiment",
    "struct-to-text",
    "text classification",
]
SPLITS = ("train", "validation", "test")
BASE = Path(str(files("fedalt"))) / "assets" / "tiny_base"


def _rows(federation: Federation) -> list[tuple[int, str, Row]]:
    clients = federation.clients.items()
    return [(client, split, row) for client, data in clients for split in SPLITS for row in getattr(data, split)]


def _digest(federation: Federation) -> str:
    lines = [[client, split, row.instruction, row.output] for client, split, row in _rows(federation)]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


@pytest.fixture(scope="module")
def world() -> Federation:
    return generate()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


# rows


def test_the_default_federation_is_pinned(world):
    assert _digest(world) == DIGEST


def test_another_process_with_another_hash_seed_makes_the_same_rows(world):
    code = (
        "import hashlib, json; from fedalt.datasets.tinyworld import generate; "
        "print(json.dumps([[c, s, r.instruction, r.output] for c, d in generate().clients.items() "
        "for s in ('train', 'validation', 'test') for r in getattr(d, s)]))"
    )
    source = str(Path(str(files("fedalt"))).parent)
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": source}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert hashlib.sha256(done.stdout.strip().encode()).hexdigest() == _digest(world)


def test_another_seed_makes_another_world(world):
    assert _digest(generate(seed=1)) != _digest(world)
    assert all_words(0).nouns != all_words(1).nouns
    assert [noun.word for noun in all_words(0).nouns] == [noun.word for noun in all_words(1).nouns]


def test_sizes_categories_and_task_names(world):
    assert world.ids == tuple(range(8))
    for client, data in world.clients.items():
        assert (len(data.train), len(data.validation), len(data.test)) == (300, 50, 200)
        rows = [*data.train, *data.validation, *data.test]
        assert {row.category for row in rows} == {CATEGORIES[client]}
        assert {row.task for row in rows} == {TASKS[client].name}
        assert all(row.instruction == row.instruction.strip() and row.output for row in rows)


def test_other_sizes():
    data = generate(train=7, validation=0, test=3).clients[4]
    assert (len(data.train), len(data.validation), len(data.test)) == (7, 0, 3)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=5, deadline=None)
def test_no_instruction_occurs_twice(seed):
    instructions = [row.instruction for _, _, row in _rows(generate(seed))]
    assert len(set(instructions)) == len(instructions)


def _form(row: Row) -> str:
    """The phrasing of a row: every word of the world blanked out."""
    names = {word for words in ([noun.word for noun in public_nouns()], invented_words()) for word in words}
    names |= {word.word for word in public_adjectives()}
    return " ".join("_" if word in names or word[0].isupper() else word for word in re.findall(r"\w+", row.instruction))


def test_every_task_has_several_phrasings(world):
    for data in world.clients.values():
        forms = [_form(row) for row in data.train]
        common = {form for form in forms if forms.count(form) >= 3}
        assert len(common) >= 4


def test_training_rows_use_the_words_a_client_holds_and_tests_use_all(world):
    invented = set(invented_words())
    for client, data in world.clients.items():
        known = known_words(0, client)
        held = {word.word for word in (*known.nouns, *known.adjectives)}
        met = {word for row in data.train for word in re.findall(r"\w+", row.instruction)} & invented
        asked = {word for row in data.test for word in re.findall(r"\w+", row.instruction)} & invented
        assert met <= held
        assert 0.25 * len(asked) < len(asked - held) < 0.75 * len(asked)


def test_every_invented_word_is_met_in_training_by_some_client(world):
    met = {
        word for data in world.clients.values() for row in data.train for word in re.findall(r"\w+", row.instruction)
    }
    assert set(invented_words()) <= met


# answers


def _adjectives(seed: int) -> dict[str, str]:
    words = all_words(seed)
    return {word.word: word.meaning for word in (*words.public_adjectives, *words.adjectives)}


def _words(row: Row) -> list[str]:
    return re.findall(r"\w+", row.instruction)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=3, deadline=None)
def test_answers_agree_with_the_world(seed):
    clients = generate(seed, clash=0).clients
    nouns = {noun.word: noun for noun in (*all_words(seed).public_nouns, *all_words(seed).nouns)}
    meanings = _adjectives(seed)
    for row in clients[7].test:  # topic: the kind of whatever is named
        kinds = {nouns[word].kind for word in _words(row) if word in nouns}
        assert {KINDS[LETTERS.index(row.output)]} == kinds
    for row in clients[5].test:  # sentiment: praise and blame outweigh size
        said = {meanings[word] for word in _words(row) if word in meanings}
        assert row.output == ("A" if "good" in said else "B" if "bad" in said else "C")
    for row in clients[4].test:  # reading: the letter is the position of the name among the names
        key, name = row.output.split()
        names = [word for word in _words(row) if word in PEOPLE]
        assert names.index(name) == LETTERS.index(key)
    for row in clients[6].test:  # struct-to-text: what the sentence adds is true
        noun = next((nouns[word] for word in _words(row) if word in nouns), None)
        word = next((meanings[word] for word in _words(row) if word in meanings), None)
        key = KINDS.index(noun.kind) if noun else MEANINGS.index(word)
        assert LETTERS.index(row.output[0]) == key
        assert (noun and (noun.kind in row.output or noun.place in row.output)) or (word and word in row.output)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=3, deadline=None)
def test_listed_options_hold_the_right_answer_once(seed):
    nouns = {noun.word: noun for noun in (*all_words(seed).public_nouns, *all_words(seed).nouns)}
    seen = 0
    for row in generate(seed, clash=0).clients[0].test:
        asked = re.search(r"\b(animal|plant|food|tool)\b", row.instruction)
        if asked:
            listed = [nouns[word].kind for word in _words(row) if word in nouns]
            assert [kind == asked[1] for kind in listed] == [slot == LETTERS.index(row.output) for slot in range(3)]
            seen += 1
    assert seen


def test_no_answer_is_the_answer_to_most_rows(world):
    for client, data in world.clients.items():
        letters = [row.output[0] for row in data.test]
        assert max(letters.count(key) for key in set(letters)) / len(letters) < 0.6, client


# the dial


@pytest.mark.parametrize("clash", [0.25, 0.5, 1.0])
def test_the_dial_changes_letters_only(clash):
    for (client, _, common), (_, _, other) in zip(_rows(generate(clash=0)), _rows(generate(clash=clash)), strict=True):
        by = shift(client, clash)
        assert (other.instruction, other.task, other.category) == (common.instruction, common.task, common.category)
        assert other.output[1:] == common.output[1:]
        assert LETTERS.index(other.output[0]) == (LETTERS.index(common.output[0]) + by) % len(LETTERS)


def test_at_one_no_two_clients_agree_and_at_zero_all_do():
    assert {shift(client, 0) for client in range(8)} == {0}
    for slot, (a, b) in product(range(4), product(range(8), repeat=2)):
        assert (letter(slot, shift(a, 1)) == letter(slot, shift(b, 1))) == (a == b)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_client_that_left_the_common_convention_stays_out_as_the_dial_goes_up(x, y):
    low, high = sorted((x, y))
    assert all(shift(client, high) == client for client in range(8) if shift(client, low))


@pytest.mark.parametrize("clash", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_dial_out_of_range_is_refused(clash):
    with pytest.raises(UserError, match="clash"):
        generate(clash=clash)


@pytest.mark.parametrize("sizes", [{"train": -1}, {"test": 5_001}, {"validation": 10**9}])
def test_sizes_the_world_cannot_fill_are_refused(sizes):
    with pytest.raises(UserError, match="rows asked for"):
        generate(**{"train": 0, "validation": 0, "test": 0, **sizes})


# more than eight clients


@pytest.fixture(scope="module")
def shards() -> Federation:
    return generate(clients=20)


def test_the_first_eight_clients_do_not_change_when_there_are_more(world, shards):
    assert shards.ids == tuple(range(20))
    assert all(shards.clients[client] == data for client, data in world.clients.items())


def test_shards_have_a_task_and_no_row_in_common(shards):
    instructions = [row.instruction for _, _, row in _rows(shards)]
    assert len(set(instructions)) == len(instructions)
    for client, data in shards.clients.items():
        assert {row.task for row in data.train} == {TASKS[client % 8].name}
        assert (len(data.train), len(data.validation), len(data.test)) == (300, 50, 200)


def test_a_shard_answers_and_speaks_as_the_client_with_its_task(shards):
    """Sentiment: the letter tells the convention."""
    for clash in (0.0, 1.0):
        clients = generate(clash=clash, train=20, validation=0, test=0, clients=16).clients
        for client in (5, 13):
            used = {row.output for row in clients[client].train}
            assert used == {letter(slot, shift(5, clash)) for slot in range(3)}
    known = known_words(0, 3)
    held = {word.word for word in (*known.nouns, *known.adjectives)}
    for client in (3, 11, 19):
        met = {word for row in shards.clients[client].train for word in re.findall(r"\w+", row.instruction)}
        assert met & set(invented_words()) <= held


def test_a_world_that_is_used_up_is_one_clear_line():
    with pytest.raises(
        UserError, match=r"^tinyworld: 5000 train rows asked for, but for client \d+ only \d+ of tiny_"
    ) as e:
        generate(train=5000, validation=0, test=0, clients=64)
    assert "fewer data.clients" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [({}, (300, 50, 200)), ({"train_limit": 16, "test_limit": 2}, (16, 2, 2)), ({"test_limit": 60}, (300, 50, 60))],
)
@pytest.mark.parametrize("clients", [3, 8, 9])
def test_limits_are_the_sizes_for_any_number_of_clients(clients, limits, sizes):
    federation = load_federation(DataConfig(clients=clients, **limits), seed=0)
    assert federation.ids == tuple(range(clients))
    for data in federation.clients.values():
        assert (len(data.train), len(data.validation), len(data.test)) == sizes


def test_limits_do_not_change_the_rows_of_eight(world):
    federation = load_federation(DataConfig(train_limit=7, test_limit=5, limit_by="first"), seed=0)
    for client, data in federation.clients.items():
        full = world.clients[client]
        assert (data.train, data.validation, data.test) == (full.train[:7], full.validation[:5], full.test[:5])


# the pretraining text


def test_the_corpus_holds_no_row_of_a_client(world):
    text = "\n".join(islice(documents(0), 50_000, 80_000))  # the simple first part and the rest
    assert not [row.instruction for _, _, row in _rows(world) if row.instruction in text]
    assert "###" not in text


def test_the_corpus_says_nothing_about_invented_words():
    invented = set(invented_words())
    for document in islice(documents(0), 50_000, 80_000):
        if invented & set(re.findall(r"\w+", document)):
            for word in ("animal", "plant", "food", "tool", "found", "means", "->"):
                assert not re.search(rf"(?<!\w){word}(?!\w)", document), document


def test_the_corpus_is_repeatable():
    assert list(islice(documents(3), 50)) == list(islice(documents(3), 50)) != list(islice(documents(4), 50))


# tiny-base

TEXTS = [
    "plain words",
    "naïve café",
    "Ελληνικά",
    "Русский",
    "漢字かな",
    "اللغة",
    "हिन्दी",
    "🙂👩‍👩‍👧",
    "a\n\n\tb  c ",
    " ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_out_of_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@given(st.text(max_size=40).filter(lambda text: "<pad>" not in text and "</s>" not in text))
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back_out_of_the_tokenizer(text):
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_is_the_recipes(tokenizer):
    assert train_tokenizer().get_vocab() == tokenizer.get_vocab()
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", "</s>", None)
    assert tokenizer.padding_side == "left"


def test_rows_are_short_and_invented_words_are_one_token(world, tokenizer):
    prompts = [len(ids) for ids in tokenizer([TEMPLATE.format(r.instruction) for _, _, r in _rows(world)])["input_ids"]]
    outputs = [len(ids) for ids in tokenizer([row.output for _, _, row in _rows(world)])["input_ids"]]
    assert sum(prompts) / len(prompts) <= 35
    assert max(prompts) <= 72
    assert max(outputs) <= 16
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for word in invented_words())


def test_the_base_model_is_small_and_opens_in_float32(tokenizer):
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 12 * 2**20
    assert {weight.dtype for weight in load_file(BASE / "model.safetensors").values()} == {torch.float16}
    model = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True)
    assert model.dtype == torch.float32
    assert 3e6 <= model.num_parameters() <= 4e6
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert model.config.vocab_size == len(tokenizer)


@torch.no_grad()
def test_the_base_model_knows_its_world_and_reads_long_contexts(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True).eval()
    text = "\n".join(islice(documents(99), 80_000, 80_040))
    ids = torch.tensor(tokenizer(text)["input_ids"][:512])[None]
    loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < 3.0
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] <= 516
